"""Submit, follow, abort and status through the real server in a process of its own, with an engine
that needs no model.
"""

import asyncio
import itertools
import json
import os
import socket
import stat
import subprocess
import sys

import pytest

from chat.engine.request import AdapterRef, CheckpointRef, Request, RequestRefused, SamplingParams
from chat.worker.router import Router, SequenceLost, WorkerClient, WorkerUnavailable
from chat.worker.wire import Address, request_as_dict, request_from_dict
from tests.support.pretend_engine import text
from tests.support.worker_process import CHECKPOINT, TOKEN, PretendWorker

numbers = itertools.count()


def ask(words: str, **fields) -> Request:
    return Request(
        id=f"sequence-{next(numbers)}", messages=({"role": "user", "content": words},), **fields
    )


@pytest.fixture(scope="module")
def worker():
    with PretendWorker(grace=0.6) as running:
        yield running


@pytest.fixture
async def client(worker):
    client = WorkerClient(worker.url, TOKEN)
    await ready(client)
    yield client
    await client.close()


async def ready(client, seconds=10.0):
    async with asyncio.timeout(seconds):
        while True:
            try:
                if (await client.status())["state"] == "ready":
                    return
            except WorkerUnavailable:
                pass
            await asyncio.sleep(0.02)


async def read(client, id, after=0):
    events = []
    async with asyncio.timeout(15):
        async for news in client.events(id, after):
            events += news
    return events


def written(events) -> str:
    return "".join(event.data["text"] for event in events if event.type == "delta")


async def test_an_answer_arrives_whole_and_in_order(client):
    request = ask("words 300")
    await client.submit(request)
    events = await read(client, request.id)
    assert [event.type for event in events[:2]] == ["queued", "started"]
    assert written(events) == text(request.id, 300)
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    assert events[-1].data["finish_reason"] == "stop"
    assert events[-1].seq == 303
    assert events[-1].data["usage"]["completion_tokens"] == 300
    assert sum(event.data["tokens"] for event in events if event.type == "delta") == 300


async def test_many_answers_share_one_connection(client):
    requests = [ask(f"every 0.001 words {20 + i}") for i in range(40)]
    for request in requests:
        await client.submit(request)
    answers = await asyncio.gather(*(read(client, request.id) for request in requests))
    for i, (request, events) in enumerate(zip(requests, answers, strict=True)):
        assert written(events) == text(request.id, 20 + i)
    assert (await client.status())["clients"] == 1


async def test_a_reader_that_left_goes_on_where_it_was(client, worker):
    request = ask("every 0.01 words 60")
    await client.submit(request)
    seen = []
    async for news in client.events(request.id):
        seen += news
        if len(seen) > 10:
            break
    other = WorkerClient(worker.url, TOKEN)
    rest = await read(other, request.id, after=seen[-1].seq)
    await other.close()
    assert written(seen + rest) == text(request.id, 60)
    assert rest[0].seq > seen[-1].seq


async def test_an_ended_answer_can_be_read_again(client):
    request = ask("words 5")
    await client.submit(request)
    first = await read(client, request.id)
    assert written(await read(client, request.id)) == written(first)
    assert [event.type for event in await read(client, request.id, after=first[-1].seq - 1)] == [
        "finished"
    ]


async def test_submitting_the_same_id_again_attaches(client):
    request = ask("every 0.01 words 20")
    await client.submit(request)
    await client.submit(request)
    assert written(await read(client, request.id)) == text(request.id, 20)


async def test_an_abort_ends_one_sequence_and_no_other(client):
    mine, other = ask("hang"), ask("every 0.01 words 30")
    await client.submit(mine)
    await client.submit(other)
    await client.abort(mine.id)
    assert (await read(client, mine.id))[-1].data["finish_reason"] == "abort"
    assert written(await read(client, other.id)) == text(other.id, 30)


async def test_a_refusal_reaches_the_caller_as_it_was(client):
    with pytest.raises(RequestRefused) as refusal:
        await client.submit(ask("refuse queue_full"))
    assert (refusal.value.code, refusal.value.param, refusal.value.retry_after) == (
        "queue_full",
        "messages",
        7,
    )


async def test_a_fault_of_the_engine_at_the_door_is_a_refusal(client):
    with pytest.raises(RequestRefused) as refusal:
        await client.submit(ask(""))  # the pretend engine stumbles over it
    assert refusal.value.code == "internal_error"


async def test_without_a_reader_the_answer_is_ended_after_the_grace_period(client):
    request = ask("hang")
    await client.submit(request)
    async for _news in client.events(request.id):
        break
    await asyncio.sleep(1.2)
    events = await read(client, request.id)
    assert events[-1].data["finish_reason"] == "abort"
    assert events[-1].data["cause"] == "no_reader"


async def test_a_reader_that_comes_back_in_time_keeps_it_alive(client):
    request = ask("hang")
    await client.submit(request)
    for _ in range(4):
        async for _news in client.events(request.id):
            break
        await asyncio.sleep(0.3)
    await client.abort(request.id)
    assert "cause" not in (await read(client, request.id))[-1].data


