"""`manage.py inference_worker`: serves one checkpoint, and every adapter of it, to the portal."""

import asyncio
import logging
import os
from typing import ClassVar

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from chat.models import Checkpoint


class Command(BaseCommand):
    requires_system_checks: ClassVar[
        list
    ] = []  # `up` has made them; the worker is to listen at once
    help = (
        "Serve a checkpoint to the portal until stopped. Without --checkpoint the default one is "
        "served, and the worker changes over when another becomes the default. "
        "Example: inference_worker --listen http://127.0.0.1:8100"
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
        from chat.supply import DatabaseSupply
        from chat.worker import process
        from chat.worker.addresses import WorkerAddress
        from chat.worker.wire import Address

        known = Checkpoint.objects
        if not (known.named(checkpoint) if checkpoint else known.exists()):
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
        named = checkpoint or "the default checkpoint"
        logging.getLogger(__name__).info("worker for %s on %s", named, url)
        code = asyncio.run(
            process.serve(
                listening,
                settings.WORKER_TOKEN,
                DatabaseSupply(checkpoint, url),
                loading_wait=settings.LOADING_WAIT,
                idle_after=settings.IDLE_UNLOAD * 60,
            )
        )
        # Not sys.exit: it would wait for, or crash on, a thread that is still importing torch or
        # loading weights.
        logging.shutdown()
        os._exit(code)
