"""/v1/completions and /v1/responses against a scripted worker."""

import json
from itertools import groupby

import pytest

pytestmark = pytest.mark.django_db(transaction=True)
JSON = "application/json"


async def complete(client, **body):
    return await client.post("/v1/completions", {"model": "base", "prompt": "从前", **body}, JSON)


async def respond(client, **body):
    return await client.post("/v1/responses", {"model": "base", "input": "你好", **body}, JSON)


async def payloads_of(response) -> list:
    text = "".join([part.decode() async for part in response])
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_text_is_gone_on_with(async_client, adapter, router):
    response = await complete(
        async_client, model="tuned", echo=True, max_tokens=9, frequency_penalty=1, seed=3, n=2
    )
    body = response.json()
    assert (response.status_code, body["object"]) == (200, "text_completion")
    assert [
        (c["index"], c["text"], c["finish_reason"], c["logprobs"]) for c in body["choices"]
    ] == [
        (0, "从前你好", "stop", None),
        (1, "从前你好", "stop", None),
    ]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    first, second = router.requests.values()
    assert (first.text, first.messages, first.prompt_ids) == ("从前", (), None)
    assert (first.adapter.name, first.sampling.max_new_tokens) == (adapter.sha256, 9)
    assert (first.sampling.seed, second.sampling.seed) == (3, 4)


async def test_several_prompts_texts_or_tokens_are_answered_in_their_order(
    async_client, base, router
):
    body = (await complete(async_client, prompt=["a", [1, 2]], n=2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 10, "each prompt once"
    asked = [(request.text, request.prompt_ids) for request in router.requests.values()]
    assert asked == [("a", None), ("a", None), (None, (1, 2)), (None, (1, 2))]
    await complete(async_client, prompt=[7, 8])
    assert list(router.requests.values())[-1].prompt_ids == (7, 8)


async def test_a_completion_streams(async_client, base, router):
    response = await complete(
        async_client, stream=True, echo=True, stream_options={"include_usage": True}
    )
    *chunks, usage, done = await payloads_of(response)
    assert done == "[DONE]" and usage["usage"]["completion_tokens"] == 2
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "从前你好"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_completions_logprobs_are_four_lists(async_client, base, router):
    (choice,) = (await complete(async_client, logprobs=1)).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["a", "a"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{}, {}],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[-1]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 2}, "prompt"),
        ({"prompt": [1], "echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"model": None}, "model"),
    ],
)
async def test_a_bad_completion_is_a_400_that_names_the_parameter(
    async_client, base, router, body, param
):
    response = await complete(async_client, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_response_is_made_of_items(async_client, base, router):
    response = await respond(
        async_client,
        instructions="简短",
        max_output_tokens=9,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "热吗？"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "31°"},
        ],
    )
    body = response.json()
    assert (response.status_code, body["object"], body["status"]) == (200, "response", "completed")
    assert body["output"][0]["content"][0]["text"] == "你好"
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (5, 2)
    (request,) = router.requests.values()
    assert [turn["content"] for turn in request.messages] == ["简短", "热吗？", "", "31°"]
    assert request.messages[2]["tool_calls"][0]["function"]["name"] == "weather"
    sampling = request.sampling
    assert (sampling.max_new_tokens, json.loads(sampling.json_schema)) == (9, {"type": "object"})


async def test_a_response_streams_its_events_in_order(async_client, base, router):
    events = await payloads_of(await respond(async_client, stream=True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    # deltas that came together are one
    kinds = [kind.removeprefix("response.") for kind, _ in groupby(e["type"] for e in events)]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "你好"


async def test_a_response_that_was_cut_or_failed_says_so(async_client, base, router):
    router.script = lambda request: [("finished", {"finish_reason": "length", "usage": {}})]
    body = (await respond(async_client)).json()
    assert (body["status"], body["incomplete_details"]["reason"]) == (
        "incomplete",
        "max_output_tokens",
    )
    failure = {"message": "NaN", "type": "server_error", "param": None, "code": "nan_logits"}
    router.script = lambda request: [("queued", {}), ("failed", {"error": failure})]
    events = await payloads_of(await respond(async_client, stream=True))
    assert (events[-1]["type"], events[-1]["response"]["error"]["message"]) == (
        "response.failed",
        "NaN",
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [7]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"instructions": 7}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
async def test_a_bad_response_request_is_a_400_that_names_the_parameter(
    async_client, base, router, body, param
):
    response = await respond(async_client, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
