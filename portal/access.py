"""Who may see and change what: the one funnel for pages, REST, SSE, websocket and admin.

A model that people see has `AccessQuerySet` as its manager and says in `visibility(user)` which
rows a user may see. What is not visible does not exist for that user (404), and nobody learns that
it does.
"""

from django.contrib.auth import get_user_model
from django.db import models
from django.db.models import Q
from django.http import Http404
from django.shortcuts import get_object_or_404

from portal.numbers import whole_number
from portal.text import is_storable

NOTHING = Q(pk__in=[])
EVERYTHING = Q()


class AccessQuerySet(models.QuerySet):
    def visible_to(self, user):
        """Rows that `user` may see."""
        if not (user and user.is_authenticated and user.is_active):
            return self.none()
        return self.filter(self.model.visibility(user))

    def changeable_by(self, user):
        """Rows that `user` may change, stop or delete: their own; staff any that they see."""
        visible = self.visible_to(user)
        if user.is_staff:
            return visible
        return visible.filter(self.model.ownership(user)) if user.is_authenticated else visible

    def named(self, wish):
        """The row among these that a client means by its name (the newest one of that name) or its
        id; None when there is none.
        """
        found = None
        if isinstance(wish, str) and is_storable(wish):
            found = self.filter(name=wish).order_by("-pk").first()
        if found is None and (pk := whole_number(wish)) is not None:
            found = self.filter(pk=pk).first()
        return found


class Owned:
    """Mixin: seen by the owner and by staff; a row without an owner belongs to the portal and is
    seen by everybody.
    """

    @classmethod
    def visibility(cls, user) -> Q:
        return EVERYTHING if user.is_staff else Q(owner=user) | Q(owner=None)

    @classmethod
    def ownership(cls, user) -> Q:
        return Q(owner=user)


class Shared(Owned):
    """Mixin: seen by the owner's teams too, who may use it and not change it (datasets, runs,
    adapters).
    """

    @classmethod
    def visibility(cls, user) -> Q:
        if user.is_staff:
            return EVERYTHING
        # a condition without a join: a row of somebody with two teams in common is there once
        mates = get_user_model().objects.filter(teams__members=user).order_by()
        return super().visibility(user) | Q(owner__in=mates.values("pk"))


class Private(Owned):
    """Mixin: seen by the owner alone, also not by staff (conversations)."""

    @classmethod
    def visibility(cls, user) -> Q:
        return Q(owner=user)


class TeamWide:
    """Mixin: seen by every member, changed by staff (base checkpoints)."""

    @classmethod
    def visibility(cls, user) -> Q:
        return EVERYTHING

    @classmethod
    def ownership(cls, user) -> Q:
        return NOTHING


def get_visible(queryset, user, *, pk):
    """The row with the id that a client sent when `user` may see it; Http404 otherwise, also for
    what can be no id.
    """
    number = whole_number(pk)
    if number is None:
        raise Http404
    return get_object_or_404(queryset.visible_to(user), pk=number)
