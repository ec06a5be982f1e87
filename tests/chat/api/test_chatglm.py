"""POST / as ChatGLM-6B's api.py answered it."""

import re

import pytest

from chat.engine.request import RequestRefused

pytestmark = pytest.mark.django_db(transaction=True)


async def post(client, body):
    return await client.post("/", body, "application/json")


async def test_the_tutorials_request(async_client, base, router):
    response = await post(async_client, {"prompt": "你好", "history": []})
    body = response.json()
    assert response.status_code == 200 and list(body) == ["response", "history", "status", "time"]
    assert (body["response"], body["history"], body["status"]) == ("你好", [["你好", "你好"]], 200)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", body["time"])
    (request,) = router.requests.values()
    assert (request.sampling.max_length, request.sampling.max_new_tokens) == (2048, None)
    assert (request.sampling.top_p, request.sampling.temperature, request.sampling.top_k) == (
        0.7,
        0.95,
        50,
    )


async def test_how_strongly_the_prefix_acts(async_client, base, router):
    await post(async_client, {"prompt": "你好", "prefix_strength": 0})
    (request,) = router.requests.values()
    assert request.sampling.prefix_strength == 0
    response = await post(async_client, {"prompt": "你好", "prefix_strength": 3})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prefix_strength"


async def test_the_history_goes_along_and_grows(async_client, base, router):
    response = await post(async_client, {"prompt": "那么？", "history": [["q", "a"]]})
    assert response.json()["history"] == [["q", "a"], ["那么？", "你好"]]
    (request,) = router.requests.values()
    assert [message["content"] for message in request.messages] == ["q", "a", "那么？"]


@pytest.mark.parametrize("falsy", [0, None, "", False])
async def test_a_falsy_value_is_the_default(async_client, base, router, falsy):
    body = {
        "prompt": "x",
        "history": falsy,
        "max_length": falsy,
        "top_p": falsy,
        "temperature": falsy,
        "model": falsy,
    }
    assert (await post(async_client, body)).status_code == 200
    (request,) = router.requests.values()
    assert (request.sampling.max_length, request.sampling.top_p, request.sampling.temperature) == (
        2048,
        0.7,
        0.95,
    )


async def test_the_checkpoints_own_wish_comes_before_the_default_and_after_the_request(
    async_client, base, router
):
    base.description = {"sampling": {"temperature": 0.2}}
    await base.asave()
    await post(async_client, {"prompt": "x"})
    await post(async_client, {"prompt": "x", "temperature": 0.6})
    assert [request.sampling.temperature for request in router.requests.values()] == [0.2, 0.6]


async def test_a_model_chooses_the_adapter(async_client, adapter, router):
    assert (await post(async_client, {"prompt": "x", "model": "tuned"})).status_code == 200
    (request,) = router.requests.values()
    assert request.adapter.name == adapter.sha256
    assert (await post(async_client, {"prompt": "x", "model": "none"})).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x", "history": [["a"]]}, "history"),
        ({"prompt": "x", "history": [["a", None]]}, "history"),
        ({"prompt": "x", "history": {"a": 1}}, "history"),
        ({"prompt": "x", "top_p": 1.5}, "top_p"),
        ({"prompt": "x", "max_length": "many"}, "max_length"),
        ({"prompt": "x", "model": ["a"]}, "model"),
        ([], None),
    ],
)
async def test_a_bad_body_is_a_400_that_names_the_field(async_client, base, router, body, param):
    response = await post(async_client, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_refusal_has_its_status(async_client, base, router):
    router.refusal = RequestRefused("queue_full", "full", retry_after=3)
    response = await post(async_client, {"prompt": "x"})
    assert (response.status_code, response["Retry-After"]) == (503, "3")


async def test_without_a_checkpoint_the_message_says_what_to_do(async_client, db):
    response = await post(async_client, {"prompt": "x"})
    assert response.status_code == 400 and "add_checkpoint" in response.json()["error"]["message"]


async def test_thoughts_are_no_part_of_the_answer(async_client, base, router):
    router.script = lambda request: [
        ("delta", {"text": "<think>\nhm\n</think>\n\n好", "tokens": 1}),
        ("finished", {"finish_reason": "stop", "usage": {}, "timings": {}}),
    ]
    body = (await async_client.post("/", {"prompt": "热吗"}, "application/json")).json()
    assert (body["response"], body["history"]) == ("好", [["热吗", "好"]])
