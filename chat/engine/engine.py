"""Continuous batching: requests join and leave at step boundaries; one step is some prefill and one
token for every row.

The scheduler (chat.engine.scheduler) sees prompts as token counts, rows are slots of one KV cache
(chat.engine.kv_cache), the model is its ordinary forward. Everything between `submit` and the sink
happens on one thread, so that it needs no lock but the scheduler's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from chat.engine.adapters import AdapterPool
from chat.engine.batch import RunningBatch
from chat.engine.capacity import CACHE_SHARE, capacity_for
from chat.engine.cuda_graphs import EagerDecoder, decoder_for
from chat.engine.flat_forward import flat_forward_for
from chat.engine.flat_steps import FlatSteps
from chat.engine.kv_cache import KVCache, layer_devices
from chat.engine.loading import Loaded
from chat.engine.offline import GenerationOutput, OutputCollector
from chat.engine.prefill import Prefiller, groups
from chat.engine.prompt_cache import PromptCache
from chat.engine.prompts import Prompter
from chat.engine.request import Request, Sink
from chat.engine.sampler import SampledToken, sample
from chat.engine.scheduler import Scheduler
from chat.engine.sequence import OnEnd, Sequence
from chat.engine.speculation import Speculation
from chat.engine.validation import RequestValidator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """max_rows, max_length: requests in a batch, tokens of one request (prompt and answer); sized
    from free memory when None. cache_share: part of the free memory that the key-value cache may
    take when rows are sized from it. queue_limit: requests waiting beyond which `submit` refuses.
    prefill_tokens: prompt tokens computed in one step. prefix_room: columns of each row for its
    adapter's prefix where rows hold copies, chosen by free memory when None (capacity.py).
    reuse_prompts: keep the keys and values of earlier prompts. compiled: use the forward of our own
    where there is one for the model (flat_forward.py). drafts: guess greedy answers' next tokens
    where it pays (drafts.py; with the forward of our own alone).
    """

    max_rows: int | None = None
    max_length: int | None = None
    queue_limit: int = 256
    prefill_tokens: int = 512
    prefix_room: int | None = None
    cache_share: float = CACHE_SHARE
    reuse_prompts: bool = True
    drafts: bool = True
    compiled: bool = True


@dataclass(frozen=True)
class Work:
    """One forward: `rows` are neighbours in the cache. counts: prompt tokens of each (0: it is past
    its prompt and decodes one), None in a decode step.
    """

    rows: list[Sequence]
    counts: list[int] | None = None

    def split(self) -> Iterator[Work]:
        """Its rows one by one."""
        for i, row in enumerate(self.rows):
            yield Work([row], None if self.counts is None else [self.counts[i]])


class Engine:
    """Serves one loaded checkpoint and any number of adapters."""

    def __init__(self, loaded: Loaded, config: EngineConfig | None = None):
        config = config or EngineConfig()
        self.loaded, self.config = loaded, config
        flat = flat_forward_for(loaded) if config.compiled else None
        self.capacity = capacity_for(
            loaded,
            config.max_rows,
            config.max_length,
            0 if flat else config.prefix_room,
            config.cache_share,
        )
        self.max_rows, self.max_length = self.capacity.rows, self.capacity.max_length
        self.positions = loaded.family.positions(loaded.model.config)
        self.adapters = AdapterPool(loaded)
        self.cache = KVCache(
            devices=layer_devices(loaded.model, loaded.layers),
            kv_heads=loaded.kv_heads,
            head_dim=loaded.head_dim,
            rows=self.max_rows,
            columns=self.capacity.columns,
            dtype=loaded.dtype,
        )
        self.prompts: PromptCache | None = None
        if config.reuse_prompts and not loaded.family.bidirectional_prompt:
            self.prompts = PromptCache(self.capacity.prompt_cache_bytes)
        self.decoder: FlatSteps | EagerDecoder
        self._prefiller: FlatSteps | Prefiller
        self._speculation: Speculation | None = None
        if flat:
            steps = FlatSteps(flat, self.cache, self.positions)
            self.decoder = self._prefiller = steps
            if config.drafts:
                self._speculation = Speculation(steps, loaded.prompter)
        else:
            self.decoder = decoder_for(loaded, self.cache, self.positions)
            self._prefiller = Prefiller(loaded, self.cache, self.positions)
        self._validator = RequestValidator(
            loaded,
            self.positions,
            self.adapters,
            self.max_length,
            None if flat else self.capacity.columns,
        )
        self.scheduler = Scheduler(
            max_rows=self.max_rows,
            queue_limit=config.queue_limit,
            prefill_tokens=config.prefill_tokens,
            whole_prompts=loaded.family.bidirectional_prompt,
        )
        # The engine's thread alone:
        self._batch = RunningBatch(
            self.cache, self.adapters, self.prompts, shares_prefixes=flat is not None
        )
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

    # -- any thread

    @property
    def prompter(self) -> Prompter:
        return self.loaded.prompter

    def submit(self, request: Request, sink: Sink, on_end: OnEnd | None = None) -> None:
        """Queue a request. Its events go to `sink`, and the whole sequence to `on_end` once it has
        ended, both on the engine's thread. Raises RequestRefused before any compute.
        """
        self.scheduler.check_room(request.id, request.user)
        self.scheduler.submit(self._validator.prepare(request, sink, on_end))

    def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort" at the next step; unknown and finished ones are
        ignored.
        """
        self.scheduler.abort(request_id)

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or holds a slot."""
        return self.scheduler.counts() == (0, 0) and not self._batch

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
            if not worked and not self._batch:
                self.scheduler.wait(stop_event)

    def close(self) -> None:
        """Take nothing more, end what runs with "abort", stop the thread."""
        self.scheduler.close()
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
        worked = False
        for work in self._schedule():
            sampled = self._run(work)
            self._deliver(sampled)
            worked = True
        self._steps += worked
        return worked

    # -- schedule

    def _schedule(self) -> Iterator[Work]:
        """The step's forwards, each decided when the one before has been delivered: a sequence
        whose prompt is done gets its second token in the same step.
        """
        self._end_aborted()
        counts = self._admit()
        if counts and self._batch.decoding and isinstance(self.decoder, FlatSteps):
            yield from self._schedule_together(counts)
            return
        if counts:
            rows, started = self._batch.prefilling_rows, time.perf_counter()
            for start, end in pairwise(groups(counts, self._prefiller.slack)):
                yield Work(rows[start:end], counts[start:end])
            self.scheduler.budget.prefilled(sum(counts), time.perf_counter() - started)
            self._batch.promote()
            self._release_finished()
        self.scheduler.report_queue_positions()
        if self._batch.decoding:
            started = time.perf_counter()
            yield Work(self._batch.decoding_rows)
            self.scheduler.budget.decoded(time.perf_counter() - started)
            self._release_finished()

    def _schedule_together(self, counts: list[int]) -> Iterator[Work]:
        """The flat forward takes prompts and running answers at once: weights are read once."""
        started, decoding = time.perf_counter(), self._batch.decoding_rows
        yield Work([*decoding, *self._batch.prefilling_rows], [0] * len(decoding) + counts)
        self.scheduler.budget.shared(sum(counts), time.perf_counter() - started)
        self._batch.promote()
        self._release_finished()
        self.scheduler.report_queue_positions()

    def _end_aborted(self) -> None:
        for sequence in self.scheduler.take_aborted():
            sequence.finish("abort")
            self._release(sequence)

    def _admit(self) -> list[int]:
        """Gives slots to those that begin; prompt tokens of each row that is being prefilled."""
        plan = self.scheduler.schedule(self._batch.prefilling_rows, self._batch.decoding)
        counts = plan.counts
        for sequence, size in plan.admitted:
            sequence.start()
            try:
                self._batch.admit(sequence)
            except Exception as error:
                self._fail(sequence, error)
                self._release(sequence)
            else:
                # what was taken over from other prompts need not be computed
                counts.append(min(size, sequence.uncomputed))
        return counts

    # -- run

    def _run(self, work: Work) -> list[tuple[Sequence, SampledToken]]:
        """One forward, and a token for each row that is past its prompt. If it raises, its rows run
        one by one, so that only the guilty ones fail.
        """
        try:
            return self._decode(work.rows) if work.counts is None else self._prefill(work)
        except Exception as error:
            if len(work.rows) == 1:
                self._fail(work.rows[0], error)
                return []
            log.warning(
                "a batch of %d failed (%s): trying its rows one by one", len(work.rows), error
            )
        return [pair for each in work.split() for pair in self._run(each)]

    def _prefill(self, work: Work) -> list[tuple[Sequence, SampledToken]]:
        assert work.counts is not None
        logits = self._prefiller.prefill(work.rows, work.counts)
        ends = [row.uncomputed == count for row, count in zip(work.rows, work.counts, strict=True)]
        ready = [row for row, end in zip(work.rows, ends, strict=True) if end]
        sampled = sample(logits[ends], [row.sampler_state for row in ready]) if ready else []
        for row, count in zip(work.rows, work.counts, strict=True):
            row.num_computed_tokens += count
            row.kv_length += count or 1
        return list(zip(ready, sampled, strict=True))

    def _decode(self, rows: list[Sequence]) -> list[tuple[Sequence, SampledToken]]:
        if self._speculation is not None and (checked := self._speculation.decode(rows)):
            return checked
        logits = self.decoder.decode(rows)
        sampled = sample(logits, [row.sampler_state for row in rows])
        for row in rows:
            row.kv_length += 1
        return list(zip(rows, sampled, strict=True))

    # -- deliver

    def _deliver(self, sampled: list[tuple[Sequence, SampledToken]]) -> None:
        for row, token in sampled:
            if row.finished:
                continue  # guesses behind its end
            try:
                row.append_token(token)
            except Exception as error:
                self._fail(row, error)
        if sampled:
            self._tokens += len(sampled)
            self.scheduler.budget.produced(len(sampled))

    def _release_finished(self) -> None:
        for row in [*self._batch.decoding_rows, *self._batch.prefilling_rows]:
            if row.finished:
                self._release(row)

    def _release(self, sequence: Sequence) -> None:
        self.scheduler.forget(sequence)
        self._batch.release(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        log.error("request %s failed", sequence.id, exc_info=error)
        code = "out_of_memory" if isinstance(error, torch.OutOfMemoryError) else "engine_error"
        sequence.fail(f"the answer could not be computed: {error}", "server_error", code)

    def _abandon(self, error: Exception) -> None:
        """End every running request and start again with empty rows."""
        for row in self._batch.clear():
            row.fail(f"the engine failed: {error}", "server_error", "engine_error")
            self.scheduler.forget(row)

    # -- convenience

    def generate(self, requests: Iterable[Request]) -> list[GenerationOutput]:
        """Answer all requests, in their order, on the calling thread (or through the engine's own
        thread if it runs).

        Requests that are refused have an output with `error`. Waits for room in the queue rather
        than being refused.
        """
        requests = list(requests)
        collector = OutputCollector()
        for request in requests:
            while not collector.submit(request, self.submit, wait=not self.scheduler.closed):
                self._progress(collector)
        while len(collector.outputs) < len(requests):
            self._progress(collector)
        return [collector.outputs[request.id] for request in requests]

    def _progress(self, collector: OutputCollector) -> None:
        if self._thread is None:
            self.step()
        else:
            collector.wait()

    # -- what the status page shows

    def status(self) -> dict[str, Any]:
        waiting, running = self.scheduler.counts()
        adapters = self.adapters.status()
        return {
            "checkpoint": {"folder": self.loaded.folder, "fingerprint": self.loaded.fingerprint},
            "device": str(self.loaded.device),
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "active_rows": running,
            "max_rows": self.max_rows,
            "max_length": self.max_length,
            "queue": waiting,
            "queue_limit": self.config.queue_limit,
            "tokens_per_second": round(self.scheduler.budget.rate(), 1),
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
