"""The chat socket: frames in and out, and how it closes."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from asgiref.sync import sync_to_async
from channels.routing import URLRouter
from channels.testing import WebsocketCommunicator
from django.test import Client
from django.utils import timezone

from chat.api import websocket
from chat.api.routing import websocket_urlpatterns
from chat.engine.request import RequestRefused
from chat.models import Conversation, Message
from portal import logins
from portal.models import ApiKey, User

pytestmark = pytest.mark.django_db(transaction=True)


@asynccontextmanager
async def socket(user, conversation_id, session=None):
    communicator = WebsocketCommunicator(
        URLRouter(websocket_urlpatterns), f"/ws/conversations/{conversation_id}/"
    )
    communicator.scope["user"] = user
    if session is not None:
        communicator.scope["session"] = session
    connected, _protocol = await communicator.connect()
    assert connected
    try:
        yield communicator
    finally:
        await communicator.disconnect()


async def hear(communicator, count: int) -> list[dict]:
    return [await communicator.receive_json_from(timeout=5) for _frame in range(count)]


async def test_a_message_is_answered_frame_by_frame(member, conversation, base, scripted):
    async with socket(member, conversation.pk) as page:
        await page.send_json_to(
            {"type": "message.send", "content": "你好", "sampling": {"seed": 3}}
        )
        frames = await hear(page, 6)
    assert [frame["type"] for frame in frames[:2]] == ["message.queued", "message.started"]
    assert "".join(frame.get("text", "") for frame in frames) == "你好，**世界**"
    assert frames[-1]["type"] == "message.finished" and [frame["seq"] for frame in frames] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    answer = await Message.objects.aget(pk=frames[0]["message"])
    assert (answer.role, answer.sampling) == ("assistant", {"seed": 3}) and scripted.started == [
        answer
    ]


async def test_a_page_attaches_where_it_left(member, conversation, answer, scripted):
    async with socket(member, conversation.pk) as page:
        await page.send_json_to({"type": "attach", "message": answer.pk, "after": 4})
        assert [frame["seq"] for frame in await hear(page, 2)] == [5, 6]


async def test_attaching_again_replaces_the_first(member, conversation, answer, scripted):
    scripted.hold = True
    async with socket(member, conversation.pk) as page:
        for _time in range(2):
            await page.send_json_to({"type": "attach", "message": answer.pk, "after": 0})
            await hear(page, 5)
        assert scripted.left == [answer.pk]
    await asyncio.sleep(0.05)
    assert scripted.left == [answer.pk] * 2  # leaving the page lets go


async def test_stop_ends_mine(member, conversation, answer, scripted):
    async with socket(member, conversation.pk) as page:
        await page.send_json_to({"type": "message.stop", "message": answer.pk})
        await page.send_json_to({"type": "attach", "message": answer.pk, "after": 5})
        await hear(page, 1)
    assert scripted.stopped == [answer.pk]


async def test_a_worker_that_is_down_is_seen_in_the_answer(member, conversation, base, scripted):
    scripted.failure = RequestRefused("queue_full", "full")
    async with socket(member, conversation.pk) as page:
        await page.send_json_to({"type": "message.send", "content": "x"})
        assert (await hear(page, 1))[0]["message"] == scripted.started[0].pk


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("nonsense", "not_json"),
        ("[" * 10_000, "not_json"),
        ("[]", "unknown_frame"),
        ("{}", "unknown_frame"),
        ('{"type": ["message.send"]}', "unknown_frame"),
        ('{"type": "connect"}', "unknown_frame"),
        ('{"type": "message.send"}', "invalid"),
        ('{"type": "message.send", "content": " "}', "blank"),
        ('{"type": "message.send", "content": "x", "adapter": "none"}', "does_not_exist"),
        ('{"type": "message.send", "content": "x", "sampling": {"top_p": 9}}', "invalid_value"),
        ('{"type": "message.stop"}', "not_found"),
        ('{"type": "message.stop", "message": 1.5}', "not_found"),
        ('{"type": "message.stop", "message": 1e999}', "not_json"),
        ('{"type": "message.stop", "message": ' + "9" * 5000 + "}", "not_json"),
        ('{"type": "attach", "message": 999999, "after": 0}', "not_found"),
        ('{"type": "attach", "message": 1, "after": "x"}', "invalid"),
        ('{"type": "ack", "seq": null}', "invalid"),
    ],
)
async def test_a_bad_frame_is_answered_and_the_socket_stays(
    member, conversation, base, scripted, frame, code
):
    async with socket(member, conversation.pk) as page:
        await page.send_to(text_data=frame)
        (refusal,) = await hear(page, 1)
        assert (refusal["type"], refusal["error"]["code"]) == ("error", code)
        await page.send_json_to({"type": "message.send", "content": "x"})
        assert (await hear(page, 1))[0]["type"] == "message.queued"


async def test_bytes_are_answered_too(member, conversation, base, scripted):
    async with socket(member, conversation.pk) as page:
        await page.send_to(bytes_data=b"\x00")
        assert (await hear(page, 1))[0]["error"]["code"] == "unknown_frame"


async def test_a_client_that_left_before_its_frames_were_read_is_no_fault(
    member, conversation, base, monkeypatch
):
    """The server hands on what the client had sent, and refuses to send to it."""

    async def gone(self, **frame):
        raise BrokenPipeError

    async with socket(member, conversation.pk) as page:
        with monkeypatch.context() as left:
            left.setattr(websocket.AsyncWebsocketConsumer, "send", gone)
            await page.send_to(text_data="nonsense")
            assert await page.receive_nothing()
        await page.send_to(text_data="nonsense")
        assert (await hear(page, 1))[0]["error"]["code"] == "not_json"


async def test_a_second_message_is_refused_while_an_answer_is_written(
    member, conversation, answer, scripted
):
    async with socket(member, conversation.pk) as page:
        await page.send_json_to({"type": "message.send", "content": "x"})
        assert (await hear(page, 1))[0]["error"]["code"] == "answer_in_flight"


async def test_a_reader_that_does_not_acknowledge_is_closed(
    member, conversation, answer, scripted, monkeypatch
):
    monkeypatch.setattr(websocket, "WINDOW", 300)
    async with socket(member, conversation.pk) as page:
        await page.send_json_to({"type": "attach", "message": answer.pk, "after": 0})
        while True:
            output = await page.receive_output(timeout=5)
            if output["type"] == "websocket.close":
                break
        assert output["code"] == websocket.TOO_SLOW


async def test_a_reader_that_acknowledges_hears_everything(
    member, conversation, answer, scripted, monkeypatch
):
    monkeypatch.setattr(websocket, "WINDOW", 300)

    async def slowly(message: int, after: int, rendered: bool):
        for seq in range(1, 31):
            yield {"type": "message.delta", "text": "x", "message": message, "seq": seq}
            await acknowledged.wait()
            acknowledged.clear()

    acknowledged = asyncio.Event()
    monkeypatch.setattr(websocket.live, "follow", slowly)
    async with socket(member, conversation.pk) as page:
        await page.send_json_to({"type": "attach", "message": answer.pk, "after": 0})
        for number in range(1, 31):
            (frame,) = await hear(page, 1)
            assert frame["seq"] == number
            await page.send_json_to({"type": "ack", "seq": number})
            await page.send_json_to({"type": "ack", "seq": None})
            assert (await hear(page, 1))[0]["type"] == "error"  # so the first one has been read
            acknowledged.set()


@pytest.mark.parametrize(("who", "code"), [("nobody", 4401), ("other", 4404), ("staff", 4404)])
async def test_a_conversation_is_its_owners(conversation, other_member, staff, who, code):
    user = {"nobody": None, "other": other_member, "staff": staff}[who]
    async with socket(user, conversation.pk) as page:
        assert await page.receive_output(timeout=5) == {"type": "websocket.close", "code": code}


async def test_another_conversations_message_is_not_found_here(
    member, other_member, conversation, answer, scripted
):
    mine_too = await Conversation.objects.acreate(owner=member)
    theirs = await Conversation.objects.acreate(owner=other_member)
    foreign = await theirs.messages.acreate(role="assistant", status="queued")
    for message, where in ((foreign, conversation), (answer, mine_too)):
        async with socket(member, where.pk) as page:
            for kind in ("attach", "message.stop"):
                await page.send_json_to({"type": kind, "message": message.pk})
                assert (await hear(page, 1))[0]["error"]["code"] == "not_found"
    assert not scripted.stopped


async def test_a_closed_account_loses_its_open_socket(member, conversation, base, scripted):
    async with socket(member, conversation.pk) as page:
        await User.objects.filter(pk=member.pk).aupdate(is_active=False)
        await page.send_json_to({"type": "message.send", "content": "x"})
        assert (await page.receive_output(timeout=5))["code"] == 4404
    assert not scripted.started


async def test_frames_carry_chinese_as_it_is(member, conversation, answer, scripted):
    async with socket(member, conversation.pk) as page:
        await page.send_json_to({"type": "attach", "message": answer.pk, "after": 2})
        assert "你好" in await page.receive_from(timeout=5)
        assert json.loads(await page.receive_from(timeout=5))["text"] == "，"


async def until_closed(page) -> int:
    while (said := await page.receive_output(timeout=5))["type"] != "websocket.close":
        pass
    return said["code"]


@pytest.mark.parametrize("cause", ["logout", "password", "deactivated", "deleted", "key"])
async def test_a_socket_ends_at_once_when_what_opened_it_does(
    member, conversation, answer, scripted, monkeypatch, cause
):
    monkeypatch.setattr(logins, "LOOK_EVERY", 0.02)
    scripted.hold = True
    client = Client()
    await sync_to_async(client.force_login)(member)
    session, user = client.session, member
    if cause == "key":
        key, secret = await sync_to_async(ApiKey.create_for)(member)
        session, user = None, await sync_to_async(ApiKey.user_of)(secret)
    async with socket(user, conversation.pk, session) as page:
        await page.send_json_to({"type": "attach", "message": answer.pk})
        await hear(page, 5)
        assert await page.receive_nothing(0.2)  # several looks later
        if cause == "logout":
            await sync_to_async(client.logout)()
        elif cause == "password":
            member.set_password("another battery")
            await member.asave()
        elif cause == "deactivated":
            await User.objects.filter(pk=member.pk).aupdate(is_active=False)
        elif cause == "deleted":
            await sync_to_async(member.delete)()
        else:
            await ApiKey.objects.filter(pk=key.pk).aupdate(revoked_at=timezone.now())
        assert await until_closed(page) == 4401


async def test_a_flood_of_frames_is_closed_and_reading_is_no_flood(
    member, conversation, answer, scripted
):
    async with socket(member, conversation.pk) as page:
        await page.send_json_to({"type": "attach", "message": answer.pk})
        for frame in await hear(page, 6):
            await page.send_json_to({"type": "ack", "message": answer.pk, "seq": frame["seq"]})
        for _frame in range(websocket.BURST + 20):
            await page.send_json_to({"type": "attach", "message": 10**9})
        assert await until_closed(page) == 4429


async def test_long_frames_cost_more(member, conversation, scripted):
    async with socket(member, conversation.pk) as page:
        for _frame in range(2):
            await page.send_to(text_data="[" + "1.5," * 250_000)
        assert await until_closed(page) == 4429


async def test_one_user_opens_so_many_sockets(member, other_member, conversation, monkeypatch):
    monkeypatch.setattr(websocket, "MOST_SOCKETS", 1)
    async with socket(member, conversation.pk), socket(member, conversation.pk) as second:
        assert await until_closed(second) == 4429
    async with socket(member, conversation.pk) as again:
        assert await again.receive_nothing()
    assert not websocket.ConversationConsumer.open_sockets
