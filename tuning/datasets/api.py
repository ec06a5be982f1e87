"""/api/v1/datasets/. Rules are in tuning/datasets/store.py; here is only HTTP."""

from django.conf import settings
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import exceptions, mixins, parsers, status
from rest_framework.decorators import action
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter

from chat.models import Checkpoint
from portal.access import get_visible
from portal.explanations import sentence
from portal.models import ApiKey
from portal.numbers import whole_number
from portal.rest.conventions import Conflict, TooLarge, error
from portal.rest.viewsets import VisibleRows, rules_as_400
from tuning.datasets import checks, store
from tuning.datasets.check_api import CheckRunViewSet
from tuning.datasets.editing_api import CollectedExampleViewSet, Editing
from tuning.datasets.serializers import (
    DatasetDetailSerializer,
    DatasetSerializer,
    ExamplePageSerializer,
    SplitSerializer,
    TrainedSerializer,
    UploadSerializer,
)
from tuning.models import Dataset

EXAMPLES_PER_PAGE, MOST_EXAMPLES_PER_PAGE = 50, 500
_FORM_ROOM = 1 << 20  # bytes of a multipart body beside the file itself


def rejection(rejected: store.DatasetRejected) -> Response:
    """The envelope of an upload that was not taken, with all its problems."""
    first = rejected.problems[0]
    too_large = first["code"] == "too_large"
    body = error(
        store.in_short(rejected),
        param="file",
        code=first["code"],
        problems=rejected.problems,
        problem_count=rejected.total,
    )
    return Response(body, status=status.HTTP_413_REQUEST_ENTITY_TOO_LARGE if too_large else 400)


