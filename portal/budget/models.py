"""The rows of the budget. Who writes them: portal/budget/ledger.py alone, but for DeviceUse
(portal/budget/meter.py). Amounts are whole micro-units: a unit is 1,000,000 of them.
"""

from django.db import models
from django.db.models import Q
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from portal.models import Run, Team, User


class Account(models.Model):
    """Units in one state. A user or a team has three; the portal has the pool, which grants come
    out of (it is below zero by what others have and have used).
    """

    class Kind(models.TextChoices):
        POOL = "pool", _("pool of the portal")
        BALANCE = "balance", _("balance")
        HELD = "held", _("held for runs")
        USED = "used", _("used")

    kind = models.CharField(_("kind"), max_length=8, choices=Kind.choices)
    user = models.ForeignKey(
        User, models.SET_NULL, null=True, related_name="+", verbose_name=_("user")
    )
    team = models.ForeignKey(
        Team, models.SET_NULL, null=True, related_name="+", verbose_name=_("team")
    )
    # whose it is, or was: outlives the user
    name = models.CharField(_("name"), max_length=150, blank=True)
    # of a balance: whether its owner has been warned that it is nearly spent
    warned = models.BooleanField(default=False)

    class Meta:
        verbose_name = _("account")
        verbose_name_plural = _("accounts")
        constraints = [
            models.UniqueConstraint(
                fields=["kind", "user"], condition=~Q(user=None), name="one_account_a_user"
            ),
            models.UniqueConstraint(
                fields=["kind", "team"], condition=~Q(team=None), name="one_account_a_team"
            ),
            models.UniqueConstraint(
                fields=["kind"], condition=Q(kind="pool"), name="one_pool_of_units"
            ),
        ]

    def __str__(self):
        label = self.Kind(self.kind).label
        return f"{self.name} · {label}" if self.name else str(label)


class Grant(models.Model):
    """Units that an admin has given, until they expire. What is left, held and lapsed are sums of
    the entries that name this grant, kept here so that nobody has to add them up. None can fall
    below zero: the database refuses it.
    """

    account = models.ForeignKey(
        Account, models.PROTECT, related_name="grants", verbose_name=_("account")
    )
    amount = models.PositiveBigIntegerField(editable=False)
    left = models.PositiveBigIntegerField(default=0, editable=False)
    held = models.PositiveBigIntegerField(default=0, editable=False)
    lapsed = models.PositiveBigIntegerField(default=0, editable=False)
    expires_at = models.DateTimeField(_("expires"))
    note = models.CharField(_("note"), max_length=200, blank=True)
    by = models.ForeignKey(
        User, models.SET_NULL, null=True, related_name="+", verbose_name=_("granted by")
    )
    created_at = models.DateTimeField(_("created"), default=timezone.now)
    # withdrawn, or its owner deleted: what comes back to it goes on to the pool
    closed_at = models.DateTimeField(_("withdrawn"), null=True, editable=False)

    class Meta:
        verbose_name = _("grant")
        verbose_name_plural = _("grants")
        ordering = ["-id"]
        indexes = [models.Index(fields=["account", "expires_at", "id"])]

    def __str__(self):
        return f"#{self.pk} {self.account.name}"


class Hold(models.Model):
    """What is set aside for one run, from when it is queued until it ends. A run that goes on after
    its end has another.
    """

    run = models.ForeignKey(
        Run, models.SET_NULL, null=True, related_name="holds", verbose_name=_("run")
    )
    payer = models.ForeignKey(Account, models.PROTECT, related_name="holds")  # a balance
    rate = models.PositiveBigIntegerField()  # micro-units for an hour of the device
    # the device time of the run, in ms, that earlier holds have settled
    settled_before = models.PositiveBigIntegerField(default=0)
    amount = models.PositiveBigIntegerField(default=0)  # what it has been given so far
    opened_at = models.DateTimeField(_("since"), default=timezone.now)
    closed_at = models.DateTimeField(_("settled"), null=True)
    at_limit = models.BooleanField(default=False)  # the run was stopped when it was spent

    class Meta:
        verbose_name = _("hold")
        verbose_name_plural = _("holds")
        constraints = [
            models.UniqueConstraint(
                fields=["run"], condition=Q(closed_at=None), name="one_open_hold_a_run"
            )
        ]

    def __str__(self):
        return f"#{self.run_id}"


