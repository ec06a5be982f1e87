"""`manage.py chat`: a conversation in the terminal, streamed; through the worker when it is up,
else with the model loaded here.
"""

import asyncio
import contextlib
import signal
import sys
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.utils.translation import gettext as _

from chat.checkpoints import adapter_files
from chat.engine.request import (
    AdapterRef,
    CheckpointRef,
    Event,
    GenerationRefused,
    Request,
    RequestRefused,
    SamplingParams,
)
from chat.models import Adapter, Checkpoint
from chat.sampling import as_sampling, checked
from chat.text import is_storable
from chat.worker.router import Router, get_router


class Command(BaseCommand):
    help = (
        "Chat in the terminal: `clear` wipes the history, `stop` exits, Ctrl-C stops the answer. "
        "Example: chat --adapter mine"
    )

    def add_arguments(self, parser):
        parser.add_argument(
            "--checkpoint",
            default="",
            help="name of the base checkpoint (default: the default one)",
        )
        parser.add_argument(
            "--adapter", default="", help="name of an adapter, or its folder (default: prefix off)"
        )
        parser.add_argument("--temperature", type=float, help="default: what the checkpoint wishes")
        parser.add_argument("--top-p", type=float)
        parser.add_argument("--max-new-tokens", type=int, default=None)
        parser.add_argument("--seed", type=int, default=None)

    def handle(self, *, checkpoint, adapter, temperature, top_p, max_new_tokens, seed, **options):
        chosen, prefix = _chosen(checkpoint, adapter)
        wishes = {
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }
        try:
            sampling = as_sampling(checked(wishes), chosen.sampling)
        except ValidationError as error:
            named = {
                f"--{name.removeprefix('sampling.')}": texts
                for name, texts in error.message_dict.items()
            }
            problems = [
                f"{name.replace('_', '-')}: {text}"
                for name, texts in named.items()
                for text in texts
            ]
            raise CommandError("\n".join(problems)) from error
        self.interactive, self.refused = sys.stdin.isatty(), False
        try:
            asyncio.run(self._converse(chosen, prefix, sampling))
        except KeyboardInterrupt:  # while the model was loaded, or standard input is no terminal
            sys.exit(130)
        if self.refused and not self.interactive:
            sys.exit(1)

    async def _converse(
        self, checkpoint: Checkpoint, adapter: AdapterRef | None, sampling: SamplingParams
    ) -> None:
        model = await self._model(checkpoint)
        self._explain()
        self._mind_the_prompt()
        history: list[dict[str, str]] = []
        try:
            while (line := await asyncio.to_thread(_line, self._prompt())) is not None:
                text = line.strip()
                if text == "stop":
                    return
                if text == "clear":
                    history = []
                    self.stdout.write(_("The history is empty again."))
                elif text:
                    turns = [*history, {"role": "user", "content": text}]
                    answer = await self._answer(
                        model, Request(str(uuid.uuid4()), tuple(turns), None, adapter, sampling)
                    )
                    if answer:
                        history = [*turns, {"role": "assistant", "content": answer}]
        finally:
            await model.close()

    def _prompt(self) -> str:
        return _("You: ") if self.interactive else ""

    def _explain(self) -> None:
        if self.interactive:
            self.stdout.write(
                _("“clear” wipes the history, “stop” exits, Ctrl-C stops the answer.")
            )

    def _mind_the_prompt(self) -> None:
        """From now on Ctrl-C explains: who pressed it just after an answer's end wants to go on
        talking.
        """
        loop = asyncio.get_running_loop()
        if not self.interactive:
            loop.remove_signal_handler(signal.SIGINT)
            return

        def explain() -> None:
            self.stdout.write("")
            self._explain()
            self.stdout.write(self._prompt(), ending="")
            self.stdout.flush()

        loop.add_signal_handler(signal.SIGINT, explain)

    async def _model(self, checkpoint: Checkpoint):
        reference = checkpoint.ref()
        router = get_router()
        served = await asyncio.gather(
            *(backend.serves(reference, with_adapter=False) for backend in router.backends),
            return_exceptions=True,
        )
        if True in served:
            return _Served(router, reference)
        await router.close()
        self.stderr.write(
            _("No worker serves %(name)s; loading it here.") % {"name": checkpoint.name}
        )
        return await asyncio.to_thread(_LoadedHere, checkpoint)

    async def _answer(self, model, request: Request) -> str:
        """Prints the answer as it comes; Ctrl-C ends the answer, not the program. What was written,
        or "" when refused.
        """
        loop = asyncio.get_running_loop()
        written: list[str] = []
        loop.add_signal_handler(signal.SIGINT, lambda: loop.create_task(model.abort(request.id)))
        try:
            if not is_storable(request.messages[-1]["content"]):
                raise RequestRefused("invalid", _("The text contains a NUL or half a character."))
            await model.submit(request)
            async with contextlib.aclosing(model.events(request.id)) as handfuls:
                async for events in handfuls:
                    for event in events:
                        self._show(event, written)
        except GenerationRefused as error:
            self._refuse(error.message)
        finally:
            self._mind_the_prompt()
        self.stdout.write("")
        return "".join(written)

    def _show(self, event: Event, written: list[str]) -> None:
        if event.type == "delta":
            written.append(event.data["text"])
            self.stdout.write(event.data["text"], ending="")
            self.stdout.flush()
        elif event.type == "failed":
            self._refuse(event.data["error"]["message"])

    def _refuse(self, message: str) -> None:
        self.refused = True
        self.stderr.write(f"\n{message}")


