"""/api/v1/check-runs/. Rules are in checks.py; here is only HTTP."""

from django.db.models import OuterRef, Subquery
from django.utils.translation import gettext as _
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_field
from rest_framework import exceptions, mixins, serializers, status
from rest_framework.decorators import action
from rest_framework.response import Response

from chat.models import Checkpoint
from portal.models import ApiKey, Run
from portal.numbers import whole_number
from portal.rest.conventions import RunSerializer
from portal.rest.viewsets import VisibleRows, rules_as_400
from portal.runs import lifecycle
from tuning.datasets import checks, measuring, store
from tuning.models import CheckRun, Dataset, DatasetVersion


class CheckRunSerializer(RunSerializer):
    dataset = serializers.IntegerField(source="dataset_version.dataset_id", read_only=True)
    dataset_version = serializers.IntegerField(source="dataset_version.number", read_only=True)

    class Meta(RunSerializer.Meta):
        model = CheckRun
        fields = [*RunSerializer.Meta.fields, "dataset", "dataset_version", "checkpoint"]
        read_only_fields = fields


class CheckReportSerializer(CheckRunSerializer):
    report = serializers.SerializerMethodField(help_text="Empty until the run has succeeded.")

    class Meta(CheckRunSerializer.Meta):
        fields = [*CheckRunSerializer.Meta.fields, "report"]
        read_only_fields = fields

    @extend_schema_field({"type": "object"})
    def get_report(self, run):
        return run.report


class NewCheckRunSerializer(serializers.Serializer):
    dataset = serializers.PrimaryKeyRelatedField(queryset=Dataset.objects.none())
    checkpoint = serializers.PrimaryKeyRelatedField(
        queryset=Checkpoint.objects.none(),
        required=False,
        default=None,
        help_text="Left out: the portal's default.",
    )
    split = serializers.ChoiceField(
        [store.TRAIN, store.VALIDATION, store.TEST], default=store.TRAIN
    )

    def get_fields(self):
        fields = super().get_fields()
        request = self.context.get("request")
        if request is not None:
            fields["dataset"].queryset = Dataset.objects.visible_to(request.user)
            fields["checkpoint"].queryset = Checkpoint.objects.visible_to(request.user)
        return fields


class CutsSerializer(serializers.Serializer):
    rows = serializers.IntegerField()
    prompts = serializers.IntegerField(help_text="longer than max_source_length")
    responses = serializers.IntegerField(help_text="longer than max_target_length")
    told = serializers.ListField(child=serializers.CharField(), help_text="the same in words")


class CheckRunViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, VisibleRows):
    """Datasets measured with a checkpoint's tokenizer before a run is paid for."""

    key_scope = ApiKey.Scope.DATA
    queryset = CheckRun.objects.select_related("owner", "dataset_version")
    serializer_class = CheckReportSerializer

    def get_queryset(self):
        found, query = super().get_queryset(), self.request and self.request.query_params
        if not query or self.action != "list":
            return found
        for name, key in (
            ("dataset", "dataset_version__dataset_id"),
            ("checkpoint", "checkpoint_id"),
        ):
            if (number := self.number_wished(name)) is not None:
                found = found.filter(**{key: number})
        if query.get("dataset"):
            newest = DatasetVersion.objects.filter(dataset=OuterRef("dataset_version__dataset"))
            found = found.filter(dataset_version=Subquery(newest.values("pk")[:1]))
        state = self.choice_wished("status", Run.Status.values)
        return found.filter(status=state) if state else found

    @extend_schema(
        parameters=[
            OpenApiParameter("dataset", int, description="checks of its newest version"),
            OpenApiParameter("checkpoint", int),
            OpenApiParameter("status", str, enum=Run.Status.values),
        ]
    )
    def list(self, request, *args, **kwargs):
        return super().list(request, *args, **kwargs)

    def get_serializer_class(self):
        return CheckRunSerializer if self.action == "list" else CheckReportSerializer

    def _answer(self, run: CheckRun, http_status: int = status.HTTP_200_OK) -> Response:
        row = self.get_queryset().get(pk=run.pk)
        return Response(CheckReportSerializer(row).data, status=http_status)

    @extend_schema(
        request=NewCheckRunSerializer,
        responses={201: CheckReportSerializer, 200: CheckReportSerializer},
    )
    def create(self, request):
        """201 with a new run, or 200 with your own that counts, or has counted, the same."""
        body = NewCheckRunSerializer(data=request.data, context={"request": request})
        body.is_valid(raise_exception=True)
        fields = body.validated_data
        checkpoint = fields["checkpoint"] or Checkpoint.default()
        if checkpoint is None:
            message = _("There is no checkpoint yet; add one with add_checkpoint.")
            raise exceptions.ValidationError({"checkpoint": [message]})
        with rules_as_400():
            run, new = checks.create_check(
                request.user,
                dataset=fields["dataset"],
                checkpoint=checkpoint,
                split=fields["split"],
            )
        return self._answer(run, status.HTTP_201_CREATED if new else status.HTTP_200_OK)

    @extend_schema(
        parameters=[
            OpenApiParameter("max_source_length", int, required=True),
            OpenApiParameter("max_target_length", int, required=True),
        ],
        responses=CutsSerializer,
    )
    @action(detail=True, pagination_class=None)
    def cuts(self, request, pk=None):
        """How many rows the lengths of a run would cut."""
        run = self.get_object()
        limits = []
        for name in ("max_source_length", "max_target_length"):
            number = whole_number(request.query_params.get(name))
            if not number:
                raise exceptions.ValidationError({name: [_("A number from 1.")]})
            limits.append(number)
        if run.status != Run.Status.SUCCEEDED:
            raise exceptions.NotFound(_("The rows have not been counted yet."))
        prompts, responses = (
            measuring.longer(run.report, part, limit)
            for part, limit in zip(measuring.PARTS, limits, strict=True)
        )
        told = checks.told_of_cuts(run.report, *limits)
        return Response(
            {
                "rows": run.report["rows"],
                "prompts": prompts,
                "responses": responses,
                "told": told,
            }
        )

    @extend_schema(request=None, responses=CheckReportSerializer)
    @action(detail=True, methods=["post"])
    def cancel(self, request, pk=None):
        run = self.get_changeable()
        lifecycle.cancel(run)
        return self._answer(run)
