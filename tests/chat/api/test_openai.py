"""/v1/ against a scripted worker: what goes to the engine, what comes back, and every refusal in
OpenAI's words.
"""

import asyncio
import json

import pytest
from django.test import AsyncClient

from chat.engine.request import RequestRefused
from chat.models import Conversation
from chat.worker.router import WorkerUnavailable
from portal.models import TokenUsage

pytestmark = pytest.mark.django_db(transaction=True)
JSON = "application/json"
URL = "/v1/chat/completions"


async def post(client, **body):
    body = {"model": "base", "messages": [{"role": "user", "content": "你好"}], **body}
    return await client.post(URL, body, JSON)


async def chunks_of(response) -> list:
    text = "".join([part.decode() async for part in response])
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_an_answer(async_client, base, router):
    response = await post(async_client)
    body = response.json()
    assert response.status_code == 200
    assert (body["object"], body["model"]) == ("chat.completion", "base")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "你好", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert not await Conversation.objects.aexists() and not router.aborted


async def test_its_tokens_are_added_to_its_persons(async_client, base, router, member):
    for _time in range(2):
        await post(async_client, model="base", messages=[{"role": "user", "content": "q"}])
    row = await TokenUsage.objects.aget(user=member)
    told = (row.door, row.answers, row.prompt_tokens, row.completion_tokens)
    assert told == ("api", 2, 10, 4)


async def test_what_the_engine_is_asked_for(async_client, adapter, router, member):
    await post(
        async_client,
        model="base:tuned",
        temperature=0.5,
        top_p=0.9,
        max_tokens=9,
        seed=7,
        n=2,
        stop=["。", "x"],
        top_k=3,
        prefix_strength=0.25,
        messages=[
            {"role": "developer", "content": "简短"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}],
            },
            {"role": "assistant", "content": None},
            {"role": "user", "content": "?"},
        ],
    )
    first, second = router.requests.values()
    assert [message["role"] for message in first.messages] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert first.messages[1]["content"] == "你\n\n好" and first.messages[2]["content"] == ""
    assert (first.adapter.name, first.adapter.folder) == (adapter.sha256, str(adapter.path))
    sampling = first.sampling
    assert sampling.prefix_strength == 0.25
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (
        0.5,
        0.9,
        3,
        9,
    )
    assert (sampling.stop, sampling.seed, second.sampling.seed) == (("。", "x"), 7, 8)
    assert first.user == str(member.pk) and router.checkpoints[0].name == "base"


async def test_a_stream(async_client, base, router):
    response = await post(async_client, stream=True, stream_options={"include_usage": True}, n=2)
    assert response["Content-Type"].startswith("text/event-stream")
    chunks = await chunks_of(response)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == [] and chunks[-2]["usage"]["completion_tokens"] == 4
    for index in (0, 1):
        own = [
            chunk["choices"][0] for chunk in chunks[:-2] if chunk["choices"][0]["index"] == index
        ]
        assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == "stop"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "你好"
    assert all(chunk["usage"] is None for chunk in chunks[:-2])


async def test_a_stream_without_the_usage_has_none(async_client, base, router):
    chunks = await chunks_of(await post(async_client, stream=True))
    assert all("usage" not in chunk for chunk in chunks[:-1])


