"""Scripts against the real web process: the official OpenAI client, the tutorial's curl, event
streams and websockets.
"""

import http.client
import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import openai
import pytest
import websockets
from websockets.sync.client import connect

from chat.worker.router import _get_status
from chat.worker.wire import Address
from tests.support import ROOT
from tests.support.live_portal import wait_for
from tests.support.web_process import Web
from tests.support.worker_process import TOKEN

pytestmark = pytest.mark.xdist_group("web")


@pytest.fixture(scope="module")
def web():
    with Web() as running:
        yield running


@pytest.fixture(scope="module")
def client(web):
    return openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.key, max_retries=0, timeout=30)


def curl(*arguments: str) -> str:
    return subprocess.run(
        ["curl", "-sS", *arguments], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def ask(words: str, **more) -> dict:
    return {"model": "pretend", "messages": [{"role": "user", "content": words}], **more}


def rows_of(web) -> int:
    """Sequences that the worker is writing."""
    return _get_status(Address.parse(web.worker.url), TOKEN, 5)["active_rows"]


def test_the_official_client_gets_an_answer(client):
    answer = client.chat.completions.create(**ask("words 5", n=2, seed=1))
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert all(len(choice.message.content.split()) == 5 for choice in answer.choices)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 10)


def test_the_official_client_streams(client):
    stream = client.chat.completions.create(
        **ask("every 0.02 words 20", stream=True, stream_options={"include_usage": True})
    )
    chunks = [(time.monotonic(), chunk) for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for _at, chunk in chunks if chunk.choices)
    assert len(text.split()) == 20
    assert chunks[-1][1].usage.completion_tokens == 20
    assert chunks[-1][0] - chunks[0][0] > 0.2  # while it was written, not at the end


def test_the_official_client_completes_texts_and_makes_responses(client):
    completed = client.completions.create(model="pretend", prompt=["words 3", "words 2"])
    assert [len(choice.text.split()) for choice in completed.choices] == [3, 2]
    streamed = client.completions.create(model="pretend", prompt="words 4", stream=True)
    assert len("".join(chunk.choices[0].text for chunk in streamed).split()) == 4
    response = client.responses.create(model="pretend", input="words 3", instructions="be brief")
    assert (len(response.output_text.split()), response.usage.output_tokens) == (3, 3)
    with client.responses.stream(model="pretend", input="words 5") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text
        assert len("".join(deltas).split()) == 5
    with pytest.raises(openai.NotFoundError, match="chat/completions"):
        client.embeddings.create(model="pretend", input="x")


CALLED = 'write <tool_call>{"name": "weather", "arguments": {"at": "京"}}</tool_call>'


def test_the_official_client_calls_tools(client):
    """And its stream helpers put the pieces together."""
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"at": {}}}}
    tools = [{"type": "function", "function": function}]
    with client.chat.completions.stream(**ask(CALLED, tools=tools)) as stream:
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert json.loads(call.function.arguments) == {"at": "京"}
    asked = ask("words 2", tools=tools)
    result = {"role": "tool", "tool_call_id": call.id, "content": "words 3"}
    history = [*asked["messages"], choice.message.to_dict(), result]
    said = client.chat.completions.create(**{**asked, "messages": history})
    assert len(said.choices[0].message.content.split()) == 3
    flat = [{"type": "function", **function}]
    with client.responses.stream(model="pretend", input=CALLED, tools=flat) as stream:
        (item,) = stream.get_final_response().output
    assert (item.type, json.loads(item.arguments)) == ("function_call", {"at": "京"})


def test_the_terminal_talks_to_another_portal(web):
    command = [sys.executable, "manage.py", "chat", "--url", web.url]
    said = {
        "input": "words 3\n/model nobody\nwords 2\nstop\n",
        "capture_output": True,
        "text": True,
    }
    there = subprocess.run([*command, "--key", web.key], cwd=ROOT, env=web.environment, **said)
    answers = [len(line.split()) for line in there.stdout.splitlines() if line.strip()]
    assert (there.returncode, answers) == (0, [3, 2]), there.stderr
    assert "pretend" in there.stderr, "the models that there are"
    refused = subprocess.run([*command, "--key", "sk-wrong"], cwd=ROOT, env=web.environment, **said)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr


def test_the_official_client_lists_models(client):
    assert [model.id for model in client.models.list()] == ["pretend"]
    assert client.models.retrieve("pretend").id == "pretend"


