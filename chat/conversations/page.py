"""A conversation as a page shows it: the turns of one branch, with what stands beside each."""

from dataclasses import dataclass, field

from django.utils.safestring import mark_safe

from chat.conversations.messages import left_out_of
from chat.conversations.rendering import to_html
from chat.conversations.streaming import StreamedMarkdown
from chat.conversations.tree import Tree, show
from chat.models import Conversation, Message

SHOWN = 60  # messages of a conversation at once; even, so that questions stay with their answers


@dataclass
class Thread:
    turns: list[Message] = field(default_factory=list)
    earlier: int | None = None  # the id that asks for the turns before these; None: there are none
    newest: bool = True  # whether nothing follows


def thread(
    conversation: Conversation | None,
    before: int | None = None,
    leaf: int | None = None,
    at: int | None = None,
) -> Thread:
    """The newest turns of the branch that is shown (or that ends with `leaf`), those before the
    one of the id `before`, or those around the one `at`, whose branch is shown from then on.

    Each turn has `branch` (where it stands among its branches; None: it is the only one) and
    `is_left_out` (it did not fit into the context of the last answer here); an answer also `html`
    and `text`; the last one, when it is being compared, `compared`: all answers.
    """
    if conversation is None:
        return Thread()
    tree = Tree(conversation)
    if at in tree.parent and at not in tree.path():
        show(conversation, at)
        tree = Tree(conversation)
    path = whole = tree.path(leaf)
    if before is not None:
        path = [pk for pk in path if pk < before]
    elif at in path:
        path = path[: path.index(at) + SHOWN // 2]
    shown = path[-SHOWN:]
    rows = conversation.messages.select_related("comparison").in_bulk(shown)
    turns = [rows[pk] for pk in shown if pk in rows]
    for turn in turns:
        turn.branch = _branch(tree, turn)
    answered = next((turn for turn in turns[::-1] if turn.role == Message.Role.ASSISTANT), None)
    left_out = left_out_of(answered) if answered else set()
    for turn in turns:
        turn.is_left_out = turn.pk in left_out
    newest = len(path) == len(whole)
    if turns and newest and turns[-1].comparison_id:
        last = turns[-1]
        last.compared = list(conversation.messages.filter(comparison=last.comparison_id))
    for turn in turns:
        for answer in getattr(turn, "compared", [turn]):
            if answer.role == Message.Role.ASSISTANT:
                answer.html, answer.text = rendered(answer)
    return Thread(turns, shown[0] if len(path) > SHOWN else None, newest)


def _branch(tree: Tree, turn: Message) -> dict | None:
    siblings = tree.siblings(turn.pk)
    if len(siblings) < 2:
        return None
    at = siblings.index(turn.pk)
    return {
        "number": at + 1,
        "count": len(siblings),
        "previous": siblings[at - 1] if at else None,
        "next": siblings[at + 1] if at + 1 < len(siblings) else None,
    }


def rendered(answer: Message) -> tuple[str, str]:
    """(safe HTML, the text behind it that is still being written)."""
    if not answer.is_in_flight:
        return mark_safe(to_html(answer.content)), ""  # sanitised there
    if answer.status == Message.Status.QUEUED:
        return "", ""
    markdown = StreamedMarkdown()
    markdown.grow(answer.content)
    html = "".join(html for html, _end in markdown.closed)
    return mark_safe(html), answer.content[markdown.closed[-1][1] if html else 0 :].lstrip("\n")
