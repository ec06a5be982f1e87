"""/api/v1/devices/: who holds how much of what, and who waits. Rules are in portal/devices/."""

from django.utils.translation import gettext as _
from drf_spectacular.utils import extend_schema
from rest_framework import exceptions, serializers, viewsets
from rest_framework.decorators import action
from rest_framework.response import Response

from portal.devices import overview, reasons
from portal.devices.models import Device, DeviceClaim
from portal.models import ApiKey


class ClaimSerializer(serializers.Serializer):
    use = serializers.CharField(help_text="chat, tuning or evaluation")
    run = serializers.IntegerField(allow_null=True)
    name = serializers.CharField(
        allow_null=True, help_text="of the run, only for whom it is visible; of chat the checkpoint"
    )
    bytes = serializers.IntegerField()
    since = serializers.DateTimeField()
    reason = serializers.CharField(help_text="why it waits; empty for what it holds")


class DeviceSerializer(serializers.Serializer):
    id = serializers.IntegerField()
    name = serializers.CharField()
    machine = serializers.CharField()
    bytes = serializers.IntegerField()
    held_bytes = serializers.IntegerField()
    declared = serializers.BooleanField(help_text="by PORTAL_DEVICES")
    state = serializers.ChoiceField(["ready", "missing", "out"])
    reason = serializers.CharField(help_text="of an admin who took it out of service")
    holders = ClaimSerializer(many=True)


class DevicesSerializer(serializers.Serializer):
    devices = DeviceSerializer(many=True)
    waiting = ClaimSerializer(many=True, help_text="in order")


class OutSerializer(serializers.Serializer):
    reason = serializers.CharField(max_length=200, required=False, allow_blank=True, default="")


class DeviceViewSet(viewsets.ViewSet):
    """Devices of every machine, what they hold, and who waits for one."""

    key_scope = ApiKey.Scope.TUNING
    lookup_value_regex = "[0-9]{1,18}"
    serializer_class = DevicesSerializer

    @extend_schema(responses=DevicesSerializer, operation_id="devices_list")
    def list(self, request):
        return Response(_told(request.user))

    @extend_schema(request=OutSerializer, responses=DevicesSerializer)
    @action(detail=True, methods=["post"])
    def out(self, request, pk=None):
        """Admins: out of service. What runs there saves and steps aside."""
        body = OutSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        overview.take_out(request.user, self._device(request, pk), body.validated_data["reason"])
        return Response(_told(request.user))

    @extend_schema(request=None, responses=DevicesSerializer)
    @action(detail=True, methods=["post"])
    def back(self, request, pk=None):
        """Admins: in service again."""
        overview.put_back(request.user, self._device(request, pk))
        return Response(_told(request.user))

    @staticmethod
    def _device(request, pk) -> Device:
        if not request.user.is_staff:
            raise exceptions.PermissionDenied(_("Only administrators may do this."))
        device = Device.objects.filter(pk=pk).first()
        if device is None:
            raise exceptions.NotFound()
        return device


def _told(user) -> dict:
    shown, waiting = overview.overview()
    return {
        "devices": [
            {
                "id": each.device.pk,
                "name": each.device.name,
                "machine": each.device.host,
                "bytes": each.device.bytes,
                "held_bytes": each.held,
                "declared": each.device.declared,
                "state": each.device.state,
                "reason": each.device.out_reason,
                "holders": [_claim(claim, user) for claim in each.claims],
            }
            for each in shown
        ],
        "waiting": [_claim(claim, user) for claim in waiting],
    }


def _claim(claim: DeviceClaim, user) -> dict:
    return {
        "use": claim.use,
        "run": claim.run_id,
        "name": claim.label if claim.run is None else overview.name_for(user, claim.run),
        "bytes": claim.bytes,
        "since": claim.since,
        "reason": reasons.in_words(claim.reason),
    }
