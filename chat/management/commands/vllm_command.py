"""`manage.py vllm_command CHECKPOINT`: the command of a vLLM server that the portal can use."""

import json
import os
import shlex
from pathlib import Path

from django.conf import settings
from django.core.management.base import BaseCommand
from django.utils.translation import gettext as _

from chat.models import Checkpoint
from portal.terminal import row_named


class Command(BaseCommand):
    help = (
        "Print the command that serves a checkpoint and its adapters with vLLM (0.32, in an "
        "environment of its own). Put further arguments of vLLM behind it, such as --dtype or "
        "--tensor-parallel-size. Of a folder that the portal cannot load (layers that take no "
        "prefix), the command that serves it untuned, and the setting that names that server."
    )

    def add_arguments(self, parser):
        parser.add_argument("checkpoint", help="its name, or a folder")
        parser.add_argument("--host", default="0.0.0.0")
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument("--python", default="python", help="that of vLLM's environment")

    def handle(self, *, checkpoint, host, port, python, **options):
        rows, folder = Checkpoint.objects.exclude(path=""), Path(checkpoint).absolute()
        if rows.named(checkpoint) is None and folder.joinpath("config.json").is_file():
            return self._plain(folder, host, port, python)
        found = row_named(rows, checkpoint)
        adapters = settings.DATA_DIR / "adapters"
        adapters.mkdir(parents=True, exist_ok=True)  # the server looks for it once, when it starts
        connector = {
            "kv_connector": "PrefixConnector",
            "kv_connector_module_path": "prefix_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"folder": str(adapters)},
        }
        command = [
            *(python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", found.path),
            # the portal knows its checkpoint by the second name; the first is for people
            *("--served-model-name", found.name, found.fingerprint),
            *("--kv-transfer-config", json.dumps(connector)),
            # sampling is the portal's business, also what it leaves to its defaults
            *("--generation-config", "vllm"),
            *("--host", host, "--port", str(port)),
        ]
        package = shlex.quote(str(settings.BASE_DIR / "vllm_prefix"))
        key = (
            "$PORTAL_WORKER_TOKEN"
            if "PORTAL_WORKER_TOKEN" in os.environ
            else f"$(cat {shlex.quote(str(settings.DATA_DIR / 'worker_token'))})"
        )
        self.stdout.write(f'PYTHONPATH={package} VLLM_API_KEY="{key}" {shlex.join(command)}')

    def _plain(self, folder: Path, host: str, port: int, python: str) -> None:
        """Of a folder that is no checkpoint here: vLLM's own chat form, no adapters."""
        name = folder.name
        command = [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *("--served-model-name", name, "--generation-config", "vllm"),
            *("--host", host, "--port", str(port)),
        ]
        self.stdout.write(shlex.join(command))
        where = "127.0.0.1" if host == "0.0.0.0" else host
        setting = shlex.quote(f"{name}=http://{where}:{port}/v1|{name}")
        told = _("Then start the portal with: %(setting)s")
        self.stderr.write(told % {"setting": f"PORTAL_UPSTREAMS={setting}"})
