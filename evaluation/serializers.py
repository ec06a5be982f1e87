"""Evaluations and predictions as JSON."""

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from chat.models import Adapter, Checkpoint
from evaluation.metrics import known
from evaluation.models import EvaluationRun, Prediction
from portal.rest.conventions import RunSerializer
from portal.rest.fields import Text
from tuning.models import Dataset

_INTERVAL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "value": {"type": "number"},
        "low": {"type": "number", "nullable": True},
        "high": {"type": "number", "nullable": True},
    },
}
_DIFFERENCE = {
    **_INTERVAL,
    "properties": {**_INTERVAL["properties"], "p": {"type": "number", "nullable": True}},
}


def _by_metric(schema: dict) -> dict:
    return {"type": "object", "nullable": True, "properties": dict.fromkeys(known(), schema)}


@extend_schema_field(_by_metric(_INTERVAL))
class ScoresField(serializers.JSONField):
    """By metric, percent where the metric has no unit of its own; low and high bound the 95 %
    interval, null for a single row.
    """


@extend_schema_field(_by_metric(_DIFFERENCE))
class DifferenceField(serializers.JSONField):
    """By metric; p is two-sided and of this comparison alone."""


class EvaluationRunSerializer(RunSerializer):
    dataset = serializers.IntegerField(source="dataset_version.dataset_id", read_only=True)
    dataset_name = serializers.CharField(source="recipe.dataset.name", read_only=True)
    rows = serializers.IntegerField(source="recipe.rows", read_only=True)
    checkpoint_name = serializers.CharField(source="checkpoint.name", read_only=True)
    adapter_name = serializers.CharField(allow_null=True, read_only=True)
    scores = ScoresField(read_only=True)
    baseline_scores = ScoresField(source="baseline.scores", allow_null=True, read_only=True)
    difference = DifferenceField(
        read_only=True, help_text="Scores minus the baseline's, paired by row."
    )
    general = serializers.SerializerMethodField(
        help_text="What the prefix cost of general ability; null without an adapter."
    )
    review = serializers.CharField(read_only=True, help_text="approved, rejected or blank")

    class Meta(RunSerializer.Meta):
        model = EvaluationRun
        fields = [
            *RunSerializer.Meta.fields,
            "dataset",
            "dataset_name",
            "split",
            "rows",
            "checkpoint",
            "checkpoint_name",
            "adapter",
            "adapter_name",
            "decoding",
            "max_examples",
            "scores",
            "failed_rows",
            "baseline",
            "baseline_scores",
            "difference",
            "general",
            "review",
            "review_note",
        ]
        read_only_fields = fields

    @extend_schema_field({"type": "object", "nullable": True})
    def get_general(self, run) -> dict | None:
        """Without the answers, which the page shows."""
        found = {name: value for name, value in (run.general or {}).items() if name != "answers"}
        return found or None


class PredictionSerializer(serializers.ModelSerializer):
    prediction = serializers.CharField(source="text", read_only=True)

    class Meta:
        model = Prediction
        fields = ["row", "prompt", "reference", "prediction", "scores"]
        read_only_fields = fields


class ComparisonSerializer(serializers.Serializer):
    rows = serializers.IntegerField(help_text="How many rows both predicted.")
    scores = ScoresField()
    other_scores = ScoresField()
    difference = DifferenceField()
    verdicts = serializers.JSONField(
        help_text="By metric: verdict (better, worse, higher, lower, cannot_tell, one_row), label "
        "and sentence."
    )
    other_references = serializers.IntegerField(
        help_text="Rows whose references differ: cut by another tokenizer or limit."
    )
    other_decoding = serializers.BooleanField(help_text="The two were decoded differently.")


class ReviewSerializer(serializers.Serializer):
    decision = Text(allow_blank=True, help_text="approved, rejected or blank")
    note = Text(
        required=False,
        allow_blank=True,
        default="",
        max_length=2000,
        help_text="A rejection needs one.",
    )


class OneOfManySerializer(ComparisonSerializer):
    id = serializers.IntegerField(help_text="The evaluation that is compared.")


class ManyComparedSerializer(serializers.Serializer):
    """Several evaluations beside one; p_corrected of each difference is Holm's."""

    baseline = serializers.IntegerField()
    comparisons = OneOfManySerializer(many=True)


class _Visible(serializers.PrimaryKeyRelatedField):
    """A row that the requesting user may see, by its id; any other does not exist."""

    def get_queryset(self):
        return super().get_queryset().visible_to(self.context["request"].user)


class NewEvaluationSerializer(serializers.Serializer):
    """The body of POST; what is allowed together is decided by
    evaluation.plan.create_evaluation.
    """

    dataset = _Visible(queryset=Dataset.objects.all())
    checkpoint = _Visible(queryset=Checkpoint.objects.all())
    adapter = _Visible(
        queryset=Adapter.objects.all(), required=False, allow_null=True, default=None
    )
    decoding = Text(default=EvaluationRun.Decoding.GREEDY, help_text="greedy or upstream")
    max_examples = serializers.IntegerField(required=False, allow_null=True, default=None)
    with_baseline = serializers.BooleanField(
        default=True, help_text="Evaluate the bare checkpoint too."
    )
    split = Text(required=False, allow_blank=True, default="", max_length=20)
    max_source_length = serializers.IntegerField(required=False, allow_null=True, default=None)
    max_target_length = serializers.IntegerField(required=False, allow_null=True, default=None)
    seed = serializers.IntegerField(default=42)
    name = Text(required=False, allow_blank=True, default="", max_length=120)
