"""Continuous batching: requests join and leave at step boundaries; one step is some prefill and one
token for every row.

The scheduler sees prompts as token lists, rows as slots of one KV cache (chat.engine.kv_cache) and
the model as its ordinary forward. Everything between `submit` and the sink happens on one thread,
so that it needs no locks but the one at the door.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from chat.engine.adapters import AdapterPool
from chat.engine.batch import Rows
from chat.engine.capacity import CACHE_SHARE, capacity_for
from chat.engine.cuda_graphs import decoder_for
from chat.engine.kv_cache import SlotCache, layer_devices
from chat.engine.loading import Loaded
from chat.engine.offline import Answer, AnswerCollector
from chat.engine.positions import positions_for
from chat.engine.prefill import Prefiller, groups
from chat.engine.prompt_cache import PromptStore
from chat.engine.request import LONGEST_PREFIX, Request, RequestRefused, Sink
from chat.engine.sampler import Chosen, choose
from chat.engine.sequence import Ended, Sequence
from chat.engine.token_budget import Pace
from chat.engine.validation import Acceptance
from chat.engine.waiting_queue import FairQueue

log = logging.getLogger(__name__)

POSITION_INTERVAL = 0.5  # seconds between queue position updates


class Engine:
    """Serves one loaded checkpoint and any number of adapters.

    max_rows, max_length: requests in a batch, tokens of one request (prompt and answer); sized from
    free memory when None. cache_share: part of the free memory that the key-value cache may take
    when rows are sized from it. queue_limit: requests waiting beyond which `submit` refuses.
    prefill_tokens: prompt tokens computed in one step.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        max_rows: int | None = None,
        max_length: int | None = None,
        queue_limit: int = 256,
        prefill_tokens: int = 512,
        prefix_room: int = LONGEST_PREFIX,
        cache_share: float = CACHE_SHARE,
        reuse_prompts: bool = True,
    ):
        self.loaded = loaded
        self.queue_limit = queue_limit
        self.capacity = capacity_for(loaded, max_rows, max_length, prefix_room, cache_share)
        self.max_rows, self.max_length = self.capacity.rows, self.capacity.max_length
        self.positions = positions_for(loaded)
        self.adapters = AdapterPool(loaded)
        self.cache = SlotCache(
            devices=layer_devices(loaded.model, loaded.layers),
            kv_heads=loaded.kv_heads,
            head_dim=loaded.head_dim,
            rows=self.max_rows,
            columns=self.capacity.columns,
            dtype=loaded.dtype,
        )
        self._prefiller = Prefiller(loaded, self.cache, self.positions)
        self.decoder = decoder_for(loaded, self.cache, self.positions)
        self.prompts: PromptStore | None = None
        if reuse_prompts and not self.positions.atomic_prefill:
            self.prompts = PromptStore(self.capacity.prompt_store_bytes)
        self._acceptance = Acceptance(
            loaded, self.positions, self.adapters, self.max_length, prefix_room
        )
        # At the door, under the lock:
        self._door = threading.Condition()
        self._waiting: FairQueue[Sequence] = FairQueue()
        self._known: dict[str, Sequence] = {}  # every request without a terminal event, by id
        self._closed = False
        # The engine's thread alone:
        self._rows = Rows(self.cache, self.adapters, self.prompts)
        self._pace = Pace(prefill_tokens)
        self._positions_told_at = 0.0
        self._steps = self._tokens = 0
        self._thread: threading.Thread | None = None
        self._stop_event = threading.Event()
        log.info(
            "engine: %d rows of %d tokens, %d MiB of key-value cache, %d MiB were free on %s",
            self.max_rows,
            self.max_length,
            self.cache.nbytes >> 20,
            self.capacity.free_bytes >> 20,
            loaded.device,
        )

    # -- the door: any thread

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; events go to `sink` on the engine's thread. Raises RequestRefused before
        any compute.
        """
        self._submit(request, sink, None)

    def _submit(self, request: Request, sink: Sink, ended: Ended | None) -> None:
        with self._door:
            self._check_room(request)
        sequence = self._acceptance.sequence(request, sink, ended)
        with self._door:
            self._check_room(request)
            self._known[request.id] = sequence
            self._waiting.push(sequence)
            self._door.notify_all()

    def _check_room(self, request: Request) -> None:
        if self._closed:
            raise RequestRefused("queue_full", "the engine is shutting down", retry_after=5)
        if request.id in self._known:
            raise RequestRefused(
                "invalid_value", f"request {request.id!r} is already running", param="id"
            )
        if len(self._waiting) >= self.queue_limit:
            raise RequestRefused(
                "queue_full",
                f"{len(self._waiting)} requests are waiting already, more are not taken",
                retry_after=self._pace.retry_after(),
            )

    def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort" at the next step; unknown and finished ones are
        ignored.
        """
        with self._door:
            sequence = self._known.get(request_id)
            if sequence is not None:
                sequence.aborted = True
                self._door.notify_all()

    # -- running

    def start(self) -> None:
        """Run on a thread of its own until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self.run_forever, args=(self._stop_event,), name="engine", daemon=True
            )
            self._thread.start()

    def run_forever(self, stop_event: threading.Event) -> None:
        while not stop_event.is_set():
            try:
                worked = self.step()
            except Exception as error:
                # no request's fault that is known of: those that run end, the engine goes on
                log.exception("a step failed")
                self._abandon(error)
                worked = True
            if not worked:
                with self._door:
                    idle = not self._waiting and not any(
                        row.aborted for row in self._known.values()
                    )
                    if idle and not self._rows and not stop_event.is_set():
                        self._door.wait(timeout=1.0)

    def close(self) -> None:
        """Take nothing more, end what runs with "abort", stop the thread."""
        with self._door:
            self._closed = True
            for sequence in self._known.values():
                sequence.aborted = True
            self._door.notify_all()
        self._stop_event.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end_aborted()

    @torch.inference_mode()
    def step(self) -> bool:
        """End what was aborted, admit and prefill, decode one token for every row. False if there
        was nothing to do.
        """
        self._end_aborted()
        worked = self._prefill()
        self._tell_positions()
        if self._rows.decoding:
            self._decode()
            worked = True
        self._steps += worked
        return worked

    def _end_aborted(self) -> None:
        with self._door:
            aborted = [sequence for sequence in self._known.values() if sequence.aborted]
            for sequence in aborted:
                if sequence.slot < 0:
                    self._waiting.remove(sequence)
        for sequence in aborted:
            sequence.finish("abort")
            self._release(sequence)

    def _tell_positions(self) -> None:
        now = time.monotonic()
        due = now - self._positions_told_at >= POSITION_INTERVAL
        with self._door:
            waiting = list(self._waiting)
        for position, sequence in enumerate(waiting):
            if due or sequence.position_told is None:
                sequence.tell_position(position)
        if due:
            self._positions_told_at = now

    # -- prefill

    def _prefill(self) -> bool:
        with self._door:
            waiting = len(self._waiting)
        budget = self._pace.prefill_budget(waiting, self._rows.decoding)
        counts: list[int] = []  # tokens of each prefilling row in this step
        for sequence in self._rows.prefilling:
            counts.append(min(budget, len(sequence.prompt) - sequence.done))
            budget -= counts[-1]
        admitted, sizes = self._admit(budget)
        for sequence, size in zip(admitted, sizes, strict=True):
            if self._settle(sequence):
                counts.append(size)
        if not counts:
            return False
        rows = self._rows.prefilling
        counts = [
            min(count, len(row.prompt) - row.done) for row, count in zip(rows, counts, strict=True)
        ]
        started = time.perf_counter()
        for start, end in pairwise(groups(counts, self._prefiller.slack)):
            self._guarded(
                rows[start:end], partial(self._prefill_rows, dict(zip(rows, counts, strict=True)))
            )
        self._pace.prefilled(sum(counts), time.perf_counter() - started)
        self._rows.advance()
        self._sweep()
        return True

    def _admit(self, budget: int) -> tuple[list[Sequence], list[int]]:
        """Waiting requests that may begin now, and how many prompt tokens each computes in this
        step.

        Sorted by that number, so that neighbours can share a rectangle; one whose prompt is cut
        comes last.
        """
        taken: list[tuple[Sequence, int, bool]] = []
        with self._door:
            while budget > 0 and len(self._rows) + len(taken) < self.max_rows:
                sequence = self._waiting.peek()
                if sequence is None:
                    break
                whole = len(sequence.prompt)
                if self.positions.atomic_prefill:
                    if whole > budget and (taken or self._rows.prefilling):
                        break
                    size = whole
                else:
                    size = min(whole, budget)
                self._waiting.pop()
                taken.append((sequence, size, size < whole))
                budget -= size
        taken.sort(key=lambda entry: (entry[2], entry[1]))
        return [entry[0] for entry in taken], [entry[1] for entry in taken]

    def _settle(self, sequence: Sequence) -> bool:
        sequence.started()
        try:
            self._rows.settle(sequence)
        except Exception as error:
            self._fail(sequence, error)
            self._release(sequence)
            return False
        return True

    def _prefill_rows(self, sizes: dict[Sequence, int], rows: list[Sequence]) -> None:
        """One forward over neighbouring rows; each takes its next `sizes[row]` prompt tokens."""
        counts = [sizes[row] for row in rows]
        logits = self._prefiller.run(rows, counts)
        ends = [
            row.done + count == len(row.prompt) for row, count in zip(rows, counts, strict=True)
        ]
        ready = [row for row, end in zip(rows, ends, strict=True) if end]
        chosen = choose(logits[ends], [row.choice for row in ready]) if ready else []
        for row, count in zip(rows, counts, strict=True):
            row.done += count
            row.columns += count
        self._hand_out(ready, chosen)

    # -- decode

    def _decode(self) -> None:
        started = time.perf_counter()
        self._guarded(self._rows.answering, self._decode_rows)
        self._pace.decoded(time.perf_counter() - started)
        self._sweep()

    def _decode_rows(self, rows: list[Sequence]) -> None:
        logits = self.decoder.run(
            first=rows[0].slot,
            ids=[row.answer[-1] for row in rows],
            columns=[row.columns for row in rows],
            places=[row.places for row in rows],
        )
        chosen = choose(logits, [row.choice for row in rows])
        for row in rows:
            row.columns += 1
        self._hand_out(rows, chosen)

    def _hand_out(self, rows: list[Sequence], chosen: list[Chosen]) -> None:
        for row, choice in zip(rows, chosen, strict=True):
            try:
                row.take(choice)
            except Exception as error:
                self._fail(row, error)
        if rows:
            self._tokens += len(rows)
            self._pace.produced(len(rows))

    # -- one request's fault is its own

    def _guarded(self, rows: list[Sequence], forward: Callable[[list[Sequence]], None]) -> None:
        """Run a batch; if it raises, run its rows one by one, so that only the guilty ones fail."""
        try:
            forward(rows)
            return
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            log.warning("a batch of %d failed (%s): trying its rows one by one", len(rows), error)
        for row in rows:
            if not row.finished:
                self._guarded([row], forward)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        log.error("request %s failed", sequence.id, exc_info=error)
        code = "out_of_memory" if isinstance(error, torch.OutOfMemoryError) else "engine_error"
        sequence.fail(f"the answer could not be computed: {error}", "server_error", code)

    def _abandon(self, error: Exception) -> None:
        """End every running request and start again with empty rows."""
        for row in self._rows.clear():
            row.fail(f"the engine failed: {error}", "server_error", "engine_error")
            with self._door:
                self._known.pop(row.id, None)

    def _sweep(self) -> None:
        for row in [*self._rows.answering, *self._rows.prefilling]:
            if row.finished:
                self._release(row)

    def _release(self, sequence: Sequence) -> None:
        with self._door:
            self._known.pop(sequence.id, None)
        self._rows.release(sequence)

    # -- convenience

    def generate(self, requests: Iterable[Request]) -> list[Answer]:
        """Answer all requests, in their order, on the calling thread (or through the engine's own
        thread if it runs).

        Requests that are refused have an Answer with `error`. Waits for room in the queue rather
        than being refused.
        """
        requests = list(requests)
        collector = AnswerCollector()
        for request in requests:
            while not collector.submit(request, self._submit, wait=not self._closed):
                self._progress(collector)
        while len(collector.answers) < len(requests):
            self._progress(collector)
        return [collector.answers[request.id] for request in requests]

    def _progress(self, collector: AnswerCollector) -> None:
        if self._thread is None:
            self.step()
        else:
            collector.wait()

    # -- what the status page shows

    def status(self) -> dict[str, Any]:
        with self._door:
            waiting, known = len(self._waiting), len(self._known)
        adapters = self.adapters.status()
        return {
            "checkpoint": {"folder": self.loaded.folder, "fingerprint": self.loaded.fingerprint},
            "device": str(self.loaded.device),
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "active_rows": known - waiting,
            "max_rows": self.max_rows,
            "max_length": self.max_length,
            "queue": waiting,
            "queue_limit": self.queue_limit,
            "tokens_per_second": round(self._pace.rate(), 1),
            "tokens": self._tokens,
            "steps": self._steps,
            "adapters": adapters,
            "memory": {
                "kv_cache_bytes": self.cache.nbytes,
                "adapter_bytes": adapters["device_bytes"],
                "prompt_store_bytes": self.prompts.nbytes if self.prompts is not None else 0,
                "free_bytes_at_start": self.capacity.free_bytes,
            },
            "prompts_reused": self.prompts.hits if self.prompts is not None else 0,
        }
