"""A conversation as a file: Markdown to read, JSON for programs."""

import json

from django.utils import timezone
from django.utils.translation import gettext as _

from chat.conversations.tree import Tree
from chat.models import Conversation, Message

FORMATS = {"md": "text/markdown; charset=utf-8", "json": "application/json"}


def exported(conversation: Conversation, form: str) -> str:
    """form: a key of FORMATS. Markdown has the branch that is shown, JSON the others too."""
    rows = {message.pk: message for message in conversation.messages.all()}
    path = Tree(conversation).path()
    messages = [rows[pk] for pk in path]
    if form == "json":
        told = _as_json(conversation, messages)
        others = [row for pk, row in rows.items() if pk not in set(path)]
        if others:
            told["other_branches"] = [_answer(row) for row in others]
        return json.dumps(told, ensure_ascii=False, indent=2) + "\n"
    parts = [f"# {' '.join(conversation.title.split()) or conversation}\n"]
    for message in messages:
        asked = message.role == Message.Role.USER
        who = _("You") if asked else message.model_label or _("Answer")
        moment = timezone.localtime(message.created_at).strftime("%Y-%m-%d %H:%M")
        parts.append(f"**{who}** · {moment}\n\n{message.content.strip()}\n")
    return "\n".join(parts)


def _as_json(conversation: Conversation, messages) -> dict:
    return {
        "title": conversation.title,
        "created_at": conversation.created_at.isoformat(),
        "messages": [_answer(message) for message in messages],
    }


def _answer(message: Message) -> dict:
    found = {
        "role": message.role,
        "content": message.content,
        "created_at": message.created_at.isoformat(),
    }
    if message.role == Message.Role.ASSISTANT:
        found |= {
            "model": message.model_label,
            "sampling": message.sampling,
            "with_history": message.with_history,
            "status": message.status,
            "finish_reason": message.finish_reason,
            "usage": message.usage,
        }
    return found
