"""Two adapters in one request: their prefixes stand one after the other, as an adapter of its own.

Only where one of them was trained with the other in front (the recipe's `beside`): prefixes that
never met answer near chance together (arXiv 2606.04557). The joined files are made when they are
first asked for, so that every door, page and evaluation takes them as any adapter.
"""

import json
import tempfile
from pathlib import Path

from django.conf import settings
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from chat.checkpoints import adapter_files
from chat.engine.request import LONGEST_PREFIX
from chat.models import Adapter
from chat.registry import publish_adapter

SIGN = "+"  # between two names, as in `base:style+domain`


def named(user, checkpoint_name: str, name: str) -> Adapter | None:
    """What `a+b` means, when `user` sees both; None when it is no such name. ValidationError when
    they do not go together. checkpoint_name "": of any.
    """
    visible = Adapter.objects.visible_to(user).select_related("checkpoint")
    if checkpoint_name:
        visible = visible.filter(checkpoint__name=checkpoint_name)
    at = name.find(SIGN)
    while at > 0:  # names may have the sign themselves
        first = visible.filter(name=name[:at]).first()
        second = visible.filter(name=name[at + 1 :]).first()
        if first is not None and second is not None:
            return composed(user, first, second)
        at = name.find(SIGN, at + 1)
    return None


def composed(user, first: Adapter, second: Adapter) -> Adapter:
    """The adapter of both, made when there is none yet; ValidationError with the reason when they
    do not go together. Which stands in front is how they were trained, not how they are named.
    """
    names = {"one": first.name, "other": second.name}
    if first.checkpoint_id != second.checkpoint_id:
        message = _("“%(one)s” and “%(other)s” belong to different bases.")
        raise ValidationError(message % names, "not_composable")
    if first.sha256 in trained_beside(second):
        front, behind = first, second
    elif second.sha256 in trained_beside(first):
        front, behind = second, first
    else:
        message = _(
            "“%(one)s” and “%(other)s” were not trained to stand together. Train one of them with "
            "the other in its recipe's “beside”."
        )
        raise ValidationError(message % names, "not_composable")
    length = front.pre_seq_len + behind.pre_seq_len
    if length > LONGEST_PREFIX:
        message = _("Both prefixes together have %(length)s positions; there is room for %(most)s.")
        raise ValidationError(
            message % {"length": length, "most": LONGEST_PREFIX}, "not_composable"
        )
    parts = [front.sha256, behind.sha256]
    mine = Adapter.objects.visible_to(user).filter(checkpoint=front.checkpoint_id, parts=parts)
    return mine.first() or _made(user, front, behind, parts)


def trained_beside(adapter: Adapter) -> list[str]:
    """sha256 of the adapters that it was trained behind; its files say so, wherever it is from."""
    try:
        text = (adapter.path / adapter_files.DESCRIPTION).read_text(encoding="utf-8")
        recipe = (json.loads(text).get("metadata") or {}).get("recipe") or {}
        return [part for part in str(recipe.get("beside", "")).split(",") if part]
    except (OSError, ValueError, AttributeError):
        return []


def _made(user, front: Adapter, behind: Adapter, parts: list[str]) -> Adapter:
    told = {"composed_of": [{"name": one.name, "sha256": one.sha256} for one in (front, behind)]}
    settings.DATA_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.DATA_DIR, prefix="compose-") as work:
        folder = Path(work) / "adapter"
        try:
            adapter_files.join(front.path, behind.path, folder, told)
        except (OSError, ValueError, KeyError, TypeError) as error:
            names = {"one": front.name, "other": behind.name, "reason": error}
            message = _("“%(one)s” and “%(other)s” cannot be joined: %(reason)s")
            raise ValidationError(message % names, "not_composable") from error
        adapter = publish_adapter(
            folder,
            name=f"{front.name}{SIGN}{behind.name}"[:120],
            checkpoint=behind.checkpoint,
            owner=user,
        )
    adapter.parts, adapter.with_history = parts, behind.with_history
    adapter.save(update_fields=["parts", "with_history"])
    return adapter
