"""An engine that only emits, at a set rate, in the real worker's server: what is measured around it
is not a model.

    python -m tests.bench.metronome URL TOKEN RATE [--even] [--fingerprint F]

The last message of a request says how many tokens it gets, and how many characters each has if that
matters: "TOKENS [CHARACTERS]". A token's text is the time of its emission on this machine's
monotonic clock, then blanks. Two rhythms: in steps, as a batched engine emits (all sequences at
once), or even, every sequence by itself, which is the worst case.
"""

import argparse
import asyncio
import sys
import threading
import time
from collections import deque

from chat.engine.request import Event
from chat.worker import process
from chat.worker.serving import OneCheckpoint, Target
from chat.worker.wire import Address


class Metronome:
    """`rate`: tokens a second and sequence."""

    def __init__(self, rate: float, even: bool):
        self.rate, self.even = rate, even
        self.new: deque = deque()

    def submit(self, request, sink):
        self.new.append(_Row(request.id, sink, *map(int, request.messages[-1]["content"].split())))

    def abort(self, request_id):
        pass

    def status(self):
        return {}

    def close(self):
        pass

    def run_forever(self, stop: threading.Event):
        rows: deque = deque()
        while not stop.is_set():
            while self.new:
                rows.append(self.new.popleft())
            if not rows:
                time.sleep(0.002)
                continue
            batch = 1 if self.even else len(rows)
            due = time.perf_counter() + batch / len(rows) / self.rate
            for _ in range(batch):
                row = rows.popleft()
                if row.emit():
                    rows.append(row)
            time.sleep(max(0.0, due - time.perf_counter()))


class _Row:
    def __init__(self, id: str, sink, total: int, characters: int = 0):
        self.id, self.sink, self.total, self.characters = id, sink, total, characters
        self.done = 0

    def emit(self) -> bool:
        """The next token, or the end; are there more?"""
        self.done += 1
        if self.done > self.total:
            ending = {"finish_reason": "stop", "usage": {}, "timings": {}}
            self.sink(Event(self.id, self.done, "finished", ending))
            return False
        text = f"{time.monotonic():.6f} ".ljust(self.characters)
        self.sink(Event(self.id, self.done, "delta", {"text": text, "tokens": 1}))
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("token")
    parser.add_argument("rate", type=float)
    parser.add_argument("--even", action="store_true")
    parser.add_argument("--fingerprint", default="f" * 64)
    options = parser.parse_args()

    supply = OneCheckpoint(
        Target("metronome", options.fingerprint), lambda: Metronome(options.rate, options.even)
    )
    listening = process.bind(Address.parse(options.url))
    return asyncio.run(process.serve(listening, options.token, supply))


if __name__ == "__main__":
    sys.exit(main())
