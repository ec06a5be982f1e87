"""Home, tasks and account: the pages that look at all apps."""

from datetime import timedelta

from asgiref.sync import sync_to_async
from django.contrib import messages
from django.contrib.auth import update_session_auth_hash
from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.paginator import Paginator
from django.db.models import F, Sum
from django.http import Http404
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST

from chat.api import chatglm
from chat.fetching.plan import catalogue
from chat.models import Adapter, Checkpoint, Conversation, Message
from chat.worker import router
from evaluation.models import EvaluationRun
from portal.access import get_visible
from portal.forms import KeyForm, PasswordChangeForm
from portal.models import ApiKey, Run, TokenUsage
from portal.notices.views import account_context
from portal.runs import board, work
from tuning.models import Dataset, TuningRun

PER_PAGE = 20
RECENT = 5
USAGE_DAYS = 30  # that the account's page adds up


@csrf_exempt  # a POST is a script's, which proves itself with a key; the GET changes nothing
@login_not_required
async def root(request):
    """GET: the home page. POST: what ChatGLM-6B's api.py answers."""
    if request.method == "POST":
        return await chatglm.answer(request)
    user = await request.auser()
    if not user.is_authenticated:
        return redirect_to_login(request.get_full_path())
    return await sync_to_async(home)(request)


def home(request):
    user = request.user
    steps = first_steps(user)
    starter = Checkpoint.objects.filter(is_starter=True, is_default=True).first()
    return render(
        request,
        "portal/home.html",
        {
            "steps": steps,
            "next_step": any("next" in step for step in steps),
            "starter": starter,
            "catalogue": catalogue() if starter else [],
            "conversations": Conversation.objects.visible_to(user)[:RECENT],
            "adapters": Adapter.objects.visible_to(user).select_related("checkpoint")[:RECENT],
            "runs": Run.objects.filter(owner=user)[:RECENT],
        },
    )


def first_steps(user) -> list[dict]:
    """The newcomer's way through the whole loop: each step with what is done and where it is done;
    `next` marks one.
    """
    answers = Message.objects.filter(conversation__owner=user, role=Message.Role.ASSISTANT)
    runs = TuningRun.objects.filter(owner=user)
    tuned = Adapter.objects.visible_to(user).exclude(run=None).first()
    done = {
        "chat": answers.exists(),
        "data": Dataset.objects.filter(owner=user).exists() or runs.exists(),  # the sample will do
        "tune": runs.exists(),
        "evaluate": EvaluationRun.objects.filter(owner=user).exists(),
        "tuned": answers.exclude(adapter=None).exists(),
    }
    steps = [{"name": name, "done": reached, "adapter": tuned} for name, reached in done.items()]
    for step in steps:
        if not step["done"]:
            step["next"] = True
            break
    return steps


@require_GET
def tasks(request):
    """All work of the team. What a member may not see in full appears as a busy row: kind, owner,
    state, times.
    """
    everything = Run.objects.select_related("owner")
    visible = set(
        Run.objects.visible_to(request.user)
        .filter(status__in=Run.ACTIVE)
        .values_list("pk", flat=True)
    )
    queues = board.board()
    changeable = set(
        Run.objects.changeable_by(request.user)
        .filter(status__in=Run.ACTIVE)
        .values_list("pk", flat=True)
    )
    running = [run for queue in queues for run in queue.running]
    queued = [entry.run for queue in queues for entry in queue.waiting]
    mine = request.GET.get("whose") == "mine"
    ended = everything.exclude(status__in=Run.ACTIVE).order_by(
        F("finished_at").desc(nulls_last=True), "-id"
    )
    if mine:
        ended = ended.filter(owner=request.user)
    page = Paginator(ended, PER_PAGE).get_page(request.GET.get("page"))
    visible |= set(
        Run.objects.visible_to(request.user)
        .filter(pk__in=[run.pk for run in page])
        .values_list("pk", flat=True)
    )
    for run in [*running, *queued, *page]:
        run.open = run.pk in visible
        run.mine = run.pk in changeable
    context = {
        "queues": queues,
        "running": running,
        "waiting": len(queued),
        "page": page,
        "mine": mine,
        "page_is_live": 3,
        "drained": all(queue.hold for queue in queues) and board.drained(),
    }
    return render(request, "portal/tasks.html", context | {"worker": worker_state()})


