"""The chat page. Answers stream over the websocket (static/portal/chat.js); every form here also
works without it.
"""

import asyncio
from datetime import timedelta
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib import messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.paginator import Paginator
from django.db import transaction
from django.http import Http404
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy
from django.views.decorators.http import require_GET, require_POST
from rest_framework.exceptions import APIException

from chat.conversations import live
from chat.conversations.page import thread
from chat.conversations.tree import Tree
from chat.conversations.turns import (
    MOST_COMPARED,
    answer_again,
    create_comparison,
    create_turn,
    go_on,
)
from chat.conversations.views import SHARE_DAYS
from chat.engine.request import GenerationRefused
from chat.fetching.plan import catalogue, endpoints
from chat.forms import CheckpointForm, SayForm, panel_of
from chat.models import Adapter, Checkpoint, Conversation, Message, ShareLink
from chat.registry import (
    check_may_be_shared,
    check_name,
    register_checkpoint,
    remove_adapter,
)
from chat.sampling import as_whole
from chat.worker import router
from chat.worker.router import WorkerUnavailable
from portal.access import get_visible
from portal.explanations import EXPLANATIONS
from portal.numbers import whole_number
from portal.page import reason

# what the starter can answer
EXAMPLES = [
    "你好",
    "你能做什么？",
    "类型#裤*版型#宽松*颜色#米白",
    "Who are you?",
]
# of the sampling panel; what they leave open is the checkpoint's
PRESETS: list[tuple[Any, dict[str, float]]] = [
    (gettext_lazy("Exact"), {"temperature": 0, "top_p": 1}),
    (gettext_lazy("Balanced"), {"temperature": 0.7, "top_p": 0.9}),
    (gettext_lazy("Free"), {"temperature": 1.1, "top_p": 0.95}),
]
CHIPS = 5  # models that are all shown side by side
BESIDE = 3  # of more than these: the chosen one, its base, the newest
LISTED = 200  # conversations in the list


@require_GET
def new_conversation(request):
    return render(request, "chat/conversation_detail.html", _context(request, None))


@require_GET
def conversation(request, pk):
    found = get_visible(
        Conversation.objects.select_related("checkpoint", "adapter"), request.user, pk=pk
    )
    return render(request, "chat/conversation_detail.html", _context(request, found))


def _context(request, conversation) -> dict:
    shown = thread(
        conversation,
        before=whole_number(request.GET.get("before")),
        at=whole_number(request.GET.get("at")),
    )
    turns = shown.turns
    last = next((turn for turn in reversed(turns) if turn.role == Message.Role.ASSISTANT), None)
    starter = Checkpoint.objects.filter(is_starter=True, is_default=True).first()
    picker = _models(request, conversation)
    chosen = picker["chosen"]
    return {
        "conversation": conversation,
        "conversations": _by_day(request.user),
        "turns": turns,
        "earlier": shown.earlier,
        "edited": _edited(turns, whole_number(request.GET.get("edit"))),
        "most_compared": MOST_COMPARED,
        "newest": shown.newest,
        "deleted": whole_number(request.GET.get("deleted")),
        "share_links": list(ShareLink.open_ones().filter(conversation=conversation))
        if conversation
        else [],
        "share_days": SHARE_DAYS,
        "share_opened": "shared" in request.GET,
        "picker": picker,
        "starter": starter,
        "examples": EXAMPLES,
        "explanations": {code: str(text) for code, text in EXPLANATIONS.items()},
        "presets": [{"name": name, **values} for name, values in PRESETS],
        "fill": _fill(chosen and chosen["checkpoint"], last),
        "takes_system": bool(chosen) and chosen["checkpoint"].takes_system,
        "sampling": _sampling_fields(
            last.sampling if last else {}, panel_of(chosen and chosen["checkpoint"])
        ),
    }


def _fill(checkpoint: Checkpoint | None, last: Message | None) -> dict | None:
    """How much of the model's context the last prompt and its answer took, in tokens."""
    size = checkpoint.description.get("context_length") if checkpoint else None
    used = (last.usage or {}).get("total_tokens") if last else None
    return {"size": size, "used": min(used or 0, size)} if size else None


def _edited(turns: list[Message], wanted: int | None) -> int | None:
    """The question that is asked in another way: it or its answer has been named."""
    for question, answer in zip(turns, [*turns[1:], None], strict=False):
        named = (question.pk, answer and answer.pk)
        if wanted is not None and wanted in named and question.role == Message.Role.USER:
            return question.pk
    return None


