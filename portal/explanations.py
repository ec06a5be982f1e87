"""What people are told when a run or an answer fails, by the error's code.

The pure cores and the worker speak English and give every fault a code; its text in the reader's
language is here, and the original message stays beside it, with the figures.
"""

from django.utils.translation import gettext_lazy as _

EXPLANATIONS = {
    # an answer (chat/engine/request.py, chat/worker/router.py)
    "worker_unavailable": _(
        "The model does not answer at the moment. It is started again by itself: try again soon."
    ),
    "worker_loading": _("The model is still loading: try again in a moment."),
    "no_worker_for_checkpoint": _(
        "Nothing serves this base at the moment. Choose another, or ask an administrator."
    ),
    "queue_full": _("Too many answers are waiting. Try again in a moment."),
    "context_length_exceeded": _(
        "This does not fit into the model's context. Begin a new conversation, shorten the "
        "message or lower the longest answer."
    ),
    "invalid_adapter": _("This tuned model does not fit the base."),
    # a tuning run (tuning/train.py, tuning/ptuning/trainer.py)
    "loss_not_finite": _(
        "The loss is no longer a number. Lower the learning rate and start a new run."
    ),
    "no_examples": _("No row has both a prompt and a response."),
    "does_not_fit": _(
        "Prefix, prompt and response do not fit into the model's context. Lower their limits."
    ),
    "out_of_memory": _(
        "There is too little free memory. Lower the batch size or the length limits."
    ),
    "file_missing": _("A file that the run needs is gone."),
    # an evaluation (evaluation/evaluate.py)
    "adapter_deleted": _("The tuned model has been deleted."),
    "dataset_missing": _("The dataset's files are gone."),
    "all_rows_failed": _("The model gave no answer to any row; the log names the reasons."),
    # both
    "checkpoint_invalid": _("The base cannot be loaded."),
    "checkpoint_changed": _("The base's files are not those that the run was made for."),
    "process_lost": _("The process ended in every attempt. The log says more."),
    "unexpected": _("Something unexpected went wrong. The log says more."),
}
