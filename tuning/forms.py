"""Forms of datasets and tuning runs. What is allowed is said by tuning/plan.py and
tuning/datasets/store.py; forms only read the types, so that pages and REST refuse the same things
with the same words.
"""

import json

from django import forms
from django.utils.translation import gettext_lazy as _

from chat.models import Adapter, Checkpoint
from portal.forms import Styled
from tuning.models import Dataset
from tuning.ptuning.recipe import BOOLEANS, TEXTS
from tuning.sweeps import parsed


class ReadableEncoder(json.JSONEncoder):
    """Chinese as it is."""

    def __init__(self, **options):
        super().__init__(**{**options, "ensure_ascii": False})


# field of the recipe -> its name for people
LABELS = {
    "method": _("Method"),
    "pre_seq_len": _("Prefix length"),
    "learning_rate": _("Learning rate"),
    "max_steps": _("Steps"),
    "max_source_length": _("Longest prompt"),
    "max_target_length": _("Longest response"),
    "overlong": _("Longer rows"),
    "save_steps": _("Save interval in steps"),
    "per_device_train_batch_size": _("Batch size"),
    "gradient_accumulation_steps": _("Gradient accumulation"),
    "lr_scheduler_type": _("Learning rate schedule"),
    "warmup_steps": _("Warm-up steps"),
    "weight_decay": _("Weight decay"),
    "max_grad_norm": _("Gradient clipping"),
    "prefix_dropout": _("Prefix dropout"),
    "logging_steps": _("Log interval in steps"),
    "seed": _("Seed"),
    "precision": _("Precision of the base"),
    "quantization_bit": _("Quantise the base"),
    "prefix_projection": _("Project the prefix through a layer"),
    "init": _("The prefix begins"),
    "init_text": _("The task in a sentence or two"),
    "init_adapter": _("The tuned model to go on from"),
    "freeze_first": _("Keep its first position as it begins"),
    "kl_weight": _("Hold to the base's own answers"),
    "kl_share": _("Share of general prompts"),
    "eval_steps": _("Validation interval in steps"),
    "early_stopping": _("Validations to wait for a better one"),
    "lora_r": _("LoRA rank"),
    "lora_alpha": _("LoRA alpha"),
    "lora_dropout": _("LoRA dropout"),
    "lora_targets": _("LoRA modules"),
    "devices": _("Devices"),
    "beside": _("To be served together with"),
    "beside_share": _("Share of steps behind it"),
}
# what one method alone has: its card is shown with it
OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets")
# how a prefix begins and what it must not forget: a card of its own
START = ("init", "kl_weight", "kl_share", "init_text", "init_adapter", "beside", "beside_share")
MAIN = (
    "method",
    "pre_seq_len",
    "learning_rate",
    "max_steps",
    "max_source_length",
    "max_target_length",
    "overlong",
    "save_steps",
)


