"""/api/v1/evaluation-runs/. Rules are in plan.py and comparison.py; here is only HTTP."""

from django.http import HttpResponse, StreamingHttpResponse
from django.utils.translation import gettext as _
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import exceptions, mixins, status
from rest_framework.decorators import action
from rest_framework.response import Response

from evaluation import exports, reviewing, upstream_files
from evaluation.comparison import compare, compare_all
from evaluation.figures import figures_of
from evaluation.models import EvaluationRun, Prediction
from evaluation.plan import create_evaluation
from evaluation.serializers import (
    ComparisonSerializer,
    EvaluationRunSerializer,
    ManyComparedSerializer,
    NewEvaluationSerializer,
    PredictionSerializer,
    ReviewSerializer,
)
from portal.access import get_visible
from portal.models import ApiKey
from portal.numbers import whole_number
from portal.rest.conventions import Conflict, Pages
from portal.rest.viewsets import AnyAccept, VisibleRows, rules_as_400
from portal.runs import lifecycle
from portal.runs.figures import event_file_response
from portal.runs.once import once


class ByRow(Pages):
    ordering = "row"


class EvaluationRunViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, VisibleRows):
    """Scores of a checkpoint, with or without an adapter, on a dataset."""

    key_scope = ApiKey.Scope.TUNING
    queryset = EvaluationRun.objects.all()
    serializer_class = EvaluationRunSerializer

    def get_queryset(self):
        return (
            super()
            .get_queryset()
            .select_related("owner", "dataset_version", "checkpoint", "baseline")
        )

    def _scored(self) -> EvaluationRun:
        run = self.get_object()
        if run.scores is None:
            raise Conflict(_("The evaluation has no scores yet."), code="no_scores")
        return run

    def _told(self, run) -> dict:
        return EvaluationRunSerializer(self.get_queryset().get(pk=run.pk)).data

    @extend_schema(request=NewEvaluationSerializer, responses={201: EvaluationRunSerializer})
    def create(self, request):
        body = NewEvaluationSerializer(data=request.data, context={"request": request})
        body.is_valid(raise_exception=True)
        with rules_as_400():
            run = once(
                request.user,
                request.headers.get("Idempotency-Key", ""),
                [request.path, request.data],
                lambda: create_evaluation(request.user, **body.validated_data),
            )
        return Response(self._told(run), status=status.HTTP_201_CREATED)

    @extend_schema(responses=PredictionSerializer(many=True))
    @action(detail=True, pagination_class=ByRow, serializer_class=PredictionSerializer)
    def predictions(self, request, pk=None):
        """Row by row, also while the run goes on."""
        page = self.paginate_queryset(Prediction.objects.filter(run=self.get_object()))
        return self.get_paginated_response(PredictionSerializer(page, many=True).data)

    @extend_schema(
        parameters=[
            OpenApiParameter(
                "with",
                {"type": "integer", "minimum": 0},
                required=True,
                description="Another evaluation of the same rows.",
            )
        ],
        responses=ComparisonSerializer,
    )
    @action(detail=True, pagination_class=None)
    def compare(self, request, pk=None):
        """This run's scores minus another's, with intervals over the paired rows."""
        run, other = self.get_object(), whole_number(request.query_params.get("with"))
        if other is None:
            raise exceptions.ValidationError({"with": [_("The id of another evaluation.")]})
        other = get_visible(EvaluationRun.objects, request.user, pk=other)
        with rules_as_400():
            return Response(compare(run, other))

    @extend_schema(
        parameters=[
            OpenApiParameter("baseline", {"type": "integer", "minimum": 0}, required=True),
            OpenApiParameter(
                "runs",
                {"type": "string", "pattern": "^[0-9]{1,18}(,[0-9]{1,18})*$"},
                required=True,
                description="Ids of evaluations, comma separated.",
            ),
        ],
        responses=ManyComparedSerializer,
    )
    @action(detail=False, pagination_class=None)
    def comparison(self, request):
        """Several evaluations beside one, of the same rows; p-values corrected after Holm, metric
        by metric.
        """
        texts = [text for text in request.query_params.get("runs", "").split(",") if text.strip()]
        numbers = [whole_number(text.strip()) for text in texts]
        baseline = whole_number(request.query_params.get("baseline"))
        problems = {}
        if baseline is None:
            problems["baseline"] = [_("The id of an evaluation.")]
        if not numbers or None in numbers:
            problems["runs"] = [_("Ids of evaluations, separated by commas.")]
        if problems:
            raise exceptions.ValidationError(problems)
        found = EvaluationRun.objects
        base = get_visible(found, request.user, pk=baseline)
        runs = [get_visible(found, request.user, pk=number) for number in dict.fromkeys(numbers)]
        with rules_as_400():
            compared = compare_all(base, runs)
        told = [{"id": run.pk, **each} for run, each in zip(runs, compared, strict=True)]
        return Response({"baseline": base.pk, "comparisons": told})

    @extend_schema(request=ReviewSerializer, responses=EvaluationRunSerializer)
    @action(detail=True, methods=["post"])
    def review(self, request, pk=None):
        """A reviewer's decision: approved, or rejected with a note; blank takes it back."""
        run = self.get_object()
        if not reviewing.may_review(request.user):
            raise exceptions.PermissionDenied(_("Only a reviewer may decide this."))
        body = ReviewSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        with rules_as_400():
            reviewing.review(request.user, run, **body.validated_data)
        return Response(self._told(run))

    @extend_schema(request=None, responses=EvaluationRunSerializer)
    @action(detail=True, methods=["post"])
    def cancel(self, request, pk=None):
        """Ends a queued run now and a running one soon; what it predicted stays."""
        run = self.get_changeable()
        lifecycle.cancel(run)
        return Response(self._told(run))

    @extend_schema(request=None, responses=EvaluationRunSerializer)
    @action(detail=True, methods=["post"])
    def resume(self, request, pk=None):
        """Queues a failed or cancelled run again; it goes on behind the rows that it has
        predicted.
        """
        run = self.get_changeable()
        with rules_as_400():
            resumed = lifecycle.resume(run)
        if not resumed:
            raise Conflict(
                _("Only a failed or cancelled run can be resumed."), code="not_resumable"
            )
        return Response(self._told(run))

    @extend_schema(
        responses={
            (200, "text/plain"): OpenApiResponse(OpenApiTypes.STR, "JSON lines {labels, predict}")
        }
    )
    @action(
        detail=True,
        url_path=upstream_files.PREDICTIONS,
        pagination_class=None,
        content_negotiation_class=AnyAccept,
    )
    def generated_predictions(self, request, pk=None):
        """The predictions in the file format of ChatGLM-6B's evaluate.sh."""
        pairs = self._scored().predictions.order_by("row").values_list("reference", "text")
        content = "".join(upstream_files.prediction_lines(pairs))
        response = HttpResponse(content, content_type="text/plain; charset=utf-8")
        return _attachment(response, upstream_files.PREDICTIONS)

    @extend_schema(responses={200: OpenApiTypes.OBJECT})
    @action(detail=True, url_path=upstream_files.RESULTS, pagination_class=None)
    def predict_results(self, request, pk=None):
        """The scores in the file format of ChatGLM-6B's evaluate.sh."""
        run = self._scored()
        content = upstream_files.results(run.scores, run.recipe["rows"], run.seconds or 0.0)
        return _attachment(
            HttpResponse(content, content_type="application/json"), upstream_files.RESULTS
        )

    @extend_schema(responses={(200, "text/csv"): OpenApiResponse(OpenApiTypes.STR, "A line a row")})
    @action(
        detail=True,
        url_path=exports.CSV,
        pagination_class=None,
        content_negotiation_class=AnyAccept,
    )
    def predictions_csv(self, request, pk=None):
        """Rows with every score, for a spreadsheet; what looks like a formula is text."""
        lines = exports.csv_lines(self._scored())
        response = StreamingHttpResponse(lines, content_type="text/csv; charset=utf-8")
        return _attachment(response, exports.CSV)

    @extend_schema(responses={(200, "application/octet-stream"): OpenApiTypes.BINARY})
    @action(detail=True, pagination_class=None, content_negotiation_class=AnyAccept)
    def tensorboard(self, request, pk=None):
        """The scores with their intervals as a TensorBoard event file."""
        run = self._scored()
        return event_file_response(run, figures_of(run))

    @extend_schema(responses={200: OpenApiTypes.OBJECT})
    @action(detail=True, url_path=exports.JSON, pagination_class=None)
    def evaluation_json(self, request, pk=None):
        """All of it: scores, differences, recipe, general answers, rows."""
        run = self._scored()
        parts = exports.as_json(run, self._told(run))
        response = StreamingHttpResponse(parts, content_type="application/json")
        return _attachment(response, exports.JSON)


def _attachment(response, name: str):
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response
