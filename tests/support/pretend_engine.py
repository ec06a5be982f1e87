"""An engine without a model, for tests of everything around the engine. `python -m
tests.support.pretend_engine URL TOKEN`.

The last message steers it: "words N" writes N words; "every S words N" pauses S seconds after each;
"write TEXT" writes that text, three characters at a time; "hang" writes one word and waits for the
abort; "die" kills the engine's thread; "refuse CODE" refuses; "fits N" refuses more than N
messages as too long for the context.
"""

import asyncio
import hashlib
import sys
import threading
import time
from collections import deque

from chat.engine.request import Event, Request, RequestRefused

FIGURES = ("grace", "loading_wait", "idle_after")  # options that `serve` has, in seconds


class PretendEngine:
    def __init__(self, max_rows: int = 8):
        self.max_rows = max_rows
        self.waiting: deque = deque()
        self.rows: dict[str, _Row] = {}
        self.aborted: set[str] = set()
        self.lock = threading.Condition()

    def submit(self, request: Request, sink) -> None:
        text = _asked(request)
        if text.startswith("refuse "):
            raise RequestRefused(text.split()[1], "refused as asked", "messages", 7)
        if text.startswith("fits ") and len(request.messages) > int(text.split()[1]):
            raise RequestRefused("context_length_exceeded", "too many", "messages")
        with self.lock:
            self.waiting.append(_Row(request, sink, text.split()))
            self.lock.notify_all()

    def abort(self, request_id: str) -> None:
        with self.lock:
            self.aborted.add(request_id)
            self.lock.notify_all()

    def status(self) -> dict:
        return {
            "active_rows": len(self.rows),
            "queue": len(self.waiting),
            "max_rows": self.max_rows,
            "threads": threading.active_count(),
        }

    def run_forever(self, stop: threading.Event) -> None:
        while not stop.is_set():
            if not self.step():
                with self.lock:
                    if not self.aborted:
                        self.lock.wait(0.002 if self.rows else 0.2)

    def close(self) -> None:
        for row in [*self.waiting, *self.rows.values()]:
            row.finish("abort")
        self.waiting.clear()
        self.rows.clear()

    def step(self) -> bool:
        with self.lock:
            aborted, self.aborted = self.aborted, set()
            for row in [row for row in self.waiting if row.request.id in aborted]:
                self.waiting.remove(row)
                row.finish("abort")
            while self.waiting and len(self.rows) < self.max_rows:
                row = self.waiting.popleft()
                self.rows[row.request.id] = row
                row.tell_position(0)
                row.emit("started", {"prompt_tokens": 3})
            for position, row in enumerate(self.waiting):
                row.tell_position(position)
        for id in aborted & self.rows.keys():
            self.rows.pop(id).finish("abort")
        worked = bool(aborted)
        for row in list(self.rows.values()):
            worked |= row.advance()
            if row.ended:
                del self.rows[row.request.id]
        return worked


def _asked(request: Request) -> str:
    return request.messages[-1]["content"] if request.text is None else request.text


class _Row:
    def __init__(self, request, sink, words):
        self.request, self.sink = request, sink
        self.hangs, self.dies = words[0] == "hang", words[0] == "die"
        text = _asked(request).removeprefix("write ")
        self.pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
        if words[0] != "write":
            self.pieces = []
        self.pause = float(words[1]) if words[0] == "every" else 0.0
        self.total = int(words[-1]) if words[0] in ("every", "words") else 1
        if self.pieces:
            self.pause, self.total = 0.01, len(self.pieces)
        self.seq = self.done = 0
        self.next_at = 0.0
        self.ended = False
        self.position = None

    def tell_position(self, position):
        if position != self.position:
            self.position = position
            self.emit("queued", {"position": position})

    def emit(self, kind, data):
        self.seq += 1
        self.sink(Event(self.request.id, self.seq, kind, data))

    def advance(self) -> bool:
        if self.dies:
            raise RuntimeError("dead as asked")
        if time.monotonic() < self.next_at or (self.hangs and self.done):
            return False
        if self.done == self.total:
            self.finish("stop")
            return True
        written = self.pieces[self.done] if self.pieces else word(self.request.id, self.done)
        self.emit("delta", {"text": written, "tokens": 1})
        self.done += 1
        self.next_at = time.monotonic() + self.pause
        return True

    def finish(self, reason):
        self.ended = True
        usage = {"prompt_tokens": 3, "completion_tokens": self.done, "total_tokens": 3 + self.done}
        self.emit(
            "finished",
            {
                "finish_reason": reason,
                "usage": usage,
                "timings": {
                    "queued_s": 0.0,
                    "prefill_s": 0.0,
                    "decode_s": 0.0,
                    "tokens_per_second": 0.0,
                },
            },
        )


def word(id: str, index: int) -> str:
    """What a sequence writes as its word number `index`: depends on both, so that a mix-up
    shows.
    """
    return hashlib.sha256(f"{id} {index}".encode()).hexdigest()[:4] + " "


def text(id: str, count: int) -> str:
    return "".join(word(id, index) for index in range(count))


def main():
    from chat.worker import process
    from chat.worker.serving import OneCheckpoint, Target
    from chat.worker.wire import Address

    url, token, *more = sys.argv[1:]
    options = dict(pair.split("=") for pair in more)
    loading = float(options.get("loading", 0))

    def load():
        time.sleep(loading)
        return PretendEngine(int(options.get("rows", 8)))

    fingerprint = options.get("fingerprint", "f" * 64)
    supply = OneCheckpoint(Target(options.get("name", "pretend"), fingerprint), load)
    listening = process.bind(Address.parse(url))
    print("listening", flush=True)
    more = {key: float(options[key]) for key in FIGURES if key in options}
    sys.exit(asyncio.run(process.serve(listening, token, supply, **more)))


if __name__ == "__main__":
    main()
