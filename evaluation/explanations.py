"""Why an evaluation failed (evaluation/work.py), beside what tuning/explanations.py says."""

from django.utils.translation import gettext_lazy as _

EXPLANATIONS = {
    "adapter_deleted": _("The tuned model has been deleted."),
    "dataset_missing": _("The dataset's files are gone."),
    "all_rows_failed": _("The model gave no answer to any row; the log names the reasons."),
}
