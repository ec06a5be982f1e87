"""`manage.py chat`: a conversation in the terminal, streamed; through the worker when it is up,
else with the model loaded here.
"""

import asyncio
import contextlib
import getpass
import signal
import sys
import uuid

from asgiref.sync import sync_to_async
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.utils.translation import gettext as _

from chat import terminal
from chat.conversations.messages import without_history
from chat.engine.request import (
    AdapterRef,
    Event,
    GenerationRefused,
    Request,
    RequestRefused,
)
from chat.sampling import as_sampling, checked
from portal.text import is_storable


class Command(BaseCommand):
    help = (
        "Chat in the terminal: `clear` wipes the history, `stop` exits, Ctrl-C stops the answer, "
        "`/model NAME` and `/adapter NAME` (without a name: prefix off) go on with another one. "
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
        parser.add_argument(
            "--history",
            choices=["yes", "no"],
            help="whether the model is shown the earlier turns (default: as it was trained)",
        )
        parser.add_argument(
            "--prefix-strength", type=float, help="0 to 2; 1 is as the adapter was trained"
        )
        parser.add_argument("--temperature", type=float, help="default: what the checkpoint wishes")
        parser.add_argument("--top-p", type=float)
        parser.add_argument("--max-new-tokens", type=int, default=None)
        parser.add_argument("--seed", type=int, default=None)
        parser.add_argument("--url", help="another portal, e.g. http://host:8000")
        parser.add_argument("--key", help="a key of yours there; left out: asked for")

    def handle(
        self,
        *,
        checkpoint,
        adapter,
        history,
        temperature,
        prefix_strength,
        top_p,
        max_new_tokens,
        seed,
        url,
        key,
        **options,
    ):
        wishes = {
            "temperature": temperature,
            "prefix_strength": prefix_strength,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }
        try:
            self.wishes = checked(wishes)
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
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing and a history, for input()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # what a terminal cannot show
        self.url, self.key, self.history = url, key, history
        if url and key is None and self.interactive:
            self.key = getpass.getpass(_("Key: "))
        self.names = {"model": checkpoint, "adapter": adapter}
        first = None if url else terminal.chosen(checkpoint, adapter)
        try:
            asyncio.run(self._converse(first))
        except KeyboardInterrupt:  # while the model was loaded, or standard input is no terminal
            sys.exit(130)
        if self.refused and not self.interactive:
            sys.exit(1)

    async def _converse(self, first: terminal.Chosen | None) -> None:
        await self._open(first)
        self._explain()
        self._mind_the_prompt()
        history: list[dict[str, str]] = []
        try:
            while True:
                try:
                    line = await asyncio.to_thread(_line, self._prompt())
                except NotText as error:
                    self._refuse(
                        _("That was not %(encoding)s; say it again.") % {"encoding": error}
                    )
                    continue
                if line is None or (text := line.strip()) == "stop":
                    return
                if text == "clear":
                    history = []
                    self.stdout.write(_("The history is empty again."))
                elif text.startswith("/"):
                    await self._switch(text)
                elif text:
                    turns = [*history, {"role": "user", "content": text}]
                    answer = await self._answer(self._request(turns))
                    if answer:
                        history = [*turns, {"role": "assistant", "content": answer}]
        finally:
            await self.model.close()

    def _request(self, turns: list[dict[str, str]]) -> Request:
        shown = tuple(turns if self.with_history else without_history(turns))
        return Request(str(uuid.uuid4()), shown, adapter=self.adapter, sampling=self.sampling)

    async def _open(self, found: terminal.Chosen | None) -> None:
        """The rows found here, or on a remote portal what `names` says."""
        if found is None:
            name = self.names["adapter"] or self.names["model"]
            self.model = await terminal.open_remote(self.url, self.key or "", name)
            self.checkpoint, self.sampling = None, as_sampling(self.wishes)
            self.adapter: AdapterRef | None = None
            self.with_history = self.history != "no"
            return
        checkpoint = found.checkpoint
        self._take(found)
        self.model = await terminal.open_model(checkpoint, self.stderr.write)
        self.checkpoint = checkpoint
        self.sampling = as_sampling(self.wishes, checkpoint.sampling)

    def _take(self, found: terminal.Chosen) -> None:
        self.adapter = found.adapter
        self.with_history = self.history == "yes" if self.history else found.with_history

    async def _switch(self, text: str) -> None:
        """`/model NAME`, `/adapter NAME`; the history stays."""
        word, _space, name = text[1:].partition(" ")
        name = name.strip()
        if word not in self.names or (word == "model" and not name):
            self._explain(always=True)
            return
        wanted = {"model": name, "adapter": ""} if word == "model" else {**self.names, word: name}
        try:
            if self.url:
                before, self.names, model = self.names, wanted, self.model
                try:
                    await self._open(None)
                except CommandError:
                    self.names = before
                    raise
                await model.close()
            else:
                found = await sync_to_async(terminal.chosen)(wanted["model"], wanted["adapter"])
                if found.checkpoint != self.checkpoint:
                    await self.model.close()
                    await self._open(found)
                self._take(found)
            self.names = wanted
        except CommandError as error:
            self.stderr.write(str(error))
            return
        named = wanted["adapter"] or wanted["model"] or _("prefix off")
        self.stdout.write(_("Going on with %(name)s.") % {"name": named})

    def _prompt(self) -> str:
        return _("You: ") if self.interactive else ""

    def _explain(self, always: bool = False) -> None:
        if self.interactive or always:
            if not self.with_history:
                self.stdout.write(
                    _("The model was trained on single turns: it is not shown the earlier ones.")
                )
            self.stdout.write(
                _(
                    "“clear” wipes the history, “stop” exits, Ctrl-C stops the answer, “/model "
                    "NAME” and “/adapter NAME” go on with another one."
                )
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

    async def _answer(self, request: Request) -> str:
        """Prints the answer as it comes; Ctrl-C ends the answer, not the program. What was written,
        or "" when refused.
        """
        loop = asyncio.get_running_loop()
        written: list[str] = []
        loop.add_signal_handler(
            signal.SIGINT, lambda: loop.create_task(self.model.abort(request.id))
        )
        try:
            if not is_storable(request.messages[-1]["content"]):
                raise RequestRefused("invalid", _("The text contains a NUL or half a character."))
            await self.model.submit(request)
            async with contextlib.aclosing(self.model.events(request.id)) as handfuls:
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


class NotText(Exception):
    """The line that was read is not in the terminal's encoding."""


def _line(prompt: str) -> str | None:
    """The next line of standard input; None at its end."""
    encoding = sys.stdin.encoding or "utf-8"
    try:
        if prompt or not hasattr(sys.stdin, "buffer"):
            line = input(prompt)
            # a terminal's C locale hides bytes in half characters
            return line.encode(encoding, "surrogateescape").decode(encoding)
        raw = sys.stdin.buffer.readline()
        return raw.decode(encoding) if raw else None
    except EOFError:
        return None
    except UnicodeError as error:
        raise NotText(encoding.upper()) from error
