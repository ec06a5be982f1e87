"""User, ApiKey and Run: what every app stands on."""

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from django.conf import settings
from django.contrib.auth.models import AbstractUser
from django.core.validators import MinValueValidator
from django.db import DatabaseError, models, transaction
from django.db.models import F, Q
from django.urls import reverse
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.translation import gettext_lazy as _

from portal.access import AccessQuerySet, Owned, Shared


class User(AbstractUser):
    """A member; staff are the portal's administrators, and a reviewer sees every evaluation."""

    is_reviewer = models.BooleanField(
        _("reviewer"), default=False, help_text=_("Sees and decides on everybody's evaluations.")
    )


class Team(models.Model):
    """Members who see each other's datasets, runs and adapters; never their conversations."""

    name = models.CharField(_("name"), max_length=100, unique=True)
    members = models.ManyToManyField(
        User, related_name="teams", blank=True, verbose_name=_("members")
    )

    class Meta:
        verbose_name = _("team")
        verbose_name_plural = _("teams")
        ordering = ["name"]

    def __str__(self):
        return self.name


class ExternalLogin(models.Model):
    """Whom a provider's subject opens an account for (portal/single_sign_on.py)."""

    user = models.ForeignKey(
        User, models.CASCADE, related_name="external_logins", verbose_name=_("member")
    )
    issuer = models.CharField(_("provider"), max_length=255)
    subject = models.CharField(_("subject"), max_length=255)
    created_at = models.DateTimeField(_("created"), auto_now_add=True)

    class Meta:
        verbose_name = _("external login")
        verbose_name_plural = _("external logins")
        constraints = [
            models.UniqueConstraint(fields=["issuer", "subject"], name="one_account_a_subject")
        ]

    def __str__(self):
        return f"{self.subject} ({self.issuer})"


class ApiKeyQuerySet(AccessQuerySet):
    def valid(self):
        return self.filter(Q(expires_at=None) | Q(expires_at__gt=timezone.now()), revoked_at=None)


def every_scope() -> list[str]:
    return list(ApiKey.Scope)


