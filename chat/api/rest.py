"""/api/v1/: checkpoints, adapters, conversations, messages. Rules are in turns.py and registry.py;
here is only HTTP.
"""

from asgiref.sync import async_to_sync
from django.utils.translation import gettext as _
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import exceptions, mixins, permissions, status, viewsets
from rest_framework.decorators import action
from rest_framework.response import Response

from chat import inventory, registry, serving
from chat.api import errors, sse
from chat.api.adapter_export import AdapterUnreadable, Download, archive, downloads
from chat.api.serializers import (
    STREAM,
    AdapterSerializer,
    CheckpointSerializer,
    ConversationSerializer,
    EstimateSerializer,
    MessageSerializer,
    NewCheckpointSerializer,
    PrecisionSerializer,
    SendSerializer,
    ServingSwitchSerializer,
    TurnSerializer,
)
from chat.checkpoints.memory import estimates
from chat.conversations import live, turns
from chat.engine.request import GenerationRefused
from chat.models import Adapter, Checkpoint, Conversation, Message, ServingSwitch
from portal.logins import login_of
from portal.models import ApiKey
from portal.numbers import whole_number
from portal.rest.conventions import Pages
from portal.rest.viewsets import AnyAccept, VisibleRows, rules_as_400


class StaffWrites(permissions.BasePermission):
    def has_permission(self, request, view):
        return request.method in permissions.SAFE_METHODS or request.user.is_staff


class CheckpointViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, VisibleRows):
    """Base weights. Registering a folder is for staff; `manage.py add_checkpoint` does the same."""

    queryset = Checkpoint.objects.order_by("-id")
    serializer_class = CheckpointSerializer
    permission_classes = [permissions.IsAuthenticated, StaffWrites]

    @extend_schema(request=NewCheckpointSerializer, responses={201: CheckpointSerializer})
    def create(self, request):
        body = NewCheckpointSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        fields = body.validated_data
        with rules_as_400():
            checkpoint = registry.register_checkpoint(
                fields["path"], fields.get("name") or None, default=fields["default"]
            )
        return Response(CheckpointSerializer(checkpoint).data, status=status.HTTP_201_CREATED)

    @extend_schema(responses={204: None})
    def destroy(self, request, pk=None):
        """The checkpoint and its tuned models, and its folder when it was fetched; 409 while it is
        the default or runs name it.
        """
        inventory.remove(self.get_changeable())
        return Response(status=status.HTTP_204_NO_CONTENT)

    @extend_schema(request=PrecisionSerializer, responses=CheckpointSerializer)
    def partial_update(self, request, pk=None):
        """How its weights are held in memory, from the next load on; of the served one at once."""
        checkpoint = self.get_changeable()
        body = PrecisionSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        serving.set_precision(checkpoint, body.validated_data["precision"], request.user)
        checkpoint.refresh_from_db()
        return Response(CheckpointSerializer(checkpoint).data)

    @extend_schema(request=None, responses={202: ServingSwitchSerializer})
    @action(detail=True, methods=["post"], pagination_class=None)
    def serve(self, request, pk=None):
        """The worker changes over to it; how that goes is at /api/v1/serving-switches/{id}/."""
        switch = serving.serve(self.get_changeable(), request.user)
        return Response(ServingSwitchSerializer(switch).data, status=status.HTTP_202_ACCEPTED)

    @extend_schema(responses=EstimateSerializer(many=True))
    @action(detail=True, pagination_class=None)
    def memory(self, request, pk=None):
        """What it takes for chat, P-tuning and full fine-tuning at each precision, with the
        arithmetic; empty when its files say too little.
        """
        found = estimates(self.get_object().description)
        return Response(EstimateSerializer([one.as_dict() for one in found], many=True).data)


class ServingSwitchViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, VisibleRows):
    """Changes of what the workers serve: who wanted them, how far they are, what became of them."""

    queryset = ServingSwitch.objects.select_related("checkpoint", "previous", "requested_by")
    serializer_class = ServingSwitchSerializer


