"""The shapes of checkpoints, adapters, conversations and messages in the REST API."""

from typing import Any, ClassVar

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from chat import registry
from chat.checkpoints.memory import PRECISIONS
from chat.engine.request import LIMITS
from chat.models import Adapter, Checkpoint, Conversation, Message, Precision, ServingSwitch
from chat.sampling import NUMBERS
from portal.explanations import explained
from portal.rest.fields import Text, Texts
from portal.text import LONGEST_CONTENT

NOTES = {
    "temperature": "; 0 is greedy",
    "top_k": "; 0 is off",
    "prefix_strength": "; 1 is as trained",
}


class CheckpointSerializer(serializers.ModelSerializer):
    description = serializers.JSONField(
        read_only=True, help_text="architecture, layers, parameters, context_length ..."
    )
    tuning_run = serializers.IntegerField(
        source="run_id", read_only=True, allow_null=True, help_text="the run that made it"
    )
    precision = serializers.ChoiceField(
        Precision.choices, allow_blank=True, read_only=True, help_text="empty: as it is stored"
    )

    class Meta:
        model = Checkpoint
        fields = [
            "id",
            "name",
            "fingerprint",
            "description",
            "is_default",
            "is_starter",
            "precision",
            "tuning_run",
            "created_at",
        ]
        read_only_fields = fields


class PrecisionSerializer(serializers.Serializer):
    precision = serializers.ChoiceField(
        Precision.choices,
        allow_blank=True,
        help_text="weights packed to this when they are loaded; empty: as they are stored",
    )


class ServingSwitchSerializer(serializers.ModelSerializer):
    checkpoint = serializers.CharField(source="checkpoint.name", read_only=True)
    previous = serializers.CharField(source="previous.name", read_only=True, default=None)
    requested_by = serializers.CharField(
        source="requested_by.username", read_only=True, default=None
    )
    explanation = serializers.SerializerMethodField(help_text="of a failure, for people")

    class Meta:
        model = ServingSwitch
        fields = [
            "id",
            "checkpoint",
            "precision",
            "previous",
            "requested_by",
            "status",
            "sentence",
            "seconds",
            "error",
            "explanation",
            "created_at",
            "finished_at",
        ]
        read_only_fields = fields

    def get_explanation(self, switch) -> str:
        return explained(switch.error)


class NewCheckpointSerializer(serializers.Serializer):
    path = Text(max_length=500, help_text="a Hugging Face folder on the portal's machine")
    name = Text(max_length=100, required=False, allow_blank=True)
    default = serializers.BooleanField(required=False, default=False)


class TermSerializer(serializers.Serializer):
    name = serializers.CharField()
    bytes = serializers.IntegerField()
    arithmetic = serializers.CharField()


class EstimateSerializer(serializers.Serializer):
    use = serializers.ChoiceField(["chat", "ptuning", "full"])
    precision = serializers.ChoiceField(list(PRECISIONS))
    bytes = serializers.IntegerField()
    fits = serializers.BooleanField(help_text="into all the memory of this machine")
    terms = TermSerializer(many=True)


class AdapterSerializer(Texts, serializers.ModelSerializer):
    owner = serializers.CharField(source="owner.username", read_only=True, allow_null=True)
    tuning_run = serializers.IntegerField(source="run_id", read_only=True, allow_null=True)
    model = serializers.SerializerMethodField(
        help_text="the id that /v1/ and ChatGLM's api.py take"
    )

    class Meta:
        model = Adapter
        fields = [
            "id",
            "name",
            "checkpoint",
            "pre_seq_len",
            "step",
            "tuning_run",
            "sha256",
            "owner",
            "shared",
            "with_history",
            "model",
            "created_at",
        ]
        read_only_fields = ["checkpoint", "pre_seq_len", "step", "sha256"]
        extra_kwargs: ClassVar[dict] = {"name": {"validators": []}}

    def get_model(self, adapter) -> str:
        return adapter.name

    def validate_name(self, name: str) -> str:
        return registry.check_name(name, 120, except_row=self.instance)

    def validate_shared(self, shared: bool) -> bool:
        if shared and self.instance is not None and not self.instance.shared:
            registry.check_may_be_shared(self.instance)
        return shared


class ConversationSerializer(Texts, serializers.ModelSerializer):
    class Meta:
        model = Conversation
        fields = ["id", "title", "checkpoint", "adapter", "created_at", "updated_at"]
        read_only_fields = ["checkpoint", "adapter"]


class MessageSerializer(serializers.ModelSerializer):
    model = serializers.CharField(source="model_label", read_only=True)
    thoughts = serializers.CharField(
        read_only=True, help_text="what the model thought before it answered"
    )
    answer = serializers.CharField(read_only=True, help_text="`content` without the thoughts")

    class Meta:
        model = Message
        fields = [
            "id",
            "conversation",
            "role",
            "content",
            "thoughts",
            "answer",
            "status",
            "checkpoint",
            "adapter",
            "model",
            "sampling",
            "with_history",
            "system",
            "left_out",
            "parent",
            "thumb",
            "seq",
            "finish_reason",
            "usage",
            "timings",
            "error",
            "created_at",
            "finished_at",
        ]
        read_only_fields = fields


@extend_schema_field({"oneOf": [{"type": "integer"}, {"type": "string"}], "nullable": True})
class ReferenceField(serializers.Field):
    """An id or a name."""


def _sampling() -> dict:
    """The object as OpenAPI says it, with the limits that chat/sampling.py holds to."""
    thinking = "whether a model that can think before it answers does; as its template has it"
    described: dict[str, dict[str, Any]] = {
        "do_sample": {"type": "boolean"},
        "thinking": {"type": "boolean", "description": thinking},
    }
    for name in NUMBERS:
        limits = LIMITS[name]
        described[name] = {
            "type": "integer" if limits.kind is int else "number",
            "minimum": limits.low,
            "maximum": limits.high,
            **({"exclusiveMinimum": True} if limits.above else {}),
            "description": f"{limits}{NOTES.get(name, '')}",
        }
    properties = {name: {**each, "nullable": True} for name, each in described.items()}
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "nullable": True,
    }


@extend_schema_field(_sampling())
class SamplingField(serializers.Field):
    """Sampling parameters."""


class SendSerializer(serializers.Serializer):
    """For the schema; chat/conversations/turns.py does the checking, for every door alike."""

    content = serializers.CharField(max_length=LONGEST_CONTENT)
    checkpoint = ReferenceField(
        required=False, help_text="id or name; absent: as in the last turn, else the default"
    )
    adapter = ReferenceField(
        required=False,
        help_text="id or name; a list of two: both together, where one was trained beside the "
        "other; null: prefix off; absent: as in the last turn",
    )
    sampling = SamplingField(required=False)
    with_history = serializers.BooleanField(
        required=False,
        allow_null=True,
        help_text="whether the model is shown the earlier turns; absent: as it was trained",
    )
    system = serializers.CharField(
        required=False, help_text="the system prompt; absent: as in the last turn"
    )


class TurnSerializer(serializers.Serializer):
    message = MessageSerializer(help_text="what the user wrote")
    answer = MessageSerializer(help_text="pending: read it from /api/v1/messages/{id}/stream/")


STREAM = {  # one server-sent event; the frames in its data are in docs/api.md
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    "required": ["event", "data"],
}
