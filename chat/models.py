"""Checkpoint (base weights), Adapter (tuned artefact), Conversation and Message."""

import logging
import secrets
import uuid
from pathlib import Path

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from chat.checkpoints.system_prompts import takes_system
from chat.engine.families import Family, family_named
from chat.engine.request import AdapterRef, CheckpointRef
from chat.engine.thoughts import apart
from portal.access import AccessQuerySet, Private, Shared, TeamWide
from portal.models import Run, User

logger = logging.getLogger(__name__)


class Precision(models.TextChoices):
    INT8 = "int8", "int8"
    INT4 = "int4", "int4"


class Checkpoint(TeamWide, models.Model):
    """Base weights in a local Hugging Face folder."""

    name = models.CharField(_("name"), max_length=100, unique=True)
    path = models.CharField(_("folder"), max_length=500)
    # chat.checkpoints.describe
    fingerprint = models.CharField(_("fingerprint"), max_length=64, editable=False)
    # architecture, parameters ... (checkpoints/describe.py)
    description = models.JSONField(_("description"), default=dict, editable=False)
    # weights packed when they are loaded; "": as they are stored, float32 on a processor
    precision = models.CharField(
        _("precision"), max_length=8, blank=True, default="", choices=Precision.choices
    )
    # the tuning run that made it; None: added or fetched
    run = models.ForeignKey(
        Run,
        models.SET_NULL,
        null=True,
        blank=True,
        editable=False,
        related_name="made_checkpoints",
        verbose_name=_("run"),
    )
    is_starter = models.BooleanField(_("built-in starter model"), default=False, editable=False)
    # what the worker serves and forms offer first
    is_default = models.BooleanField(_("default"), default=False)
    created_at = models.DateTimeField(_("created"), auto_now_add=True)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("checkpoint")
        verbose_name_plural = _("checkpoints")
        ordering = ["-is_default", "name"]
        constraints = [
            models.UniqueConstraint(
                fields=["is_default"], condition=Q(is_default=True), name="one_default_checkpoint"
            )
        ]

    def __str__(self):
        return self.name

    @property
    def sampling(self) -> dict:
        """What its folder wishes in place of the engine's own defaults (generation_config.json)."""
        return self.description.get("sampling") or {}

    @property
    def takes_system(self) -> bool:
        """Whether its prompt has a place for a system prompt."""
        return takes_system(self.path, self.fingerprint, self.description)

    @property
    def family(self) -> Family:
        return family_named(self.description.get("family"))

    def ref(self) -> CheckpointRef:
        return CheckpointRef(self.name, self.fingerprint, self.path, self.is_default)

    @classmethod
    def default(cls):
        """The checkpoint that is served unless somebody chooses another; None before first-run
        set-up.
        """
        return cls.objects.order_by("-is_default", "id").first()


class Adapter(Shared, models.Model):
    """A tuned artefact: a KV prefix in a folder (chat/engine/adapters.py). Its name is an OpenAI
    model id, so it is unique.
    """

    name = models.CharField(_("name"), max_length=120, unique=True)
    checkpoint = models.ForeignKey(
        Checkpoint, models.CASCADE, related_name="adapters", verbose_name=_("checkpoint")
    )
    owner = models.ForeignKey(
        User,
        models.CASCADE,
        null=True,
        blank=True,
        related_name="adapters",
        verbose_name=_("owner"),
    )
    shared = models.BooleanField(_("shared with the team"), default=False)
    # the tuning run that made it; None: imported
    run = models.ForeignKey(
        Run, models.SET_NULL, null=True, blank=True, related_name="adapters", verbose_name=_("run")
    )
    folder = models.CharField(_("folder"), max_length=500, editable=False)  # relative to DATA_DIR
    sha256 = models.CharField(_("fingerprint"), max_length=64, editable=False)
    pre_seq_len = models.PositiveIntegerField(_("prefix length"), editable=False)
    step = models.PositiveIntegerField(_("step"), null=True, editable=False)
    # whether its training rows had earlier turns; None: nobody knows (imported)
    with_history = models.BooleanField(_("trained on conversations"), null=True, blank=True)
    # of two that stand one after the other: their sha256, the one in front first
    # (chat/compositions.py)
    parts = models.JSONField(default=list, blank=True, editable=False)
    created_at = models.DateTimeField(_("created"), auto_now_add=True)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("adapter")
        verbose_name_plural = _("adapters")
        ordering = ["-id"]

    def __str__(self):
        return self.name

    @classmethod
    def visibility(cls, user) -> Q:
        seen = super().visibility(user)
        return seen if user.is_staff else seen | Q(shared=True)

    @property
    def path(self) -> Path:
        return settings.DATA_DIR / self.folder

    @property
    def asks_with_history(self) -> bool:
        """Whether its prompt has the earlier turns unless somebody chooses otherwise."""
        return self.with_history is not False

    def ref(self) -> AdapterRef:
        return AdapterRef(self.sha256, str(self.path))


