"""What changes a dataset's rows, below /api/v1/datasets/ID/, and /api/v1/collected-examples/. Rules
are in editing.py and collecting.py; here is only HTTP.
"""

import contextlib

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import exceptions, mixins, status
from rest_framework.decorators import action
from rest_framework.response import Response

from chat.models import Message
from portal.access import get_visible
from portal.models import ApiKey
from portal.numbers import whole_number
from portal.rest.conventions import Conflict
from portal.rest.viewsets import AnyAccept, VisibleRows, rules_as_400
from tuning.datasets import collecting, editing, exporting, store
from tuning.datasets.serializers import (
    CollectedExampleSerializer,
    DatasetDetailSerializer,
    DecisionSerializer,
    DifferenceSerializer,
    MergeSerializer,
    NewCollectedExampleSerializer,
    RowsSerializer,
)
from tuning.models import CollectedExample, Dataset, DatasetVersion

MOST_DIFFERENCES = 1000
_CONFLICTS = ("changed_meanwhile", "already_taken")


@contextlib.contextmanager
def rules_as_answers():
    """`rules_as_400`, with 409 for what somebody else was faster in."""
    try:
        with rules_as_400():
            yield
    except exceptions.ValidationError as refused:
        cause = refused.__cause__
        problems = getattr(cause, "error_list", None) or [
            problem for found in cause.error_dict.values() for problem in found
        ]
        if problems[0].code in _CONFLICTS:
            raise Conflict(problems[0].messages[0], problems[0].code) from cause
        raise


class Editing(VisibleRows):
    """Mixin of the datasets' viewset."""

    def _changed(self, dataset: Dataset) -> Response:
        row = self.get_queryset().get(pk=dataset.pk)
        return Response(DatasetDetailSerializer(row).data, status=status.HTTP_201_CREATED)

    def _body(self, kind, **context):
        body = kind(data=self.request.data, context={"request": self.request})
        body.is_valid(raise_exception=True)
        return body.validated_data

    @extend_schema(request=RowsSerializer, responses={201: DatasetDetailSerializer})
    @action(detail=True, methods=["post"])
    def rows(self, request, pk=None):
        """Adds, replaces and leaves out rows of a split, as one new version."""
        dataset, fields = self.get_changeable(), self._body(RowsSerializer)
        base = dataset.current
        if len(fields["add"]) > editing.MOST_ADDED:
            message = _("At most %(most)s rows at once.") % {"most": editing.MOST_ADDED}
            raise exceptions.ValidationError({"add": [message]})
        with rules_as_answers():
            if "version" in fields and fields["version"] != (base.number if base else 0):
                message = _("Somebody has changed the dataset meanwhile. Look at it again.")
                raise ValidationError(message, "changed_meanwhile")
            editing.change_rows(
                dataset,
                fields["split"],
                base=base,
                replaced={row.pop("line"): editing.line_of(**row) for row in fields["replace"]},
                excluded=fields["exclude"],
                added=[editing.line_of(**row) for row in fields["add"]],
            )
        return self._changed(dataset)

    @extend_schema(request=MergeSerializer, responses={201: DatasetDetailSerializer})
    @action(detail=True, methods=["post"])
    def merge(self, request, pk=None):
        """Puts another dataset's rows behind this one's, without those that are here already."""
        dataset, fields = self.get_changeable(), self._body(MergeSerializer)
        with rules_as_answers():
            editing.merge(dataset, fields["other"])
        return self._changed(dataset)

    @extend_schema(
        parameters=[
            OpenApiParameter("from", int, description="version; left out: the one before"),
            OpenApiParameter("to", int, description="version; left out: the newest"),
            OpenApiParameter("split", str, description="train if left out"),
        ],
        responses=DifferenceSerializer(many=True),
    )
    @action(detail=True, pagination_class=None, filter_backends=[])
    def difference(self, request, pk=None):
        """The rows that distinguish two versions, the first 1,000."""
        dataset, split = self.get_object(), request.query_params.get("split", store.TRAIN)
        newest = dataset.current
        to = self._version(dataset, "to", newest and newest.number)
        since = self._version(dataset, "from", max(1, to.number - 1))
        with rules_as_400():
            found = editing.difference(since, to, split)
        return Response(DifferenceSerializer(found[:MOST_DIFFERENCES], many=True).data)

    def _version(self, dataset: Dataset, name: str, otherwise: int | None) -> DatasetVersion:
        number = whole_number(self.request.query_params.get(name) or otherwise)
        found = number and dataset.versions.filter(number=number).first()
        if not found:
            raise exceptions.ValidationError({name: [_("There is no such version.")]})
        return found

    @extend_schema(
        parameters=[
            OpenApiParameter("split", str, description="train if left out"),
            OpenApiParameter("form", str, enum=list(exporting.TYPES), description="jsonl"),
            OpenApiParameter("version", int, description="left out: the newest"),
        ],
        responses={(200, "application/octet-stream"): OpenApiTypes.BINARY},
    )
    @action(
        detail=True,
        pagination_class=None,
        filter_backends=[],
        content_negotiation_class=AnyAccept,
    )
    def export(self, request, pk=None):
        """A split as a file. In CSV an apostrophe stands before what a spreadsheet would compute;
        the two others hold every text as it is.
        """
        dataset = self.get_object()
        newest = dataset.current
        version = self._version(dataset, "version", newest and newest.number)
        split = request.query_params.get("split", store.TRAIN)
        form = request.query_params.get("form", "jsonl")
        for name, wish, known in (
            ("split", split, version.splits),
            ("form", form, exporting.TYPES),
        ):
            if wish not in known:
                message = _("Must be one of: %(choices)s.") % {"choices": ", ".join(known)}
                raise exceptions.ValidationError({name: [message]})
        with rules_as_400():
            return exporting.response(version, split, form)

    @extend_schema(request=DecisionSerializer, responses={201: DatasetDetailSerializer})
    @action(detail=True, methods=["post"])
    def decide(self, request, pk=None):
        """Takes waiting collected examples as training rows of a new version, leaves others out."""
        dataset, fields = self.get_changeable(), self._body(DecisionSerializer)
        with rules_as_answers():
            collecting.decide(dataset, request.user, **fields)
        return self._changed(dataset)


class CollectedExampleViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, VisibleRows):
    """Good answers from chat that wait to become rows of a dataset."""

    key_scope = ApiKey.Scope.DATA
    queryset = CollectedExample.objects.all()
    serializer_class = CollectedExampleSerializer

    def get_queryset(self):
        found = super().get_queryset().select_related("by", "version")
        if self.action != "list" or self.request is None:  # None: the schema is made
            return found
        for name, key in (("dataset", "dataset_id"), ("message", "message_id")):
            if (number := self.number_wished(name)) is not None:
                found = found.filter(**{key: number})
        state = self.choice_wished("status", CollectedExample.Status.values)
        return found.filter(status=state) if state else found

    @extend_schema(
        parameters=[
            OpenApiParameter("dataset", int),
            OpenApiParameter("message", int),
            OpenApiParameter("status", str, enum=CollectedExample.Status.values),
        ]
    )
    def list(self, request, *args, **kwargs):
        return super().list(request, *args, **kwargs)

    @extend_schema(
        request=NewCollectedExampleSerializer, responses={201: CollectedExampleSerializer}
    )
    def create(self, request):
        """Proposes an answer; again for the same answer: changes what was proposed."""
        body = NewCollectedExampleSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        fields = body.validated_data
        answers = Message.objects.select_related("conversation")
        message = get_visible(answers, request.user, pk=fields["message"])
        dataset = None
        if fields["dataset"] is not None:
            dataset = get_visible(Dataset.objects, request.user, pk=fields["dataset"])
        with rules_as_answers():
            example = collecting.collect_answer(
                request.user, message, response=fields["response"], dataset=dataset
            )
        return Response(CollectedExampleSerializer(example).data, status=status.HTTP_201_CREATED)

    def destroy(self, request, pk=None):
        """Takes a proposal back; 409 once it is a row."""
        example = self.get_changeable()
        with rules_as_answers():
            collecting.withdraw(example)
        return Response(status=status.HTTP_204_NO_CONTENT)
