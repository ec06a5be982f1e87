"""Answers in flight, with a real worker process (an engine that needs no model) and real rows."""

import asyncio
import contextlib
import threading
import time

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import OperationalError

from chat.conversations import live, loop
from chat.conversations.frames import TEXT
from chat.conversations.loop import current
from chat.conversations.messages import request_for
from chat.conversations.rendering import to_html
from chat.engine.request import RequestRefused
from chat.models import Checkpoint, Conversation, Message
from chat.worker.router import WorkerUnavailable
from tests.support.pretend_engine import text
from tests.support.worker_process import CHECKPOINT, TOKEN, PretendWorker

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(scope="module")
def shared_worker():
    with PretendWorker(grace=5) as running:
        yield running


def serve_from(settings, worker):
    settings.WORKER_URLS, settings.WORKER_TOKEN, settings.UPSTREAMS = [worker.url], TOKEN, []


@pytest.fixture
def worker(settings, shared_worker):
    serve_from(settings, shared_worker)
    return shared_worker


@pytest.fixture
def conversation(member):
    checkpoint = Checkpoint.objects.create(
        name=CHECKPOINT.name, path="/nowhere", fingerprint=CHECKPOINT.fingerprint
    )
    return Conversation.objects.create(owner=member, checkpoint=checkpoint)


@pytest.fixture(autouse=True)
def nothing_left():
    """A test's answers end before its database is emptied."""
    yield
    live.quiesce()


def turn(conversation, words, **fields) -> Message:
    conversation.messages.create(role="user", content=words)
    return conversation.messages.create(
        role="assistant", status="queued", checkpoint=conversation.checkpoint, **fields
    )


async def begin(conversation, words, **fields) -> Message:
    message = await sync_to_async(turn)(conversation, words, **fields)
    async with asyncio.timeout(10):
        while True:
            try:
                await live.start(message)
                return message
            except WorkerUnavailable as error:
                if error.code != "worker_loading":
                    raise
                await Message.objects.filter(pk=message.pk).aupdate(status="queued", error=None)
                await asyncio.sleep(0.05)


async def read(message, after=0, until=None):
    frames = []
    async with asyncio.timeout(15):
        async with contextlib.aclosing(live.follow(message.pk, after)) as following:
            async for frame in following:
                frames.append(frame)
                if until and until(frames):
                    break
    return frames


def written(frames) -> str:
    return "".join(frame["text"] for frame in frames if frame["type"] == "message.delta")


def restart_web():
    """As if this web process had ended and a new one been started."""
    live.restart()


async def test_an_answer_is_streamed_and_its_row_explains_it(worker, conversation):
    message = await begin(conversation, "every 0.005 words 60")
    frames = await read(message)
    content = text(str(message.sequence), 60)
    assert written(frames) == content
    assert "message.started" in [frame["type"] for frame in frames[:2]]
    assert len(frames) > 6  # streamed, not delivered at once
    numbers = [frame["seq"] for frame in frames]
    assert numbers == sorted(set(numbers))
    assert all(frame["message"] == message.pk for frame in frames)
    last = frames[-1]
    assert (last["type"], last["finish_reason"], last["usage"]["completion_tokens"]) == (
        "message.finished",
        "stop",
        60,
    )
    assert content.strip() in last["html"]

    await message.arefresh_from_db()  # written before the end was told
    assert (message.status, message.content, message.finish_reason) == ("complete", content, "stop")
    assert message.seq == last["seq"]
    assert (
        message.usage["completion_tokens"] == 60 and message.finished_at and message.error is None
    )


async def test_whoever_waits_is_told_the_place_in_line(settings, conversation):
    with PretendWorker(rows=1) as own:
        serve_from(settings, own)
        running = await begin(conversation, "hang")
        waiting = await begin(conversation, "words 3")
        frames = await read(waiting, until=lambda frames: True)
        assert (frames[0]["type"], frames[0]["position"]) == ("message.queued", 0)
        await live.stop(running.pk)
        frames = await read(waiting, after=frames[0]["seq"])
        assert [frame["type"] for frame in frames] == [
            "message.started",
            "message.delta",
            "message.finished",
        ]


