"""Prefixes of 2,048 tokens: as exact as short ones, in memory once, refused by name where they
cannot be.
"""

import random
import threading

import psutil
import pytest
import torch

from chat.engine import capacity
from chat.engine.adapters import AdapterPool
from chat.engine.engine import Engine, EngineConfig
from chat.engine.request import LONGEST_PREFIX, RequestRefused
from chat.ops import cpu_kernels
from tests.support.tiny_models import (
    CONTEXT,
    Prefix,
    adapter,
    greedy,
    loaded_model,
    random_prompt,
    reference,
)

LONG = Prefix(LONGEST_PREFIX, 5)


@pytest.mark.parametrize(
    ("architecture", "compiled"),
    [("qwen2-long", True), ("qwen2-long", False), ("glm-long", False), ("chatglm", False)],
)
def test_beside_other_rows_answers_are_those_of_plain_generation(architecture, compiled, tmp_path):
    prefixes = {
        prefix: adapter(architecture, tmp_path, prefix.length, prefix.seed)
        for prefix in (LONG, Prefix(300, 6))
    } | {None: None}
    draw, requests, expected = random.Random(2), [], {}
    for number in range(6):
        prefix = list(prefixes)[number % 3]
        prompt = random_prompt(architecture, draw)
        requests.append(greedy(str(number), prompt, 8, prefixes[prefix]))
        expected[str(number)] = reference(architecture, prompt, 8, prefix)
    engine = Engine(loaded_model(architecture), EngineConfig(max_rows=4, compiled=compiled))
    answers = engine.generate(requests)
    assert {answer.id: answer.token_ids for answer in answers} == expected


def test_thirty_two_rows_cost_one_copy(tmp_path):
    if cpu_kernels.load(torch.float32) is None:
        pytest.skip("no C++ compiler")
    loaded, draw = loaded_model("qwen2-long"), random.Random(3)
    ref = adapter("qwen2-long", tmp_path, LONG.length, LONG.seed)
    copy = AdapterPool(loaded).fetch(ref).nbytes

    def grown(prefix):
        """Bytes of memory that 32 rows in flight have taken."""
        before = psutil.Process().memory_info().rss
        engine = Engine(loaded, EngineConfig(max_rows=32, prefill_tokens=4096))
        for number in range(32):
            prompt = random_prompt("qwen2-long", draw, 20, 30)
            engine.submit(greedy(str(number), prompt, 20, prefix), lambda event: None)
        for _ in range(4):
            engine.step()
        assert len(engine._batch) >= 30  # short answers may have ended
        return psutil.Process().memory_info().rss - before, engine

    engines = [grown(None)[1]]  # kept, so that their memory is not used again
    bare, engine = grown(None)
    engines.append(engine)
    tuned, engine = grown(ref)
    assert {row.shared_prefix.data_ptr() for row in engine._batch.decoding_rows} == {
        engine.adapters.fetch(ref).data_ptr()
    }
    assert engine.cache.columns < 300  # slots hold none of it
    assert tuned - bare < 4 * copy  # and not 32 times


def test_threads_that_ask_at_once_get_one_copy(tmp_path):
    ref, pool = adapter("qwen2", tmp_path, 40, 5), AdapterPool(loaded_model("qwen2"))
    start, found = threading.Barrier(8), []

    def ask():
        start.wait()
        found.append(pool.fetch(ref).data_ptr())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and set(found) == {pool.fetch(ref).data_ptr()}


def refusal(engine, *arguments):
    with pytest.raises(RequestRefused) as caught:
        engine.submit(greedy("1", *arguments), lambda event: None)
    return caught.value


@pytest.mark.parametrize("compiled", [True, False])
def test_a_context_too_short_for_it_is_named(compiled, tmp_path):
    ref = adapter("qwen2", tmp_path, LONG.length, LONG.seed)
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=2, compiled=compiled))
    refused = refusal(engine, (20, 21, 22), 4, ref)
    assert (refused.code, refused.param) == ("invalid_adapter", "adapter")
    assert str(LONG.length) in refused.message and str(CONTEXT) in refused.message
    almost = adapter("qwen2", tmp_path, CONTEXT - 10, 1)
    refused = refusal(engine, tuple(range(20, 40)), 4, almost)
    assert refused.code == "context_length_exceeded"
    assert "holds 10 tokens behind the adapter's prefix of 246; the prompt has 20" in str(refused)


def test_rows_without_room_for_it_leave_less_for_the_answer_or_refuse_it(tmp_path, monkeypatch):
    """A card with little memory: rows hold copies and are sized for usual prefixes."""
    monkeypatch.setattr(capacity, "LONGEST_PREFIX", capacity.USUAL_PREFIX)
    engine = Engine(loaded_model("chatglm"), EngineConfig(max_rows=2, max_length=128))
    prompt = random_prompt("chatglm", random.Random(1), 20, 20)
    prefix = Prefix(340, 1)
    ref = adapter("chatglm", tmp_path, prefix.length, prefix.seed)
    (answer,) = engine.generate([greedy("1", prompt, 100, ref)])
    room = 128 + capacity.USUAL_PREFIX - prefix.length
    assert answer.usage["max_tokens"] == room - len(prompt)
    assert answer.token_ids == reference("chatglm", prompt, room - len(prompt), prefix)
    ref = adapter("chatglm", tmp_path, LONG.length, LONG.seed)
    refused = refusal(engine, prompt, 4, ref)
    assert refused.code == "invalid_adapter" and "holds 384 in all" in refused.message
