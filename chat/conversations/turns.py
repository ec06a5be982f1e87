"""A turn of a conversation: the user's message and the answer that is to come."""

from collections.abc import Callable

from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from chat import compositions
from chat import sampling as sampling_rules
from chat.conversations.tree import Tree, show
from chat.models import Adapter, Checkpoint, Comparison, Conversation, Message
from portal.budget import tokens
from portal.rest.conventions import Conflict
from portal.text import check_content, is_storable, shown

TITLE = 40  # characters of the first message that become a fresh conversation's title
MOST_COMPARED = 4  # models that answer one question side by side
# what an answer that goes on with another has in common with it
ASKED = (
    "checkpoint",
    "adapter",
    "model_label",
    "sampling",
    "with_history",
    "system",
    "api_key",
)
KEEP = object()  # for `adapter`: whatever the conversation used last


def create_turn(
    conversation,
    user,
    content,
    checkpoint=None,
    adapter=None,
    sampling=None,
    with_history=None,
    system=None,
    edited=None,
) -> tuple[Message, Message]:
    """(the user's message, the queued answer); `chat.conversations.live.start(answer)` then makes
    somebody write it.

    `checkpoint` and `adapter` are rows, ids or names that `user` may see; two adapters in a list
    stand together. checkpoint None: the
    adapter's, else the conversation's last one, else the default. adapter None: prefix off; KEEP:
    as in the conversation's last turn. with_history: whether the model is shown the earlier turns;
    None: as it was trained. system: what it is told before them; None: as in the last turn. edited:
    the question of this conversation that is asked in another way, as a branch beside it; None: the
    message goes on with the branch that is shown.

    ValidationError({field: ...}) names every problem; Conflict: an answer of this conversation is
    still being written.
    """
    told, problems = _told(conversation, sampling, with_history, system)
    content = _checked(_content, content, "content", problems)
    asked = _asked(conversation, user, checkpoint, adapter, told, problems)
    message, answers = _written(conversation, [asked], content=content, beside=edited)
    return message, answers[0]


def create_comparison(
    conversation, user, content, models, sampling=None, with_history=None, system=None, edited=None
) -> tuple[Message, list[Message]]:
    """As `create_turn`, answered by several models side by side. models: 2 to MOST_COMPARED pairs
    (checkpoint, adapter), no two alike.
    """
    told, problems = _told(conversation, sampling, with_history, system)
    content = _checked(_content, content, "content", problems)
    if not 2 <= len(models) <= MOST_COMPARED:
        problems["models"] = ValidationError(
            _("Choose two to %(most)s models to compare.") % {"most": MOST_COMPARED}, "invalid"
        )
    asked = [
        _asked(conversation, user, checkpoint, adapter, told, problems)
        for checkpoint, adapter in models
    ]
    if len({one["model_label"] for one in asked}) < len(asked):
        raise ValidationError({"models": ValidationError(_("Each model once, please."), "invalid")})
    return _written(conversation, asked, content=content, beside=edited, compare=True)


def answer_again(
    conversation,
    user,
    answer,
    checkpoint=None,
    adapter=None,
    sampling=None,
    with_history=None,
    system=None,
) -> Message:
    """A queued answer beside the ended `answer`, to the same question; that one stays."""
    told, problems = _told(conversation, sampling, with_history, system)
    asked = _asked(conversation, user, checkpoint, adapter, told, problems)
    return _written(conversation, [asked], beside=answer)[1][0]


def go_on(conversation, answer) -> Message:
    """A queued answer that begins with all of the ended `answer`, which was cut short, and goes on
    from there; that one stays.
    """
    if answer.is_in_flight or not answer.content:
        raise ValidationError(_("There is nothing to go on with."), "invalid")
    asked = {name: getattr(answer, name) for name in ASKED}
    asked |= {"content": answer.content, "begun": len(answer.content)}
    return _written(conversation, [asked], beside=answer)[1][0]


def _told(conversation, sampling, with_history, system) -> tuple[dict, dict]:
    """(what every model of the turn is asked with, problems by field)."""
    problems: dict[str, ValidationError] = {}
    sampling = _checked(sampling_rules.checked, sampling, None, problems)
    if not (with_history is None or isinstance(with_history, bool)):
        problems["with_history"] = ValidationError(_("Must be true or false."), "invalid")
    if system is None:
        system = conversation.system
    elif system != "":
        system = _checked(check_content, system, "system", problems)
    return {"sampling": sampling, "with_history": with_history, "system": system}, problems