class TuningRunForm(Styled, forms.Form):
    preset = forms.CharField(widget=forms.HiddenInput, required=False)
    name = forms.CharField(
        label=_("Name"),
        max_length=120,
        required=False,
        help_text=_("The tuned model appears under this name in chat."),
    )
    dataset = forms.ModelChoiceField(Dataset.objects.none(), label=_("Dataset"), empty_label=None)
    checkpoint = forms.ModelChoiceField(
        Checkpoint.objects.none(), label=_("Base"), empty_label=None
    )

    method = forms.ChoiceField(
        choices=[
            ("ptuning_v2", "P-tuning v2"),
            ("lora", "LoRA"),
            ("full", _("Full fine-tuning")),
        ]
    )
    sweep = forms.CharField(
        label=_("Variants, one a line"),
        required=False,
        widget=forms.Textarea(
            attrs={
                "rows": 4,
                "class": "input num",
                "placeholder": "seed=1\nseed=2\nseed=1 learning_rate=1e-2",
                "spellcheck": "false",
            }
        ),
    )

    pre_seq_len = forms.IntegerField()
    learning_rate = forms.FloatField()
    max_steps = forms.IntegerField()
    max_source_length = forms.IntegerField()
    max_target_length = forms.IntegerField()
    overlong = forms.ChoiceField(
        choices=[
            ("truncate", _("cut them off")),
            ("drop", _("leave them out")),
            ("refuse", _("do not start")),
        ]
    )
    save_steps = forms.IntegerField()
    per_device_train_batch_size = forms.IntegerField()
    gradient_accumulation_steps = forms.IntegerField()
    lr_scheduler_type = forms.ChoiceField(
        choices=[("linear", _("linear")), ("cosine", _("cosine")), ("constant", _("constant"))]
    )
    warmup_steps = forms.IntegerField()
    weight_decay = forms.FloatField()
    max_grad_norm = forms.FloatField()
    prefix_dropout = forms.FloatField()
    logging_steps = forms.IntegerField()
    seed = forms.IntegerField()
    precision = forms.ChoiceField(
        choices=[
            ("auto", _("automatic")),
            ("float32", "fp32"),
            ("bfloat16", "bf16"),
            ("float16", "fp16"),
        ]
    )
    quantization_bit = forms.TypedChoiceField(
        choices=[("", _("no")), ("8", "INT8"), ("4", "INT4")],
        coerce=int,
        empty_value=None,
        required=False,
    )
    prefix_projection = forms.BooleanField(required=False)
    init = forms.ChoiceField(
        choices=[
            ("prompt", _("as a text: the task and examples")),
            ("zero", _("at zero")),
            ("random", _("at random, as the original")),
            ("adapter", _("as a tuned model, learning on")),
        ]
    )
    init_text = forms.CharField(
        required=False,
        strip=True,
        widget=forms.Textarea(attrs={"rows": 2}),
        help_text=_("Empty: from the dataset's columns. Examples of the task follow it."),
    )
    init_adapter = forms.ChoiceField(required=False)
    freeze_first = forms.BooleanField(required=False)
    kl_weight = forms.FloatField()
    kl_share = forms.FloatField()
    eval_steps = forms.IntegerField()
    early_stopping = forms.IntegerField()
    lora_r = forms.IntegerField()
    lora_alpha = forms.IntegerField()
    lora_dropout = forms.FloatField()
    lora_targets = forms.CharField(required=False)
    devices = forms.IntegerField()
    beside = forms.ChoiceField(required=False)
    beside_share = forms.FloatField(initial=0.5)

    def __init__(self, *args, user, **kwargs):
        super().__init__(*args, **kwargs)
        adapters = [("", _("none"))] + [
            (adapter.sha256, f"{adapter.checkpoint.name}:{adapter.name}")
            for adapter in Adapter.objects.visible_to(user).select_related("checkpoint")
        ]
        if not user.is_staff:  # the others make a model for everybody
            self.fields["method"].choices = self.fields["method"].choices[:1]
        for name in ("init_adapter", "beside"):
            self.fields[name].choices = adapters
        self.fields["dataset"].queryset = Dataset.objects.visible_to(user)
        self.fields["checkpoint"].queryset = Checkpoint.objects.visible_to(user)
        for name, label in LABELS.items():
            field = self.fields[name]
            field.label = label
            if isinstance(field, (forms.IntegerField, forms.FloatField)):
                # A plain text field: a number field would hide "2e-2" and refuse silently.
                field.widget = forms.TextInput(
                    attrs={"class": "input num", "inputmode": "decimal", "data-recipe": ""}
                )
            else:
                field.widget.attrs["data-recipe"] = "text" if name in TEXTS else ""

    def clean_sweep(self) -> list | None:
        return parsed(self.cleaned_data["sweep"]) or None

    def hyper(self) -> dict:
        """The recipe's fields, typed."""
        return {name: self.cleaned_data[name] for name in LABELS}

    def main_fields(self):
        return [self[name] for name in MAIN]

    def start_fields(self):
        return [self[name] for name in START]

    def lora_fields(self):
        return [self[name] for name in OF_LORA]

    def advanced_fields(self):
        apart = {*MAIN, *START, *OF_LORA, *BOOLEANS}
        return [self[name] for name in LABELS if name not in apart]

    def switches(self):
        return [self[name] for name in LABELS if name in BOOLEANS]


class UploadForm(Styled, forms.Form):
    file = forms.FileField(label=_("File"))
    validation = forms.FileField(
        label=_("Validation file"),
        required=False,
        help_text=_("Only if these rows lie in a file of their own."),
    )
    name = forms.CharField(
        label=_("Name"), max_length=120, required=False, help_text=_("Empty: the name of the file.")
    )
    prompt_column = forms.CharField(
        label=_("Prompt column"),
        max_length=100,
        required=False,
        help_text=_("Empty: recognised from the first row."),
    )
    response_column = forms.CharField(label=_("Response column"), max_length=100, required=False)
    history_column = forms.CharField(
        label=_("History column"),
        max_length=100,
        required=False,
        help_text=_("Only for conversations of several turns."),
    )
    sheet = forms.CharField(
        label=_("Sheet"), max_length=100, required=False, help_text=_("Empty: the first sheet.")
    )
    skip_bad_rows = forms.BooleanField(label=_("Leave out rows with errors"), required=False)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("prompt_column", "response_column", "history_column"):
            self.fields[name].widget.attrs["list"] = "column-names"
        for name in ("file", "validation"):
            self.fields[name].widget.attrs["accept"] = (
                ".json,.jsonl,.ndjson,.csv,.tsv,.txt,.xlsx,.gz,.zip,.tgz"
            )


class HistoryField(forms.JSONField):
    """Earlier turns as JSON text; none is empty."""

    def prepare_value(self, value):
        return super().prepare_value(value) if value else ""


class RowForm(Styled, forms.Form):
    version = forms.IntegerField(widget=forms.HiddenInput)  # that was looked at
    prompt = forms.CharField(
        label=_("Prompt"), strip=False, widget=forms.Textarea(attrs={"rows": 5})
    )
    response = forms.CharField(
        label=_("Response"), strip=False, widget=forms.Textarea(attrs={"rows": 7})
    )
    history = HistoryField(
        label=_("Earlier turns"),
        required=False,
        encoder=ReadableEncoder,
        widget=forms.Textarea(attrs={"rows": 2}),
        help_text=_('Only for conversations: [["question", "answer"], …].'),
    )


class SplitForm(Styled, forms.Form):
    validation = forms.IntegerField(label=_("Rows for validation"), min_value=1)
    seed = forms.IntegerField(label=_("Seed"), min_value=0, initial=42)


class NameForm(Styled, forms.ModelForm):
    class Meta:
        model = Dataset
        fields = ["name"]


def as_shown(name: str, value):
    """A value of the recipe as the form shows it: the name of a choice, else the value itself."""
    choices = dict(getattr(TuningRunForm.base_fields[name], "choices", ()))
    return choices.get("" if value is None else str(value), value)
