"""/api/v1/fetch-runs/. Rules are in plan.py and portal/runs/lifecycle.py; here is only HTTP."""

from django.http import HttpResponse
from django.utils.translation import gettext as _
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from rest_framework import exceptions, mixins, permissions, status
from rest_framework.decorators import action
from rest_framework.response import Response

from chat.fetching.plan import create_fetch
from chat.fetching.serializers import FetchRunSerializer, NewFetchRunSerializer
from chat.models import FetchRun
from portal.models import ApiKey
from portal.rest.conventions import Conflict
from portal.rest.viewsets import AnyAccept, VisibleRows, rules_as_400
from portal.runs import lifecycle


class FetchRunViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, VisibleRows):
    """Downloads of checkpoints. Starting one is for staff."""

    key_scope = ApiKey.Scope.ADMIN
    queryset = FetchRun.objects.select_related("owner")
    serializer_class = FetchRunSerializer
    permission_classes = [permissions.IsAuthenticated]

    def _answer(self, run: FetchRun, http_status: int = status.HTTP_200_OK) -> Response:
        run = FetchRun.objects.select_related("owner").get(pk=run.pk)
        return Response(FetchRunSerializer(run).data, status=http_status)

    @extend_schema(
        request=NewFetchRunSerializer, responses={201: FetchRunSerializer, 200: FetchRunSerializer}
    )
    def create(self, request):
        """201 with a new run, or 200 with the one that fetches the same source already."""
        if not request.user.is_staff:
            raise exceptions.PermissionDenied()
        body = NewFetchRunSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        fields = body.validated_data
        with rules_as_400():
            run, new = create_fetch(
                request.user,
                fields["source"],
                name=fields.get("name", ""),
                default=fields["default"],
                accept_licence=fields["accept_licence"],
            )
        return self._answer(run, status.HTTP_201_CREATED if new else status.HTTP_200_OK)

    @extend_schema(responses={(200, "text/plain"): OpenApiTypes.STR})
    @action(detail=True, pagination_class=None, content_negotiation_class=AnyAccept)
    def log(self, request, pk=None):
        """The log of all attempts, for people."""
        return HttpResponse(self.get_object().log_tail(), content_type="text/plain; charset=utf-8")

    @extend_schema(request=None, responses=FetchRunSerializer)
    @action(detail=True, methods=["post"])
    def cancel(self, request, pk=None):
        """Ends it; every byte that has come stays for the next attempt."""
        run = self.get_changeable()
        lifecycle.cancel(run)
        return self._answer(run)

    @extend_schema(request=None, responses=FetchRunSerializer)
    @action(detail=True, methods=["post"])
    def resume(self, request, pk=None):
        """A failed or cancelled one goes on at the byte where it ended; 409 for any other."""
        run = self.get_changeable()
        if not lifecycle.resume(run):
            raise Conflict(_("Only a failed or cancelled run can go on."), "not_resumable")
        return self._answer(run)