async def test_frames_are_coalesced(worker, conversation):
    message = await begin(conversation, "every 0.002 words 300")
    begun = time.monotonic()
    frames = await read(message)
    assert written(frames) == text(str(message.sequence), 300)
    assert len(frames) <= (time.monotonic() - begun) * 20 + 5


async def test_two_tabs_and_a_reload_see_the_same(worker, conversation):
    message = await begin(conversation, "every 0.01 words 50")
    first_look = await read(message, until=lambda frames: len(written(frames)) > 30)
    other_tab = asyncio.create_task(read(message))
    rest = await read(message, after=first_look[-1]["seq"])
    content = text(str(message.sequence), 50)
    assert written(first_look) + written(rest) == content
    assert written(await other_tab) == content


async def test_a_finished_answer_can_be_read_from_any_frame(worker, conversation):
    message = await begin(conversation, "words 9")
    content = written(await read(message))
    restart_web()
    for seen in (0, 10, len(content)):
        frames = await read(message, after=TEXT + seen)
        assert written(frames) == content[seen:]
        assert frames[-1]["type"] == "message.finished"
    assert [frame["type"] for frame in await read(message, after=10**9)] == ["message.finished"]


# the paragraph and the code are long enough for a slow reader to see them while they are open
MARKDOWN = """# 标题

第一段，**粗**。LONG
第二行

- 一
- **二**

```python
print("<b>")  # LONG

x = 1
```
| a | b |
|---|---|
| 1 | \\(x\\) |

最后**一段**"""
MARKDOWN = MARKDOWN.replace("LONG", "长" * 300)


def shown(frames) -> list[tuple[str, str]]:
    """(rendered, text) as a page has them after each frame."""
    states, closed, opened, tail = [], [], "", ""
    for frame in frames:
        if frame["type"] == "message.rendered":
            assert len(closed) >= frame["from"]
            closed = [*closed[: frame["from"]], frame["html"]]
            closed += [""] * 99  # blocks are counted, frames not
            opened, tail = frame["open"], frame["text"]
        elif frame["type"] == "message.delta":
            tail += frame["text"]
        elif frame.get("html"):
            closed, opened, tail = [frame["html"]], "", ""
        states.append(("".join(closed) + opened, tail))
    return states


async def test_a_reader_may_have_it_rendered_as_it_comes(worker, conversation):
    message = await begin(conversation, "write " + MARKDOWN)
    frames = []
    async for frame in live.follow(message.pk, rendered=True):
        frames.append(frame)
    states = shown(frames)
    assert states[-1] == (to_html(MARKDOWN), "") and frames[-1]["html"] == ""
    assert any("<h1>标题</h1>" in html and "粗**" in text for html, text in states)
    assert any('<code class="language-python">' in html and "<b>" in text for html, text in states)
    for frame in frames:  # whatever is written is text until the sanitiser has seen it
        assert "<b>" not in frame.get("html", "") + frame.get("open", "")
    numbers = [frame["seq"] for frame in frames]
    assert numbers == sorted(numbers)
    # others are told as ever
    assert "message.rendered" not in {frame["type"] for frame in await read(message)}


async def test_whoever_attaches_later_gets_the_same(worker, conversation):
    message = await begin(conversation, "write " + MARKDOWN)
    await read(message, until=lambda frames: len(written(frames)) > 60)
    following = [frame async for frame in live.follow(message.pk, 1030, rendered=True)]
    assert following[0]["type"] == "message.rendered" and following[0]["from"] == 0
    assert shown(following)[-1] == (to_html(MARKDOWN), "")
    # long after the end the row is all there is
    current().answers.clear()
    late = [frame async for frame in live.follow(message.pk, 1030, rendered=True)]
    assert (late[-1]["type"], late[-1]["html"]) == ("message.finished", to_html(MARKDOWN))


async def test_the_row_follows_while_it_is_written(worker, conversation):
    message = await begin(conversation, "every 0.02 words 100")
    await asyncio.sleep(1.5)
    await message.arefresh_from_db()
    assert message.status == "streaming"
    content = text(str(message.sequence), 100)
    assert message.content and content.startswith(message.content)
    assert message.seq == TEXT + len(message.content)
    frames = await read(message, after=message.seq)
    assert message.content + written(frames) == content


