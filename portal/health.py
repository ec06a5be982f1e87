"""`GET /healthz`: for load balancers, scripts and the supervisor. Needs no key and tells nothing about anybody."""

from django.contrib.auth.decorators import login_not_required
from django.db.models import Count
from django.http import JsonResponse

from portal.models import Run


@login_not_required
def healthz(request):
    """{"status": "ok" | "degraded", "worker": {...}, "queue": {"queued", "running"}}; 200 as long as the web itself works."""
    from chat import worker_client

    try:
        worker = worker_client.status_sync(timeout=1.0)
    except worker_client.WorkerUnavailable as error:
        worker = {"state": "unavailable", "reason": str(error)}
    counts = dict(Run.objects.filter(status__in=Run.ACTIVE).values_list("status").annotate(Count("id")))
    queue = {status.value: counts.get(status.value, 0) for status in Run.ACTIVE}
    healthy = worker.get("state") == "ready"
    return JsonResponse({"status": "ok" if healthy else "degraded", "worker": worker, "queue": queue})