def test_the_official_client_understands_every_refusal(web, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**ask("x"), "model": "gpt-5"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask("x", temperature=9))
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask("refuse context_length_exceeded", stream=True))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**ask("refuse queue_full"))
    assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"] == "7"
    stranger = openai.OpenAI(base_url=f"{web.url}/v1", api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(**ask("x"))


@pytest.mark.parametrize("words", ["hang", "every 0.005 words 9999"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_generation(web, stream, words):
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=20)
    headers = {"Authorization": f"Bearer {web.key}", "Content-Type": "application/json"}
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(ask(words, stream=stream)), headers
    )
    wait_for(lambda: rows_of(web) == 1, 10, "the generation")
    connection.close()
    wait_for(lambda: rows_of(web) == 0, 10, "its end")


def test_what_is_being_answered_ends_when_its_key_is_revoked(web):
    """Also where nothing is streamed, and where the answer still waits."""
    make = "from portal.models import *; print(ApiKey.create_for(User.objects.get())[1])"
    key = web.manage("shell", "-v", "0", "-c", make).strip()
    doors = {
        "/": {"prompt": "hang"},
        "/v1/chat/completions": ask("hang"),
        "/v1/completions": {"model": "pretend", "prompt": "hang"},
        "/v1/responses": {"model": "pretend", "input": "hang"},
    }
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    asked = []
    for path, body in doors.items():
        connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=20)
        connection.request("POST", path, json.dumps(body), headers)
        asked.append(connection)
    wait_for(lambda: rows_of(web) == len(doors), 10, "the generations")
    with closing(sqlite3.connect(f"{web.folder.name}/portal.sqlite3")) as database:
        revoke = "UPDATE portal_apikey SET revoked_at = '2026-01-01' WHERE prefix = ?"
        assert database.execute(revoke, [key[:9]]).rowcount == 1
        database.commit()
    for connection in asked:
        answer = connection.getresponse()
        told = json.load(answer)["error"]
        assert (answer.status, told["code"]) == (401, "invalid_api_key")
        connection.close()
    wait_for(lambda: rows_of(web) == 0, 10, "their end")


def test_the_tutorials_curl(web):
    reply = json.loads(
        curl(
            "-X",
            "POST",
            web.url,
            "-H",
            "Content-Type: application/json",
            "-H",
            f"Authorization: Bearer {web.key}",
            "-d",
            '{"prompt": "words 3", "history": []}',
        )
    )
    assert reply["status"] == 200 and reply["history"] == [["words 3", reply["response"]]]
    assert len(reply["response"].split()) == 3


def test_a_conversation_over_rest_and_its_event_stream(web):
    header = ["-H", f"Authorization: Bearer {web.key}", "-H", "Content-Type: application/json"]
    conversation = json.loads(curl(f"{web.url}/api/v1/conversations/", *header, "-d", "{}"))["id"]
    messages = f"{web.url}/api/v1/conversations/{conversation}/messages/"
    answer = json.loads(curl(messages, *header, "-d", '{"content": "every 0.05 words 10"}'))[
        "answer"
    ]
    stream = f"{web.url}/api/v1/messages/{answer['id']}/stream/"
    whole, later = (curl("-N", f"{stream}?after={after}", *header) for after in (0, 3))
    for text, after in ((whole, 0), (later, 3)):
        blocks = [
            dict(line.split(": ", 1) for line in block.splitlines())
            for block in text.strip().split("\n\n")
        ]
        numbers = [int(block["id"]) for block in blocks]
        assert numbers == sorted(set(numbers)) and numbers[0] > after
        assert blocks[-1]["event"] == "message.finished"
    saved = json.loads(curl(messages, *header))["results"][-1]
    assert saved["status"] == "complete" and len(saved["content"].split()) == 10


def test_stop_over_rest_keeps_what_was_written(web):
    header = ["-H", f"Authorization: Bearer {web.key}", "-H", "Content-Type: application/json"]
    conversation = json.loads(curl(f"{web.url}/api/v1/conversations/", *header, "-d", "{}"))["id"]
    messages = f"{web.url}/api/v1/conversations/{conversation}/messages/"
    answer = json.loads(curl(messages, *header, "-d", '{"content": "hang"}'))["answer"]
    wait_for(lambda: rows_of(web) == 1, 10, "the generation")
    stopped = json.loads(
        curl("-X", "POST", f"{web.url}/api/v1/messages/{answer['id']}/stop/", *header)
    )
    assert stopped["status"] == "stopped" and len(stopped["content"].split()) == 1
    assert rows_of(web) == 0


def socket(web, conversation: int, cookie: str | None = None, origin: str | None = None):
    headers = {"Cookie": f"sessionid={web.cookie if cookie is None else cookie}"}
    address = f"ws://127.0.0.1:{web.port}/ws/conversations/{conversation}/"
    return connect(address, additional_headers=headers, origin=origin or web.url)


def conversation_of(web) -> int:
    header = ["-H", f"Authorization: Bearer {web.key}", "-H", "Content-Type: application/json"]
    return json.loads(curl(f"{web.url}/api/v1/conversations/", *header, "-d", "{}"))["id"]


def test_two_tabs_and_a_reload_lose_nothing_of_an_answer(web):
    conversation = conversation_of(web)
    with socket(web, conversation) as first, socket(web, conversation) as second:
        first.send(json.dumps({"type": "message.send", "content": "every 0.05 words 30"}))
        seen = [json.loads(first.recv(10)) for _frame in range(4)]
        answer = seen[-1]["message"]
        second.send(json.dumps({"type": "attach", "message": answer, "after": 0}))
        first.close()  # the reload
        with socket(web, conversation) as again:
            again.send(json.dumps({"type": "attach", "message": answer, "after": seen[-1]["seq"]}))
            seen += until_the_end(again)
        whole = until_the_end(second)
    assert text_of(seen) == text_of(whole) and len(text_of(whole).split()) == 30


