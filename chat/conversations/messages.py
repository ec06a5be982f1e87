"""The rows of answers in flight: what to ask a worker for, and what is written down."""

from collections.abc import Sequence

from django.db import transaction
from django.utils import timezone

from chat.conversations.frames import LiveAnswer
from chat.conversations.tree import Tree
from chat.engine.request import CheckpointRef, Request
from chat.engine.thoughts import apart
from chat.models import Checkpoint, Message
from chat.sampling import as_sampling
from chat.worker.router import WorkerUnavailable
from portal.budget import tokens
from portal.models import TokenUsage


def request_for(message_id: int, leave_out: int = 0) -> tuple[Request, CheckpointRef]:
    """What to ask a worker for: the turns before this answer, questions with the answers that they
    got; without the oldest `leave_out` of them.
    """
    message = Message.objects.select_related("conversation", "checkpoint", "adapter").get(
        pk=message_id
    )
    checkpoint = message.checkpoint or Checkpoint.default()
    if checkpoint is None:
        raise WorkerUnavailable("there is no checkpoint", "no_worker_for_checkpoint")
    turns = turns_before(message)
    first = 1 if turns and turns[0]["role"] == "system" else 0
    del turns[first : first + leave_out]
    adapter = message.adapter
    request = Request(
        id=str(message.sequence),
        messages=tuple(turns),
        begun=message.content[: message.begun],
        adapter=adapter.ref() if adapter else None,
        sampling=as_sampling(message.sampling),
        user=str(message.conversation.owner_id),
    )
    return request, checkpoint.ref()


def turns_before(answer: Message) -> list[dict[str, str]]:
    """What the model is shown for this answer, {"role", "content"} of each: the branch that leads
    to it, its question last.
    """
    turns = [{"role": role, "content": content} for _pk, role, content in _rows_before(answer)]
    if not answer.with_history:
        turns = without_history(turns)
    return [{"role": "system", "content": answer.system}, *turns] if answer.system else turns


def left_out_of(answer: Message) -> set[int]:
    """The ids of the oldest messages, which did not fit into the context of this answer."""
    if not answer.left_out:
        return set()
    return {pk for pk, _role, _content in _rows_before(answer)[: answer.left_out]}


def _rows_before(answer: Message) -> list[tuple[int, str, str]]:
    """(id, role, content) of what leads to an answer and is told to its model."""
    conversation = answer.conversation
    path = Tree(conversation).path(answer.pk)[:-1]
    rows = {
        pk: (role, content)
        for pk, role, content in conversation.messages.filter(pk__lt=answer.pk).values_list(
            "pk", "role", "content"
        )
    }
    turns: list[tuple[int, str, str]] = []
    for pk, (role, content) in ((pk, rows[pk]) for pk in path):
        if role == Message.Role.USER and turns and turns[-1][1] == Message.Role.USER:
            turns.pop()  # it got no answer
        if role == Message.Role.ASSISTANT:
            content = apart(content)[1]  # nobody is shown earlier thoughts
        if content:
            turns.append((pk, role, content))
    return turns


def without_history(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The last question alone, with what the system says and the tools have said since: how a model
    trained on single turns was asked.
    """
    asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    last = asked[-1] if asked else 0
    return [turn for turn in turns[:last] if turn["role"] == "system"] + list(turns[last:])


def earlier_turns(request: Request) -> int:
    """How many turns a request has that it could do without: all but the system's and the last."""
    return sum(turn["role"] != "system" for turn in request.messages[:-1])


def save_left_out(message_id: int, left_out: int) -> None:
    Message.objects.filter(pk=message_id).update(left_out=left_out)


def save_progress(rows: list[tuple[int, str, int, str]]) -> None:
    """rows: (message's id, content, offset of the newest frame, status)."""
    # `seq` only rises: two web processes may follow the same answer.
    with transaction.atomic():
        for message_id, content, offset, status in rows:
            Message.objects.filter(
                pk=message_id, status__in=Message.IN_FLIGHT, seq__lte=offset
            ).update(content=content, seq=offset, status=status)


def save_end(answer: LiveAnswer) -> None:
    ended = Message.objects.filter(pk=answer.message_id, status__in=Message.IN_FLIGHT).update(
        content=answer.content,
        seq=answer.offset,
        status=answer.status,
        finish_reason=answer.finish_reason,
        usage=answer.usage,
        timings=answer.timings,
        error=answer.error,
        finished_at=timezone.now(),
    )
    if ended and answer.usage:
        message = Message.objects.select_related("api_key", "conversation").get(
            pk=answer.message_id
        )
        door = TokenUsage.Door.API if message.api_key_id else TokenUsage.Door.CHAT
        spent = [answer.usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
        tokens.count(message.conversation.owner_id, door, message.model_label, *spent)
        if message.api_key and message.api_key.tokens_per_day is not None:
            message.api_key.spend(answer.usage.get("total_tokens") or 0)
