"""The shape of downloads in the REST API."""

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from chat.checkpoints.fetch.catalogue import CATALOGUE
from chat.models import FetchRun
from portal.rest.conventions import RunSerializer
from portal.rest.fields import Text


class FileSerializer(serializers.Serializer):
    name = serializers.CharField()
    bytes = serializers.IntegerField(source="size")
    done = serializers.IntegerField()


class FetchRunSerializer(RunSerializer):
    progress = serializers.SerializerMethodField(help_text="0 to 1")
    files = serializers.SerializerMethodField(help_text="each with its bytes and what is done")
    bytes_done = serializers.SerializerMethodField()
    bytes_total = serializers.SerializerMethodField()
    bytes_per_second = serializers.SerializerMethodField(help_text="over the last ten seconds")
    eta_seconds = serializers.FloatField(read_only=True, allow_null=True)

    class Meta(RunSerializer.Meta):
        model = FetchRun
        fields = [
            *RunSerializer.Meta.fields,
            "source",
            "files",
            "bytes_done",
            "bytes_total",
            "bytes_per_second",
            "eta_seconds",
            "checkpoint",
        ]
        read_only_fields = fields

    @extend_schema_field(FileSerializer(many=True))
    def get_files(self, run):
        return FileSerializer(run.transfer.get("files", []), many=True).data

    def get_bytes_done(self, run) -> int:
        return run.transfer.get("done", 0)

    def get_bytes_total(self, run) -> int:
        return run.transfer.get("total", 0)

    def get_bytes_per_second(self, run) -> float | None:
        return run.transfer.get("bytes_per_second") if run.is_active else None


class NewFetchRunSerializer(serializers.Serializer):
    source = Text(
        max_length=4096,
        help_text=f"{', '.join(CATALOGUE)}, hf:ORG/NAME[@REVISION], "
        "modelscope:ORG/NAME[@REVISION], a folder, an archive or a .gguf file on the portal's "
        "machine",
    )
    name = Text(max_length=100, required=False, allow_blank=True)
    default = serializers.BooleanField(required=False, default=False)
    accept_licence = serializers.BooleanField(required=False, default=False)
