"""/api/v1/tuning-runs/. Rules are in plan.py and portal/runs/lifecycle.py; here is only HTTP."""

from collections import deque
from io import StringIO

from django.http import HttpResponse
from django.utils.translation import gettext as _
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import exceptions, mixins, status
from rest_framework.decorators import action
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter

from chat.api.serializers import AdapterSerializer
from portal.models import ApiKey, Run
from portal.numbers import whole_number
from portal.rest.conventions import Conflict, Pages
from portal.rest.viewsets import AnyAccept, VisibleRows, rules_as_400
from portal.runs import lifecycle
from portal.runs.figures import event_file_response
from portal.runs.once import once
from tuning.figures import figures_of
from tuning.models import TuningRun
from tuning.plan import create_run
from tuning.serializers import NewTuningRunSerializer, TuningMetricSerializer, TuningRunSerializer
from tuning.steps import publish_saved_step

MOST_LOG_LINES = 100_000


class BySteps(Pages):
    """Metrics, oldest first."""

    ordering = "step"
    page_size = 1000
    max_page_size = 10_000


class TuningRunViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, VisibleRows):
    """Tuning runs. What the user does not see is 404; what they see but may not change is
    403.
    """

    key_scope = ApiKey.Scope.TUNING
    queryset = TuningRun.objects.all()
    serializer_class = TuningRunSerializer

    def get_queryset(self):
        found = super().get_queryset()
        wanted = self.action == "list" and self.request and self.request.query_params.get("status")
        if wanted:
            if wanted not in Run.Status.values:
                message = _("Must be one of: %(choices)s.") % {
                    "choices": ", ".join(Run.Status.values)
                }
                raise exceptions.ValidationError({"status": [message]})
            found = found.filter(status=wanted)
        return found.select_related("owner", "dataset_version").prefetch_related(
            "adapters", "made_checkpoints"
        )

    def _answer(self, run: TuningRun, http_status: int = status.HTTP_200_OK) -> Response:
        return Response(
            TuningRunSerializer(self.get_queryset().get(pk=run.pk)).data, status=http_status
        )

    @extend_schema(parameters=[OpenApiParameter("status", str, enum=Run.Status.values)])
    def list(self, request, *args, **kwargs):
        return super().list(request, *args, **kwargs)

    @extend_schema(request=NewTuningRunSerializer, responses={201: TuningRunSerializer})
    def create(self, request):
        """Checks the plan, freezes it and puts the run into the queue. All problems of a body are
        named at once.
        """
        body = NewTuningRunSerializer(data=request.data, context={"request": request})
        body.is_valid(raise_exception=True)
        fields = body.validated_data
        with rules_as_400():
            run = once(
                request.user,
                request.headers.get("Idempotency-Key", ""),
                [request.path, request.data],
                lambda: create_run(request.user, **fields),
            )
        return self._answer(run, status.HTTP_201_CREATED)

    @extend_schema(responses=TuningMetricSerializer(many=True))
    @action(detail=True, pagination_class=BySteps, serializer_class=TuningMetricSerializer)
    def metrics(self, request, pk=None):
        """Loss, learning rate and speed of each logged step, oldest first."""
        page = self.paginate_queryset(self.get_object().metrics.all())
        return self.get_paginated_response(TuningMetricSerializer(page, many=True).data)

    @extend_schema(responses={(200, "application/octet-stream"): OpenApiTypes.BINARY})
    @action(detail=True, pagination_class=None, content_negotiation_class=AnyAccept)
    def tensorboard(self, request, pk=None):
        """The curves as a TensorBoard event file."""
        run = self.get_object()
        return event_file_response(run, figures_of(run))

    @extend_schema(
        parameters=[OpenApiParameter("tail", int, description="only so many of the last lines")],
        responses={(200, "text/plain"): OpenApiTypes.STR},
    )
    @action(detail=True, pagination_class=None, content_negotiation_class=AnyAccept)
    def log(self, request, pk=None):
        """The trainer's log of all attempts, for people."""
        run = self.get_object()
        tail = whole_number(request.query_params.get("tail") or MOST_LOG_LINES)
        if tail is None or not 0 < tail <= MOST_LOG_LINES:
            message = _("Must lie between %(low)s and %(high)s.") % {
                "low": 1,
                "high": MOST_LOG_LINES,
            }
            raise exceptions.ValidationError({"tail": [message]})
        text = "".join(deque(StringIO(run.log_tail()), tail))
        return HttpResponse(text, content_type="text/plain; charset=utf-8")

    @extend_schema(request=None, responses=TuningRunSerializer)
    @action(detail=True, methods=["post"])
    def cancel(self, request, pk=None):
        """A queued run ends at once, a running one after its step, with its state saved. An ended
        run stays as it is.
        """
        run = self.get_changeable()
        lifecycle.cancel(run)
        return self._answer(run)

    @extend_schema(request=None, responses=TuningRunSerializer)
    @action(detail=True, methods=["post"])
    def resume(self, request, pk=None):
        """A failed or cancelled run goes on from its saved state; 409 for any other."""
        run = self.get_changeable()
        with rules_as_400():
            resumed = lifecycle.resume(run)
        if not resumed:
            raise Conflict(_("Only a failed or cancelled run can go on."), "not_resumable")
        return self._answer(run)

    @extend_schema(request=None, responses={201: AdapterSerializer})
    @action(detail=True, methods=["post"], url_path=r"steps/(?P<step>[0-9]{1,7})")
    def steps(self, request, pk=None, step=None):
        """A step that the run saved becomes a tuned model of its own; the same one again when it
        has been published.
        """
        with rules_as_400():
            adapter = publish_saved_step(self.get_changeable(), int(step))
        return Response(AdapterSerializer(adapter).data, status=status.HTTP_201_CREATED)


_router = SimpleRouter()
_router.register("tuning-runs", TuningRunViewSet, basename="api-tuning-run")
tuning_run_urlpatterns = _router.urls
