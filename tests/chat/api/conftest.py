"""Rows that every door is tested with, and a scripted stand-in for the worker."""

import asyncio

import pytest
from django.test import AsyncClient, Client

from chat import registry
from chat.conversations import live
from chat.engine.request import Event
from chat.models import Conversation, Message
from chat.worker import router as worker_router
from portal.models import ApiKey
from tests.support.folders import adapter_folder, checkpoint_folder


@pytest.fixture
def base(db, tmp_path, data_dir):
    return registry.register_checkpoint(checkpoint_folder(tmp_path / "base"))


@pytest.fixture
def adapter(base, member, tmp_path):
    return registry.publish_adapter(
        adapter_folder(tmp_path / "tuned", base.fingerprint),
        name="tuned",
        checkpoint=base,
        owner=member,
        step=7,
    )


@pytest.fixture
def conversation(member):
    return Conversation.objects.create(owner=member, title="mine")


@pytest.fixture
def answer(conversation, base):
    """A pending answer of member's."""
    conversation.messages.create(role="user", content="q")
    return conversation.messages.create(
        role="assistant", status="queued", checkpoint=base, model_label="base"
    )


@pytest.fixture
def key(member):
    return ApiKey.create_for(member)[1]


@pytest.fixture
def other_key(other_member):
    return ApiKey.create_for(other_member)[1]


@pytest.fixture
def client(key):
    return Client(headers={"Authorization": f"Bearer {key}"})


@pytest.fixture
def other_client(other_key):
    return Client(headers={"Authorization": f"Bearer {other_key}"})


class KeyedClient(AsyncClient):
    """AsyncClient forgets the headers of its constructor."""

    def __init__(self, key: str):
        super().__init__()
        self.key = key

    def generic(self, *arguments, headers=None, **more):
        return super().generic(
            *arguments, headers={"Authorization": f"Bearer {self.key}", **(headers or {})}, **more
        )


@pytest.fixture
def async_client(key):
    return KeyedClient(key)


class ScriptedGeneration:
    """chat.conversations.live without a worker: every answer says the same words; `hold` keeps it
    from ending.
    """

    WORDS = ("你好", "，", "**世界**")

    def __init__(self):
        self.started, self.stopped, self.failure, self.hold, self.left = [], [], None, False, []

    def frames(self, message_id: int) -> list[dict]:
        frames = [{"type": "message.queued", "position": 0}, {"type": "message.started"}]
        frames += [{"type": "message.delta", "text": word} for word in self.WORDS]
        if not self.hold:
            frames.append(
                {
                    "type": "message.finished",
                    "finish_reason": "stop",
                    "usage": {},
                    "html": "<p></p>",
                }
            )
        return [{**frame, "message": message_id, "seq": i} for i, frame in enumerate(frames, 1)]

    async def start(self, answer) -> None:
        self.started.append(answer)
        if self.failure:
            await Message.objects.filter(pk=answer.pk).aupdate(
                status="failed", error={"code": "worker_unavailable"}
            )
            raise self.failure

    async def follow(self, message_id: int, after: int, rendered: bool = False):
        try:
            for frame in self.frames(message_id):
                if frame["seq"] > after:
                    yield frame
            if self.hold:
                await asyncio.Event().wait()
        finally:
            self.left.append(message_id)

    async def stop(self, message_id: int) -> None:
        self.stopped.append(message_id)
        await Message.objects.filter(pk=message_id).aupdate(status="stopped")


@pytest.fixture
def scripted(monkeypatch):
    script = ScriptedGeneration()
    for name in ("start", "follow", "stop"):
        monkeypatch.setattr(live, name, getattr(script, name))
    return script


class ScriptedRouter:
    """chat.worker.router's router without a worker. `events(request)` is what each request gets."""

    def __init__(self):
        self.requests, self.checkpoints, self.aborted, self.refusal, self.hold = (
            {},
            [],
            [],
            None,
            False,
        )

    def script(self, request):
        logprobs = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]
        more = {"logprobs": logprobs} if request.sampling.logprobs is not None else {}
        yield "queued", {"position": 0}
        yield "started", {"prompt_tokens": 5}
        yield "delta", {"text": "你", "tokens": 1, **more}
        yield "delta", {"text": "好", "tokens": 1, **more}
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        yield "finished", {"finish_reason": "stop", "usage": usage, "timings": {}}

    async def submit(self, request, checkpoint) -> None:
        if self.refusal:
            raise self.refusal
        self.requests[request.id] = request
        self.checkpoints.append(checkpoint)

    async def events(self, id, after=0):
        for seq, (type_, data) in enumerate(self.script(self.requests[id]), 1):
            if type_ == "finished" and self.hold:
                await asyncio.Event().wait()
            if isinstance(data, Exception):
                raise data
            yield [Event(id, seq, type_, data)]

    async def abort(self, id) -> None:
        self.aborted.append(id)

    async def status(self) -> list:
        return [{"state": "ready", "max_rows": 8, "queue": 0, "active_rows": 0}]

    async def close(self) -> None:
        pass


@pytest.fixture
def router(monkeypatch):
    scripted = ScriptedRouter()
    monkeypatch.setattr(worker_router, "get_router", lambda: scripted)
    return scripted
