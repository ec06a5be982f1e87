"""Why an answer failed (chat/engine/request.py, chat/worker/client.py), for people."""

from django.utils.translation import gettext_lazy as _

EXPLANATIONS = {
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
}