@require_POST
def decide(request):
    """A decision on the queue board, named by `action`; whose run it is may cancel or lower it,
    the rest is for admins.
    """
    action, pk = request.POST.get("action"), request.POST.get("run")
    try:
        if action in ("drain", "undrain"):
            _decide_on_all(request, action)
        elif action in ("hold", "release"):
            _decide_on_queue(request, action)
        else:
            _decide_on_run(request, action, pk)
    except ValidationError as refused:
        messages.warning(request, " ".join(refused.messages))
    return redirect("tasks")


def _decide_on_all(request, action: str) -> None:
    if not request.user.is_staff:
        raise PermissionDenied
    if action == "drain":
        reason = request.POST.get("reason", "").strip()
        board.drain(request.user, reason, checkpoint="checkpoint" in request.POST)
    else:
        board.undrain(request.user)


def _decide_on_queue(request, action: str) -> None:
    queue = request.POST.get("queue", "")
    if not request.user.is_staff:
        raise PermissionDenied
    if queue not in work.queues():
        raise Http404
    if action == "hold":
        board.hold(request.user, queue, request.POST.get("reason", "").strip())
    else:
        board.release(request.user, queue)


def _decide_on_run(request, action: str | None, pk) -> None:
    run = get_visible(Run.objects.changeable_by(request.user), request.user, pk=pk)
    if action == "cancel":
        board.cancel(request.user, run)
    elif action in ("low", "normal"):
        if not board.set_priority(request.user, run, board.PRIORITIES[action]):
            messages.warning(request, _("The run does not wait any more."))
    elif action in ("up", "down", "first"):
        if not request.user.is_staff:
            raise PermissionDenied
        places = {"up": -1, "down": 1, "first": -1_000_000}[action]
        board.move(request.user, run, places, request.POST.get("version"))
    else:
        raise Http404


def worker_state() -> dict:
    """What the inference worker says of itself; {"state": "unavailable", "reason"} when it says
    nothing.
    """
    try:
        return router.status_sync(timeout=1.0)
    except router.WorkerUnavailable as error:
        return {"state": "unavailable", "reason": str(error)}


def usage_of(user) -> list[dict]:
    """Tokens of the last USAGE_DAYS by the way they were asked for; unused ways too."""
    since = timezone.localdate() - timedelta(days=USAGE_DAYS - 1)
    sums = TokenUsage.objects.filter(user=user, day__gte=since).order_by().values("door")
    found = {
        row["door"]: row
        for row in sums.annotate(
            prompt=Sum("prompt_tokens"), completion=Sum("completion_tokens"), count=Sum("answers")
        )
    }
    none = {"prompt": 0, "completion": 0, "count": 0}
    return [{**none, **found.get(door, {}), "name": name} for door, name in TokenUsage.Door.choices]


@never_cache  # it may show a new key
def account(request):
    """Keys and password; each form says by its `action` what it does."""
    action = request.POST.get("action")
    key_form, password_form, secret = KeyForm(), PasswordChangeForm(request.user), None
    if action == "create_key":
        key_form = KeyForm(request.POST)
        if key_form.is_valid():
            # Shown in this answer and nowhere else, so there is no redirect to carry it.
            _key, secret = ApiKey.create_for(
                request.user, key_form.cleaned_data["name"], **key_form.limits()
            )
            key_form = KeyForm()
    elif action == "revoke_key":
        key = get_visible(
            ApiKey.objects.filter(owner=request.user), request.user, pk=request.POST.get("key")
        )
        ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now())
        messages.success(request, _("The key has been revoked."))
        return redirect("account")
    elif action == "change_password":
        password_form = PasswordChangeForm(request.user, request.POST, request=request)
        if password_form.is_valid():
            update_session_auth_hash(request, password_form.save())
            messages.success(request, _("The password has been changed."))
            return redirect("account")
    keys = ApiKey.objects.filter(owner=request.user)
    teams = request.user.teams.prefetch_related("members")
    context = {
        "keys": keys,
        "teams": teams,
        "key_form": key_form,
        "password_form": password_form,
        "secret": secret,
        "usage": usage_of(request.user),
        "usage_days": USAGE_DAYS,
        **account_context(request.user),
    }
    return render(request, "portal/account.html", context)
