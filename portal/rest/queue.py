"""/api/v1/queue/: the queue board by script. Rules are in portal/runs/board.py."""

from django.utils.translation import gettext as _
from drf_spectacular.utils import extend_schema
from rest_framework import exceptions, serializers, viewsets
from rest_framework.decorators import action
from rest_framework.response import Response

from portal.access import get_visible
from portal.models import ApiKey, Run
from portal.rest.conventions import Conflict
from portal.rest.fields import Text
from portal.rest.viewsets import rules_as_400
from portal.runs import board
from portal.runs.work import queues

QUEUE_NAME = r"[a-z]{1,20}"


class QueuedRunSerializer(serializers.Serializer):
    """A run as everybody may see it; `name` only for whom it is visible."""

    id = serializers.IntegerField()
    kind = serializers.CharField()
    name = serializers.CharField(allow_null=True)
    owner = serializers.CharField()
    status = serializers.CharField()
    priority = serializers.ChoiceField(["normal", "low"])
    place = serializers.IntegerField(allow_null=True, help_text="1: next; null: it runs")
    reason = serializers.CharField(help_text="why it waits")
    starts_in = serializers.FloatField(allow_null=True, help_text="seconds; null: not known")
    seconds_left = serializers.FloatField(allow_null=True, help_text="of a running run")


class QueueSerializer(serializers.Serializer):
    name = serializers.CharField()
    held = serializers.BooleanField(help_text="no new run begins until an admin releases it")
    held_reason = serializers.CharField()
    version = serializers.CharField(help_text="changes with the order; send it with a new one")
    running = QueuedRunSerializer(many=True)
    waiting = QueuedRunSerializer(many=True)


class OrderSerializer(serializers.Serializer):
    runs = serializers.ListField(child=serializers.IntegerField(), max_length=1000)
    version = Text(required=False, help_text="of the list that was looked at")


class HoldSerializer(serializers.Serializer):
    reason = Text(max_length=200, required=False, allow_blank=True, default="")


class DrainSerializer(HoldSerializer):
    checkpoint = serializers.BooleanField(
        default=False, help_text="what runs saves and waits too; else it goes on to its end"
    )


class PrioritySerializer(serializers.Serializer):
    priority = serializers.ChoiceField(["normal", "low"])


class QueueViewSet(viewsets.ViewSet):
    """What runs and what waits, in which order and why."""

    key_scope = ApiKey.Scope.TUNING
    lookup_field = "name"
    lookup_value_regex = QUEUE_NAME
    serializer_class = QueueSerializer

    @extend_schema(responses=QueueSerializer(many=True), operation_id="queue_list")
    def list(self, request):
        return Response(_told(request.user))

    @extend_schema(request=OrderSerializer, responses=QueueSerializer(many=True))
    @action(detail=True, methods=["post"])
    def order(self, request, name=None):
        """Admins: these waiting runs first, in this order; 409 when the order has changed since
        `version`.
        """
        self._admin(request, name)
        body = OrderSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        try:
            with rules_as_400():
                board.reorder(
                    request.user,
                    name,
                    body.validated_data["runs"],
                    body.validated_data.get("version"),
                )
        except exceptions.ValidationError as refused:
            if isinstance(refused.__cause__, board.OrderChanged):
                raise Conflict(refused.__cause__.message, "order_changed") from refused
            raise
        return Response(_told(request.user))

    @extend_schema(request=HoldSerializer, responses=QueueSerializer(many=True))
    @action(detail=True, methods=["post"])
    def hold(self, request, name=None):
        """Admins: no new run begins until `release`; what runs goes on to its end."""
        self._admin(request, name)
        body = HoldSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        board.hold(request.user, name, body.validated_data["reason"])
        return Response(_told(request.user))

    @extend_schema(request=None, responses=QueueSerializer(many=True))
    @action(detail=True, methods=["post"])
    def release(self, request, name=None):
        self._admin(request, name)
        board.release(request.user, name)
        return Response(_told(request.user))

    @extend_schema(request=DrainSerializer, responses=QueueSerializer(many=True))
    @action(detail=False, methods=["post"])
    def drain(self, request):
        """Admins: for maintenance nothing new begins in any queue, until `undrain`."""
        self._admin(request, queues()[0])
        body = DrainSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        told = body.validated_data
        board.drain(request.user, told["reason"], checkpoint=told["checkpoint"])
        return Response(_told(request.user))

    @extend_schema(request=None, responses=QueueSerializer(many=True))
    @action(detail=False, methods=["post"])
    def undrain(self, request):
        """Admins: everything goes on."""
        self._admin(request, queues()[0])
        board.undrain(request.user)
        return Response(_told(request.user))

    @extend_schema(request=PrioritySerializer, responses=QueueSerializer(many=True))
    @action(detail=False, methods=["post"], url_path=r"runs/(?P<pk>[0-9]{1,18})/priority")
    def priority(self, request, pk=None):
        """The owner or an admin: `low` waits until nobody else does; 409 once the run began."""
        run = get_visible(Run.objects, request.user, pk=pk)
        if not Run.objects.changeable_by(request.user).filter(pk=run.pk).exists():
            raise exceptions.PermissionDenied(_("Only the owner may change this."))
        body = PrioritySerializer(data=request.data)
        body.is_valid(raise_exception=True)
        wanted = board.PRIORITIES[body.validated_data["priority"]]
        if not board.set_priority(request.user, run, wanted):
            raise Conflict(_("The run does not wait any more."), "not_waiting")
        return Response(_told(request.user))

    @staticmethod
    def _admin(request, name: str) -> None:
        if name not in queues():
            raise exceptions.NotFound()
        if not request.user.is_staff:
            raise exceptions.PermissionDenied(_("Only administrators may do this."))


def _told(user) -> list[dict]:
    return [
        {
            "name": queue.name,
            "held": queue.hold is not None,
            "held_reason": queue.hold.reason if queue.hold else "",
            "version": queue.version,
            "running": [_run(run, user, board.seconds_left(run)) for run in queue.running],
            "waiting": [_run(entry.run, user, None, entry) for entry in queue.waiting],
        }
        for queue in board.board()
    ]


def _run(run: Run, user, left: float | None, entry: board.Waiting | None = None) -> dict:
    starts_in = entry.starts_in.total_seconds() if entry and entry.starts_in is not None else None
    return {
        "id": run.pk,
        "kind": run.kind,
        "name": run.name if user.is_staff or run.owner_id == user.pk else None,
        "owner": run.owner.username,
        "status": run.status,
        "priority": Run.Priority(run.priority).name.lower(),
        "place": entry.place if entry else None,
        "reason": entry.reason if entry else run.wait_reason,
        "starts_in": starts_in,
        "seconds_left": left,
    }