class NeverChanged(Exception):
    """A row of the ledger stays as it was written; a correction is another transaction."""


class AppendOnlyQuerySet(models.QuerySet):
    def update(self, **changes):
        raise NeverChanged

    def delete(self):
        raise NeverChanged


class AppendOnly(models.Model):
    objects = AppendOnlyQuerySet.as_manager()

    class Meta:
        abstract = True

    def save(self, *args, **options):
        if self.pk is not None:
            raise NeverChanged
        super().save(*args, **options)

    def delete(self, *args, **options):
        raise NeverChanged


class Transaction(AppendOnly):
    """One move of units; its entries sum to zero."""

    class Kind(models.TextChoices):
        GRANT = "grant", _("granted")
        HOLD = "hold", _("held for a run")
        SETTLE = "settle", _("settled")
        CHARGE = "charge", _("tokens")
        LAPSE = "lapse", _("expired")
        RESTORE = "restore", _("expired too early, restored")
        REFUND = "refund", _("refunded")
        WITHDRAW = "withdraw", _("withdrawn")
        RETURN = "return", _("returned with its owner's account")

    kind = models.CharField(_("what"), max_length=8, choices=Kind.choices)
    at = models.DateTimeField(_("when"), default=timezone.now)
    by = models.ForeignKey(
        User, models.SET_NULL, null=True, related_name="+", verbose_name=_("who")
    )
    hold = models.ForeignKey(Hold, models.PROTECT, null=True, related_name="transactions")
    about = models.CharField(_("about"), max_length=200, blank=True)
    reverses = models.OneToOneField("self", models.PROTECT, null=True, related_name="refund")

    class Meta:
        verbose_name = _("transaction")
        verbose_name_plural = _("ledger")
        ordering = ["-id"]

    def __str__(self):
        return f"#{self.pk} {self.Kind(self.kind).label}"


class Entry(AppendOnly):
    """So much into an account, or (below zero) out of it."""

    transaction = models.ForeignKey(Transaction, models.PROTECT, related_name="entries")
    account = models.ForeignKey(
        Account, models.PROTECT, related_name="entries", verbose_name=_("account")
    )
    # whose units moved; none: what ran over the limit, which the pool pays
    grant = models.ForeignKey(
        Grant, models.PROTECT, null=True, related_name="entries", verbose_name=_("grant")
    )
    amount = models.BigIntegerField(_("amount"))

    class Meta:
        verbose_name = _("entry")
        verbose_name_plural = _("entries")
        constraints = [models.CheckConstraint(condition=~Q(amount=0), name="an_entry_moves_units")]

    def __str__(self):
        return f"{self.account}: {self.amount}"


class DeviceUse(models.Model):
    """How long a run has had its device on one day; counted whether or not there is a budget."""

    run = models.ForeignKey(Run, models.SET_NULL, null=True, related_name="device_use")
    user = models.ForeignKey(User, models.CASCADE, related_name="device_use")
    day = models.DateField()
    kind = models.CharField(_("kind"), max_length=20, choices=Run.Kind.choices)
    model = models.CharField(_("model"), max_length=240, blank=True)  # base or base:adapter
    milliseconds = models.PositiveBigIntegerField(default=0)

    class Meta:
        verbose_name = _("device use")
        verbose_name_plural = _("device use")
        ordering = ["-day"]
        constraints = [models.UniqueConstraint(fields=["run", "day"], name="one_device_use_a_day")]

    def __str__(self):
        return f"{self.user_id} {self.day} {self.model}"
