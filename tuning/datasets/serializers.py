"""The shape of datasets, their rows and what is collected for them in the REST API."""

from django.utils.translation import gettext as _
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from portal.rest.fields import Text, Texts
from tuning.datasets import store
from tuning.models import CollectedExample, Dataset


class DatasetSerializer(Texts, serializers.ModelSerializer):
    owner = serializers.CharField(source="owner.username", allow_null=True, read_only=True)
    status = serializers.SerializerMethodField(
        help_text="Always ready: an upload is checked while it is sent, and stored whole or not."
    )
    rows = serializers.SerializerMethodField(help_text="Of all splits of the newest version.")
    version = serializers.SerializerMethodField(help_text="Number of the newest version.")
    sha256 = serializers.SerializerMethodField(help_text="Names the content of the newest version.")
    splits = serializers.SerializerMethodField(help_text="Rows of each split.")
    encoding = serializers.SerializerMethodField(help_text="Of the uploaded file.")

    class Meta:
        model = Dataset
        fields = [
            "id",
            "name",
            "owner",
            "status",
            "rows",
            "splits",
            "version",
            "sha256",
            "encoding",
            "prompt_column",
            "response_column",
            "history_column",
            "created_at",
        ]
        read_only_fields = [field for field in fields if field != "name"]

    def _current(self, dataset):
        return next(iter(dataset.versions.all()), None)  # newest first; prefetched in lists

    def get_status(self, dataset) -> str:
        return "ready"

    def get_rows(self, dataset) -> int:
        version = self._current(dataset)
        return version.rows if version else 0

    def get_version(self, dataset) -> int | None:
        version = self._current(dataset)
        return version.number if version else None

    def get_sha256(self, dataset) -> str:
        version = self._current(dataset)
        return version.sha256 if version else ""

    @extend_schema_field({"type": "object", "additionalProperties": {"type": "integer"}})
    def get_splits(self, dataset):
        version = self._current(dataset)
        return {name: entry["rows"] for name, entry in version.splits.items()} if version else {}

    def get_encoding(self, dataset) -> str:
        version = self._current(dataset)
        return version.encoding if version else ""


class ProblemSerializer(serializers.Serializer):
    line = serializers.IntegerField(
        allow_null=True, help_text="The first, from 1; null where it concerns the whole file."
    )
    code = serializers.CharField()
    message = serializers.CharField()
    level = serializers.ChoiceField(["error", "warning"])
    member = serializers.CharField(required=False, help_text="The file inside the archive.")
    count = serializers.IntegerField(help_text="Rows that have this kind of problem.")
    lines = serializers.ListField(
        child=serializers.IntegerField(), help_text="Their lines, the first 1,000."
    )


class DatasetDetailSerializer(DatasetSerializer):
    problems = ProblemSerializer(
        many=True, read_only=True, help_text="One entry a kind of problem."
    )
    problem_count = serializers.IntegerField(read_only=True)

    class Meta(DatasetSerializer.Meta):
        fields = [*DatasetSerializer.Meta.fields, "problems", "problem_count"]
        read_only_fields = [field for field in fields if field != "name"]


class UploadSerializer(serializers.Serializer):
    file = serializers.FileField(
        help_text=".json, .jsonl, .csv or .xlsx; plain or in .gz, .zip, .tar, .tar.gz"
    )
    validation_file = serializers.FileField(
        required=False, default=None, help_text="Such a file too: the validation rows."
    )
    sheet = Text(
        max_length=100,
        required=False,
        allow_blank=True,
        default="",
        help_text="Of a workbook. Empty: the first one.",
    )
    name = Text(max_length=120, required=False, allow_blank=True, default="")
    prompt_column = Text(
        max_length=100,
        required=False,
        allow_blank=True,
        default="",
        help_text="Empty: recognised from the first row.",
    )
    response_column = Text(
        max_length=100,
        required=False,
        allow_blank=True,
        default="",
        help_text="Same as prompt_column: that column holds a whole conversation.",
    )
    history_column = Text(max_length=100, required=False, allow_blank=True, default="")
    skip_bad_rows = serializers.BooleanField(
        default=False, help_text="Take the good rows of a file that has bad ones, rather than none."
    )