class FetchRun(Run):
    """A checkpoint on its way here (chat/fetching/). `recipe`: {"source", "name", "default",
    "accept_licence", "endpoints"}.
    """

    # the source in its one spelling: two wishes for the same thing are one run
    source = models.CharField(_("source"), max_length=500, editable=False)
    # {"phase", "files": [{"name", "size", "done"}], "done", "total", "bytes_per_second",
    # "seconds_left"} (chat/checkpoints/fetch/progress.py)
    transfer = models.JSONField(default=dict, editable=False)
    # what it became
    checkpoint = models.ForeignKey(
        Checkpoint,
        models.SET_NULL,
        null=True,
        blank=True,
        related_name="fetch_runs",
        verbose_name=_("checkpoint"),
    )

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("download")
        verbose_name_plural = _("downloads")
        ordering = ["-id"]

    @property
    def eta_seconds(self) -> float | None:
        return self.transfer.get("seconds_left") if self.status == self.Status.RUNNING else None


class Hub(models.Model):
    """Where the models of one hub are asked for, in order; no row: what the environment and the
    hub's own address say.
    """

    name = models.CharField(max_length=20, unique=True)  # "hf" or "modelscope"
    endpoints = models.JSONField(default=list)

    class Meta:
        verbose_name = _("hub")
        verbose_name_plural = _("hubs")

    def __str__(self):
        return self.name


class ServingSwitch(TeamWide, models.Model):
    """A change of what the workers serve: who wanted it, how far it is, what became of it."""

    class Status(models.TextChoices):
        WAITING = "waiting", _("Waiting for the worker")
        DRAINING = "draining", _("Running answers end")
        LOADING = "loading", _("Loading")
        CHECKING = "checking", _("Trying it out")
        SUCCEEDED = "succeeded", _("Succeeded")
        FAILED = "failed", _("Failed")

    ACTIVE = (Status.WAITING, Status.DRAINING, Status.LOADING, Status.CHECKING)

    checkpoint = models.ForeignKey(
        Checkpoint, models.CASCADE, related_name="switches", verbose_name=_("checkpoint")
    )
    precision = models.CharField(_("precision"), max_length=8, blank=True, default="")
    # what was served before, and is again when this fails
    previous = models.ForeignKey(
        Checkpoint, models.SET_NULL, null=True, related_name="+", verbose_name=_("before")
    )
    previous_precision = models.CharField(max_length=8, blank=True, default="")
    # None: from the command line, or the worker noticed it
    requested_by = models.ForeignKey(
        User, models.SET_NULL, null=True, related_name="+", verbose_name=_("by")
    )
    status = models.CharField(
        _("status"), max_length=10, choices=Status.choices, default=Status.WAITING
    )
    worker = models.CharField(max_length=200, blank=True)  # host and process that took it
    sentence = models.TextField(blank=True)  # what it said when it was tried out
    seconds = models.FloatField(null=True)  # until it was ready
    error = models.JSONField(null=True)  # {"message", "type", "param", "code"}
    created_at = models.DateTimeField(_("created"), auto_now_add=True)
    finished_at = models.DateTimeField(null=True)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("change of the served model")
        verbose_name_plural = _("changes of the served model")
        ordering = ["-id"]

    def __str__(self):
        return f"{self.checkpoint} {self.status}"

    @property
    def is_active(self) -> bool:
        return self.status in self.ACTIVE

    @classmethod
    def record(cls, checkpoint, previous, previous_precision: str, user=None) -> None:
        """A change that a worker has to make; earlier ones that nobody has begun are void."""
        cls.objects.filter(status=cls.Status.WAITING).update(
            status=cls.Status.FAILED,
            error={"code": "superseded", "message": f"{checkpoint.name} was chosen instead"},
            finished_at=timezone.now(),
        )
        switch = cls.objects.create(
            checkpoint=checkpoint,
            precision=checkpoint.precision,
            previous=previous,
            previous_precision=previous_precision,
            requested_by=user,
        )
        logger.info(
            "switch %s: serve %s %s in place of %s, wanted by %s",
            switch.pk,
            checkpoint.name,
            checkpoint.precision,
            previous.name,
            user.username if user else "a command or another rule",
        )