async def test_logprobs(async_client, base, router):
    body = (await post(async_client, logprobs=True, top_logprobs=3)).json()
    assert [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]] == ["a", "a"]
    assert next(iter(router.requests.values())).sampling.logprobs == 3
    chunks = await chunks_of(await post(async_client, logprobs=True, stream=True))
    assert (
        sum(
            len(c["choices"][0]["logprobs"]["content"])
            for c in chunks[:-1]
            if c["choices"][0]["logprobs"]
        )
        == 2
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_aborts(async_client, base, router, stream):
    router.hold = True

    async def read():
        response = await post(async_client, stream=stream, n=2)
        async for _part in response:
            pass

    reader = asyncio.create_task(read())
    while len(router.requests) < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    for _wait in range(100):
        if len(router.aborted) == 2:
            break
        await asyncio.sleep(0.01)
    assert set(router.aborted) == set(router.requests)


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (WorkerUnavailable("down"), 503, "worker_unavailable"),
        (WorkerUnavailable("loading", "worker_loading"), 503, "worker_loading"),
        (RequestRefused("queue_full", "full", retry_after=9), 503, "queue_full"),
        (
            RequestRefused("context_length_exceeded", "600 tokens, 512 fit", param="messages"),
            400,
            "context_length_exceeded",
        ),
        (RequestRefused("invalid_adapter", "shape", param="adapter"), 400, "invalid_adapter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_has_its_status_even_for_a_stream(
    async_client, base, router, refusal, status, code, stream
):
    router.refusal = refusal
    response = await post(async_client, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.get("Retry-After") == (
        {"queue_full": "9"}.get(code, "5") if status == 503 else None
    )


async def test_a_failure_on_the_way_is_the_streams_last_word(async_client, base, router):
    failure = {"message": "NaN", "type": "server_error", "param": None, "code": "nan_logits"}
    router.script = lambda request: [
        ("queued", {}),
        ("delta", {"text": "你"}),
        ("failed", {"error": failure}),
    ]
    assert (await chunks_of(await post(async_client, stream=True)))[-2:] == [
        {"error": failure},
        "[DONE]",
    ]
    response = await post(async_client)
    assert (response.status_code, response.json()) == (500, {"error": failure})


async def test_a_worker_that_dies_on_the_way_is_the_streams_last_word(async_client, base, router):
    router.script = lambda request: [
        ("queued", {}),
        ("delta", {"text": "你"}),
        ("delta", WorkerUnavailable("gone")),
    ]
    chunks = await chunks_of(await post(async_client, stream=True))
    assert chunks[-2]["error"]["code"] == "worker_unavailable"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "messages",
        ),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 7}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": "json"}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema",
        ),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"prefix_strength": 2.01}, "prefix_strength"),
        ({"prefix_strength": "1"}, "prefix_strength"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"white": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"seed": 1.5}, "seed"),
    ],
)
async def test_a_bad_body_is_a_400_that_names_the_parameter(
    async_client, base, router, body, param
):
    response = await post(async_client, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert response.json()["error"]["type"] == "invalid_request_error" and not router.requests
    assert response.json()["error"]["message"].startswith(f"{param}: "), (
        "all that many clients show"
    )


async def test_what_is_left_open_is_as_the_checkpoint_wishes(async_client, base, router):
    base.description = {"sampling": {"temperature": 0.2, "top_k": 20}}
    await base.asave()
    await post(async_client)
    await post(async_client, temperature=1, top_k=-1)
    wished, asked = (request.sampling for request in router.requests.values())
    assert (wished.temperature, wished.top_k, wished.top_p) == (0.2, 20, 0.7)
    assert (asked.temperature, asked.top_k) == (1, 0)


async def test_an_empty_system_message_is_none(async_client, base, router):
    question = {"role": "user", "content": "你好"}
    await post(async_client, messages=[{"role": "system", "content": ""}, question])
    (request,) = router.requests.values()
    assert request.messages == (question,)


async def test_chinese_is_written_as_it_is(async_client, base, router):
    for response in (
        await post(async_client),
        await post(async_client, n=0),
        await post(async_client, model="无"),
    ):
        assert b"\\u" not in response.content


async def test_neutral_values_ask_for_nothing(async_client, base, router):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "tools": [],
        "functions": None,
        "tool_choice": "auto",
        "function_call": "none",
        "response_format": {"type": "text"},
        "stop": "",
        "logit_bias": {},
        "logprobs": False,
        "top_logprobs": 0,
        "max_tokens": -1,
        "temperature": None,
        "n": None,
        "stream_options": None,
        "user": "me",
    }
    assert (await post(async_client, **neutral)).status_code == 200
    assert (await post(async_client)).status_code == 200
    with_all, with_none = (request.sampling for request in router.requests.values())
    assert with_all == with_none
    for neutral in ({"stop": [""]}, {"tools": [{"type": "function"}], "tool_choice": "none"}):
        assert (await post(async_client, **neutral)).status_code == 200