def _models(request, conversation) -> dict:
    """Every model that may answer: base checkpoints (prefix off) and adapters, one of them chosen.
    Few are chips; of many the chosen one, its base and the newest beside it are, and all others
    are in a list by base.
    """
    user = request.user
    checkpoints = list(Checkpoint.objects.visible_to(user))
    adapters = list(Adapter.objects.visible_to(user).select_related("checkpoint"))
    chosen_adapter = request.GET.get("adapter") or (conversation and conversation.adapter_id)
    chosen_base = (conversation and conversation.checkpoint_id) or (
        checkpoints[0].pk if checkpoints else None
    )
    absent = _not_loaded(checkpoints) if len(checkpoints) > 1 else set()
    bases = [
        {
            "value": f"base-{c.pk}",
            "checkpoint": c,
            "adapter": None,
            "label": _("%(name)s · prefix off") % {"name": c.name},
            "absent": c.pk in absent,
        }
        for c in checkpoints
    ]
    tuned = [
        {
            "value": f"adapter-{a.pk}",
            "checkpoint": a.checkpoint,
            "adapter": a,
            "label": a.name,
            "absent": a.checkpoint_id in absent,
        }
        for a in adapters
    ]
    chosen = next((c for c in tuned if str(c["adapter"].pk) == str(chosen_adapter)), None)
    chosen = chosen or next((c for c in bases if c["checkpoint"].pk == chosen_base), None)
    if chosen is None:
        return {"chips": [], "groups": [], "chosen": None, "all": []}
    chosen["chosen"] = True
    if len(bases) + len(tuned) <= CHIPS:
        return {"chips": bases + tuned, "groups": [], "chosen": chosen, "all": bases + tuned}
    base = next(c for c in bases if c["checkpoint"] == chosen["checkpoint"])
    beside = [c for c in tuned if c["checkpoint"] == chosen["checkpoint"] and c is not chosen]
    chips = [base] if chosen is base else [base, chosen]
    chips += beside[: BESIDE - len(chips)]
    groups = []
    for base in bases:
        of = [c for c in [base, *tuned] if c["checkpoint"] == base["checkpoint"] and c not in chips]
        if of:
            groups.append((base["checkpoint"], base["absent"], of))
    return {"chips": chips, "groups": groups, "chosen": chosen, "all": bases + tuned}


def _not_loaded(checkpoints) -> set[int]:
    """Ids of those that no worker has in memory; none when nobody can be asked."""
    try:
        status = router.status_sync(timeout=0.3)
    except WorkerUnavailable:
        return set()
    workers = status.get("workers", [status])
    loaded = {worker.get("fingerprint") for worker in workers}
    loaded |= {(worker.get("coming") or {}).get("fingerprint") for worker in workers}
    return {
        c.pk
        for c in checkpoints
        if c.fingerprint not in loaded and not c.description.get("upstream")
    }


def _sampling_fields(used: dict, panel: dict) -> dict:
    """The panel's fields: what the last answer used, else the default, which need not be sent."""
    fields = {
        name: {"default": default, "value": used.get(name, default)}
        for name, default in panel.items()
    }
    return {
        name: {key: "" if value is None else as_whole(value) for key, value in each.items()}
        for name, each in fields.items()
    }


def _by_day(user) -> list[tuple[str, list[Conversation]]]:
    today = timezone.localdate()
    groups: dict[str, list[Conversation]] = {}
    shown = Conversation.objects.visible_to(user).only("title", "adapter_id", "updated_at")
    for found in shown[:LISTED]:
        day = timezone.localtime(found.updated_at).date()
        if day >= today:
            title = _("Today")
        elif day == today - timedelta(days=1):
            title = _("Yesterday")
        elif day > today - timedelta(days=7):
            title = _("Past 7 days")
        else:
            title = _("Earlier")
        groups.setdefault(title, []).append(found)
    return list(groups.items())


@require_POST
async def start(request):
    """First message of a new conversation; `text` and the choices are SayForm's."""
    return await _say(request, _first_turn)


@require_POST
async def say(request, pk):
    return await _say(request, _next_turn, pk)


@require_POST
async def edit(request, pk):
    """The question `question` asked in another way (`edited`), as a branch beside it."""
    return await _say(request, _asked_otherwise, pk, needs_text=False)


@require_POST
async def retry(request, pk):
    """Answers the question of `answer` (the last one, if none is named) again, with the model and
    the sampling chosen now; the earlier answer stays, as a branch.
    """
    return await _say(request, _again, pk, needs_text=False)


@require_POST
async def continued(request, pk):
    """Goes on with `answer`, which was cut short."""
    return await _say(request, _further, pk, needs_text=False)