async def test_stop_ends_mine_and_keeps_what_was_written(worker, conversation, other_member):
    theirs = await sync_to_async(Conversation.objects.create)(
        owner=other_member, checkpoint=conversation.checkpoint
    )
    mine = await begin(conversation, "every 0.01 words 1000")
    other = await begin(theirs, "every 0.01 words 60")
    await read(mine, until=lambda frames: len(written(frames)) > 20)
    await live.stop(mine.pk)
    await mine.arefresh_from_db()
    assert (mine.status, mine.finish_reason, mine.error) == ("stopped", "abort", None)
    assert mine.content and text(str(mine.sequence), 1000).startswith(mine.content)
    assert written(await read(other)) == text(str(other.sequence), 60)
    await live.stop(mine.pk)  # nothing happens
    await live.stop(10**9)


async def test_a_restarted_web_process_goes_on(worker, conversation):
    message = await begin(conversation, "every 0.02 words 80")
    seen = await read(message, until=lambda frames: len(written(frames)) > 30)
    await asyncio.to_thread(restart_web)
    await message.arefresh_from_db()
    assert message.status in Message.IN_FLIGHT
    assert await live.recover() == 1
    rest = await read(message, after=seen[-1]["seq"])
    content = text(str(message.sequence), 80)
    assert written(seen) + written(rest) == content
    await message.arefresh_from_db()
    assert (message.status, message.content) == ("complete", content)


async def test_a_row_that_no_worker_knows_is_interrupted(worker, conversation):
    message = await sync_to_async(turn)(conversation, "words 3", content="half an ans")
    await Message.objects.filter(pk=message.pk).aupdate(
        created_at="2020-01-01T00:00:00Z", status="streaming"
    )
    frames = await read(message)
    assert written(frames) == "half an ans"
    assert (frames[-1]["type"], frames[-1]["error"]["code"]) == ("message.failed", "interrupted")
    await message.arefresh_from_db()
    assert (message.status, message.content) == ("interrupted", "half an ans")


async def test_a_database_that_stays_away_loses_no_answer_and_keeps_no_reader(
    worker, conversation, monkeypatch
):
    """Cut for longer than the attempts at the end take; then it is back."""
    away = threading.Event()
    away.set()

    def while_it_is_there(save):
        def saving(*arguments):
            if away.is_set():
                raise OperationalError("server closed the connection unexpectedly")
            save(*arguments)

        return saving

    for name in ("save_end", "save_progress"):
        monkeypatch.setattr(loop, name, while_it_is_there(getattr(loop, name)))
    monkeypatch.setattr(loop, "SAVE_LATE", 0.05)
    message = await begin(conversation, "words 20")
    frames = await read(message)
    assert frames[-1]["type"] == "message.finished"
    row = await Message.objects.aget(pk=message.pk)
    assert row.is_in_flight, "the database has not heard of it"
    assert (await read(message))[-1] == frames[-1], "whoever comes now is told from memory"
    away.clear()
    await sync_to_async(live.quiesce)()
    await row.arefresh_from_db()
    assert row.status == "complete" and row.content == text(str(message.sequence), 20)


async def test_a_refusal_is_raised_and_kept(worker, conversation):
    message = await sync_to_async(turn)(conversation, "refuse context_length_exceeded")
    with pytest.raises(RequestRefused):
        await live.start(message)
    await message.arefresh_from_db()
    assert (message.status, message.error["code"]) == ("failed", "context_length_exceeded")
    frames = await read(message)
    assert [frame["type"] for frame in frames] == ["message.failed"]


async def test_without_a_worker_the_row_says_so(settings, tmp_path, conversation):
    settings.WORKER_URLS = [f"unix:{tmp_path}/nobody.sock"]
    message = await sync_to_async(turn)(conversation, "words 3")
    with pytest.raises(WorkerUnavailable):
        await live.start(message)
    await message.arefresh_from_db()
    assert (message.status, message.error["code"]) == ("failed", "worker_unavailable")