async def test_whole_numbers_may_be_spelt_as_floats(async_client, base, router):
    body = {"max_tokens": 512.0, "seed": 7.0, "top_k": 3.0, "n": 1.0, "top_logprobs": 2.0}
    assert (await post(async_client, **body, logprobs=True)).status_code == 200
    (request,) = router.requests.values()
    sampling = request.sampling
    numbers = [sampling.max_new_tokens, sampling.seed, sampling.top_k, sampling.logprobs]
    assert numbers == [512, 7, 3, 2] and all(type(number) is int for number in numbers)


async def test_a_client_may_ask_for_more_tokens_than_any_model_has(async_client, base, router):
    for many in (32_000, 10**7, 10**400, 1e300):
        assert (await post(async_client, max_tokens=many)).status_code == 200


async def test_penalties_and_biases_reach_the_engine(async_client, base, router):
    await post(
        async_client, presence_penalty=0.5, frequency_penalty=-1, logit_bias={"7": -100, "8": 1.5}
    )
    await post(async_client, top_p=0)
    first, second = (request.sampling for request in router.requests.values())
    assert (first.presence_penalty, first.frequency_penalty) == (0.5, -1)
    assert first.logit_bias == ((7, -100.0), (8, 1.5))
    assert not second.do_sample


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"at":"京"}'}}


async def test_a_history_with_tools_reaches_the_engine(async_client, base, router):
    """Which tells it in words where the template knows no tools."""
    question = {"role": "user", "content": "热吗？"}
    await post(
        async_client,
        messages=[
            question,
            {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
            {"role": "tool", "tool_call_id": "c1", "content": "31°"},
            {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "32°"}]},
        ],
    )
    await post(
        async_client,
        messages=[
            question,
            {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "31°"},
        ],
    )
    tools, functions = (request.messages for request in router.requests.values())
    assert tools == (
        question,
        {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "c2"}]},
        {"role": "tool", "content": "31°", "tool_call_id": "c1"},
        {"role": "tool", "content": "32°", "tool_call_id": "c2"},
    )
    assert functions[2] == {"role": "tool", "content": "31°", "name": "weather"}
    (call,) = functions[1]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": "{}"}


async def test_a_system_message_alone_is_asked(async_client, base, router):
    await post(async_client, messages=[{"role": "system", "content": "讲个笑话"}])
    (request,) = router.requests.values()
    assert request.messages == ({"role": "user", "content": "讲个笑话"},)


async def test_the_usage_says_when_there_was_less_room_than_asked_for(async_client, base, router):
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "max_tokens": 9}
    router.script = lambda request: [("finished", {"finish_reason": "length", "usage": usage})]
    assert (await post(async_client, max_tokens=4096)).json()["usage"] == usage
    stream = await post(async_client, stream=True, stream_options={"include_usage": True})
    assert (await chunks_of(stream))[-2]["usage"] == usage


@pytest.mark.parametrize("path", [URL, "/", "/api/v1/conversations/"])
@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "utf-16-le", "utf-32"])
async def test_a_body_in_another_encoding_is_told_so(async_client, base, router, path, encoding):
    body = '{"model": "base", "prompt": "你好"}'.encode(encoding)
    response = await async_client.post(path, body, JSON)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "not_utf8")
    assert "UTF-8" in error["message"]


async def test_a_byte_order_mark_is_passed_over(async_client, base, router):
    body = {"model": "base", "messages": [{"role": "user", "content": "你好"}]}
    content = b"\xef\xbb\xbf" + json.dumps(body).encode()
    assert (await async_client.post(URL, content, JSON)).status_code == 200