class AdapterViewSet(
    mixins.ListModelMixin,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    mixins.DestroyModelMixin,
    VisibleRows,
):
    """Tuned artefacts. The owner may rename, share and delete them."""

    @property
    def key_scope(self):
        safe = self.request.method in permissions.SAFE_METHODS
        return ApiKey.Scope.CHAT if safe else ApiKey.Scope.TUNING

    queryset = Adapter.objects.select_related("owner")
    serializer_class = AdapterSerializer
    http_method_names = ["get", "patch", "delete", "head", "options"]

    def perform_update(self, serializer):
        self.check_changeable(serializer.instance)
        serializer.save()

    def perform_destroy(self, adapter):
        self.check_changeable(adapter)
        registry.remove_adapter(adapter)

    @extend_schema(responses={(200, "application/zip"): bytes})
    @action(detail=True, content_negotiation_class=AnyAccept, pagination_class=None)
    def download(self, request, pk=None):
        """The adapter's folder and, in `peft/`, the same prefix in peft's format, as a zip."""
        adapter = self.get_object()
        ended = downloads.begin(request.user.pk)
        if ended is None:
            raise exceptions.Throttled(
                30, _("You are downloading already; wait until that has ended."), "too_many"
            )
        try:
            file = archive(adapter)
        except AdapterUnreadable as error:
            ended()
            raise exceptions.NotFound(
                _("The adapter's files are missing or damaged."), "files_missing"
            ) from error
        return Download(file, adapter.name.replace("/", "-") + ".zip", ended)


class OldestFirst(Pages):
    ordering = "id"


class ConversationViewSet(viewsets.ModelViewSet, VisibleRows):
    """The user's own conversations; nobody else sees them, staff neither."""

    queryset = Conversation.objects.all()
    serializer_class = ConversationSerializer
    http_method_names = ["get", "post", "patch", "delete", "head", "options"]

    def perform_create(self, serializer):
        serializer.save(owner=self.request.user)

    def perform_destroy(self, conversation):
        live.discard(conversation)

    @extend_schema(responses=MessageSerializer(many=True))
    @action(detail=True, pagination_class=OldestFirst, serializer_class=MessageSerializer)
    def messages(self, request, pk=None):
        """Every message, oldest first."""
        page = self.paginate_queryset(self.get_object().messages.all())
        return self.get_paginated_response(MessageSerializer(page, many=True).data)

    @extend_schema(request=SendSerializer, responses={202: TurnSerializer})
    @messages.mapping.post
    def send(self, request, pk=None):
        """A message and its answer, which is pending: read it from its stream."""
        conversation = self.get_object()
        body = request.data if isinstance(request.data, dict) else {}
        with rules_as_400():
            message, answer = turns.create_turn(
                conversation,
                request.user,
                body.get("content"),
                checkpoint=body.get("checkpoint"),
                adapter=body.get("adapter", turns.KEEP),
                sampling=body.get("sampling"),
                with_history=body.get("with_history"),
                system=body.get("system"),
            )
        try:
            async_to_sync(live.start)(answer)
        except GenerationRefused as error:
            raise errors.as_api_exception(error) from error
        answer.refresh_from_db()
        return Response(
            TurnSerializer({"message": message, "answer": answer}).data,
            status=status.HTTP_202_ACCEPTED,
        )


class MessageViewSet(mixins.RetrieveModelMixin, VisibleRows):
    """One turn of a conversation; an answer's row explains the answer."""

    queryset = Message.objects.all()
    serializer_class = MessageSerializer

    @extend_schema(
        parameters=[
            OpenApiParameter("after", int, description="the last sequence number that was seen")
        ],
        responses={
            (200, "text/event-stream"): OpenApiResponse(
                STREAM, "frames as on the websocket; see docs/api.md"
            )
        },
    )
    @action(detail=True, content_negotiation_class=AnyAccept)
    def stream(self, request, pk=None):
        """The answer as server-sent events from sequence number `after` on; ends with the terminal
        event.
        """
        message = self.get_object()
        if message.role != Message.Role.ASSISTANT:
            raise exceptions.NotFound(_("Only answers have a stream."))
        after = whole_number(
            request.query_params.get("after", request.headers.get("Last-Event-ID", "0"))
        )
        if after is None:
            raise exceptions.ValidationError({"after": [_("Must be a whole number.")]})
        return sse.response(_events(message.pk, after), login_of(request.user, request.session))

    @extend_schema(request=None, responses={202: MessageSerializer})
    @action(detail=True, methods=["post"])
    def stop(self, request, pk=None):
        """Ends the answer; what was written stays. Stopping a finished answer changes nothing."""
        message = self.get_object()
        if message.is_in_flight:
            async_to_sync(live.stop)(message.pk)
            message.refresh_from_db()
        return Response(MessageSerializer(message).data, status=status.HTTP_202_ACCEPTED)


async def _events(message_id: int, after: int):
    frames = live.follow(message_id, after)
    try:
        async for frame in frames:
            number = f"id: {frame['seq']}\n" if frame.get("seq") is not None else ""
            yield f"{number}event: {frame['type']}\n{sse.data(frame)}"
    finally:
        await frames.aclose()