async def test_an_unknown_sequence_is_lost(client):
    with pytest.raises(SequenceLost):
        await read(client, "nobody knows this")


async def test_a_wrong_token_gets_nothing(worker):
    stranger = WorkerClient(worker.url, "guessed")
    with pytest.raises(WorkerUnavailable, match="refuses our token"):
        await stranger.status()
    await stranger.close()


async def test_a_frame_outside_the_protocol_closes_that_connection_alone(client, worker):
    stranger = WorkerClient(worker.url, TOKEN)
    connection = await stranger._connection()
    await connection.send_str('{"op": "format the disk"}')
    async with asyncio.timeout(5):
        while not connection.closed:
            await asyncio.sleep(0.01)
    await stranger.close()
    assert (await client.status())["state"] == "ready"


async def test_a_reader_that_does_not_read_costs_the_others_nothing(client, worker):
    stalled = WorkerClient(worker.url, TOKEN)
    await stalled.status()
    request = ask("every 0.0005 words 400")
    await client.submit(request)
    await stalled._send({"op": "attach", "reading": 99, "id": request.id, "after": 0})
    stalled._socket._response.connection.transport.pause_reading()
    assert written(await read(client, request.id)) == text(request.id, 400)
    await stalled.close()


def test_the_socket_is_for_its_owner_alone(worker):
    mode = os.stat(Address.parse(worker.url).path).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_a_second_worker_on_the_same_address_gives_up(worker):
    second = subprocess.run(
        [sys.executable, "-m", "tests.support.pretend_engine", worker.url, TOKEN],
        capture_output=True,
        text=True,
    )
    assert second.returncode != 0
    assert "another worker listens" in second.stderr


async def test_killed_in_the_middle_and_started_again():
    """kill -9: what was being written is lost at once, the socket file is replaced, the same client
    works again.
    """
    with PretendWorker() as worker:
        client = WorkerClient(worker.url, TOKEN)
        await ready(client)
        request = ask("hang")
        await client.submit(request)
        events = client.events(request.id)
        await anext(events)
        worker.kill()
        with pytest.raises(SequenceLost):
            async with asyncio.timeout(5):
                async for _news in events:
                    pass
        with pytest.raises(WorkerUnavailable):
            await client.submit(ask("words 1"))
        worker.start()
        await ready(client)
        again = ask("words 3")
        await client.submit(again)
        assert written(await read(client, again.id)) == text(again.id, 3)
        with pytest.raises(SequenceLost):
            await read(client, request.id)
        await client.close()


async def test_a_lost_connection_loses_no_event():
    """The connection is cut ten times while answers are written; every reader gets every word
    once.
    """
    with PretendWorker() as worker:
        client = WorkerClient(worker.url, TOKEN)
        await ready(client)
        requests = [ask("every 0.004 words 150") for _ in range(8)]
        for request in requests:
            await client.submit(request)
        readers = [asyncio.create_task(read(client, request.id)) for request in requests]
        for _ in range(10):
            await asyncio.sleep(0.05)
            connection = client._socket._response.connection
            # else it is between two connections
            if connection is not None and connection.transport is not None:
                connection.transport.abort()
        for request, reader in zip(requests, readers, strict=True):
            events = await reader
            assert written(events) == text(request.id, 150)
            assert len({event.seq for event in events}) == len(events)
        await client.close()


async def test_terminated_it_tells_its_readers_and_cleans_up():
    with PretendWorker() as worker:
        client = WorkerClient(worker.url, TOKEN)
        await ready(client)
        request = ask("hang")
        await client.submit(request)
        events = client.events(request.id)
        await anext(events)
        assert await asyncio.to_thread(worker.terminate) == 0
        last = [event async for news in events for event in news][-1]
        assert (last.data["finish_reason"], last.data["cause"]) == ("abort", "shutdown")
        await client.close()


async def test_it_says_loading_before_the_model_is_there():
    with PretendWorker(loading=0.8) as worker:
        client = WorkerClient(worker.url, TOKEN)
        assert (await client.status())["state"] == "loading"
        request = ask("words 1")
        await client.submit(request, CHECKPOINT)
        events = await read(client, request.id)
        assert [event.type for event in events[:1]] == ["loading"]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert written(events) == text(request.id, 1)
        await client.close()


async def test_waiting_for_the_model_ends_at_some_time():
    with PretendWorker(loading=5, loading_wait=0.4, grace=1) as worker:
        client = WorkerClient(worker.url, TOKEN)
        request = ask("words 1")
        await client.submit(request, CHECKPOINT)
        last = (await read(client, request.id))[-1]
        assert (last.type, last.data["error"]["code"]) == ("failed", "worker_loading")
        other = ask("words 1")
        with pytest.raises(WorkerUnavailable) as refusal:
            await client.submit(other, CheckpointRef("other", "0" * 64))
        assert refusal.value.code == "worker_loading"
        await client.close()


