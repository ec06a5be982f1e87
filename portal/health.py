"""How the portal is: `GET /healthz` for load balancers, scripts and people, `GET /metrics` for
Prometheus. Neither tells anything about anybody.
"""

import contextlib
from ipaddress import ip_address

from django.conf import settings
from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError
from django.db.models import Count, Min
from django.http import HttpResponse, JsonResponse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from chat.models import Message
from chat.worker import router
from portal import outages
from portal.models import ApiKey, Run
from portal.rest.api_keys import bearer
from portal.rest.conventions import json_error

WORKER_FIGURES = {
    "active_rows": "Answers that are computed at the moment.",
    "max_rows": "Answers that can be computed at once.",
    "queue": "Answers that wait.",
    "tokens_per_second": "Tokens of all answers together.",
}
PUBLIC = (
    "state",
    "checkpoint",
    "coming",
    "device",
    "active_rows",
    "max_rows",
    "queue",
    "tokens_per_second",
)


@csrf_exempt  # a wrong method is to be told as that
@require_safe
@login_not_required
def healthz(request):
    """{"status": "ok" | "degraded", "worker": {...}, "queue": {"queued", "running"} | null,
    "problems": [code, ...]}; 200 as long as the web itself works.
    """
    problems = []
    try:
        worker = router.status_sync(timeout=1.0)
    except router.WorkerUnavailable as error:
        worker = {"state": "unavailable", "reason": str(error)}
    # No paths, process numbers or names of others: anybody may read this.
    worker = {field: worker[field] for field in PUBLIC if field in worker}
    if worker.get("state") not in ("ready", "resting"):
        problems.append("worker_unavailable")
    try:
        counts = dict(
            Run.objects.filter(status__in=Run.ACTIVE).values_list("status").annotate(Count("id"))
        )
        queue = {status.value: counts.get(status.value, 0) for status in Run.ACTIVE}
    except DatabaseError:
        queue = None
        problems.append("database_unavailable")
    if outages.room() < outages.NEARLY_FULL:
        problems.append("disk_full")
    status = "degraded" if problems else "ok"
    return JsonResponse({"status": status, "worker": worker, "queue": queue, "problems": problems})


@csrf_exempt
@require_safe
@login_not_required
def metrics(request):
    """Figures for Prometheus; for an administrator's key, or an address of PORTAL_METRICS_FROM."""
    if not _may_read_metrics(request):
        return json_error(
            401,
            _("An administrator's API key is needed here."),
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Figures())
    return HttpResponse(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def _may_read_metrics(request) -> bool:
    secret = bearer(request.headers.get("Authorization", ""))
    if secret is not None:
        user = ApiKey.user_of(secret)
        return user is not None and user.is_staff
    with contextlib.suppress(ValueError):
        address = ip_address(request.META.get("REMOTE_ADDR") or "")
        return any(address in network for network in settings.METRICS_FROM)
    return False


class _Figures(Collector):
    """What the database, the disk and the worker say when they are asked; nothing is counted in
    this process, so that it does not matter which of several answers.
    """

    def collect(self):
        yield GaugeMetricFamily("portal_disk_free_bytes", "Room for data.", outages.room())
        up = 1
        try:
            yield from self._runs()
            answers = GaugeMetricFamily("portal_answers_in_flight", "Answers being written.")
            answers.add_metric([], Message.objects.filter(status__in=Message.IN_FLIGHT).count())
            yield answers
        except DatabaseError:
            up = 0
        yield GaugeMetricFamily("portal_database_up", "1 when the database answers.", up)
        yield from self._worker()

    def _runs(self):
        runs = GaugeMetricFamily("portal_runs", "Runs by state.", labels=["kind", "status"])
        for kind, status, count in (
            Run.objects.order_by().values_list("kind", "status").annotate(Count("id"))
        ):
            runs.add_metric([kind, status], count)
        yield runs
        oldest = Run.objects.filter(status=Run.Status.QUEUED).aggregate(Min("created_at"))
        since = oldest["created_at__min"]
        waited = (timezone.now() - since).total_seconds() if since else 0
        yield GaugeMetricFamily(
            "portal_oldest_queued_run_seconds", "How long the oldest run has waited.", waited
        )

    def _worker(self):
        try:
            status = router.status_sync(timeout=1.0)
        except router.WorkerUnavailable:
            status = {}
        ready = status.get("state") in ("ready", "resting")
        yield GaugeMetricFamily("portal_worker_up", "1 when the model answers.", int(ready))
        for field, text in WORKER_FIGURES.items():
            if isinstance(status.get(field), int | float):
                yield GaugeMetricFamily(f"portal_worker_{field}", text, status[field])
