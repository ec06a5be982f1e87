"""/api/v1/budget/ and /api/v1/usage/."""

from django.conf import settings
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import exceptions, serializers, viewsets
from rest_framework.decorators import action
from rest_framework.response import Response

from portal.budget import grants, pricing, tokens, usage
from portal.budget.models import Grant, Transaction
from portal.budget.statement import Statement, statement
from portal.models import Team
from portal.numbers import whole_number
from portal.rest.conventions import Conflict
from portal.rest.viewsets import rules_as_400


class Units(serializers.DecimalField):
    """Micro-units, told as units with six decimals."""

    def __init__(self, **options):
        super().__init__(max_digits=25, decimal_places=6, **options)

    def to_representation(self, value):
        return None if value is None else super().to_representation(pricing.units(value))


class GrantSerializer(serializers.ModelSerializer):
    user = serializers.CharField(source="account.user.username", default=None, allow_null=True)
    team = serializers.CharField(source="account.team.name", default=None, allow_null=True)
    units = Units(source="amount")
    left, held = Units(), Units()
    by = serializers.CharField(source="by.username", default=None, allow_null=True)

    class Meta:
        model = Grant
        fields = read_only_fields = [
            "id",
            "user",
            "team",
            "units",
            "left",
            "held",
            "expires_at",
            "note",
            "by",
            "created_at",
            "closed_at",
        ]


class NewGrantSerializer(serializers.Serializer):
    """Whole units for a user (by name) or a team (by name) until a date."""

    user = serializers.CharField(max_length=150, required=False)
    team = serializers.CharField(max_length=100, required=False)
    # as it comes: what is wrong with it is told by the rules, in one place
    units = serializers.JSONField()
    expires_at = serializers.DateTimeField()
    note = serializers.CharField(max_length=200, required=False, allow_blank=True, default="")


class HoldSerializer(serializers.Serializer):
    run = serializers.IntegerField(source="run_id", allow_null=True)
    units = Units(source="amount")
    since = serializers.DateTimeField(source="opened_at")


class LineSerializer(serializers.Serializer):
    """One transaction; changes of the holder's accounts."""

    id = serializers.IntegerField(source="transaction.pk")
    at = serializers.DateTimeField(source="transaction.at")
    kind = serializers.ChoiceField(Transaction.Kind.values, source="transaction.kind")
    about = serializers.CharField(source="transaction.about")
    by = serializers.CharField(source="transaction.by.username", default=None, allow_null=True)
    balance, held, used = Units(), Units(), Units()


class BudgetSerializer(serializers.Serializer):
    """Units are decimal texts; `percent` of the valid ones is used."""

    enabled = serializers.BooleanField()
    device_rate = Units(help_text="for an hour of the device", allow_null=True)
    token_rate = Units(help_text="for 1,000 tokens", allow_null=True)
    tokens_per_day = serializers.IntegerField(allow_null=True)
    tokens_today = serializers.IntegerField(allow_null=True)
    user = serializers.CharField(allow_null=True)
    team = serializers.CharField(allow_null=True)
    granted, left, held, used = Units(), Units(), Units(), Units()
    percent = serializers.IntegerField()
    grants = GrantSerializer(many=True)
    holds = HoldSerializer(many=True)
    entries = LineSerializer(many=True)


class UsedSerializer(serializers.Serializer):
    key = serializers.CharField(help_text="a username, a team, base:adapter, a way, a day")
    prompt_tokens = serializers.IntegerField(source="used.prompt_tokens")
    completion_tokens = serializers.IntegerField(source="used.completion_tokens")
    answers = serializers.IntegerField(source="used.answers")
    device_seconds = serializers.FloatField(source="used.seconds")
    runs = serializers.IntegerField(source="used.runs")