class ApiKey(Owned, models.Model):
    """A key for scripts. Only its SHA-256 is kept: it has 256 random bits, so a slow password hash
    would add nothing.
    """

    owner = models.ForeignKey(
        User, models.CASCADE, related_name="api_keys", verbose_name=_("owner")
    )
    name = models.CharField(_("name"), max_length=100, blank=True)
    prefix = models.CharField(_("begins with"), max_length=12, editable=False)  # tells keys apart
    digest = models.CharField(max_length=64, unique=True, editable=False)
    created_at = models.DateTimeField(_("created"), auto_now_add=True)
    last_used_at = models.DateTimeField(_("last used"), null=True, editable=False)
    revoked_at = models.DateTimeField(_("revoked at"), null=True, blank=True)
    expires_at = models.DateTimeField(_("expires"), null=True, blank=True)
    scopes = models.JSONField(_("may be used for"), default=every_scope)
    requests_per_minute = models.PositiveIntegerField(null=True, blank=True)
    tokens_per_day = models.PositiveIntegerField(null=True, blank=True)
    tokens_used = models.PositiveBigIntegerField(default=0, editable=False)  # on tokens_day
    tokens_day = models.DateField(null=True, editable=False)

    class Scope(models.TextChoices):
        CHAT = "chat", _("chat")
        DATA = "data", _("datasets")
        TUNING = "tuning", _("tuning and evaluation")
        ADMIN = "admin", _("administration")

    objects = ApiKeyQuerySet.as_manager()

    class Meta:
        verbose_name = _("API key")
        verbose_name_plural = _("API keys")
        ordering = ["-created_at"]

    def __str__(self):
        return f"{self.prefix}… {self.name}"

    @staticmethod
    def digest_of(secret: str) -> str:
        return hashlib.sha256(secret.encode()).hexdigest()

    @classmethod
    def create_for(cls, user, name="", **limits) -> tuple["ApiKey", str]:
        """A new key and its secret, which is shown once and cannot be recovered. `limits`: scopes,
        expires_at, requests_per_minute, tokens_per_day.
        """
        secret = "sk-" + secrets.token_urlsafe(32)
        return cls.objects.create(
            owner=user, name=name, prefix=secret[:9], digest=cls.digest_of(secret), **limits
        ), secret

    @classmethod
    def user_of(cls, secret: str):
        """The active user whose valid key this is, with the key as `.api_key`; or None."""
        digest = cls.digest_of(secret)
        key = cls.objects.valid().select_related("owner").filter(digest=digest).first()
        if key is None or not key.owner.is_active:
            return None
        key._seen()
        user = key.owner
        user.api_key = key
        if cls.Scope.ADMIN not in key.scopes:  # then nobody's rights go beyond a member's
            user.is_staff = user.is_superuser = False
        return user

    @property
    def has_expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= timezone.now()

    def limits_in_words(self) -> str:
        """What distinguishes the key from one that may do all that its owner may; "—" for such."""
        parts = []
        if set(self.scopes) != set(self.Scope):
            parts += [self.Scope(scope).label for scope in self.scopes if scope in list(self.Scope)]
        if self.requests_per_minute is not None:
            parts.append(_("%(most)s requests a minute") % {"most": self.requests_per_minute})
        if self.tokens_per_day is not None:
            parts.append(_("%(most)s tokens a day") % {"most": self.tokens_per_day})
        if self.expires_at is not None:
            until = date_format(timezone.localtime(self.expires_at), "DATE_FORMAT")
            parts.append(_("until %(date)s") % {"date": until})
        return " · ".join(map(str, parts)) or "—"

    def spend(self, tokens: int) -> None:
        """Counts tokens towards today's limit; best effort."""
        today, mine = timezone.localdate(), ApiKey.objects.filter(pk=self.pk)
        with contextlib.suppress(DatabaseError), transaction.atomic():
            if not mine.filter(tokens_day=today).update(tokens_used=F("tokens_used") + tokens):
                mine.update(tokens_day=today, tokens_used=tokens)

    def tokens_left(self) -> int | None:
        """Of today; None: without a limit."""
        if self.tokens_per_day is None:
            return None
        self.refresh_from_db(fields=["tokens_used", "tokens_day"])
        used = self.tokens_used if self.tokens_day == timezone.localdate() else 0
        return max(0, self.tokens_per_day - used)

    def _seen(self) -> None:
        """Notes the use, once a minute; a database that cannot be written refuses nobody."""
        now = timezone.now()
        if self.last_used_at is None or (now - self.last_used_at).total_seconds() > 60:
            with contextlib.suppress(DatabaseError), transaction.atomic():
                ApiKey.objects.filter(pk=self.pk).update(last_used_at=now)


def new_run_key() -> str:
    return secrets.token_hex(4)


