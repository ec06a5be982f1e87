"""The shape of tuning runs in the REST API."""

from django.utils.translation import gettext_lazy as _
from rest_framework import serializers

from chat.models import Checkpoint
from portal.rest.conventions import RunSerializer
from portal.rest.fields import Text
from tuning.models import Dataset, TuningMetric, TuningRun
from tuning.plan import PRESETS
from tuning.ptuning.recipe import BOOLEANS, CHOICES, LIMITS, TEXTS, WHOLE_NUMBERS


class TuningRunSerializer(RunSerializer):
    dataset = serializers.IntegerField(source="dataset_version.dataset_id", read_only=True)
    dataset_version = serializers.IntegerField(source="dataset_version.number", read_only=True)
    method = serializers.SerializerMethodField()
    step = serializers.IntegerField(source="progress", read_only=True)
    max_steps = serializers.IntegerField(source="total", read_only=True)
    progress = serializers.SerializerMethodField(help_text="0 to 1")
    eta_seconds = serializers.FloatField(read_only=True, allow_null=True)
    adapter = serializers.SerializerMethodField(help_text="id of what the run has made")
    made_checkpoint = serializers.SerializerMethodField(
        help_text="id of the checkpoint that the run has made, where weights were trained"
    )
    saved_steps = serializers.ListField(
        child=serializers.IntegerField(),
        read_only=True,
        help_text="steps that can be published beside it, newest first",
    )
    proof = serializers.JSONField(
        read_only=True,
        allow_null=True,
        help_text="validation prompts answered as served and held against the trainer's logits: "
        "prompts, tokens, same, gap, tolerance, holds",
    )

    variants = serializers.JSONField(
        read_only=True,
        help_text="of an ended sweep, for each variant: changes, step, loss, validation_loss, "
        "adapter (id), best, error",
    )

    class Meta(RunSerializer.Meta):
        model = TuningRun
        fields = [
            *RunSerializer.Meta.fields,
            "dataset",
            "dataset_version",
            "checkpoint",
            "method",
            "step",
            "max_steps",
            "loss",
            "validation_loss",
            "samples_per_second",
            "eta_seconds",
            "trainable_parameters",
            "adapter",
            "made_checkpoint",
            "saved_steps",
            "proof",
            "peak_memory",
            "variants",
        ]
        read_only_fields = fields

    def get_method(self, run) -> str:
        return run.recipe["method"]

    def get_adapter(self, run) -> int | None:
        made = run.result()
        return made.pk if made else None

    def get_made_checkpoint(self, run) -> int | None:
        made = run.made_checkpoint
        return made.pk if made else None


class TuningMetricSerializer(serializers.ModelSerializer):
    class Meta:
        model = TuningMetric
        fields = [
            "step",
            "variant",
            "loss",
            "learning_rate",
            "samples_per_second",
            "divergence",
            "validation_loss",
            "created_at",
        ]


def _hyper_fields() -> dict[str, serializers.Field]:
    """A field for each hyper-parameter, with the recipe's own limits."""
    found: dict[str, serializers.Field] = {}
    for name, (low, high) in LIMITS.items():
        kind = serializers.IntegerField if name in WHOLE_NUMBERS else serializers.FloatField
        found[name] = kind(required=False, min_value=low, max_value=high)
    for name, choices in CHOICES.items():
        if name in BOOLEANS:
            found[name] = serializers.BooleanField(required=False)
        else:
            named = [choice for choice in choices if choice is not None]
            found[name] = serializers.ChoiceField(named, required=False, allow_null=None in choices)
    for name, most in TEXTS.items():
        found[name] = Text(required=False, allow_blank=True, max_length=most)
    return found


class NewTuningRunSerializer(serializers.Serializer):
    """What is left out comes from the preset; without a preset from that of the checkpoint."""

    dataset = serializers.PrimaryKeyRelatedField(queryset=Dataset.objects.none())
    checkpoint = serializers.PrimaryKeyRelatedField(queryset=Checkpoint.objects.none())
    name = Text(
        required=False,
        max_length=120,
        allow_blank=True,
        help_text="the tuned model's name; else the dataset's",
    )
    preset = serializers.ChoiceField(list(PRESETS), required=False, allow_null=True)
    sweep = serializers.ListField(
        child=serializers.DictField(),
        required=False,
        allow_null=True,
        help_text="several prefixes trained at once: what each changes of the hyper-parameters, "
        'such as [{"seed": 1}, {"seed": 2, "learning_rate": 0.01}]; the best by validation loss '
        "is the run's adapter, the others stand beside it",
    )

    def get_fields(self):
        fields = super().get_fields() | _hyper_fields()
        request = self.context.get("request")
        if request is not None:
            fields["dataset"].queryset = Dataset.objects.visible_to(request.user)
            fields["checkpoint"].queryset = Checkpoint.objects.visible_to(request.user)
        return fields

    def to_internal_value(self, data):
        """A misspelt field must not be a default in silence: it is named together with all other
        problems.
        """
        problems = {}
        known = self.fields
        if isinstance(data, dict):
            unknown = [name for name in data if name not in known]
            problems = {
                name: [serializers.ErrorDetail(_("There is no such field."), "unknown_field")]
                for name in unknown
            }
        try:
            values = super().to_internal_value(data)
        except serializers.ValidationError as error:
            raise serializers.ValidationError({**problems, **error.detail}) from error
        if problems:
            raise serializers.ValidationError(problems)
        return values