async def test_killed_worker_interrupts_and_the_next_answer_works(settings, conversation):
    with PretendWorker() as own:
        serve_from(settings, own)
        message = await begin(conversation, "every 0.01 words 1000")
        await read(message, until=lambda frames: len(written(frames)) > 20)
        own.kill()
        frames = await read(message)
        assert (frames[-1]["type"], frames[-1]["status"]) == ("message.failed", "interrupted")
        await message.arefresh_from_db()
        assert (message.status, message.content) == ("interrupted", written(frames))
        assert message.content and text(str(message.sequence), 1000).startswith(message.content)
        own.start()
        again = await begin(conversation, "words 4")
        assert written(await read(again)) == text(str(again.sequence), 4)


async def test_a_worker_that_shuts_down_interrupts_too(settings, conversation):
    with PretendWorker() as own:
        serve_from(settings, own)
        message = await begin(conversation, "every 0.01 words 1000")
        await read(message, until=lambda frames: len(written(frames)) > 20)
        await asyncio.to_thread(own.terminate)
        frames = await read(message)
        assert frames[-1]["status"] == "interrupted"


def test_started_from_a_synchronous_view_it_goes_on_without_that_view(worker, conversation):
    message = turn(conversation, "every 0.005 words 40")
    async_to_sync(live.start)(message)
    deadline = time.monotonic() + 10
    while message.status in Message.IN_FLIGHT and time.monotonic() < deadline:
        time.sleep(0.05)
        message.refresh_from_db()
    assert message.content == text(str(message.sequence), 40)


async def test_many_answers_at_once_reach_all_their_readers(worker, conversation, member):
    def conversations():
        return [
            Conversation.objects.create(owner=member, checkpoint=conversation.checkpoint)
            for _ in range(20)
        ]

    messages = [
        await begin(each, "every 0.003 words 50") for each in await sync_to_async(conversations)()
    ]
    results = await asyncio.gather(*(read(message) for message in messages * 2))
    for message, frames in zip(messages * 2, results, strict=True):
        assert written(frames) == text(str(message.sequence), 50)


def test_the_history_is_questions_with_their_answers(conversation):
    def say(role, content, status="complete"):
        return conversation.messages.create(
            role=role,
            content=content,
            status=status,
            checkpoint=conversation.checkpoint,
            sampling={"temperature": 0},
        )

    say("user", "one")
    say("assistant", "first")
    say("user", "two")
    say("assistant", "", "failed")
    say("user", "three")
    say("assistant", "thi", "stopped")
    say("user", "four")
    request, checkpoint = request_for(say("assistant", "", "queued").pk)
    assert [turn["content"] for turn in request.messages] == [
        "one",
        "first",
        "three",
        "thi",
        "four",
    ]
    assert checkpoint == conversation.checkpoint.ref()
    assert request.sampling.temperature == 0


async def test_what_an_answer_goes_on_with_stays_in_front_also_after_a_restart(
    worker, conversation
):
    message = await begin(conversation, "every 0.05 words 20", content="从前有座", begun=4)
    frames = live.follow(message.pk)
    seen = [frame async for frame in frames if frame["type"] != "message.queued"]
    told = "".join(frame.get("text", "") for frame in seen)
    assert told == "从前有座" + text(str(message.sequence), 20)
    await message.arefresh_from_db()
    assert message.content == told and message.usage["completion_tokens"] == 20
    another = await begin(conversation, "every 0.05 words 20", content="山", begun=1)
    await asyncio.sleep(0.3)
    live.restart()
    await live.recover()
    await asyncio.to_thread(live.quiesce)
    await another.arefresh_from_db()
    assert another.content == "山" + text(str(another.sequence), 20)


async def test_a_conversation_that_outgrows_the_context_goes_on_without_its_oldest_turns(
    worker, conversation
):
    for _number in range(5):
        earlier = await begin(conversation, "words 1")
        await asyncio.to_thread(live.quiesce)
    message = await begin(conversation, "fits 5", system="你是店员")
    frames = [frame async for frame in live.follow(message.pk)]
    started = next(frame for frame in frames if frame["type"] == "message.started")
    await message.arefresh_from_db()
    # 10 turns, the system's and the question: 2 and then 2, 4 more, until 5 are left at most
    assert (message.left_out, started["left_out"], message.status) == (8, 8, "complete")
    frames = [frame async for frame in live.follow(earlier.pk)]
    assert frames and not any("left_out" in frame for frame in frames)
    alone = await sync_to_async(turn)(conversation, "fits 0")
    with pytest.raises(RequestRefused):
        await live.start(alone)