class Run(Shared, models.Model):
    """One piece of long work: a tuning, an evaluation, a download or a check. The queue is a
    doorbell; this row is the truth.

    Status is written only in portal/runs/lifecycle.py. `token` is the fencing token: a process may
    write to the row only while it holds the current one. Statuses, error and times explain the run
    without any log.
    """

    class Status(models.TextChoices):
        QUEUED = "queued", _("Queued")
        RUNNING = "running", _("Running")
        SUCCEEDED = "succeeded", _("Succeeded")
        FAILED = "failed", _("Failed")
        CANCELLED = "cancelled", _("Cancelled")

    ACTIVE = (Status.QUEUED, Status.RUNNING)

    class Kind(models.TextChoices):
        TUNING = "tuning", _("Tuning")
        EVALUATION = "evaluation", _("Evaluation")
        FETCH = "fetch", _("Download")
        CHECK = "check", _("Check of a dataset")
        BATCH = "batch", _("Batch")

    class Priority(models.IntegerChoices):
        NORMAL = 0, _("normal")
        LOW = 1, _("low")  # when nobody else waits

    class Phase(models.TextChoices):
        """What a running run is doing."""

        STARTING = "starting", _("starting")
        WAITING = "waiting", _("waiting for the device")
        LOADING = "loading", _("loading the model")
        TRAINING = "training", _("training")
        PREDICTING = "predicting", _("predicting")
        SAVING = "saving", _("saving")
        LISTING = "listing", _("looking what there is")
        DOWNLOADING = "downloading", _("downloading")
        UNPACKING = "unpacking", _("unpacking")
        CONVERTING = "converting", _("converting the weights")
        CHECKING = "checking", _("checking")

    owner = models.ForeignKey(User, models.CASCADE, related_name="runs", verbose_name=_("owner"))
    kind = models.CharField(_("kind"), max_length=20, choices=Kind.choices, editable=False)
    name = models.CharField(_("name"), max_length=120)
    # Part of the folder's name: ids come again when a backup is restored, folders must not.
    key = models.CharField(max_length=8, blank=True, default=new_run_key, editable=False)
    # the plan, frozen when the run is created: {"dataset": {"id", "name", "version", "split",
    # "sha256", "rows"}, "checkpoint": {"id", "name", "fingerprint"}, ...} and what the kind adds
    recipe = models.JSONField(_("recipe"), default=dict, editable=False)

    status = models.CharField(
        _("status"), max_length=12, choices=Status.choices, default=Status.QUEUED, editable=False
    )
    queue = models.CharField(max_length=20, default="gpu", editable=False)
    token = models.CharField(max_length=32, blank=True, editable=False)
    attempt = models.PositiveSmallIntegerField(_("attempt"), default=0, editable=False)
    max_attempts = models.PositiveSmallIntegerField(
        default=3, validators=[MinValueValidator(1)], editable=False
    )
    cancel_requested = models.BooleanField(default=False, editable=False)
    # stopped by somebody who means to go on with it
    paused = models.BooleanField(default=False, editable=False)
    priority = models.PositiveSmallIntegerField(
        _("priority"), choices=Priority.choices, default=Priority.NORMAL, editable=False
    )
    # an admin's own order of waiting runs: goes before the turns, smallest first
    rank = models.PositiveIntegerField(null=True, editable=False)

    progress = models.PositiveIntegerField(default=0, editable=False)  # steps, rows, KiB
    total = models.PositiveIntegerField(default=0, editable=False)
    # of a running run only
    phase = models.CharField(
        _("phase"), max_length=40, choices=Phase.choices, blank=True, editable=False
    )
    # where its figures were sent: {"url"} or {"error"} (portal/runs/mlflow.py); {}: nowhere
    tracking = models.JSONField(default=dict, editable=False)
    # {"code", "message"}
    error = models.JSONField(_("error"), null=True, blank=True, editable=False)

    created_at = models.DateTimeField(_("created"), auto_now_add=True)
    rung_at = models.DateTimeField(null=True, editable=False)  # when the queue was last told
    started_at = models.DateTimeField(_("started"), null=True, editable=False)
    heartbeat_at = models.DateTimeField(null=True, editable=False)
    lease_expires_at = models.DateTimeField(null=True, editable=False)
    # of a queued run that had begun: when it lost its process or stepped aside
    interrupted_at = models.DateTimeField(null=True, editable=False)
    finished_at = models.DateTimeField(_("ended"), null=True, editable=False)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("run")
        verbose_name_plural = _("runs")
        ordering = ["-id"]
        indexes = [models.Index(fields=["status", "queue", "id"])]

    def __str__(self):
        return f"#{self.pk} {self.name}"

    def get_absolute_url(self) -> str:
        if self.kind == self.Kind.BATCH:  # for programs; people see its tokens
            return reverse("account")
        return reverse(f"{self.kind}_run", args=[self.pk])

    @classmethod
    def visibility(cls, user) -> Q:
        seen = super().visibility(user)
        if user.is_reviewer and not user.is_staff:
            seen |= Q(kind=cls.Kind.EVALUATION)
        return seen

    @property
    def is_active(self) -> bool:
        return self.status in self.ACTIVE

    @property
    def percent(self) -> int:
        return min(100, 100 * self.progress // self.total) if self.total else 0

    @property
    def seconds(self) -> float | None:
        """How long the run has been running, or ran."""
        if self.started_at is None:
            return None
        return ((self.finished_at or timezone.now()) - self.started_at).total_seconds()

    @property
    def folder(self) -> Path:
        """Where the run keeps its log, what it needs to go on, and what it makes."""
        return settings.DATA_DIR / "runs" / (f"{self.pk}-{self.key}" if self.key else str(self.pk))

    @property
    def state_folder(self) -> Path:
        """What a later process needs to go on."""
        return self.folder / ("state" if self.key else "checkpoint")  # as earlier versions wrote

    @property
    def log_path(self) -> Path:
        return self.folder / "run.log"

    def log_tail(self, most_bytes: int = 16 << 20) -> str:
        """The end of the log of all attempts, from a line's beginning; "" before there is one."""
        try:
            with open(self.log_path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - most_bytes))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return text if size <= most_bytes else text.partition("\n")[2]

    def queue_position(self) -> int | None:
        """How many runs of the same queue go first: 0 is next; None when not queued."""
        if self.status != self.Status.QUEUED:
            return None
        from portal.runs.waiting import waiting_order  # which reads this model

        running = Run.objects.filter(queue=self.queue, status=self.Status.RUNNING).count()
        order = waiting_order(self.queue)
        return running + (order.index(self.pk) if self.pk in order else 0)