class BudgetViewSet(viewsets.ViewSet):
    """Units: what there is, what they went to, and (administrators) giving more."""

    serializer_class = BudgetSerializer
    lookup_value_regex = "[0-9]{1,18}"

    @extend_schema(
        responses=BudgetSerializer,
        operation_id="budget_retrieve",
        parameters=[
            OpenApiParameter("user", str, description="administrators: somebody's"),
            OpenApiParameter("team", str, description="administrators and its members"),
        ],
    )
    def list(self, request):
        """One's own; the last entries are the newest 20."""
        return Response(BudgetSerializer(_told(statement(self._holder(request)))).data)

    @extend_schema(request=NewGrantSerializer, responses={201: GrantSerializer})
    @action(detail=False, methods=["post"])
    def grants(self, request):
        """Administrators: new units; 1 to 1,000,000,000, whole, until a date to come."""
        self._admin(request)
        body = NewGrantSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        told = body.validated_data
        with rules_as_400():
            holder = grants.holder_named(told.get("user"), told.get("team"))
            made = grants.give(
                request.user, holder, told["units"], told["expires_at"], told["note"]
            )
        return Response(GrantSerializer(made).data, status=201)

    @extend_schema(request=None, responses=GrantSerializer)
    @action(detail=False, methods=["post"], url_path=r"grants/(?P<pk>[0-9]{1,18})/withdraw")
    def withdraw(self, request, pk=None):
        """Administrators: what is left of it goes back; 409 when that was done."""
        self._admin(request, exceptions.NotFound)
        given = Grant.objects.filter(pk=whole_number(pk)).first()
        if given is None:
            raise exceptions.NotFound()
        if not grants.withdraw(request.user, given):
            raise Conflict(_("The grant has been withdrawn already."), "withdrawn")
        given.refresh_from_db()
        return Response(GrantSerializer(given).data)

    @extend_schema(request=None, responses={204: None})
    @action(detail=False, methods=["post"], url_path=r"entries/(?P<pk>[0-9]{1,18})/refund")
    def refund(self, request, pk=None):
        """Administrators: gives back what a run or an answer has used; 409 when that was done, or
        when the entry used nothing.
        """
        self._admin(request, exceptions.NotFound)
        spent = Transaction.objects.filter(pk=whole_number(pk)).first()
        if spent is None:
            raise exceptions.NotFound()
        if not grants.refund(request.user, spent):
            raise Conflict(_("There is nothing to refund."), "nothing_to_refund")
        return Response(status=204)

    @staticmethod
    def _admin(request, refusal=exceptions.PermissionDenied) -> None:
        """refusal: NotFound for what a member is not told of."""
        if not request.user.is_staff:
            raise refusal()

    @staticmethod
    def _holder(request):
        user, team = request.query_params.get("user"), request.query_params.get("team")
        if user is None and team is None:
            return request.user
        try:
            holder = grants.holder_named(user, team)
        except ValidationError as nobody:
            raise exceptions.NotFound() from nobody
        mine = holder == request.user or (
            isinstance(holder, Team) and holder.members.filter(pk=request.user.pk).exists()
        )
        if not (mine or request.user.is_staff):
            raise exceptions.NotFound()
        return holder


def _told(found: Statement) -> dict:
    holder, standing = found.holder, found.standing
    return {
        "enabled": pricing.on(),
        "device_rate": pricing.device_rate() or None,
        "token_rate": settings.TOKEN_RATE or None,
        "tokens_per_day": settings.TOKENS_PER_DAY or None,
        "tokens_today": None if found.is_team else tokens.used_today(holder.pk),
        "user": None if found.is_team else str(holder),
        "team": str(holder) if found.is_team else None,
        "granted": standing.granted,
        "left": standing.left,
        "held": standing.held,
        "used": standing.used,
        "percent": standing.percent,
        "grants": found.grants,
        "holds": found.holds,
        "entries": found.lines,
    }


class UsageViewSet(viewsets.ViewSet):
    """Who used what: tokens and device time."""

    serializer_class = UsedSerializer

    @extend_schema(
        responses=UsedSerializer(many=True),
        operation_id="usage_list",
        parameters=[
            OpenApiParameter("by", str, enum=list(usage.BY), description="person if left out"),
            OpenApiParameter("days", int, description="1 to 366; 30 if left out"),
        ],
    )
    def list(self, request):
        """Members: their own; administrators: everybody's. A team's is its members' together."""
        by = request.query_params.get("by", "person")
        if by not in usage.BY:
            message = _("One of: %(choices)s.") % {"choices": ", ".join(usage.BY)}
            raise exceptions.ValidationError({"by": [message]})
        days = whole_number(request.query_params.get("days", usage.DAYS))
        if days is None or not 1 <= days <= usage.MOST_DAYS:
            message = _("A number of days between 1 and %(most)s.") % {"most": usage.MOST_DAYS}
            raise exceptions.ValidationError({"days": [message]})
        return Response(UsedSerializer(usage.used_by(request.user, by, days), many=True).data)