class Conversation(Private, models.Model):
    owner = models.ForeignKey(User, models.CASCADE, related_name="conversations")
    title = models.CharField(_("title"), max_length=120, blank=True)
    # last chosen, offered next
    checkpoint = models.ForeignKey(Checkpoint, models.SET_NULL, null=True, blank=True)
    adapter = models.ForeignKey(Adapter, models.SET_NULL, null=True, blank=True)  # None: prefix off
    # the last message of the branch that is shown; None: the newest message (conversations/tree.py)
    leaf = models.ForeignKey(
        "Message", models.SET_NULL, null=True, blank=True, editable=False, related_name="+"
    )
    # what the model is told before the first turn; last chosen, offered next
    system = models.TextField(_("system prompt"), blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    # seen by nobody from then on; can be taken back until it is deleted for good
    deleted_at = models.DateTimeField(null=True, blank=True, editable=False)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("conversation")
        verbose_name_plural = _("conversations")
        ordering = ["-updated_at", "-id"]
        # the list beside every chat page: the newest of thousands, without sorting them
        indexes = [models.Index(fields=["owner", "-updated_at", "-id"], name="newest_of_owner")]

    def __str__(self):
        return self.title or f"#{self.pk}"

    @classmethod
    def visibility(cls, user) -> Q:
        return super().visibility(user) & Q(deleted_at=None)


class OfConversation:
    """Mixin: seen and changed by the owner of its conversation, while that is not deleted."""

    @classmethod
    def visibility(cls, user) -> Q:
        return Q(conversation__owner=user, conversation__deleted_at=None)

    ownership = visibility


class Message(OfConversation, models.Model):
    """One turn. An answer's row explains the answer: model, prefix, sampling, what was written, how
    and when it ended.
    """

    class Role(models.TextChoices):
        USER = "user", _("user")
        ASSISTANT = "assistant", _("assistant")

    class Status(models.TextChoices):
        QUEUED = "queued", _("Queued")
        STREAMING = "streaming", _("Writing")
        COMPLETE = "complete", _("Complete")
        STOPPED = "stopped", _("Stopped")
        INTERRUPTED = "interrupted", _("Interrupted")
        FAILED = "failed", _("Failed")

    IN_FLIGHT = (Status.QUEUED, Status.STREAMING)

    conversation = models.ForeignKey(Conversation, models.CASCADE, related_name="messages")
    # what it follows; None: the message written before it, or nothing (chat/conversations/tree.py)
    parent = models.ForeignKey(
        "self", models.CASCADE, null=True, blank=True, editable=False, related_name="children"
    )
    starts_anew = models.BooleanField(default=False, editable=False)
    # the answers to one question that were asked for together, to be compared
    comparison = models.ForeignKey(
        "Comparison", models.CASCADE, null=True, blank=True, editable=False, related_name="answers"
    )
    role = models.CharField(max_length=10, choices=Role.choices)
    content = models.TextField(blank=True)
    status = models.CharField(max_length=12, choices=Status.choices, default=Status.COMPLETE)
    checkpoint = models.ForeignKey(Checkpoint, models.SET_NULL, null=True, blank=True)
    adapter = models.ForeignKey(Adapter, models.SET_NULL, null=True, blank=True)
    # what the model was called then; outlives its row
    model_label = models.CharField(max_length=240, blank=True)
    sampling = models.JSONField(default=dict, blank=True)
    # an answer's prompt: the turns before its question too, or the question alone
    with_history = models.BooleanField(_("with the earlier turns"), default=True)
    system = models.TextField(_("system prompt"), blank=True)
    # characters of `content` that an earlier answer had, which this one goes on with
    begun = models.PositiveIntegerField(default=0, editable=False)
    # the engine's id of this generation
    sequence = models.UUIDField(default=uuid.uuid4, editable=False)
    # number of the last frame that `content` includes (chat/conversations/frames.py)
    seq = models.PositiveIntegerField(default=0)
    finish_reason = models.CharField(max_length=10, blank=True)
    # {"prompt_tokens", "completion_tokens", "total_tokens"}
    # whose daily tokens an answer counts towards; None: asked for on a page
    api_key = models.ForeignKey(
        "portal.ApiKey", models.SET_NULL, null=True, editable=False, related_name="+"
    )
    usage = models.JSONField(null=True, blank=True)
    # {"queued_s", "prefill_s", "decode_s", "tokens_per_second"}
    timings = models.JSONField(null=True, blank=True)
    error = models.JSONField(null=True, blank=True)  # {"message", "type", "param", "code"}
    # earlier turns that the prompt is without because they did not fit into the context
    left_out = models.PositiveIntegerField(default=0, editable=False)
    # what the reader thinks of an answer: 1 or -1
    thumb = models.SmallIntegerField(_("rating"), null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("message")
        verbose_name_plural = _("messages")
        ordering = ["id"]
        indexes = [
            models.Index(
                fields=["status"],
                condition=Q(status__in=["queued", "streaming"]),
                name="messages_in_flight",
            )
        ]

    def __str__(self):
        return f"{self.role} {self.pk}"

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the question to the answer's first token."""
        told = self.timings or {}
        if told.get("queued_s") is None or told.get("prefill_s") is None:
            return None
        return told["queued_s"] + told["prefill_s"]

    @property
    def is_in_flight(self) -> bool:
        return self.status in self.IN_FLIGHT

    @property
    def thoughts(self) -> str:
        """What a model thought before it answered; `content` is both, as they were written."""
        return apart(self.content)[0] if self.role == self.Role.ASSISTANT else ""

    @property
    def answer(self) -> str:
        return apart(self.content)[1] if self.role == self.Role.ASSISTANT else ""


class Comparison(OfConversation, models.Model):
    """Two to four models' answers to one question, and which of them the asker found better."""

    class Verdict(models.TextChoices):
        OPEN = "", _("not judged")
        BETTER = "better", _("one is better")
        SAME = "same", _("equally good")
        NONE = "none", _("none is good")

    conversation = models.ForeignKey(Conversation, models.CASCADE, related_name="comparisons")
    verdict = models.CharField(max_length=6, choices=Verdict.choices, blank=True)
    chosen = models.ForeignKey(Message, models.SET_NULL, null=True, blank=True, related_name="+")
    judged_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("comparison")
        verbose_name_plural = _("comparisons")
        ordering = ["-id"]

    def __str__(self):
        return f"#{self.pk}"


class ShareLink(OfConversation, models.Model):
    """An address under which the team's members read a conversation as it was when it was shared:
    the branch that ended with `leaf`.
    """

    conversation = models.ForeignKey(Conversation, models.CASCADE, related_name="share_links")
    leaf = models.ForeignKey(Message, models.CASCADE, related_name="+")
    token = models.CharField(max_length=43, unique=True, default=secrets.token_urlsafe)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    revoked_at = models.DateTimeField(null=True, blank=True)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("share link")
        verbose_name_plural = _("share links")
        ordering = ["-id"]

    def __str__(self):
        return f"#{self.pk}"

    @classmethod
    def open_ones(cls):
        return cls.objects.filter(
            revoked_at=None, expires_at__gt=timezone.now(), conversation__deleted_at=None
        )


from chat.batches.rows import ApiFile, BatchRun  # noqa: E402, F401  rows of this app