class QueueHold(models.Model):
    """A queue that takes no new run until an admin releases it; what runs goes on to its end, or
    saves and waits with the others.
    """

    queue = models.CharField(max_length=20, primary_key=True)
    reason = models.CharField(_("reason"), max_length=200, blank=True)
    # what runs is to save and step aside too
    checkpoint = models.BooleanField(default=False)
    by = models.ForeignKey(User, models.SET_NULL, null=True, related_name="+")
    since = models.DateTimeField(auto_now_add=True)

    class Meta:
        verbose_name = _("held queue")
        verbose_name_plural = _("held queues")

    def __str__(self):
        return self.queue


class IdempotencyKey(models.Model):
    """Which run a request has made already (portal/runs/once.py)."""

    owner = models.ForeignKey(User, models.CASCADE, related_name="+")
    key = models.CharField(max_length=255)
    digest = models.CharField(max_length=64)  # SHA-256 of what was asked for
    run = models.ForeignKey(Run, models.CASCADE, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["owner", "key"], name="one_run_per_key")]

    def __str__(self):
        return self.key


class TokenUsage(models.Model):
    """Tokens of one person on one day, by the way they were asked for and the model."""

    class Door(models.TextChoices):
        CHAT = "chat", _("chat pages")
        API = "api", _("programs")
        BATCH = "batch", _("batches")

    user = models.ForeignKey(User, models.CASCADE, related_name="token_usage")
    day = models.DateField()
    door = models.CharField(_("through"), max_length=8, choices=Door.choices)
    model = models.CharField(_("model"), max_length=240, blank=True)  # base or base:adapter
    prompt_tokens = models.PositiveBigIntegerField(default=0)
    completion_tokens = models.PositiveBigIntegerField(default=0)
    answers = models.PositiveIntegerField(default=0)

    class Meta:
        verbose_name = _("token usage")
        verbose_name_plural = _("token usage")
        ordering = ["-day", "door"]
        constraints = [
            models.UniqueConstraint(fields=["user", "day", "door", "model"], name="one_usage_a_day")
        ]

    def __str__(self):
        return f"{self.user_id} {self.day} {self.door}"

    @classmethod
    def count(cls, user_id: int, door: str, model: str, prompt: int, completion: int) -> None:
        """Adds an answer to today's. Doors ask portal/budget/tokens.py."""
        mine = {"user_id": user_id, "day": timezone.localdate(), "door": door, "model": model}
        more = {
            "prompt_tokens": F("prompt_tokens") + prompt,
            "completion_tokens": F("completion_tokens") + completion,
            "answers": F("answers") + 1,
        }
        cls.objects.get_or_create(**mine)
        cls.objects.filter(**mine).update(**more)


# They refer to the above.
from portal.devices.models import Device, DeviceClaim  # noqa: E402, F401
from portal.notices.models import Delivery, Notice, NoticeSettings  # noqa: E402, F401
