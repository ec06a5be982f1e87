"""Who answers in the terminal: a worker, a model loaded in this process, or another portal. Each
has submit, events, abort and close as a backend of the router has.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
from django.conf import settings
from django.core.management.base import CommandError
from django.utils.translation import gettext as _

from chat.checkpoints import adapter_files
from chat.engine.request import AdapterRef, CheckpointRef, Event, Request
from chat.models import Adapter, Checkpoint
from chat.worker.router import OpenAIBackend, Router, get_router
from portal.terminal import row_named


class Chosen(NamedTuple):
    """with_history: whether the model is shown the earlier turns, unless somebody wants it else."""

    checkpoint: Checkpoint
    adapter: AdapterRef | None
    with_history: bool


def chosen(checkpoint_name: str, adapter_name: str) -> Chosen:
    """By name; CommandError naming what there is otherwise."""
    adapter = reference = None
    if adapter_name:
        adapters, folder = Adapter.objects.select_related("checkpoint"), Path(adapter_name)
        if not adapters.named(adapter_name) and (folder / adapter_files.DESCRIPTION).is_file():
            folder = folder.resolve()
            reference = AdapterRef(
                f"{folder} {(folder / adapter_files.WEIGHTS).stat().st_mtime_ns}", str(folder)
            )
        else:
            adapter = row_named(adapters, adapter_name)
            reference = adapter.ref()
    if checkpoint_name:
        checkpoint = row_named(Checkpoint.objects.all(), checkpoint_name)
    else:
        checkpoint = adapter.checkpoint if adapter else Checkpoint.default()
    if checkpoint is None:
        raise CommandError("There is no checkpoint yet: python manage.py fetch_checkpoint SOURCE")
    if adapter is not None and adapter.checkpoint_id != checkpoint.pk:
        raise CommandError(
            f"The adapter {adapter.name} belongs to {adapter.checkpoint.name}, not to "
            f"{checkpoint.name}."
        )
    return Chosen(checkpoint, reference, adapter is None or adapter.asks_with_history)


async def open_model(checkpoint: Checkpoint, say: Callable[[str], None]):
    """The checkpoint in a worker that serves it, else loaded here."""
    reference = checkpoint.ref()
    router = get_router()
    served = await asyncio.gather(
        *(backend.serves(reference, with_adapter=False) for backend in router.backends),
        return_exceptions=True,
    )
    if True in served:
        return Served(router, reference)
    await router.close()
    say(_("No worker serves %(name)s; loading it here.") % {"name": checkpoint.name})
    return await asyncio.to_thread(LoadedHere, checkpoint)


class Served:
    """The model in a worker."""

    def __init__(self, router: Router, checkpoint: CheckpointRef):
        self._router, self._checkpoint = router, checkpoint
        self.events, self.abort, self.close = router.events, router.abort, router.close

    async def submit(self, request: Request) -> None:
        await self._router.submit(request, self._checkpoint)


class LoadedHere:
    """The model in this process, with the same engine as a worker's."""

    def __init__(self, checkpoint: Checkpoint):
        from chat.checkpoints.describe import CheckpointInvalid
        from chat.engine.engine import Engine, EngineConfig
        from chat.engine.loading import load

        try:
            self._engine = Engine(
                load(checkpoint.path, device=settings.DEVICE or None), EngineConfig(max_rows=1)
            )
        except CheckpointInvalid as error:
            raise CommandError(error.message) from error
        self._engine.start()
        self._arrived: dict[str, asyncio.Queue[Event]] = {}

    async def submit(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        queue = self._arrived[request.id] = asyncio.Queue()

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        await asyncio.to_thread(self._engine.submit, request, sink)

    async def events(self, id: str) -> AsyncGenerator[list[Event], None]:
        queue = self._arrived.pop(id)
        while True:
            event = await queue.get()
            yield [event]
            if event.terminal:
                return

    async def abort(self, id: str) -> None:
        self._engine.abort(id)

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)


async def open_remote(url: str, key: str, model: str) -> OpenAIBackend:
    """Another portal, or any OpenAI-compatible server. `model`: what it calls the model; "": the
    first it lists. CommandError when it does not answer.
    """
    if "://" not in url:
        url = f"http://{url}"
    try:
        remote = OpenAIBackend.parse(f"remote={url}|{model or '?'}", key)
    except ValueError:
        raise CommandError(_("--url must be an address: http://host:port")) from None
    known = await _models_of(remote.url, key)
    if model and known and model not in known and ":" not in model:
        message = _("There is no “%(name)s”. There are: %(known)s")
        raise CommandError(message % {"name": model, "known": ", ".join(known[:20])})
    remote.model = model or next(iter(known), "")
    return remote


async def _models_of(url: str, key: str) -> list[str]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
            session.get(f"{url}/models", headers=headers) as response,
        ):
            body = await response.json(content_type=None)
            if response.status == 200:
                return [str(row["id"]) for row in body["data"]]
            reason = body["error"]["message"]
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
    message = _("%(url)s does not answer as an OpenAI-compatible server: %(reason)s")
    raise CommandError(message % {"url": url, "reason": reason})