async def test_who_waits_for_the_model_can_leave():
    with PretendWorker(loading=3) as worker:
        client = WorkerClient(worker.url, TOKEN)
        request = ask("words 1")
        await client.submit(request, CHECKPOINT)
        events = client.events(request.id)
        assert (await anext(events))[0].type == "loading"
        await client.abort(request.id)
        last = [event async for news in events for event in news][-1]
        assert (last.type, last.data["finish_reason"]) == ("finished", "abort")
        await client.close()


async def test_an_idle_worker_rests_and_wakes_for_the_next_request():
    with PretendWorker(idle_after=0.5, grace=1) as worker:
        client = WorkerClient(worker.url, TOKEN)
        await ready(client)
        while (await client.status())["state"] != "resting":
            await asyncio.sleep(0.05)
        router = Router([worker.url], TOKEN)
        request = ask("words 2")
        await router.submit(request, CHECKPOINT)
        events = [event async for news in router.events(request.id) for event in news]
        assert events[0].type == "loading"
        assert written(events) == text(request.id, 2)
        await router.close()
        await client.close()


async def test_a_dead_engine_ends_the_worker():
    with PretendWorker() as worker:
        client = WorkerClient(worker.url, TOKEN)
        await ready(client)
        request = ask("die")
        await client.submit(request)
        with pytest.raises(WorkerUnavailable):
            while True:
                await read(client, request.id)
        assert await asyncio.to_thread(worker.process.wait, 10) == 1
        worker.process.stdout.close()
        await client.close()


async def test_over_tcp_and_with_a_path_that_is_too_long_for_a_socket(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    for url in (f"http://127.0.0.1:{port}", f"unix:{deep}/worker.sock"):
        with PretendWorker(url) as worker:
            client = WorkerClient(worker.url, TOKEN)
            await ready(client)
            request = ask("words 2")
            await client.submit(request)
            assert written(await read(client, request.id)) == text(request.id, 2)
            await client.close()


async def test_the_router_chooses_by_checkpoint_then_by_load():
    with (
        PretendWorker(fingerprint="a" * 64, name="a") as first,
        PretendWorker(fingerprint="a" * 64, name="a") as second,
        PretendWorker(fingerprint="b" * 64, name="b") as third,
    ):
        router = Router([first.url, f"zwei={second.url}", third.url], TOKEN)
        for client in router.backends:
            await ready(client)
        a, b = type(CHECKPOINT)("a", "a" * 64), type(CHECKPOINT)("b", "b" * 64)
        busy = [ask("hang") for _ in range(6)]
        for request in busy:
            await router.submit(request, a)
        other = ask("hang")
        await router.submit(other, b)
        homes = [router.backend_of(request.id) for request in busy]
        assert {home.name for home in homes} == {first.url, "zwei"}
        assert [homes.count(client) for client in router.backends] == [3, 3, 0]
        assert router.backend_of(other.id) is router.backends[2]
        with pytest.raises(WorkerUnavailable) as refusal:
            await router.submit(ask("words 1"), type(CHECKPOINT)("c", "c" * 64))
        assert refusal.value.code == "no_worker_for_checkpoint"

        # a fresh router, as after a restart of the web process, finds the sequence by asking around
        fresh = Router([first.url, second.url, third.url], TOKEN)
        await fresh.abort(other.id)
        assert (await read(fresh, other.id))[-1].data["finish_reason"] == "abort"
        with pytest.raises(SequenceLost):
            await read(fresh, "nobody's")
        first.kill()
        await asyncio.sleep(0.1)  # until the client has seen the end of its connection
        states = {status["name"]: status["state"] for status in await fresh.status()}
        assert states == {first.url: "unavailable", second.url: "ready", third.url: "ready"}
        request = ask("words 2")
        await fresh.submit(request, a)
        assert written(await read(fresh, request.id)) == text(request.id, 2)
        await router.close()
        await fresh.close()


def test_a_request_survives_the_wire():
    request = Request(
        id="x",
        messages=({"role": "user", "content": "你好"},),
        adapter=AdapterRef("sha", "/folder"),
        sampling=SamplingParams(temperature=0.0, stop=("\n", "。"), seed=2**62, logprobs=3),
        user="7",
    )
    assert request_from_dict(request_as_dict(request)) == request
    biased = SamplingParams(logit_bias=((7, -100.0), (8, 1.5)), json_schema="{}")
    request = Request(id="y", text="从前", sampling=biased)
    assert request_from_dict(json.loads(json.dumps(request_as_dict(request)))) == request
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c", "name": "f"},
    )
    tools = ({"type": "function", "function": {"name": "f"}},)
    request = Request(id="z", messages=turns, begun="从", tools=tools, must_call=("f",))
    assert request_from_dict(json.loads(json.dumps(request_as_dict(request)))) == request
    with pytest.raises(TypeError):
        request_from_dict({"id": "x", "sampling": {"heat": 1}})


@pytest.mark.parametrize(
    "url", ["", "worker.sock", "unix:", "http://host", "https://host:1", "ftp://host:1"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError):
        Address.parse(url)
