"""Misconfigured addresses of workers and other servers, found by `manage.py check`."""

from django.conf import settings
from django.core.checks import Error, register

from chat.worker.addresses import RemoteAddress, WorkerAddress


def _wrong(parse, entries) -> list[str]:
    found = []
    for entry in entries:
        try:
            parse(entry)
        except ValueError:
            found.append(entry)
    return found


@register()
def addresses(**kwargs):
    workers = [
        Error(
            f"PORTAL_WORKERS: {entry!r} is not an address.",
            hint="unix:/folder/worker.sock, http://host:port or vllm+http://host:port, with NAME= "
            "in front if you like.",
            id="portal.E003",
        )
        for entry in _wrong(WorkerAddress.parse, settings.WORKER_URLS)
    ]
    remotes = [
        Error(
            f"PORTAL_UPSTREAMS: {entry!r} is not of the form CHECKPOINT=URL|MODEL.",
            hint="For instance qwen=http://gpu-host:8000/v1|Qwen/Qwen2.5-7B-Instruct",
            id="portal.E004",
        )
        for entry in _wrong(RemoteAddress.parse, settings.UPSTREAMS)
    ]
    return workers + remotes
