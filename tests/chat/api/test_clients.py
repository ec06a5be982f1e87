"""Requests as popular clients send them, written from their public sources: each gets an answer.

The fields are the clients' own, down to those that mean nothing here.
"""

import json

import pytest

pytestmark = pytest.mark.django_db(transaction=True)
JSON = "application/json"
CHAT = "/v1/chat/completions"
ASKED = {"role": "user", "content": "你好"}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0}
USAGE = {"stream_options": {"include_usage": True}}

REQUESTS = {
    "Open WebUI": {
        "stream": True,
        "messages": [SYSTEM, ASKED, {"role": "assistant", "content": "你好！"}, ASKED],
        **USAGE,
        "temperature": 0.8,
        "logit_bias": {},
        "seed": 0,
        "stop": [],
        "max_tokens": 128000,
        "frequency_penalty": 1.1,
    },
    "Open WebUI naming a chat": {
        "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title."}],
        "stream": False,
        "max_completion_tokens": 1000,
        "response_format": None,
    },
    "LobeChat": {
        "messages": [SYSTEM, ASKED],
        **PENALTIES,
        "stream": True,
        "temperature": 1,
        "top_p": 1,
        **USAGE,
        "user": "lobe",
        "tools": None,
        "reasoning_effort": "medium",
    },
    "NextChat": {
        "messages": [
            {
                "role": "system",
                "content": "\nYou are ChatGPT.\nCurrent model: base\nLatex inline: \\(x^2\\)",
            },
            ASKED,
        ],
        "stream": True,
        **PENALTIES,
        "temperature": 0.5,
        "top_p": 1,
        "max_tokens": 4000,
    },
    "Dify checking the key": {"max_tokens": 5, "messages": [{"role": "user", "content": "ping"}]},
    "Dify": {
        "stream": True,
        "temperature": 0.7,
        "top_p": 1,
        "max_tokens": 4096,
        **PENALTIES,
        "messages": [{"role": "system", "content": "回答用户"}, ASKED],
        "stop": ["\nObservation"],
        "user": "7c1e0e8b",
    },
    "Dify, one box of text": {
        "messages": [{"role": "system", "content": "把“你好”译成英文"}],
        "stream": True,
    },
    "Dify, an image as parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "data": "", "text": "你好"}]}],
        "stream": True,
    },
    "Cherry Studio": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "你好"}]}],
        "temperature": 1,
        "top_p": 1,
        "max_tokens": None,
        "keep_alive": "5m",
        "stream": True,
        **USAGE,
        "enable_thinking": False,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "one-api testing a channel": {
        "messages": [{"role": "user", "content": "Output only your specific model name."}],
        "max_tokens": 2,
        "n": 1,
        "seed": 1.0,
    },
    "one-api": {"messages": [ASKED], "max_tokens": 2048, "stream": True, "tool_choice": None},
    "LangChain": {
        "messages": [
            {"content": "你好", "role": "user"},
            {
                "content": None,
                "role": "assistant",
                "tool_calls": [
                    {
                        "type": "function",
                        "id": "call_1",
                        "function": {"name": "search", "arguments": '{"q": "裙子"}'},
                    }
                ],
            },
            {"content": "红裙", "role": "tool", "tool_call_id": "call_1"},
        ],
        "n": 1,
        "stream": False,
        "temperature": 0.7,
        "logprobs": False,
    },
    "LangChain's ChatGLM3": {
        "messages": [ASKED],
        "max_tokens": 80000,
        "temperature": 0.1,
        "top_p": 0.9,
        "stream": False,
    },
    "LiteLLM": {
        "messages": [ASKED],
        "max_tokens": 10,
        "extra_body": {},
        "drop_params": True,
        "parallel_tool_calls": True,
        "functions": [],
        "function_call": "auto",
        "stream": False,
        "stream_options": None,
        "service_tier": "auto",
        "store": False,
        "metadata": {},
        "modalities": ["text"],
    },
}


@pytest.mark.parametrize("client", REQUESTS)
async def test_a_clients_request_gets_an_answer(async_client, base, router, client):
    body = {"model": "base", **REQUESTS[client]}
    response = await async_client.post(CHAT, body, JSON)
    assert response.status_code == 200, response.content.decode()
    if body.get("stream"):
        lines = "".join([part.decode() async for part in response]).split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "你好"
        assert lines[-2] == "data: [DONE]"
    else:
        assert response.json()["choices"][0]["message"]["content"] == "你好"


@pytest.mark.parametrize(
    "history",
    [
        [],
        [["我将从美国到中国来旅游", "欢迎问我任何问题。"]],
        [[None, "欢迎问我任何问题。"], [None, "好"]],  # with_history=True keeps answers alone
    ],
)
async def test_langchains_chatglm(async_client, base, router, history):
    body = {
        "prompt": "北京和上海两座城市有什么不同？",
        "temperature": 0.1,
        "history": history,
        "max_length": 80000,
        "top_p": 0.9,
        "sample_model_args": False,
    }
    response = await async_client.post("/", body, JSON)
    assert (response.status_code, response.json()["response"]) == (200, "你好")
    (request,) = router.requests.values()
    assert len(request.messages) == 2 * len(history) + 1


async def test_what_clients_ask_before_they_chat(async_client, adapter, router):
    """The list of models, with what clients read of it."""
    models = (await async_client.get("/v1/models")).json()["data"]
    assert len(models) == 2
    for model in models:
        assert model.keys() >= {"id", "object", "created", "owned_by"}
