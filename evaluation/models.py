"""EvaluationRun and its Predictions."""

from django.db import models
from django.utils.translation import gettext_lazy as _

from chat.models import Adapter, Checkpoint
from evaluation.metrics import METRICS
from portal.access import AccessQuerySet
from portal.models import Run, User
from tuning.models import DatasetVersion


class EvaluationRun(Run):
    """Predictions of one model (a checkpoint, with or without an adapter) on a dataset split,
    scored against the references.
    """

    class Decoding(models.TextChoices):
        GREEDY = "greedy", _("greedy")
        UPSTREAM = "upstream", _("upstream (sampled, as ChatGLM-6B's evaluate.sh)")

    class Review(models.TextChoices):
        NONE = "", _("not reviewed")
        APPROVED = "approved", _("approved")
        REJECTED = "rejected", _("rejected")

    dataset_version = models.ForeignKey(
        DatasetVersion, models.PROTECT, related_name="evaluation_runs"
    )
    split = models.CharField(_("split"), max_length=20)
    checkpoint = models.ForeignKey(
        Checkpoint, models.PROTECT, related_name="evaluation_runs", verbose_name=_("checkpoint")
    )
    adapter = models.ForeignKey(
        Adapter,
        models.SET_NULL,
        null=True,
        blank=True,
        related_name="evaluation_runs",
        verbose_name=_("adapter"),
    )
    decoding = models.CharField(
        _("decoding"), max_length=10, choices=Decoding.choices, default=Decoding.GREEDY
    )
    max_examples = models.PositiveIntegerField(null=True, blank=True)
    # {"rouge-1": {"value", "low", "high"}, ...}; low and high bound the 95 % interval, null for one
    # row (evaluation/intervals.py)
    scores = models.JSONField(null=True, editable=False)
    # rows that the model refused or broke on; they count as empty predictions
    failed_rows = models.PositiveIntegerField(
        _("rows without an answer"), default=0, editable=False
    )
    # the run of the same checkpoint without adapter on the same rows with the same decoding: shown
    # beside this one
    baseline = models.ForeignKey(
        "self",
        models.SET_NULL,
        null=True,
        blank=True,
        editable=False,
        related_name="compared",
        verbose_name=_("evaluation of the base"),
    )
    # this run's scores minus the baseline's, paired by row, in the form of `scores`, with "p"; null
    # until both have ended
    difference = models.JSONField(null=True, editable=False)
    # what the prefix cost of general ability (evaluation/forgetting.py); {} without an adapter,
    # null until it has been asked
    general = models.JSONField(null=True, editable=False)

    review = models.CharField(
        _("review"), max_length=10, choices=Review.choices, blank=True, editable=False
    )
    review_note = models.TextField(_("note"), blank=True, editable=False)
    reviewed_by = models.ForeignKey(
        User,
        models.SET_NULL,
        null=True,
        blank=True,
        editable=False,
        related_name="+",
        verbose_name=_("reviewed by"),
    )
    reviewed_at = models.DateTimeField(_("reviewed"), null=True, blank=True, editable=False)

    objects = AccessQuerySet.as_manager()

    class Meta:
        verbose_name = _("evaluation")
        verbose_name_plural = _("evaluations")
        ordering = ["-id"]

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name when the run was made, None for the bare checkpoint; outlives the
        adapter.
        """
        return self.recipe.get("adapter", {}).get("name")


class Prediction(models.Model):
    """One row: prediction against reference."""

    run = models.ForeignKey(EvaluationRun, models.CASCADE, related_name="predictions")
    row = models.PositiveIntegerField()  # 0-based index in the split
    prompt = models.TextField()
    reference = models.TextField()
    text = models.TextField(blank=True)
    scores = models.JSONField()  # {"rouge-1": 31.2, ...}
    # {"sacrebleu": [...], ...}: figures of the metrics that are combined over all rows
    counts = models.JSONField(default=dict)
    # somebody wants it looked at again
    flagged = models.BooleanField(_("noted for review"), default=False)

    class Meta:
        ordering = ["row"]
        constraints = [
            models.UniqueConstraint(fields=["run", "row"], name="one_prediction_per_row")
        ]

    def __str__(self):
        return f"row {self.row}"

    @property
    def score_list(self) -> list[float]:
        """In the order of METRICS; JSON columns keep no order."""
        return [self.scores.get(metric) for metric in METRICS]


class BlindVote(models.Model):
    """Which of two evaluations' answers to one row somebody prefers, who did not see whose they
    are. `judge`: the name of the model that was asked in place of a person.
    """

    class Choice(models.TextChoices):
        RUN = "run", _("this one")
        OTHER = "other", _("the other")
        TIE = "tie", _("equal")

    run = models.ForeignKey(EvaluationRun, models.CASCADE, related_name="votes")
    other = models.ForeignKey(EvaluationRun, models.CASCADE, related_name="votes_against")
    row = models.PositiveIntegerField()
    by = models.ForeignKey(User, models.CASCADE, related_name="+", verbose_name=_("by"))
    judge = models.CharField(max_length=120, blank=True)
    choice = models.CharField(max_length=5, choices=Choice.choices)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        verbose_name = _("blind vote")
        verbose_name_plural = _("blind votes")
        ordering = ["id"]
        constraints = [
            models.UniqueConstraint(
                fields=["run", "other", "row", "by", "judge"], name="one_vote_per_person_and_row"
            )
        ]

    def __str__(self):
        return f"{self.run_id}:{self.other_id} row {self.row}"
