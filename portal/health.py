"""`GET /healthz`: for load balancers, scripts and the supervisor. Needs no key and tells nothing
about anybody.
"""

from django.contrib.auth.decorators import login_not_required
from django.db.models import Count
from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe

from chat.worker import router
from portal.models import Run

PUBLIC = ("state", "checkpoint", "device", "active_rows", "max_rows", "queue", "tokens_per_second")


@csrf_exempt  # a wrong method is to be told as that
@require_safe
@login_not_required
def healthz(request):
    """{"status": "ok" | "degraded", "worker": {...}, "queue": {"queued", "running"}}; 200 as long
    as the web itself works.
    """
    try:
        worker = router.status_sync(timeout=1.0)
    except router.WorkerUnavailable as error:
        worker = {"state": "unavailable", "reason": str(error)}
    # No paths, process numbers or names of others: anybody may read this.
    worker = {field: worker[field] for field in PUBLIC if field in worker}
    counts = dict(
        Run.objects.filter(status__in=Run.ACTIVE).values_list("status").annotate(Count("id"))
    )
    queue = {status.value: counts.get(status.value, 0) for status in Run.ACTIVE}
    healthy = worker.get("state") == "ready"
    return JsonResponse(
        {"status": "ok" if healthy else "degraded", "worker": worker, "queue": queue}
    )