class DatasetViewSet(
    Editing,
    mixins.ListModelMixin,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    mixins.DestroyModelMixin,
    VisibleRows,
):
    """Uploaded examples. A dataset's versions never change; what changes rows adds one."""

    key_scope = ApiKey.Scope.DATA
    queryset = Dataset.objects.all()
    serializer_class = DatasetDetailSerializer
    http_method_names = ["get", "post", "patch", "delete", "head", "options"]

    def get_queryset(self):
        return super().get_queryset().select_related("owner").prefetch_related("versions")

    def get_serializer_class(self):
        return DatasetSerializer if self.action == "list" else DatasetDetailSerializer

    def get_parsers(self):
        if (
            getattr(self, "action_map", {}).get(self.request.method.lower() if self.request else "")
            == "create"
        ):
            return [parsers.MultiPartParser()]
        return super().get_parsers()

    def initial(self, request, *args, **kwargs):
        """Refuses a body that is too large before anything reads it."""
        length = request.META.get("CONTENT_LENGTH") or "0"
        if length.isdigit() and int(length) > settings.DATASET_MAX_BYTES + _FORM_ROOM:
            raise TooLarge(
                sentence(store.MESSAGES, "too_large", {"limit": settings.DATASET_MAX_BYTES >> 20})
            )
        super().initial(request, *args, **kwargs)

    @extend_schema(
        request={"multipart/form-data": UploadSerializer},
        responses={
            201: DatasetDetailSerializer,
            400: OpenApiResponse(
                OpenApiTypes.OBJECT,
                "error.problems lists every kind of problem with its lines; nothing was stored",
            ),
        },
    )
    def create(self, request):
        body = UploadSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        fields = body.validated_data
        try:
            dataset = store.ingest(
                fields.pop("file"),
                name=fields.pop("name"),
                owner=request.user,
                validation=fields.pop("validation_file"),
                **fields,
            )
        except store.DatasetRejected as rejected:
            return rejection(rejected)
        return Response(DatasetDetailSerializer(dataset).data, status=status.HTTP_201_CREATED)

    def perform_update(self, serializer):
        self.get_changeable()
        serializer.save()

    def perform_destroy(self, dataset):
        self.get_changeable()
        try:
            store.delete(dataset)
        except ValidationError as fault:
            raise Conflict(fault.messages[0], code="in_use") from fault

    @extend_schema(
        parameters=[
            OpenApiParameter(
                "split", str, description="train, validation or test; the first split if left out"
            ),
            OpenApiParameter("page", int, description="from 1"),
            OpenApiParameter("page_size", int, description=f"up to {MOST_EXAMPLES_PER_PAGE}"),
        ],
        responses=ExamplePageSerializer,
    )
    @action(detail=True, pagination_class=None, filter_backends=[])
    def examples(self, request, pk=None):
        version = self.get_object().current
        if version is None:
            return Response({"count": 0, "next": None, "previous": None, "results": []})
        split = request.query_params.get("split") or next(iter(version.splits), "")
        if split not in version.splits:
            raise exceptions.ValidationError(
                {
                    "split": [
                        _("There is no such split. There are: %(splits)s.")
                        % {"splits": ", ".join(version.splits)}
                    ]
                }
            )
        page, size = (
            self._number("page", 1),
            min(self._number("page_size", EXAMPLES_PER_PAGE), MOST_EXAMPLES_PER_PAGE),
        )
        count = version.splits[split]["rows"]
        last = max(1, -(-count // size))
        if page > last:
            raise exceptions.NotFound(_("There are %(pages)s pages.") % {"pages": last})

        def link(number: int) -> str | None:
            if not 1 <= number <= last:
                return None
            query = request.query_params.copy()
            query["page"] = number
            return request.build_absolute_uri(f"{request.path}?{query.urlencode()}")

        with rules_as_400():
            rows = store.examples(version, split, (page - 1) * size, size)
        return Response(
            {"count": count, "next": link(page + 1), "previous": link(page - 1), "results": rows}
        )

    def _number(self, name: str, otherwise: int) -> int:
        text = self.request.query_params.get(name, "")
        if not text:
            return otherwise
        number = whole_number(text)
        if not number:
            raise exceptions.ValidationError({name: [_("A number from 1.")]})
        return number

    @extend_schema(
        parameters=[
            OpenApiParameter("line", int, required=True, description="from 1"),
            OpenApiParameter("split", str, description="train if left out"),
            OpenApiParameter("checkpoint", int, description="the portal's default if left out"),
            OpenApiParameter("max_source_length", int, description="left out: the preset's"),
            OpenApiParameter("max_target_length", int, description="left out: the preset's"),
        ],
        responses=TrainedSerializer,
    )
    @action(detail=True, pagination_class=None, filter_backends=[])
    def trained(self, request, pk=None):
        """A row as the trainer sees it: every token, and whether the loss counts it."""
        version, query = self.get_object().current, request.query_params
        split = query.get("split", store.TRAIN)
        if version is None or split not in version.splits:
            raise exceptions.NotFound()
        checkpoint = Checkpoint.default()
        if query.get("checkpoint"):
            checkpoint = get_visible(Checkpoint.objects, request.user, pk=query["checkpoint"])
        if checkpoint is None or not checkpoint.path:
            raise exceptions.ValidationError(
                {"checkpoint": [_("This base's tokenizer is not here.")]}
            )
        with rules_as_400():
            lengths = checks.lengths_for(
                checkpoint,
                **{
                    name: self._number(name, 0)
                    for name in ("max_source_length", "max_target_length")
                },
            )
            tokens = checks.row_as_trained(
                version, split, self._number("line", 1), checkpoint, *lengths
            )
        return Response(
            {
                "max_source_length": lengths[0],
                "max_target_length": lengths[1],
                "trained": sum(token["trained"] for token in tokens),
                "tokens": tokens,
            }
        )

    @extend_schema(request=SplitSerializer, responses={201: DatasetDetailSerializer})
    @action(detail=True, methods=["post"])
    def split(self, request, pk=None):
        """Sets some of the training rows aside for validation, as a new version."""
        dataset = self.get_changeable()
        body = SplitSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        with rules_as_400():
            store.add_split(dataset, **body.validated_data)
        return Response(
            DatasetDetailSerializer(self.get_queryset().get(pk=dataset.pk)).data, status=201
        )


_router = SimpleRouter()
_router.register("datasets", DatasetViewSet, basename="api-dataset")
_router.register("collected-examples", CollectedExampleViewSet, basename="api-collected-example")
_router.register("check-runs", CheckRunViewSet, basename="api-check-run")
dataset_urlpatterns = _router.urls
