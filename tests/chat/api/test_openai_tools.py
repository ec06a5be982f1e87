"""Tools and the older functions, in the words of /v1/chat/completions and /v1/responses."""

import json

import pytest

from tests.chat.api.test_openai import chunks_of, post
from tests.chat.api.test_openai_text import payloads_of, respond

pytestmark = pytest.mark.django_db(transaction=True)

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"at": {}}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"at": "京"}}\n</tool_call>'
ARGUMENTS = '{"at": "京"}'


@pytest.fixture
def says(router):
    """Lets the model write this text, in small pieces."""

    def says(text: str, reason: str = "stop"):
        def script(request):
            for at in range(0, len(text), 7):
                yield "delta", {"text": text[at : at + 7], "tokens": 1}
            yield "finished", {"finish_reason": reason, "usage": {}, "timings": {}}

        router.script = script

    return says


def request_of(router):
    return list(router.requests.values())[-1]


async def test_a_call_is_no_text(async_client, base, router, says):
    says(f"看看。\n{CALL}\n{CALL}")
    (choice,) = (await post(async_client, tools=[TOOL])).json()["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "看看。")
    first, second = message["tool_calls"]
    assert first["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert first["type"] == "function" and first["id"] != second["id"]
    (tool,) = request_of(router).tools
    assert tool["function"]["parameters"] == WEATHER["parameters"]
    one = await post(async_client, tools=[TOOL], parallel_tool_calls=False)
    assert len(one.json()["choices"][0]["message"]["tool_calls"]) == 1


async def test_calls_stream_in_openais_shape(async_client, base, says):
    says(f"<think>\nhm\n</think>\n\n{CALL}")
    chunks = await chunks_of(await post(async_client, tools=[TOOL], stream=True))
    choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
    deltas = [part for choice in choices for part in choice["delta"].get("tool_calls", [])]
    assert deltas[0]["id"] and deltas[0]["function"] == {"name": "weather", "arguments": ""}
    assert all("id" not in part and part["index"] == 0 for part in deltas[1:])
    assert "".join(part["function"]["arguments"] for part in deltas) == ARGUMENTS
    assert "".join(choice["delta"].get("reasoning_content", "") for choice in choices) == "hm"
    assert not any(choice["delta"].get("content") for choice in choices)
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_older_functions(async_client, base, router, says, stream):
    says(CALL)
    asked = {"functions": [WEATHER], "function_call": {"name": "weather"}, "stream": stream}
    response = await post(async_client, **asked)
    if stream:
        chunks = await chunks_of(response)
        choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
        parts = [choice["delta"].get("function_call", {}) for choice in choices]
        called = {
            name: "".join(part.get(name, "") for part in parts) for name in ("name", "arguments")
        }
    else:
        choices = response.json()["choices"]
        called = choices[0]["message"]["function_call"]
    assert called == {"name": "weather", "arguments": ARGUMENTS}
    assert choices[-1]["finish_reason"] == "function_call"
    assert request_of(router).must_call == ("weather",)


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("choice", "must_call"),
    [(None, ()), ("auto", ()), ("required", ("weather", "time")), (NAMED, ("weather",))],
)
async def test_what_must_be_called(async_client, base, router, choice, must_call):
    tools = [TOOL, {"type": "function", "function": {"name": "time"}}]
    response = await post(async_client, tools=tools, tool_choice=choice)
    assert response.json()["choices"][0]["finish_reason"] == "stop"  # what it says calls nothing
    assert request_of(router).must_call == must_call


async def test_an_answer_that_was_cut_says_so(async_client, base, says):
    says(CALL[:-20], "length")
    (choice,) = (await post(async_client, tools=[TOOL])).json()["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"]


async def test_without_tools_nothing_is_a_call(async_client, base, router, says):
    says(CALL)
    for asked in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        (choice,) = (await post(async_client, **asked)).json()["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", CALL)
        assert request_of(router).tools == ()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tools[1].type"),
        ({"tools": [7]}, "tools[0].type"),
        ({"tools": {}}, None),
        ({"tools": "weather"}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].name"),
        ({"functions": [{"name": "f", "parameters": "x"}]}, "functions[0].parameters"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"name": "time"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [{"function": {"name": "f", "description": "a" * 200_001}}]}, "tools"),
    ],
)
async def test_bad_tools_are_refused_by_name(async_client, base, router, body, param):
    response = await post(async_client, **body)
    told = response.json().get("error", {}).get("param")
    assert (response.status_code, told) == ((400, param) if param else (200, None))


async def test_a_response_has_items_of_thoughts_text_and_calls(async_client, base, router, says):
    says(f"<think>\nhm\n</think>\n\n看看。{CALL}")
    flat = [{"type": "function", **WEATHER}]
    body = (await respond(async_client, tools=flat)).json()
    thought, text, call = body["output"]
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert text["content"][0]["text"] == "看看。"
    assert (call["name"], call["arguments"], call["status"]) == ("weather", ARGUMENTS, "completed")
    events = await payloads_of(await respond(async_client, tools=flat, stream=True))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert events[-1]["response"]["output"] == done
    written = [e for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert json.loads("".join(event["delta"] for event in written)) == {"at": "京"}
    assert {event["output_index"] for event in written} == {2}
    again = [{"role": "user", "content": "热吗"}, *done]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "31"}
    assert (await respond(async_client, input=[*again, result])).status_code == 200
    turns = request_of(router).messages
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"]
    assert turns[1]["content"] == "看看。" and len(turns[1]["tool_calls"]) == 1
