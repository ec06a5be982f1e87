"""Dataset and DatasetVersion (metadata; the rows are files), CollectedExample, TuningRun and
TuningMetric.
"""

from pathlib import Path

from django.db import models
from django.utils.translation import gettext_lazy as _

from chat.models import Adapter, Checkpoint, Message
from portal.access import AccessQuerySet, Shared
from portal.models import Run, User
from tuning.saved_steps import saved_steps


class Dataset(Shared, models.Model):
    """A named collection of examples; its versions never change once written. No owner: the sample
    that comes with the portal.
    """

    owner = models.ForeignKey(
        User,
        models.CASCADE,
        null=True,
        blank=True,
        related_name="datasets",
        verbose_name=_("owner"),
    )
    name = models.CharField(_("name"), max_length=120)
    prompt_column = models.CharField(_("prompt column"), max_length=100)
    response_column = models.CharField(_("response column"), max_length=100)
    history_column = models.CharField(_("history column"), max_length=100, blank=True)
    # one entry a kind of problem (tuning/datasets/findings.py), worded
    problems = models.JSONField(_("problems"), default=list, blank=True)
    created_at = models.DateTimeField(_("created"), auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    # the owner's place for good answers from chat (tuning/datasets/collecting.py)
    collects = models.BooleanField(default=False, editable=False)
    # deleted while ended runs name it: out of everybody's sight, its rows stay for those runs
    # (tuning/datasets/store.py, delete)
    deleted_at = models.DateTimeField(_("deleted"), null=True, blank=True, editable=False)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("dataset")
        verbose_name_plural = _("datasets")
        ordering = ["-id"]

    def __str__(self):
        return self.name

    @classmethod
    def visibility(cls, user) -> models.Q:
        return super().visibility(user) & models.Q(deleted_at=None)

    @property
    def current(self):
        """The newest version, or None while there is none."""
        return self.versions.order_by("-number").first()

    @property
    def problem_count(self) -> int:
        """All problems that the upload had, each row counted; `problems` keeps the kinds.

        The uploaded version knows it, versions drawn from that one do not. Asks for all versions,
        so that lists can prefetch them.
        """
        counts = (
            version.splits.get("train", {}).get("problems") for version in self.versions.all()
        )
        return next(
            (count for count in counts if count is not None),
            sum(kind["count"] for kind in self.problems),
        )


class DatasetVersion(models.Model):
    """Immutable, content-addressed: `splits` says which file holds which rows;
    tuning/datasets/store.py reads and writes the files.

    splits: {"train": {"sha256", "rows", "bytes", ...}, "validation": {...}}
    """

    dataset = models.ForeignKey(Dataset, models.CASCADE, related_name="versions")
    number = models.PositiveIntegerField(_("version"))
    # over the splits, so that a run can name exactly what it read
    sha256 = models.CharField(_("fingerprint"), max_length=64)
    splits = models.JSONField()
    # the uploaded file's name, for people
    source_name = models.CharField(_("file"), max_length=255, blank=True)
    encoding = models.CharField(_("encoding"), max_length=20, blank=True)
    # what made it of the version before: {"action": split, edit, collect or merge, ...} with
    # numbers of rows (tuning/datasets/editing.py); {}: an upload
    change = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(_("created"), auto_now_add=True)

    class Meta:
        verbose_name = _("dataset version")
        verbose_name_plural = _("dataset versions")
        ordering = ["-number"]
        constraints = [
            models.UniqueConstraint(fields=["dataset", "number"], name="one_number_per_dataset")
        ]

    def __str__(self):
        return f"{self.dataset} v{self.number}"

    @property
    def rows(self) -> int:
        return sum(split["rows"] for split in self.splits.values())

    def split_for_evaluation(self) -> str:
        """The validation split when there is one, else the training rows."""
        return "validation" if "validation" in self.splits else "train"


class CollectedExample(models.Model):
    """A row that somebody proposes for a dataset: a good answer from chat, corrected or not. It
    waits until one who may change the dataset takes it, into a new version, or leaves it.
    """

    class Status(models.TextChoices):
        WAITING = "waiting", _("Waiting")
        TAKEN = "taken", _("Taken")
        LEFT = "left", _("Left out")

    dataset = models.ForeignKey(Dataset, models.CASCADE, related_name="collected")
    by = models.ForeignKey(User, models.CASCADE, related_name="+", verbose_name=_("by"))
    prompt = models.TextField(_("prompt"))
    response = models.TextField(_("response"))
    history = models.JSONField(_("history"), default=list, blank=True)  # [[question, answer], ...]
    # what the model had said, where `response` corrects it
    original = models.TextField(blank=True)
    # where it is from; outlived by the row
    message = models.ForeignKey(
        Message, models.SET_NULL, null=True, editable=False, related_name="collected"
    )
    model_label = models.CharField(_("model"), max_length=240, blank=True)
    status = models.CharField(
        _("status"), max_length=10, choices=Status.choices, default=Status.WAITING
    )
    # which has it as a row
    version = models.ForeignKey(
        DatasetVersion, models.SET_NULL, null=True, editable=False, related_name="+"
    )
    decided_by = models.ForeignKey(
        User, models.SET_NULL, null=True, editable=False, related_name="+"
    )
    created_at = models.DateTimeField(_("created"), auto_now_add=True)
    decided_at = models.DateTimeField(null=True, editable=False)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("collected example")
        verbose_name_plural = _("collected examples")
        ordering = ["-id"]
        constraints = [
            models.UniqueConstraint(fields=["dataset", "message"], name="one_example_per_message")
        ]

    def __str__(self):
        return f"{self.dataset} +{self.pk}"

    @classmethod
    def visibility(cls, user) -> models.Q:
        """Seen by who proposed it and by who decides."""
        here = models.Q(dataset__deleted_at=None)
        if user.is_staff:
            return here
        return here & (models.Q(by=user) | models.Q(dataset__owner=user))

    @classmethod
    def ownership(cls, user) -> models.Q:
        return models.Q(by=user)


class TuningRun(Run):
    """A tuning run. Method and hyper-parameters are in `recipe`, frozen (tuning/plan.py)."""

    dataset_version = models.ForeignKey(DatasetVersion, models.PROTECT, related_name="tuning_runs")
    checkpoint = models.ForeignKey(
        Checkpoint, models.PROTECT, related_name="tuning_runs", verbose_name=_("checkpoint")
    )
    loss = models.FloatField(null=True, editable=False)  # mean over the last logging interval
    validation_loss = models.FloatField(null=True, editable=False)  # the last one measured
    samples_per_second = models.FloatField(_("examples per second"), null=True, editable=False)
    trainable_parameters = models.BigIntegerField(
        _("trainable parameters"), null=True, editable=False
    )
    # the step that was published as the run's own; others may be published beside it
    result_step = models.PositiveIntegerField(null=True, editable=False)
    # whether the served prefix answers as the trained one (tuning.ptuning.proof.Proof.as_dict)
    proof = models.JSONField(null=True, editable=False)

    # of a sweep, when it has ended: for each variant {"changes", "step", "loss",
    # "validation_loss", "adapter" (id or None), "best", "error" ({"code", "message"} or None)}
    variants = models.JSONField(default=list, editable=False)
    peak_memory = models.BigIntegerField(null=True, editable=False)  # bytes, of the run's process

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("tuning run")
        verbose_name_plural = _("tuning runs")
        ordering = ["-id"]

    @property
    def eta_seconds(self) -> float | None:
        if self.status != self.Status.RUNNING or not self.samples_per_second or not self.total:
            return None
        per_step = (
            self.recipe["per_device_train_batch_size"] * self.recipe["gradient_accumulation_steps"]
        )
        return (self.total - self.progress) * per_step / self.samples_per_second

    @property
    def steps_folder(self) -> Path:
        """Adapters of the steps that were saved on the way, `step-N` each."""
        return self.folder / "steps"

    def saved_steps(self) -> list[int]:
        """Steps whose prefix can be published, newest first."""
        return saved_steps(self.steps_folder)

    def result(self) -> Adapter | None:
        """What the run has made, of its adapters (prefetched in lists)."""
        made = sorted(self.adapters.all(), key=lambda adapter: adapter.pk)
        own = [adapter for adapter in made if adapter.step == self.result_step]
        return next(iter(own or made[-1:]), None)

    @property
    def made_checkpoint(self) -> Checkpoint | None:
        """What the run has made where weights were trained (prefetched in lists)."""
        return next(iter(self.made_checkpoints.all()), None)


class CheckRun(Run):
    """What a checkpoint makes of a dataset version, counted before a run is paid for
    (tuning/datasets/checks.py).
    """

    dataset_version = models.ForeignKey(DatasetVersion, models.CASCADE, related_name="check_runs")
    checkpoint = models.ForeignKey(
        Checkpoint, models.CASCADE, related_name="check_runs", verbose_name=_("checkpoint")
    )
    # {"rows", "near_duplicates": {"count", "pairs"}, "prompt" and "response": {"lengths":
    # [[tokens, rows], ...], "longest": [[line, tokens], ...]}}
    report = models.JSONField(default=dict, editable=False)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("check of a dataset")
        verbose_name_plural = _("checks of datasets")
        ordering = ["-id"]


class TuningMetric(models.Model):
    """One logged step of a tuning run."""

    run = models.ForeignKey(TuningRun, models.CASCADE, related_name="metrics")
    step = models.PositiveIntegerField()
    variant = models.PositiveSmallIntegerField(default=0)  # of a sweep, from 0
    loss = models.FloatField()
    learning_rate = models.FloatField()
    samples_per_second = models.FloatField(null=True)
    # KL(base || prefixed) on general prompts, where the recipe has a kl_weight
    divergence = models.FloatField(null=True)
    validation_loss = models.FloatField(null=True)  # on rows that are not learnt from
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["step", "variant"]
        constraints = [
            models.UniqueConstraint(fields=["run", "step", "variant"], name="one_metric_per_step")
        ]

    def __str__(self):
        return f"step {self.step}"