class ExampleSerializer(serializers.Serializer):
    line = serializers.IntegerField()
    prompt = serializers.CharField()
    response = serializers.CharField()
    history = serializers.ListField(child=serializers.ListField(child=serializers.CharField()))


class ExamplePageSerializer(serializers.Serializer):
    count = serializers.IntegerField()
    next = serializers.URLField(allow_null=True)
    previous = serializers.URLField(allow_null=True)
    results = ExampleSerializer(many=True)


class SplitSerializer(serializers.Serializer):
    validation = serializers.FloatField(help_text="Rows to set aside, or a fraction below 1.")
    seed = serializers.IntegerField(default=42, min_value=0)

    def validate_validation(self, value):
        if value <= 0 or (value > 1 and value != int(value)):
            raise serializers.ValidationError(_("A number of rows, or a fraction below 1."))
        return value if value < 1 else int(value)


class TokenSerializer(serializers.Serializer):
    id = serializers.IntegerField()
    text = serializers.CharField()
    trained = serializers.BooleanField(help_text="Whether the loss counts it.")


class TrainedSerializer(serializers.Serializer):
    max_source_length = serializers.IntegerField()
    max_target_length = serializers.IntegerField()
    trained = serializers.IntegerField(help_text="Tokens that the loss counts.")
    tokens = TokenSerializer(many=True)


class RowSerializer(serializers.Serializer):
    prompt = Text(trim_whitespace=False)
    response = Text(trim_whitespace=False)
    history = serializers.ListField(
        child=serializers.ListField(
            child=Text(trim_whitespace=False, allow_blank=True),
            min_length=2,
            max_length=2,
        ),
        required=False,
        default=list,
        help_text="Earlier turns, [question, answer] each.",
    )


class ReplacedRowSerializer(RowSerializer):
    line = serializers.IntegerField(min_value=1)


class RowsSerializer(serializers.Serializer):
    """Changes to the rows of a split, which make a new version together."""

    split = serializers.ChoiceField(
        [store.TRAIN, store.VALIDATION, store.TEST], default=store.TRAIN
    )
    version = serializers.IntegerField(
        required=False,
        help_text="The version that was looked at: 409 if there is a newer one. Lines are its own.",
    )
    add = RowSerializer(many=True, required=False, default=list)
    replace = ReplacedRowSerializer(many=True, required=False, default=list)
    exclude = serializers.ListField(
        child=serializers.IntegerField(min_value=1), required=False, default=list
    )


class MergeSerializer(serializers.Serializer):
    other = serializers.PrimaryKeyRelatedField(queryset=Dataset.objects.none())

    def get_fields(self):
        fields = super().get_fields()
        request = self.context.get("request")
        if request is not None:
            fields["other"].queryset = Dataset.objects.visible_to(request.user)
        return fields


class DifferenceSerializer(serializers.Serializer):
    kind = serializers.ChoiceField(["changed", "removed", "added"])
    line = serializers.IntegerField(help_text="Of the old version; of the new for an added row.")
    before = ExampleSerializer(allow_null=True)
    after = ExampleSerializer(allow_null=True)


class DecisionSerializer(serializers.Serializer):
    take = serializers.ListField(child=serializers.IntegerField(), required=False, default=list)
    leave = serializers.ListField(child=serializers.IntegerField(), required=False, default=list)


class CollectedExampleSerializer(serializers.ModelSerializer):
    by = serializers.CharField(source="by.username", read_only=True)
    version = serializers.IntegerField(
        source="version.number", read_only=True, allow_null=True, default=None
    )

    class Meta:
        model = CollectedExample
        fields = [
            "id",
            "dataset",
            "by",
            "prompt",
            "response",
            "history",
            "original",
            "model_label",
            "message",
            "status",
            "version",
            "created_at",
            "decided_at",
        ]
        read_only_fields = fields


class NewCollectedExampleSerializer(serializers.Serializer):
    message = serializers.IntegerField(help_text="The answer, of one of your conversations.")
    response = Text(
        required=False,
        allow_null=True,
        default=None,
        trim_whitespace=False,
        help_text="What it should have said. Left out: the answer as it is.",
    )
    dataset = serializers.IntegerField(
        required=False,
        allow_null=True,
        default=None,
        help_text="Left out: your own collection, which is made with the first answer.",
    )