@pytest.mark.parametrize("body", ["", "{", "[]", '"x"', "7", "[" * 100_000])
async def test_what_is_no_object_is_a_400(async_client, base, router, body):
    response = await async_client.post(URL, body, JSON)
    assert response.status_code == 400 and response.json()["error"]["message"]


async def test_a_body_that_is_too_large_is_refused(async_client, base, router):
    response = await post(async_client, messages=[{"role": "user", "content": "x" * 6_000_000}])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "too_large")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 10_000, ":", "base:", ":tuned"])
async def test_a_name_that_can_be_none_is_a_404(async_client, base, router, name):
    assert (await post(async_client, model=name)).status_code == 404


async def test_an_unknown_model_is_a_404(async_client, base, router):
    for name in ("gpt-5", "base:none", "a/b"):
        response = await post(async_client, model=name)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert (await async_client.get(f"/v1/models/{name}")).status_code == 404


async def test_every_checkpoint_and_adapter_is_a_model(async_client, adapter, router):
    body = (await async_client.get("/v1/models")).json()
    assert [(m["id"], m["root"], m["parent"]) for m in body["data"]] == [
        ("base", "base", None),
        ("tuned", "base", "base"),
    ]
    for name in ("base", "tuned", "base:tuned"):
        found = (await async_client.get(f"/v1/models/{name}")).json()
        assert (found["id"], found["object"], found["root"]) == (name, "model", "base")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("get", URL),
        ("post", "/v1/models"),
        ("delete", "/v1/models/base"),
        ("post", "/v1/models/base"),
    ],
)
async def test_another_method_is_a_405_in_openais_words(key, base, method, path):
    client = AsyncClient(enforce_csrf_checks=True)
    response = await getattr(client, method)(path, headers={"Authorization": f"Bearer {key}"})
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_a_response_format_becomes_a_schema(async_client, base, router):
    schema = {"type": "object", "properties": {"颜色": {"type": "string"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for wanted in ({"type": "json_object"}, named):
        assert (await post(async_client, response_format=wanted)).status_code == 200
    anything, given = (json.loads(r.sampling.json_schema) for r in router.requests.values())
    assert (anything, given) == ({"type": "object"}, schema)


def thinking_aloud(request):
    yield "started", {"prompt_tokens": 5}
    for piece in ("<think>\nis it", " 1 < 2?\n</th", "ink>\n\nYes", "."):
        yield "delta", {"text": piece, "tokens": 1}
    yield "finished", {"finish_reason": "stop", "usage": {}, "timings": {}}


async def test_thoughts_come_apart_from_the_answer(async_client, base, router):
    router.script = thinking_aloud
    message = (await post(async_client)).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("is it 1 < 2?", "Yes.")
    chunks = (await chunks_of(await post(async_client, stream=True)))[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "is it 1 < 2?"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."


@pytest.mark.parametrize(
    ("body", "wish"),
    [
        ({}, None),
        ({"enable_thinking": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"thinking": False}, "enable_thinking": None}, False),
    ],
)
async def test_whether_to_think_is_asked_for(async_client, base, router, body, wish):
    assert (await post(async_client, **body)).status_code == 200
    assert [request.sampling.thinking for request in router.requests.values()] == [wish]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs.documents"),
    ],
)
async def test_a_wrong_wish_about_thinking_is_named(async_client, base, router, body, param):
    response = await post(async_client, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_template_that_refuses_is_quoted(async_client, base, router):
    """As the engine refuses it: its own sentence, 400, no internal_error."""
    told = "the checkpoint's chat template does not take these messages: Roles must alternate"
    router.refusal = RequestRefused("template_refused", told, param="messages")
    for body in ({}, {"stream": True}):
        response = await post(async_client, **body)
        error = response.json()["error"]
        assert response.status_code == 400
        assert (error["code"], error["message"]) == ("template_refused", told)
