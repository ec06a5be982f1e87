"""Why a run failed that loads a base and reads a dataset: a tuning run's codes, most of which an
evaluation shares.
"""

from django.utils.translation import gettext_lazy as _

EXPLANATIONS = {
    "loss_not_finite": _(
        "The loss is no longer a number. Lower the learning rate and start a new run."
    ),
    "no_examples": _("No row has both a prompt and a response."),
    "rows_too_long": _(
        "Some rows are longer than the lengths of the recipe, which says not to start then. Raise "
        "the lengths, or let such rows be cut off or left out."
    ),
    "does_not_fit": _(
        "Prefix, prompt and response do not fit into the model's context. Lower their limits."
    ),
    "out_of_memory": _(
        "There is too little free memory. Lower the batch size or the length limits."
    ),
    "not_proven": _(
        "What would be served answers otherwise than what was trained, so it is not offered. Tell "
        "whoever looks after the portal."
    ),
    "lora_targets_unknown": _(
        "The base has none of the modules that LoRA is to change. Leave the list empty for those "
        "of its family."
    ),
    "too_few_devices": _("This machine has fewer devices than the run wants."),
    "file_missing": _("A file that the run needs is gone."),
    "checkpoint_invalid": _("The base cannot be loaded."),
    "checkpoint_changed": _("The base's files are not those that the run was made for."),
}

# what is wrong with a hyper-parameter (Problem in tuning/ptuning/recipe.py)
UNUSABLE_RECIPE = {
    "not_a_number": _("A number is needed here."),
    "out_of_range": _("Must lie between %(low)s and %(high)s."),
    "not_a_choice": _("Must be one of: %(choices)s."),
    "too_many_samples": _("Batch size times accumulation may be at most %(most)s."),
    "warmup_too_long": _("There must be fewer warm-up steps than steps."),
    "no_init_text": _("Describe the task in a sentence or two."),
    "init_text_too_long": _(
        "The task's text takes %(tokens)s tokens with the model's template; the prefix has "
        "%(room)s. Shorten it, or lengthen the prefix."
    ),
    "no_init_adapter": _("Choose a tuned model of the same base to go on from."),
    "text_too_long": _("At most %(most)s characters."),
    "init_with_projection": _("A prefix behind a projection can only begin at random."),
    "no_general_prompts": _("Holding forgetting needs a share of general prompts."),
    "no_beside_share": _("Standing beside other tuned models needs a share of the steps."),
    "beside_on_several": _("Beside other tuned models a prefix is trained on one device."),
    "no_eval_steps": _("Stopping early needs a validation interval."),
    "not_with_method": _("Only for P-tuning v2; the method is “%(method)s”."),
    "too_many_devices": _("A step has only %(most)s examples to share out."),
    "float16_on_several": _("On several devices full fine-tuning needs bf16 or fp32."),
}
