"""Predictions for the rows of a dataset through the same engine that serves chat. No Django.

Many rows are in flight at once and the engine batches them; greedy predictions do not depend on
what shares the batch, and sampled ones have a seed per row, so an evaluation that was interrupted
goes on and ends with the same predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded
from chat.engine.prompts import IGNORED
from chat.engine.request import AdapterRef, Event, Request, RequestRefused, SamplingParams
from chat.remote_engine import RemoteEngine
from tuning.datasets.examples import messages_of

GREEDY, UPSTREAM = "greedy", "upstream"
# rows given to the engine at once; it runs as many of them as fit and keeps the rest queued
IN_FLIGHT = 64

NOTHING: Mapping[int, str] = {}

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Predicted:
    """One row's end. `error` is the engine's error object; the text is then what came before it."""

    row: int
    text: str
    error: dict[str, Any] | None = None


def sampling_of(decoding: str, max_target_length: int, seed: int) -> SamplingParams:
    """greedy: the most likely token each time, so scores can be compared between runs.

    upstream: sampled as ChatGLM-6B's evaluate.sh does (docs/chatglm.md#11-evaluation),
    so scores can be compared with its table.
    """
    if decoding == GREEDY:
        return SamplingParams(do_sample=False, max_new_tokens=max_target_length, seed=seed)
    if decoding == UPSTREAM:
        # the engine's defaults are ChatGLM-6B's, also those of that script
        return SamplingParams(max_new_tokens=max_target_length, seed=seed)
    raise ValueError(f"decoding is {GREEDY} or {UPSTREAM}, not {decoding!r}")


def engine_for(
    loaded: Loaded, max_source_length: int, max_target_length: int, pre_seq_len: int = 0
) -> Engine:
    """An engine with rows just long enough, so that as many as possible fit into a batch."""
    return Engine(
        loaded,
        EngineConfig(
            max_length=max_source_length + max_target_length,
            prefix_room=pre_seq_len,
            queue_limit=2 * IN_FLIGHT,
            reuse_prompts=False,
        ),
    )


def reference_of(
    prompter: Any, prompt: str, response: str, max_source_length: int, max_target_length: int
) -> str:
    """The response as a model could have written it: through the tokenizer, cut to
    `max_target_length` as in training.

    The original scores against this too; against the whole text a prediction of 64 tokens could
    never be complete.
    """
    _, labels = prompter.training_ids(
        messages_of(prompt), response, max_source_length, max_target_length
    )
    return prompter.decode(label for label in labels if label != IGNORED)


def predict(
    engine: Engine | RemoteEngine,
    rows: Iterable[tuple[int, Messages]],
    *,
    adapter: AdapterRef | None = None,
    decoding: str = GREEDY,
    max_source_length: int = 64,
    max_target_length: int = 64,
    seed: int = 42,
    should_stop: Callable[[], bool] = lambda: False,
    in_flight: int | None = None,
    resembles: Mapping[int, str] = NOTHING,
) -> Iterator[Predicted]:
    """Yields each row when it is finished, in any order; steps the engine itself (its own thread
    must not run).

    Prompts are shortened to `max_source_length` tokens by the prompter that also prepares training.
    resembles: by row, a text that its prediction may resemble: another model's, which greedy
    decoding then only checks where it agrees.

    When `should_stop` turns true (asked between engine steps) what is in flight is aborted and the
    rest is left out. Raises RequestRefused when the adapter does not fit the checkpoint,
    WorkerUnavailable when no server elsewhere is left; any other refusal or fault ends its row
    alone.
    """
    prompter = engine.prompter
    if in_flight is None:
        in_flight = IN_FLIGHT if isinstance(engine, Engine) else engine.in_flight
    waiting = iter(rows)
    running: dict[str, int] = {}
    texts: dict[int, list[str]] = {}
    ended: list[Predicted] = []
    exhausted = False

    def sink(event: Event) -> None:
        row = running[event.id]
        if event.type == "delta":
            texts[row].append(event.data["text"])
        elif event.terminal:
            del running[event.id]
            ended.append(Predicted(row, "".join(texts.pop(row)), event.data.get("error")))

    try:
        while not should_stop():
            while not exhausted and len(running) < in_flight:
                try:
                    row, messages = next(waiting)
                except StopIteration:
                    exhausted = True
                    break
                request_id = f"row-{row}"
                running[request_id], texts[row] = row, []
                try:
                    request = Request(
                        id=request_id,
                        prompt_ids=tuple(prompter.prompt_ids(messages, max_source_length)),
                        adapter=adapter,
                        sampling=sampling_of(decoding, max_target_length, seed + row),
                        untidied=True,  # as the original: scores come before the chat's tidying
                        resembles=resembles.get(row, ""),
                    )
                    engine.submit(request, sink)
                except RequestRefused as refusal:
                    del running[request_id], texts[row]
                    if refusal.code == "invalid_adapter":
                        raise
                    ended.append(Predicted(row, "", refusal.as_error()))
            if running:
                engine.step()
            finished, ended[:] = ended[:], []
            yield from finished
            if exhausted and not running:
                return
    finally:
        for request_id in list(running):
            engine.abort(request_id)
        while running and engine.step():
            pass
