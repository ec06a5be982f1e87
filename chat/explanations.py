"""Why an answer failed (chat/engine/request.py, chat/worker/client.py), for people."""

from django.utils.translation import gettext_lazy as _

EXPLANATIONS = {
    "worker_unavailable": _(
        "The model does not answer at the moment. It is started again by itself: try again soon."
    ),
    "chat_paused": _(
        "Chat is paused: a run needs the memory. It comes back by itself when the run has ended."
    ),
    "worker_loading": _("The model is still loading: try again in a moment."),
    "loading_failed": _("The model could not be loaded. What was served before is served again."),
    "memory_too_small": _("The model needs more memory than is free at the moment."),
    "try_out_failed": _("The model was loaded, but could not write a sentence: it is damaged."),
    "checkpoint_changed": _(
        "The model's files have changed since it was added. Add the folder again."
    ),
    "worker_died": _("The model's process ended while it was loading: perhaps for want of memory."),
    "superseded": _("Another model was chosen before this one was loaded."),
    "no_worker_for_checkpoint": _(
        "Nothing serves this base at the moment. Choose another, or ask an administrator."
    ),
    "queue_full": _("Too many answers are waiting. Try again in a moment."),
    "context_length_exceeded": _(
        "This does not fit into the model's context. Begin a new conversation, shorten the "
        "message or lower the longest answer."
    ),
    "template_refused": _(
        "The model's chat form does not take this conversation. Begin a new one, or choose another "
        "model."
    ),
    "invalid_adapter": _("This tuned model does not fit the base."),
}

# why a folder is no checkpoint (CheckpointInvalid in chat/checkpoints/describe.py)
UNUSABLE_CHECKPOINT = {
    "not_a_folder": _("%(folder)s is not a folder."),
    "config_missing": _("%(folder)s has no config.json: it is not a Hugging Face model folder."),
    "config_invalid": _("config.json cannot be used: %(reason)s"),
    "unknown_model_type": _(
        "“%(model_type)s” is not a text generation architecture that the portal knows."
    ),
    "remote_code_only": _(
        "“%(model_type)s” needs code from the model's folder to run; the portal never runs "
        "such code. A version of the model in the format of Llama or Qwen can be added."
    ),
    "unsupported_attention": _(
        "“%(model_type)s” has layers that take no prefix (%(layers)s), so it cannot be tuned here. "
        "To chat with it, serve it with vLLM: manage.py vllm_command prints the command."
    ),
    "weights_missing": _("%(folder)s lacks weight files."),
    "weights_invalid": _(
        "%(file)s is not a readable weight file; if it is a Git LFS pointer, run git lfs pull."
    ),
    "tokenizer_missing": _("%(folder)s has no tokenizer."),
    "unsafe_file": _("%(file)s is no plain file of this folder, or far too large: it is not read."),
}