def _asked(conversation, user, checkpoint, adapter, told: dict, problems: dict) -> dict:
    """The fields of an answer's row that say what is asked of whom; ValidationError({field: ...})
    with `problems` and its own.
    """
    if adapter is KEEP:
        adapter = _last_adapter(conversation, user, checkpoint)
    adapter = _checked(lambda value: _adapter(user, value), adapter, "adapter", problems)
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
    with_history = told["with_history"]
    if with_history is None:
        with_history = adapter is None or adapter.asks_with_history
    return {
        "checkpoint": checkpoint,
        "adapter": adapter,
        "model_label": model_label(checkpoint, adapter),
        "sampling": {**checkpoint.sampling, **told["sampling"]},
        "with_history": with_history,
        "system": told["system"],
        "api_key": getattr(user, "api_key", None),
    }


@transaction.atomic
def _written(
    conversation, asked: list[dict], content=None, beside=None, compare=False
) -> tuple[Message, list[Message]]:
    """(question, queued answers). With `content` the question is new, a branch beside the question
    `beside` or at the end of what is shown; without, it is that of the answer `beside`.
    """
    tokens.check(conversation.owner_id)
    # The lock makes two simultaneous sends queue up here, so that only the first finds no answer in
    # flight.
    held = Conversation.objects.select_for_update().get(pk=conversation.pk)
    if held.messages.filter(status__in=Message.IN_FLIGHT).exists():
        raise Conflict(
            _("The last answer is still being written. Wait for it or stop it first."),
            "answer_in_flight",
        )
    tree = Tree(held)
    if content is None:
        message = held.messages.get(pk=tree.parent[beside.pk])
    else:
        after = tree.leaf if beside is None else tree.parent[beside.pk]
        message = held.messages.create(
            role=Message.Role.USER, content=content, parent_id=after, starts_anew=after is None
        )
    comparison = held.comparisons.create() if compare else None
    answers = [
        held.messages.create(
            role=Message.Role.ASSISTANT,
            status=Message.Status.QUEUED,
            parent=message,
            comparison=comparison,
            **one,
        )
        for one in asked
    ]
    held.title = held.title or title_of(message.content)
    for name in ("checkpoint", "adapter", "system"):
        setattr(held, name, asked[0][name])
    held.leaf = answers[0]
    changed = ("title", "checkpoint", "adapter", "system", "leaf", "updated_at")
    held.save(update_fields=changed)
    for name in changed:
        setattr(conversation, name, getattr(held, name))
    return message, answers


# Called with a comparison that has been judged: what stands above makes use of the verdict.
JUDGED: list[Callable[[Comparison], None]] = []


def judge(comparison: Comparison, verdict: str, chosen: Message | None) -> None:
    """Writes down what the asker thinks of the compared answers; the conversation goes on with the
    better one and its model.
    """
    if verdict not in Comparison.Verdict.values:
        raise ValidationError(_("There is no such verdict."), "invalid")
    found = Comparison.Verdict(verdict)
    if (found == Comparison.Verdict.BETTER) != (chosen is not None):
        raise ValidationError(_("Say which answer is better."), "invalid")
    comparison.verdict, comparison.chosen, comparison.judged_at = found, chosen, timezone.now()
    comparison.save(update_fields=["verdict", "chosen", "judged_at"])
    if chosen is not None:
        show(comparison.conversation, chosen.pk)
        Conversation.objects.filter(pk=comparison.conversation_id).update(
            checkpoint=chosen.checkpoint, adapter=chosen.adapter
        )
    for use in JUDGED:
        use(comparison)


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


def _adapter(user, value):
    """As `_row`, of adapters; [one, other] or "one+other": both together (chat/compositions.py)."""
    if isinstance(value, list) and len(value) == 2:
        one, other = (_row(Adapter, user, each) for each in value)
        if one is None or other is None:
            raise ValidationError(_("Name two adapters to stand together."), "invalid")
        return compositions.composed(user, one, other)
    if isinstance(value, str) and compositions.SIGN in value and is_storable(value):
        known = Adapter.objects.visible_to(user).named(value)
        if found := known or compositions.named(user, "", value):
            return found
    return _row(Adapter, user, value)


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