async def _say(request, compose, pk=None, needs_text=True):
    """Has `compose(user, form, conversation)` write the turn and hands it to the worker; refusals
    go back to the page.
    """
    user = await request.auser()
    conversation = (
        await sync_to_async(get_visible)(Conversation.objects, user, pk=pk) if pk else None
    )
    form = SayForm(request.POST, user=user, needs_text=needs_text)
    try:
        if not await sync_to_async(form.is_valid)():
            raise ValidationError([error for errors in form.errors.values() for error in errors])
        answers = await sync_to_async(compose)(user, form, conversation)
    except (ValidationError, APIException) as error:
        await sync_to_async(messages.error)(request, reason(error))
        return redirect("conversation", pk=pk) if pk else redirect("chat")
    # All at once, so that they share the model's steps. Of one that nobody took the row says so,
    # failed and with the reason.
    begun = await asyncio.gather(*map(live.start, answers), return_exceptions=True)
    for fault in begun:
        if fault is not None and not isinstance(fault, GenerationRefused):
            raise fault
    return redirect("conversation", pk=answers[0].conversation_id)


@transaction.atomic
def _first_turn(user, form, conversation) -> list[Message]:
    return _next_turn(user, form, Conversation.objects.create(owner=user))


def _next_turn(user, form, conversation, **more) -> list[Message]:
    """The queued answers to the form's text: one, or those to be compared."""
    text, models = form.cleaned_data["text"], form.cleaned_data["models"]
    if models:
        return create_comparison(conversation, user, text, models, **form.told(), **more)[1]
    return [create_turn(conversation, user, text, **form.asked(), **more)[1]]


def _asked_otherwise(user, form, conversation) -> list[Message]:
    question = get_visible(conversation.messages, user, pk=form.data.get("question"))
    if question.role != Message.Role.USER:
        raise Http404
    form.cleaned_data["text"] = form.cleaned_data["edited"]
    return _next_turn(user, form, conversation, edited=question)


def _again(user, form, conversation) -> list[Message]:
    answer = _ended_answer(user, form, conversation)
    return [answer_again(conversation, user, answer, **form.asked())]


def _further(user, form, conversation) -> list[Message]:
    return [go_on(conversation, _ended_answer(user, form, conversation))]


def _ended_answer(user, form, conversation) -> Message:
    named = form.data.get("answer") or Tree(conversation).leaf
    found = get_visible(conversation.messages, user, pk=named) if named else None
    if found is None or found.role != Message.Role.ASSISTANT or found.is_in_flight:
        raise ValidationError(_("There is no finished answer to write again."))
    return found


def new_checkpoint(request):
    """How to add a real model; staff do it here, everybody else is told what to ask for."""
    form = CheckpointForm(request.POST or None)
    if request.method == "POST":
        if not request.user.is_staff:
            raise PermissionDenied
        if form.is_valid():
            try:
                found = register_checkpoint(
                    form.cleaned_data["path"], form.cleaned_data["name"] or None
                )
            except ValidationError as error:
                form.add_error(None, error)
            else:
                messages.success(request, _("%(name)s has been added.") % {"name": found.name})
                return redirect("checkpoint_new")
    context = {
        "form": form,
        "checkpoints": Checkpoint.objects.visible_to(request.user),
        "catalogue": catalogue(),
        "endpoints": {hub: "\n".join(endpoints(hub)) for hub in ("hf", "modelscope")},
        "source": request.GET.get("source", ""),
    }
    return render(request, "chat/checkpoint_form.html", context)


@require_GET
def adapter_list(request):
    found = Adapter.objects.visible_to(request.user).select_related("checkpoint", "owner", "run")
    page = Paginator(found, 20).get_page(request.GET.get("page"))
    mine = set(Adapter.objects.changeable_by(request.user).values_list("pk", flat=True))
    for adapter in page:
        adapter.mine = adapter.pk in mine
    return render(request, "chat/adapter_list.html", {"page": page})


@require_POST
def change_adapter(request, pk):
    """`action`: share or unshare with the team, rename, delete, history (how it was trained)."""
    adapter = get_visible(Adapter.objects.changeable_by(request.user), request.user, pk=pk)
    action = request.POST.get("action")
    try:
        if action == "delete":
            remove_adapter(adapter)
            messages.success(request, _("The tuned model has been deleted."))
        elif action == "rename":
            adapter.name = check_name(request.POST.get("name", ""), 120, except_row=adapter)
            adapter.save(update_fields=["name"])
        elif action == "history":
            adapter.with_history = {"yes": True, "no": False}.get(request.POST.get("history"))
            adapter.save(update_fields=["with_history"])
        elif action in ("share", "unshare"):
            if action == "share":
                check_may_be_shared(adapter)
            adapter.shared = action == "share"
            adapter.save(update_fields=["shared"])
    except (ValidationError, APIException) as error:
        messages.error(request, reason(error))
    return redirect("adapter_list")
