"""The chat page. Answers stream over the websocket (static/portal/chat.js); every form here also
works without it.
"""

import contextlib
from datetime import timedelta

from asgiref.sync import sync_to_async
from django.contrib import messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.paginator import Paginator
from django.db import transaction
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.safestring import mark_safe
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST
from rest_framework.exceptions import APIException

from chat.conversations import live
from chat.conversations.rendering import to_html
from chat.conversations.turns import create_turn
from chat.engine.request import GenerationRefused
from chat.fetching.plan import catalogue, endpoints
from chat.forms import CheckpointForm, RenameForm, SayForm, panel_of
from chat.models import Adapter, Checkpoint, Conversation, Message
from chat.registry import check_name, register_checkpoint, remove_adapter
from portal.access import get_visible
from portal.explanations import EXPLANATIONS
from portal.page import reason

# what the starter can answer
EXAMPLES = [
    "你好",
    "你能做什么？",
    "类型#裤*版型#宽松*颜色#米白",
    "Who are you?",
]
CHIPS = 4  # adapters shown beside the base; the others are in the menu behind them
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
    turns = list(conversation.messages.all()) if conversation else []
    for turn in turns:
        if turn.role == Message.Role.ASSISTANT and not turn.is_in_flight:
            turn.html = mark_safe(to_html(turn.content))  # sanitised there
    last = next((turn for turn in reversed(turns) if turn.role == Message.Role.ASSISTANT), None)
    starter = Checkpoint.objects.filter(is_starter=True, is_default=True).first()
    picker = _models(request, conversation)
    chosen = picker["chosen"]
    return {
        "conversation": conversation,
        "conversations": _by_day(request.user),
        "turns": turns,
        "picker": picker,
        "starter": starter,
        "examples": EXAMPLES,
        "explanations": {code: str(text) for code, text in EXPLANATIONS.items()},
        "sampling": _sampling_fields(
            last.sampling if last else {}, panel_of(chosen and chosen["checkpoint"])
        ),
    }


def _models(request, conversation) -> dict:
    """The chips: base checkpoints (prefix off) and adapters, one of them chosen; many adapters go
    into a menu.
    """
    user = request.user
    checkpoints = list(Checkpoint.objects.visible_to(user))
    adapters = list(Adapter.objects.visible_to(user).select_related("checkpoint"))
    chosen_adapter = request.GET.get("adapter") or (conversation and conversation.adapter_id)
    chosen_base = (conversation and conversation.checkpoint_id) or (
        checkpoints[0].pk if checkpoints else None
    )
    chips = [
        {
            "value": f"base-{c.pk}",
            "checkpoint": c,
            "adapter": None,
            "label": _("%(name)s · prefix off") % {"name": c.name},
        }
        for c in checkpoints
    ]
    tuned = [
        {"value": f"adapter-{a.pk}", "checkpoint": a.checkpoint, "adapter": a, "label": a.name}
        for a in adapters
    ]
    chosen = next((c for c in tuned if str(c["adapter"].pk) == str(chosen_adapter)), None)
    chosen = chosen or next((c for c in chips if c["checkpoint"].pk == chosen_base), None)
    if chosen:
        chosen["chosen"] = True
        if chosen in tuned:  # always visible
            tuned.remove(chosen)
            tuned.insert(0, chosen)
    return {"chips": chips + tuned[:CHIPS], "more": tuned[CHIPS:], "chosen": chosen}


def _sampling_fields(used: dict, panel: dict) -> dict:
    """The panel's fields: what the last answer used, else the default, which need not be sent."""
    fields = {
        name: {"default": default, "value": used.get(name, default)}
        for name, default in panel.items()
    }
    return {
        name: {key: "" if value is None else value for key, value in each.items()}
        for name, each in fields.items()
    }


def _by_day(user) -> list[tuple[str, list[Conversation]]]:
    today = timezone.localdate()
    groups: dict[str, list[Conversation]] = {}
    for found in Conversation.objects.visible_to(user)[:LISTED]:
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
async def retry(request, pk):
    """Answers the last question again, with the model and the sampling chosen now; the last answer
    is replaced.
    """
    return await _say(request, _last_turn_again, pk)


async def _say(request, compose, pk=None):
    """Has `compose(user, form, conversation)` write the turn and hands it to the worker; refusals
    go back to the page.
    """
    user = await request.auser()
    conversation = (
        await sync_to_async(get_visible)(Conversation.objects, user, pk=pk) if pk else None
    )
    form = SayForm(request.POST, user=user, needs_text=compose is not _last_turn_again)
    try:
        if not await sync_to_async(form.is_valid)():
            raise ValidationError([error for errors in form.errors.values() for error in errors])
        answer = await sync_to_async(compose)(user, form, conversation)
    except (ValidationError, APIException) as error:
        await sync_to_async(messages.error)(request, reason(error))
        return redirect("conversation", pk=pk) if pk else redirect("chat")
    # Nobody took it: the answer's row says so, failed and with the reason.
    with contextlib.suppress(GenerationRefused):
        await live.start(answer)
    return redirect("conversation", pk=answer.conversation_id)


@transaction.atomic
def _first_turn(user, form, conversation) -> Message:
    return _next_turn(user, form, Conversation.objects.create(owner=user))


def _next_turn(user, form, conversation) -> Message:
    """The queued answer to the form's text."""
    text = form.cleaned_data["text"]
    return create_turn(conversation, user, text, sampling=form.sampling(), **form.model_choice())[1]


@transaction.atomic
def _last_turn_again(user, form, conversation) -> Message:
    """Replaces the last question and its ended answer by the same question and a queued answer."""
    pair = list(conversation.messages.order_by("-id")[:2])
    if [turn.role for turn in pair] != ["assistant", "user"] or pair[0].is_in_flight:
        raise ValidationError(_("There is no finished answer to write again."))
    conversation.messages.filter(pk__in=[turn.pk for turn in pair]).delete()
    form.cleaned_data["text"] = pair[1].content
    return _next_turn(user, form, conversation)


@require_POST
def rename(request, pk):
    found = get_visible(Conversation.objects, request.user, pk=pk)
    form = RenameForm(request.POST, instance=found)
    if form.is_valid():
        form.save()
    return redirect("conversation", pk=pk)


@require_POST
def delete(request, pk):
    live.discard(get_visible(Conversation.objects, request.user, pk=pk))
    messages.success(request, _("The conversation has been deleted."))
    return redirect("chat")


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
    """`action`: share or unshare with the team, rename, delete."""
    adapter = get_visible(Adapter.objects.changeable_by(request.user), request.user, pk=pk)
    action = request.POST.get("action")
    try:
        if action == "delete":
            remove_adapter(adapter)
            messages.success(request, _("The tuned model has been deleted."))
        elif action == "rename":
            adapter.name = check_name(request.POST.get("name", ""), 120, except_row=adapter)
            adapter.save(update_fields=["name"])
        elif action in ("share", "unshare"):
            adapter.shared = action == "share"
            adapter.save(update_fields=["shared"])
    except (ValidationError, APIException) as error:
        messages.error(request, reason(error))
    return redirect("adapter_list")