def test_stop_ends_mine_and_nobody_elses(web):
    with socket(web, conversation_of(web)) as mine, socket(web, conversation_of(web)) as other:
        for page in (mine, other):
            page.send(json.dumps({"type": "message.send", "content": "every 0.02 words 60"}))
        answer = json.loads(mine.recv(10))["message"]
        other.recv(10)
        # of another conversation
        other.send(json.dumps({"type": "message.stop", "message": answer}))
        assert (
            json.loads(wait_for(lambda: error_of(other), 10, "the refusal"))["error"]["code"]
            == "not_found"
        )
        mine.send(json.dumps({"type": "message.stop", "message": answer}))
        ended = until_the_end(mine)[-1]
        assert (ended["type"], ended["finish_reason"]) == ("message.finished", "abort")
        assert until_the_end(other)[-1]["finish_reason"] == "stop"


def error_of(page) -> str | None:
    frame = page.recv(10)
    return frame if '"type":"error"' in frame else None


def until_the_end(page) -> list[dict]:
    frames = []
    while not frames or frames[-1]["type"] not in ("message.finished", "message.failed"):
        frames.append(json.loads(page.recv(20)))
        page.send(json.dumps({"type": "ack", "seq": frames[-1]["seq"]}))
    return frames


def text_of(frames) -> str:
    return "".join(frame.get("text", "") for frame in frames)


def test_an_answer_too_long_for_one_frame_is_read_to_its_end(web):
    """The web server refuses to send a frame above 1 MiB."""
    conversation = conversation_of(web)
    code = f"""
from chat.models import Message
content = "字" * 400_000
print(Message.objects.create(conversation_id={conversation}, role="assistant", content=content).pk)
"""
    message = int(web.manage("shell", "-v", "0", "-c", code))
    with socket(web, conversation) as page:
        page.send(json.dumps({"type": "attach", "message": message, "after": 0}))
        text, frame = "", {}
        while frame.get("type") != "message.finished":
            frame = json.loads(page.recv(10))
            text += frame.get("text", "")
            page.send(json.dumps({"type": "ack", "message": message, "seq": frame["seq"]}))
    assert text == "字" * 400_000


def test_the_socket_needs_a_login_an_owner_and_this_sites_origin(web):
    conversation = conversation_of(web)
    for cookie, number, code in (("", conversation, 4401), (None, conversation + 1000, 4404)):
        with (
            socket(web, number, cookie) as page,
            pytest.raises(websockets.ConnectionClosed) as caught,
        ):
            page.recv(10)
        assert caught.value.rcvd.code == code
    with pytest.raises(websockets.InvalidStatus) as refused:
        socket(web, conversation, origin="http://evil.example").__enter__()
    assert refused.value.response.status_code == 403


def test_a_scripts_key_opens_the_socket_of_its_owner(web):
    address = f"{web.url.replace('http', 'ws', 1)}/ws/conversations/{conversation_of(web)}/"
    with connect(address, additional_headers={"Authorization": f"Bearer {web.key}"}) as script:
        script.send(json.dumps({"type": "message.send", "content": "words 3"}))
        assert len(text_of(until_the_end(script)).split()) == 3
    wrong = {"Authorization": "Bearer sk-wrong"}
    with (
        connect(address, additional_headers=wrong) as script,
        pytest.raises(websockets.ConnectionClosed) as caught,
    ):
        script.recv(10)
    assert caught.value.rcvd.code == 4401


def test_a_worker_that_dies_ends_the_stream_and_the_next_request_is_told_to_wait(web, client):
    """Last: it takes the worker away, and brings it back."""
    stream = client.chat.completions.create(**ask("every 0.05 words 1000", stream=True))
    next(iter(stream))
    web.worker.kill()
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**ask("x"))
        assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"]
        reply = curl(
            "-w",
            "%{http_code}",
            f"{web.url}/",
            "-H",
            f"Authorization: Bearer {web.key}",
            "-d",
            '{"prompt": "x"}',
        )
        assert reply.endswith("503")
        with socket(web, conversation_of(web)) as page:
            page.send(json.dumps({"type": "message.send", "content": "x"}))
            failed = until_the_end(page)[-1]
            assert failed["type"] == "message.failed" and failed["error"]["message"]
        web.worker.start()
        with pytest.raises(openai.APIError) as caught:
            for _chunk in stream:
                pass
        assert caught.value.code == "sequence_lost"
    finally:
        if web.worker.process.poll() is not None:
            web.worker.start()
    answer = wait_for(lambda: attempt(client), 15, "an answer of the new worker")
    assert answer.choices[0].finish_reason == "stop"


def attempt(client):
    try:
        return client.chat.completions.create(**ask("words 2"))
    except openai.InternalServerError:
        return None
