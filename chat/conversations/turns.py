"""A turn of a conversation: the user's message and the answer that is to come."""

from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.translation import gettext as _

from chat import sampling as sampling_rules
from chat.models import Adapter, Checkpoint, Conversation, Message
from portal.rest.conventions import Conflict
from portal.text import check_content, shown

TITLE = 40  # characters of the first message that become a fresh conversation's title
KEEP = object()  # for `adapter`: whatever the conversation used last


def create_turn(
    conversation,
    user,
    content,
    checkpoint=None,
    adapter=None,
    sampling=None,
    with_history=None,
) -> tuple[Message, Message]:
    """(the user's message, the queued answer); `chat.conversations.live.start(answer)` then makes
    somebody write it.

    `checkpoint` and `adapter` are rows, ids or names that `user` may see. checkpoint None: the
    adapter's, else the conversation's last one, else the default. adapter None: prefix off; KEEP:
    as in the conversation's last turn. with_history: whether the model is shown the earlier turns;
    None: as it was trained.

    ValidationError({field: ...}) names every problem; Conflict: an answer of this conversation is
    still being written.
    """
    problems: dict[str, ValidationError] = {}
    content = _checked(_content, content, "content", problems)
    sampling = _checked(sampling_rules.checked, sampling, None, problems)
    if not (with_history is None or isinstance(with_history, bool)):
        problems["with_history"] = ValidationError(_("Must be true or false."), "invalid")
    if adapter is KEEP:
        adapter = _last_adapter(conversation, user, checkpoint)
    adapter = _checked(lambda value: _row(Adapter, user, value), adapter, "adapter", problems)
    checkpoint = _checked(
        lambda value: _row(Checkpoint, user, value), checkpoint, "checkpoint", problems
    )
    if not problems:
        checkpoint = checkpoint or (adapter.checkpoint if adapter else None)
        checkpoint = checkpoint or conversation.checkpoint or Checkpoint.default()
        if checkpoint is None:
            message = _(
                "There is no checkpoint yet. Register one with: python manage.py add_checkpoint "
                "PATH"
            )
            problems["checkpoint"] = ValidationError(message, "no_checkpoint")
        elif adapter and adapter.checkpoint_id != checkpoint.pk:
            message = _(
                "The adapter “%(adapter)s” belongs to the checkpoint “%(its)s”, not to "
                "“%(chosen)s”."
            )
            names = {
                "adapter": adapter.name,
                "its": adapter.checkpoint.name,
                "chosen": checkpoint.name,
            }
            problems["adapter"] = ValidationError(message % names, "invalid_adapter")
    if problems:
        raise ValidationError(problems)
    if with_history is None:
        with_history = adapter is None or adapter.asks_with_history
    asked = {
        "checkpoint": checkpoint,
        "adapter": adapter,
        "model_label": model_label(checkpoint, adapter),
        "sampling": {**checkpoint.sampling, **sampling},
        "with_history": with_history,
        "api_key": getattr(user, "api_key", None),
    }
    return _written(conversation, content, asked)


@transaction.atomic
def _written(conversation, content, asked: dict) -> tuple[Message, Message]:
    # The lock makes two simultaneous sends queue up here, so that only the first finds no answer in
    # flight.
    held = Conversation.objects.select_for_update().get(pk=conversation.pk)
    if held.messages.filter(status__in=Message.IN_FLIGHT).exists():
        raise Conflict(
            _("The last answer is still being written. Wait for it or stop it first."),
            "answer_in_flight",
        )
    message = held.messages.create(role=Message.Role.USER, content=content)
    answer = held.messages.create(
        role=Message.Role.ASSISTANT,
        status=Message.Status.QUEUED,
        **asked,
    )
    held.title = held.title or title_of(content)
    held.checkpoint, held.adapter = asked["checkpoint"], asked["adapter"]
    held.save(update_fields=["title", "checkpoint", "adapter", "updated_at"])
    for name in ("title", "checkpoint", "adapter", "updated_at"):
        setattr(conversation, name, getattr(held, name))
    return message, answer


def model_label(checkpoint, adapter=None) -> str:
    """`base` or `base:adapter`: what /v1/ accepts as a model, and what an answer says it was
    written by.
    """
    return f"{checkpoint.name}:{adapter.name}" if adapter else checkpoint.name


def title_of(content: str) -> str:
    line = next((line.strip() for line in content.splitlines() if line.strip()), "")
    return line if len(line) <= TITLE else line[: TITLE - 1] + "…"


def _checked(check, value, field, problems):
    """`check(value)`; a ValidationError goes into `problems` under `field` (or its own fields)
    instead.
    """
    try:
        return check(value)
    except ValidationError as error:
        problems.update(error.error_dict if field is None else {field: error})
        return None


def _content(content) -> str:
    if isinstance(content, str) and not content.strip():
        raise ValidationError(_("Write something first."), "blank")
    return check_content(content)


def _row(model, user, value):
    """The row that `value` (a row, an id or a name) means and `user` may see; ValidationError when
    there is none.
    """
    if value is None or isinstance(value, model):
        return value
    found = model.objects.visible_to(user).named(value)
    if found is None:
        raise ValidationError(
            _("“%(value)s” does not exist.") % {"value": shown(value)}, "does_not_exist"
        )
    return found


def _last_adapter(conversation, user, checkpoint):
    """The conversation's last adapter while it still exists for `user` and fits a newly chosen
    checkpoint; else none.
    """
    adapter = conversation.adapter
    if adapter is None or not Adapter.objects.visible_to(user).filter(pk=adapter.pk).exists():
        return None
    if checkpoint is not None and checkpoint not in (
        adapter.checkpoint,
        adapter.checkpoint_id,
        adapter.checkpoint.name,
    ):
        return None
    return adapter