def _line(prompt: str) -> str | None:
    """The next line of standard input; None at its end."""
    try:
        return input(prompt)
    except EOFError:
        return None


def _chosen(checkpoint_name: str, adapter_name: str) -> tuple[Checkpoint, AdapterRef | None]:
    """Rows by name; CommandError naming what there is otherwise."""
    adapter = reference = None
    if adapter_name:
        adapter = Adapter.objects.filter(name=adapter_name).select_related("checkpoint").first()
        if adapter is not None:
            reference = adapter.ref()
        elif (Path(adapter_name) / adapter_files.DESCRIPTION).is_file():
            folder = Path(adapter_name).resolve()
            reference = AdapterRef(
                f"{folder} {(folder / adapter_files.WEIGHTS).stat().st_mtime_ns}", str(folder)
            )
        else:
            known = ", ".join(Adapter.objects.values_list("name", flat=True)[:20]) or "-"
            raise CommandError(f"There is no adapter named {adapter_name!r}. There are: {known}")
    if checkpoint_name:
        checkpoint = Checkpoint.objects.filter(name=checkpoint_name).first()
    else:
        checkpoint = adapter.checkpoint if adapter else Checkpoint.default()
    if checkpoint is None:
        known = ", ".join(Checkpoint.objects.values_list("name", flat=True)) or "-"
        raise CommandError(f"There is no checkpoint named {checkpoint_name!r}. There are: {known}")
    if adapter is not None and adapter.checkpoint_id != checkpoint.pk:
        raise CommandError(
            f"The adapter {adapter.name} belongs to {adapter.checkpoint.name}, not to "
            f"{checkpoint.name}."
        )
    return checkpoint, reference


class _Served:
    """The model in a worker."""

    def __init__(self, router: Router, checkpoint: CheckpointRef):
        self._router, self._checkpoint = router, checkpoint
        self.events, self.abort, self.close = router.events, router.abort, router.close

    async def submit(self, request: Request) -> None:
        await self._router.submit(request, self._checkpoint)


class _LoadedHere:
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
        await asyncio.to_thread(
            self._engine.submit,
            request,
            lambda event: loop.call_soon_threadsafe(queue.put_nowait, event),
        )

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
