"""The web process against clients that mean harm: bodies without end, slow forms, other origins."""

import asyncio
import json

import psutil
import pytest
import websockets
from websockets.sync.client import connect

from portal import request_bodies
from portal.request_bodies import LimitedBodies
from tests.attack.client import CHUNK, Neighbour, chunked, head, send
from tests.support.web_process import Web

pytestmark = pytest.mark.xdist_group("web")
FORM = "Content-Type: multipart/form-data; boundary=x"
JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def web():
    with Web(PORTAL_TRUSTED_ORIGINS="https://portal.example") as running:
        yield running


def key_of(web) -> str:
    return f"Authorization: Bearer {web.key}"


@pytest.mark.parametrize(
    "path", ["/healthz", "/login/", "/v1/models", "/static/nothing", "/datasets/upload/"]
)
@pytest.mark.parametrize("size", [10 << 20, 1 << 40])
def test_a_body_too_large_is_refused_before_any_of_it_is_read(web, path, size):
    for kind in (FORM, "Content-Type: application/x-www-form-urlencoded"):
        status, answer, _taken = send(
            web.port, head("POST", path, kind, f"Content-Length: {size}", port=web.port)
        )
        upload = path == "/datasets/upload/" and size < 200 << 20
        assert (status, b"too_large" in answer) == ((401, False) if upload else (413, True))


@pytest.mark.parametrize("path", ["/healthz", "/api/v1/datasets/"])
def test_nor_does_it_matter_that_its_length_is_not_declared(web, path):
    before = psutil.Process(web.process.pid).memory_info().rss
    with Neighbour(f"{web.url}/healthz") as other:
        status, _answer, taken = send(
            web.port,
            head("POST", path, FORM, CHUNKED, port=web.port),
            chunked([b"\n" * CHUNK] * 3200),
        )
    assert status == (401 if path.startswith("/api/") else 413) and taken < 100 << 20
    assert psutil.Process(web.process.pid).memory_info().rss - before < 50 << 20
    assert other.longest < 2 and not other.errors


