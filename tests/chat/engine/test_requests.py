"""What a client of the engine holds: refusals before compute, events, faults that stay with their
request.
"""

import math
import random
import threading
from dataclasses import replace

import pytest
import torch

from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.request import AdapterRef, Request, RequestRefused, SamplingParams
from tests.support.tiny_models import (
    CONTEXT,
    VOCABULARY,
    adapter,
    greedy,
    loaded_model,
    random_prompt,
    reference,
)

PROMPT = tuple(range(20, 45))


@pytest.fixture
def engine():
    return Engine(loaded_model("qwen2"), EngineConfig(max_rows=4))


class Reader:
    """Collects a request's events."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)

    @property
    def types(self):
        return [event.type for event in self.events]

    @property
    def text(self):
        return "".join(event.data["text"] for event in self.events if event.type == "delta")

    @property
    def last(self):
        return self.events[-1]


def run(engine, *requests):
    readers = {request.id: Reader() for request in requests}
    for request in requests:
        engine.submit(request, readers[request.id])
    while engine.step():
        pass
    return list(readers.values())


def refusal(engine, request):
    with pytest.raises(RequestRefused) as caught:
        engine.submit(request, lambda event: pytest.fail("nothing may be computed"))
    assert not engine.step()
    return caught.value


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("logprobs", 21),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", ((VOCABULARY, 1.0),)),
        ("logit_bias", ((1, 101.0),)),
        ("stop", ("",)),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(engine, parameter, value):
    refused = refusal(
        engine, Request(id="1", prompt_ids=PROMPT, sampling=SamplingParams(**{parameter: value}))
    )
    assert (refused.code, refused.param) == ("invalid_value", parameter)


@pytest.mark.parametrize("ids", [(5, VOCABULARY), (5, -1)])
def test_ids_out_of_the_vocabulary_are_refused(engine, ids):
    assert refusal(engine, greedy("1", ids, 4)).code == "invalid_value"


@pytest.mark.parametrize(
    "request_",
    [
        greedy("1", (), 4),
        Request(id="1"),
        Request(id="1", messages=({"role": "user", "content": " "},)),
    ],
)
def test_an_empty_prompt_is_refused(engine, request_):
    assert refusal(engine, request_).code == "empty_prompt"


def test_an_overflowing_context_is_refused_with_the_numbers(engine):
    long = refusal(engine, greedy("1", PROMPT * 20, 4))
    assert long.code == "context_length_exceeded"
    assert str(CONTEXT) in long.message and str(len(PROMPT * 20)) in long.message


def test_more_tokens_than_fit_are_cut_to_what_does_and_the_usage_says_so(engine):
    wished, plain = engine.generate(
        [greedy("1", PROMPT, 100 * CONTEXT), greedy("2", PROMPT, CONTEXT - len(PROMPT))]
    )
    assert wished.error is None and wished.token_ids == plain.token_ids
    assert wished.usage == {**plain.usage, "max_tokens": CONTEXT - len(PROMPT)}


def test_a_prefix_counts_where_it_shifts_positions(tmp_path):
    ref = adapter("qwen2", tmp_path, 24, 4)
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=1))
    (answer,) = engine.generate([greedy("1", PROMPT, CONTEXT - len(PROMPT) - 23, ref)])
    assert answer.usage["max_tokens"] == CONTEXT - len(PROMPT) - 24
    ref = adapter("chatglm", tmp_path, 24, 4)
    prompt = random_prompt("chatglm", random.Random(1), 20, 20)
    (answer,) = Engine(loaded_model("chatglm"), EngineConfig(max_rows=1)).generate(
        [greedy("1", prompt, CONTEXT - 22, ref)]
    )
    assert answer.error is None


def test_without_a_limit_the_answer_takes_what_the_context_leaves(engine):
    (reader,) = run(
        engine, Request(id="1", prompt_ids=PROMPT, sampling=SamplingParams(do_sample=False))
    )
    assert reader.last.data["usage"]["total_tokens"] <= CONTEXT
    assert reader.last.data["finish_reason"] in ("stop", "length")


def wrong_adapters(folder):
    loaded = loaded_model("qwen2")
    good = torch.zeros(loaded.layers, 2, loaded.kv_heads, 4, loaded.head_dim)
    return {
        "layers": KVPrefix(good[:2], True, loaded.fingerprint),
        "head_dim": KVPrefix(good[..., :4], True, loaded.fingerprint),
        "fingerprint": KVPrefix(good, True, "another"),
        "positions": KVPrefix(good, False, loaded.fingerprint),
        "nan": KVPrefix(torch.full_like(good, torch.nan), True, loaded.fingerprint),
        "long": KVPrefix(good.repeat(1, 1, 1, 100, 1), True, loaded.fingerprint),
    }


@pytest.mark.parametrize(
    "fault", ["layers", "head_dim", "fingerprint", "positions", "nan", "long", "missing"]
)
def test_an_adapter_that_does_not_fit_is_refused(engine, fault, tmp_path):
    if fault != "missing":
        save(wrong_adapters(tmp_path)[fault], tmp_path / fault)
    assert (
        refusal(engine, greedy("1", PROMPT, 4, AdapterRef(fault, str(tmp_path / fault)))).code
        == "invalid_adapter"
    )


def test_the_queue_is_bounded_and_says_when_to_come_back():
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=1, queue_limit=2))
    for number in range(2):
        engine.submit(greedy(str(number), PROMPT, 4), lambda event: None)
    with pytest.raises(RequestRefused) as caught:
        engine.submit(greedy("2", PROMPT, 4), lambda event: None)
    assert caught.value.code == "queue_full" and caught.value.retry_after >= 1
    assert caught.value.as_error()["type"] == "server_error"


def test_an_id_in_use_is_refused_and_free_again_afterwards(engine):
    engine.submit(greedy("1", PROMPT, 4), lambda event: None)
    with pytest.raises(RequestRefused):
        engine.submit(greedy("1", PROMPT, 4), lambda event: None)
    while engine.step():
        pass
    engine.submit(greedy("1", PROMPT, 4), lambda event: None)


def test_events_are_numbered_and_end_with_usage_and_timings(engine):
    (reader,) = run(engine, greedy("1", PROMPT, 12))
    assert [event.seq for event in reader.events] == list(range(1, len(reader.events) + 1))
    assert reader.types[0] == "started" and reader.types[-1] == "finished"
    assert reader.events[0].data == {"prompt_tokens": len(PROMPT)}
    usage, timings = reader.last.data["usage"], reader.last.data["timings"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (
        sum(event.data["tokens"] for event in reader.events if event.type == "delta")
        <= usage["completion_tokens"]
    )
    assert set(timings) == {"queued_s", "prefill_s", "decode_s", "tokens_per_second"}
    assert all(value >= 0 for value in timings.values())


def test_streamed_text_is_the_decoded_answer(engine):
    loaded = engine.loaded
    draw = random.Random(3)
    requests = [greedy(str(number), random_prompt("qwen2", draw), 20) for number in range(6)]
    for request, reader in zip(requests, run(engine, *requests), strict=True):
        assert reader.text == loaded.prompter.decode(
            reference("qwen2", request.prompt_ids, 20, None)
        )


def test_those_who_wait_are_told_their_place():
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=1))
    readers = run(engine, *[greedy(str(number), PROMPT, 3) for number in range(3)])
    assert readers[0].types[0] == "started"
    assert next(event.data for event in readers[2].events if event.type == "queued") == {
        "position": 1
    }


def test_users_take_turns():
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=1))
    order = []
    for number, user in enumerate("aaaab"):
        request = greedy(f"{user}{number}", PROMPT, 2, user=user)
        engine.submit(
            request, lambda event: order.append(event.id) if event.type == "started" else None
        )
    while engine.step():
        pass
    assert order == ["a0", "b4", "a1", "a2", "a3"]


def test_a_stop_string_ends_the_answer_even_across_tokens(engine):
    text = run(engine, greedy("1", PROMPT, 40))[0].text
    stop = text[7:11]  # byte-level tokens of a random model: spread over several of them
    request = greedy("2", PROMPT, 40)
    (reader,) = run(
        engine, replace(request, sampling=replace(request.sampling, stop=("never there", stop)))
    )
    assert reader.text == text[: text.index(stop)]
    assert reader.last.data["finish_reason"] == "stop"


def test_logprobs_come_with_their_tokens(engine):
    request = greedy("1", PROMPT, 6)
    (reader,) = run(engine, replace(request, sampling=replace(request.sampling, logprobs=3)))
    entries = [
        entry
        for event in reader.events
        if event.type == "delta"
        for entry in event.data.get("logprobs", [])
    ]
    expected = reference("qwen2", PROMPT, 6, None)
    assert tuple(entry["token_id"] for entry in entries) == expected
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        # greedy: the best itself
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])
        assert sum(math.exp(top["logprob"]) for top in entry["top_logprobs"]) <= 1.0001


def test_temperature_zero_is_greedy(engine):
    request = Request(
        id="1", prompt_ids=PROMPT, sampling=SamplingParams(temperature=0.0, max_new_tokens=8)
    )
    assert engine.generate([request])[0].token_ids == reference("qwen2", PROMPT, 8, None)


def test_an_aborted_request_ends_within_two_steps_and_frees_its_row(engine):
    reader = Reader()
    engine.submit(greedy("1", PROMPT, 200), reader)
    for _ in range(3):
        engine.step()
    engine.abort("1")
    engine.step()
    assert reader.last.type == "finished" and reader.last.data["finish_reason"] == "abort"
    assert reader.last.data["usage"]["completion_tokens"] >= 3
    assert engine.idle and engine.status()["active_rows"] == 0
    engine.abort("1")
    engine.abort("unknown")


def test_a_waiting_request_can_be_aborted():
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=1))
    readers = [Reader(), Reader()]
    for number, reader in enumerate(readers):
        engine.submit(greedy(str(number), PROMPT, 30), reader)
    engine.step()
    engine.abort("1")
    engine.step()
    assert readers[1].last.data["finish_reason"] == "abort"
    assert readers[0].last.type == "delta"


def test_nan_logits_end_one_request_and_leave_no_trace_in_the_slot(engine, monkeypatch):
    """The token 33 poisons its row: what is not finite must reach neither its neighbours nor the
    slot's next owner.
    """
    embedding = engine.loaded.model.get_input_embeddings()
    poisoned = embedding.weight.detach().clone()
    poisoned[33] = torch.nan
    plain = torch.nn.functional.embedding
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "embedding",
            lambda ids, weight, *args, **kw: plain(ids, poisoned, *args, **kw),
        )
        healthy = [(40, 41, 42), (50, 51, 52, 53)]
        readers = run(
            engine,
            greedy("a", healthy[0], 8),
            greedy("bad", (*range(60, 70), 33, 31), 8),
            greedy("b", healthy[1], 8),
        )
    assert (
        readers[1].types[-1] == "failed" and readers[1].last.data["error"]["code"] == "nan_logits"
    )
    for reader, prompt in ((readers[0], healthy[0]), (readers[2], healthy[1])):
        assert reader.text == engine.loaded.prompter.decode(reference("qwen2", prompt, 8, None))
    # Short prompts take the same slots; a long one beside them makes the batch look at the columns
    # behind them.
    prompts = [*[(40 + number, 41, 42) for number in range(3)], tuple(range(70, 90))]
    answers = engine.generate(
        [greedy(str(number), prompt, 8) for number, prompt in enumerate(prompts)]
    )
    assert [answer.token_ids for answer in answers] == [
        reference("qwen2", prompt, 8, None) for prompt in prompts
    ]


def test_a_batch_that_raises_costs_only_the_guilty_request(engine, monkeypatch):
    embedding = torch.nn.functional.embedding

    def trapped(ids, *args, **kwargs):
        if (ids == 33).any():
            raise RuntimeError("a kernel gave up")
        return embedding(ids, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", trapped)
    prompts = [(40, 41, 42), (30, 33, 31), (50, 51, 52)]
    readers = run(
        engine, *[greedy(str(number), prompt, 8) for number, prompt in enumerate(prompts)]
    )
    assert readers[1].last.data["error"]["code"] == "engine_error"
    for number in (0, 2):
        expected = reference("qwen2", prompts[number], 8, None)
        if 33 not in expected[:-1]:
            assert readers[number].text == engine.loaded.prompter.decode(expected)


def test_a_reader_that_raises_loses_only_its_own_request(engine):
    def broken(event):
        raise ConnectionError

    reader = Reader()
    engine.submit(greedy("1", PROMPT, 30), broken)
    engine.submit(greedy("2", PROMPT, 10), reader)
    while engine.step():
        pass
    assert reader.last.type == "finished"
    assert engine.idle


def test_generate_keeps_order_and_reports_refusals(engine):
    engine.queue_limit = 2
    requests = [greedy(str(number), (20 + number, 21), 3) for number in range(6)]
    requests.insert(3, greedy("bad", (VOCABULARY,), 3))
    answers = engine.generate(requests)
    assert [answer.id for answer in answers] == [request.id for request in requests]
    assert answers[3].error["code"] == "invalid_value" and answers[3].finish_reason == "error"
    assert all(answer.error is None for answer in answers if answer.id != "bad")


def test_the_engine_runs_on_its_own_thread_and_ends_what_runs_when_closed():
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=2))
    engine.start()
    finished = threading.Event()
    engine.submit(greedy("1", PROMPT, 5), lambda event: finished.set() if event.terminal else None)
    assert finished.wait(30)
    assert engine.generate([greedy("2", PROMPT, 5)])[0].token_ids == reference(
        "qwen2", PROMPT, 5, None
    )
    reader = Reader()
    engine.submit(greedy("3", PROMPT, 200), reader)
    engine.close()
    assert reader.last.terminal
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
    with pytest.raises(RequestRefused):
        engine.submit(greedy("4", PROMPT, 5), lambda event: None)


def test_status_says_what_the_page_shows(engine, tmp_path):
    ref = adapter("qwen2", tmp_path, 9, 2)
    engine.submit(greedy("1", PROMPT, 5, ref), lambda event: None)
    engine.step()
    status = engine.status()
    assert (
        status["active_rows"] == 1 and status["max_rows"] == 4 and status["max_length"] == CONTEXT
    )
    assert status["adapters"]["resident"] == [ref.name]
    assert status["memory"]["kv_cache_bytes"] > 0
    assert status["checkpoint"]["fingerprint"] == "fingerprint-qwen2"


def test_a_row_that_cannot_be_set_up_fails_alone(engine, tmp_path, monkeypatch):
    ref = adapter("qwen2", tmp_path, 9, 2)
    monkeypatch.setattr(engine.adapters, "on_device", lambda name, host: 1 / 0)
    readers = run(engine, greedy("1", PROMPT, 5, ref), greedy("2", PROMPT, 5))
    assert readers[0].last.type == "failed" and readers[1].last.type == "finished"
    assert engine.idle


def test_the_thread_outlives_a_step_that_fails(engine, monkeypatch):
    def broken():
        monkeypatch.undo()
        raise RuntimeError("a bug")

    failed, finished = threading.Event(), threading.Event()
    engine.submit(
        greedy("1", PROMPT, 200), lambda event: failed.set() if event.type == "failed" else None
    )
    engine.step()
    monkeypatch.setattr(engine.scheduler, "report_queue_positions", broken)
    engine.start()
    assert failed.wait(30)
    engine.submit(
        greedy("2", PROMPT, 5), lambda event: finished.set() if event.type == "finished" else None
    )
    assert finished.wait(30)
    engine.close()


def test_what_cannot_fit_is_refused_without_being_cut_into_tokens(engine, monkeypatch):
    monkeypatch.setattr(type(engine.loaded.prompter), "prompt_ids", lambda *_: 1 / 0)
    for texts in (["字" * 1_000_000], ["word " * 20_000] * 50):
        messages = tuple({"role": "user", "content": text} for text in texts)
        assert refusal(engine, Request("1", messages=messages)).code == "context_length_exceeded"
