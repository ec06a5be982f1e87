"""`manage.py inference_worker`: serves one checkpoint, and every adapter of it, to the portal."""

import asyncio
import logging
import os
from typing import TYPE_CHECKING, ClassVar

import psutil
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import close_old_connections

from chat.models import Checkpoint
from chat.registry import remember_memory

if TYPE_CHECKING:
    from chat.engine.loading import Loaded


class Command(BaseCommand):
    requires_system_checks: ClassVar[
        list
    ] = []  # `up` has made them; the worker is to listen at once
    help = (
        "Serve a checkpoint to the portal until stopped. Without --checkpoint the default one is "
        "served, and the process ends "
        "when another becomes the default (`up` starts it again). Example: inference_worker "
        "--listen http://127.0.0.1:8100"
    )

    def add_arguments(self, parser):
        parser.add_argument(
            "--checkpoint", default="", help="name of the checkpoint (default: the default one)"
        )
        parser.add_argument(
            "--listen",
            default="",
            help="unix:/path.sock or http://host:port (default: first worker URL)",
        )

    def handle(self, *, checkpoint, listen, **options):
        # transformers and torch cost seconds and come with `load`, after the socket is bound.
        from chat.worker import process
        from chat.worker.addresses import WorkerAddress
        from chat.worker.wire import Address

        chosen = Checkpoint.objects.named(checkpoint) if checkpoint else Checkpoint.default()
        if chosen is None:
            named = (
                f"There is no checkpoint named {checkpoint!r}."
                if checkpoint
                else "There is no checkpoint yet."
            )
            raise CommandError(
                f"{named} Register one with: python manage.py add_checkpoint PATH", returncode=3
            )
        if not listen and not settings.OWN_WORKER_URLS:
            raise CommandError("PORTAL_WORKERS names no worker of this kind; give --listen.")
        url = listen or WorkerAddress.parse(settings.OWN_WORKER_URLS[0]).url
        try:
            listening = process.bind(Address.parse(url))
        except (process.AlreadyServed, ValueError) as error:
            raise CommandError(str(error), returncode=1) from error
        logging.getLogger(__name__).info("worker for checkpoint %s on %s", chosen.name, url)
        code = asyncio.run(
            process.serve(
                listening,
                settings.WORKER_TOKEN,
                lambda: _load(chosen),
                name=chosen.name,
                replaced=lambda: _replaced(chosen, following_default=not checkpoint),
            )
        )
        # Not sys.exit: it would wait for, or crash on, a thread that is still importing torch or
        # loading weights.
        logging.shutdown()
        os._exit(code)


def _load(checkpoint: Checkpoint):
    """(engine, fingerprint of what was really loaded)."""
    import torch

    from chat.engine.engine import Engine, EngineConfig
    from chat.engine.loading import load

    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    if threads:
        torch.set_num_threads(threads)
    loaded = load(checkpoint.path, device=settings.DEVICE or None)
    if loaded.fingerprint != checkpoint.fingerprint:
        logging.getLogger(__name__).warning(
            "the files of checkpoint %s have changed since it was registered; register them again",
            checkpoint.name,
        )
    remember_memory(checkpoint, _memory_taken(loaded))
    return Engine(loaded, EngineConfig(cache_share=settings.CACHE_SHARE)), loaded.fingerprint


def _memory_taken(loaded: "Loaded") -> dict:
    """What `memory.estimates` reads as `measured`: the process on a CPU, the weights on cards."""
    import torch

    device = loaded.device.type
    if device == "cuda":
        taken = sum(torch.cuda.memory_allocated(n) for n in range(torch.cuda.device_count()))
    else:
        taken = psutil.Process().memory_info().rss
    precision = str(loaded.dtype).removeprefix("torch.")
    return {"precision": precision, "device": device, "bytes": taken}


def _replaced(served: Checkpoint, *, following_default: bool) -> str:
    """Why this worker should make way, or an empty text."""
    close_old_connections()
    now = (
        Checkpoint.default()
        if following_default
        else Checkpoint.objects.filter(pk=served.pk).first()
    )
    if now is None:
        return f"the checkpoint {served.name} is no longer registered"
    if (now.pk, now.fingerprint, now.path) != (served.pk, served.fingerprint, served.path):
        return f"the checkpoint to serve is {now.name} now"
    return ""