def test_a_form_is_parsed_for_views_that_ask_for_it_and_never_on_the_event_loop(web):
    size = 5 << 20
    with Neighbour(f"{web.url}/healthz") as other:
        for kind, byte in (
            (FORM, b"\n"),
            ("Content-Type: application/x-www-form-urlencoded", b"a=1&"),
        ):
            start = head("POST", "/healthz", kind, f"Content-Length: {size}", port=web.port)
            status, _answer, _taken = send(
                web.port, start, [byte * (CHUNK // len(byte))] * (size // CHUNK)
            )
            assert status == 405
    assert other.longest < 2 and not other.errors


def test_a_large_upload_passes_through_the_disk_and_not_through_memory(web):
    row = b'{"content": "x", "summary": "%b"}\n' % (b"y" * 100_000)
    start, end = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.json"\r\n\r\n',
        b"\r\n--x--\r\n",
    )
    rows = (100 << 20) // len(row)
    length = f"Content-Length: {len(start) + rows * len(row) + len(end)}"
    before = psutil.Process(web.process.pid).memory_info().rss
    with Neighbour(f"{web.url}/healthz") as other:
        status, answer, _taken = send(
            web.port,
            head("POST", "/api/v1/datasets/", FORM, key_of(web), length, port=web.port),
            [start, *[row] * rows, end],
        )
    assert status == 201 and b'"rows":%d' % rows in answer
    assert psutil.Process(web.process.pid).memory_info().rss - before < 100 << 20
    assert other.longest < 2


def test_chunks_are_read_at_every_door_as_a_body_with_a_length_is(web):
    doors = {
        "/api/v1/conversations/": (JSON, [b'{"title": ', b'"hello"}'], b'"title":"hello"'),
        "/v1/chat/completions": (
            JSON,
            [b'{"model": "pretend", "messages": [', b'{"role": "user", "content": "x"}]}'],
            b"choices",
        ),
        "/": (JSON, [b'{"prompt":', b' "words 3"}'], b"history"),
        "/api/v1/datasets/": (
            FORM,
            [
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.json"\r\n\r\n',
                b'{"content": "x", "summary": "y"}\n',
                b"\r\n--x--\r\n",
            ],
            b'"rows":1',
        ),
    }
    for path, (kind, pieces, told) in doors.items():
        status, answer, _taken = send(
            web.port, head("POST", path, kind, CHUNKED, key_of(web), port=web.port), chunked(pieces)
        )
        assert status in (200, 201) and told in answer, path


def test_a_portal_whose_broker_is_redis_starts():
    """`up` does not need Redis to be there; what is missing is said when it is asked for."""
    from tests.support.live_portal import free_port

    with Web(PORTAL_REDIS_URL=f"redis://127.0.0.1:{free_port()}/0") as running:
        status, _answer, _taken = send(
            running.port, head("GET", "/v1/models", key_of(running), port=running.port)
        )
        assert status == 200


def test_what_is_no_http_is_answered_and_ends(web):
    assert send(web.port, b"\0\1\2\r\n\r\n")[0] == 400
    assert send(web.port, head("GET", "/healthz", "Content-Length: x", port=web.port))[0] == 400
    assert send(web.port, head("GET", "/" + "x" * 1_000_000, port=web.port))[0] in (None, 400, 431)


def test_static_files_are_not_sniffed(web):
    assert (
        b"x-content-type-options: nosniff"
        in send(web.port, head("GET", "/static/x.js", port=web.port))[1].lower()
    )


@pytest.mark.parametrize(
    ("origin", "opens"),
    [
        ("http://127.0.0.1:{port}", True),
        ("https://portal.example", True),  # PORTAL_TRUSTED_ORIGINS
        ("http://127.0.0.1:1", False),
        ("https://127.0.0.1:{port}", False),
        ("http://localhost:{port}", False),
        ("http://portal.example", False),
        ("null", False),
        ("http://[", False),
        (None, False),
    ],
)
def test_a_page_of_another_origin_opens_no_socket_with_the_cookie(web, origin, opens):
    address = f"ws://127.0.0.1:{web.port}/ws/conversations/{web.conversation}/"
    cookie = {"Cookie": f"sessionid={web.cookie}"}
    own = origin and origin.format(port=web.port)
    if opens:
        with connect(address, additional_headers=cookie, origin=own) as page:
            page.send('{"type": "nothing"}')
            assert json.loads(page.recv(10))["error"]["code"] == "unknown_frame"
    else:
        with pytest.raises(websockets.InvalidStatus) as refused:
            connect(address, additional_headers=cookie, origin=own).__enter__()
        assert refused.value.response.status_code in (400, 403)


async def through(scope: dict, messages: list[dict]) -> tuple[int, bytes]:
    """(status, body) that LimitedBodies, before an application that reads its body, answers."""

    async def application(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        if messages:
            return messages.pop(0)
        return await asyncio.Event().wait()

    sent = []

    async def sending(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": b"",
        "headers": [],
        **scope,
    }
    await LimitedBodies(application, set())(scope, receive, sending)
    return sent[0]["status"], sent[-1]["body"]


async def test_a_body_that_trickles_is_given_up(monkeypatch):
    monkeypatch.setattr(request_bodies, "PATIENCE", 0.05)
    piece = {"type": "http.request", "body": b"x", "more_body": True}
    assert (await through({}, [piece] * 3))[0] == 408
    assert (await through({}, [piece, {"type": "http.request", "body": b"", "more_body": False}]))[
        0
    ] == 204


async def test_a_refusal_speaks_the_clients_language():
    for language, words in (("en", "The body is too large."), ("zh-hans", "请求体太大。")):
        headers = [(b"content-length", b"99999999"), (b"accept-language", language.encode())]
        status, body = await through({"headers": headers}, [])
        assert status == 413 and json.loads(body)["error"]["message"] == words


@pytest.mark.django_db(transaction=True)
async def test_one_member_uploads_two_large_files_at_a_time(member, monkeypatch):
    from asgiref.sync import sync_to_async

    from portal.models import ApiKey

    monkeypatch.setattr(request_bodies, "MOST_BYTES", 10)
    _key, secret = await sync_to_async(ApiKey.create_for)(member)
    scope = {
        "type": "http", "method": "POST", "path": "/up", "query_string": b"",
        "headers": [(b"content-length", b"99"), (b"authorization", f"Bearer {secret}".encode())],
    }  # fmt: skip
    inside, goes_on, statuses = asyncio.Semaphore(0), asyncio.Event(), []

    async def application(scope, receive, send):
        inside.release()
        await goes_on.wait()

    async def sending(message):
        statuses.append(message.get("status"))

    bodies = LimitedBodies(application, {"/up"})
    running = [asyncio.create_task(bodies({**scope}, None, sending)) for _upload in range(2)]
    for _upload in running:
        await inside.acquire()
    await bodies({**scope}, None, sending)
    assert statuses[0] == 429
    goes_on.set()
    await asyncio.gather(*running)
    assert not bodies.uploading


@pytest.mark.slow
def test_a_head_that_never_ends_is_given_up_and_the_pages_answer_beside_it(web):
    """300 connections that say one more header every other second."""
    import socket
    import time

    from portal.web_server import HEADERS_WITHIN

    half = head("GET", "/healthz", port=web.port)[:-2]
    lines = [socket.create_connection(("127.0.0.1", web.port)) for _line in range(300)]
    with Neighbour(f"{web.url}/healthz") as other:
        for line in lines:
            line.sendall(half)
        begun, open_ = time.monotonic(), set(lines)
        while open_ and time.monotonic() - begun < HEADERS_WITHIN + 10:
            time.sleep(2)
            for line in list(open_):
                try:
                    line.sendall(b"X-More: 1\r\n")
                except OSError:
                    open_.discard(line)
    assert not open_ and other.longest < 2 and not other.errors
