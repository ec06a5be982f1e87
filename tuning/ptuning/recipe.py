"""The hyper-parameters of a run: names as the original's ptuning/arguments.py has them. No torch
here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from chat.engine.request import LONGEST_PREFIX

METHOD = "ptuning_v2"  # what runs and adapters say they were made by
FULL, LORA = "full", "lora"
METHODS = (METHOD, FULL, LORA)
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
INITS = ("random", "zero", "prompt", "adapter")
OVERLONG = ("truncate", "drop", "refuse")

# field -> (smallest, largest) value that is accepted
LIMITS: dict[str, tuple[float, float]] = {
    "pre_seq_len": (1, LONGEST_PREFIX),
    "learning_rate": (1e-7, 1.0),
    "max_steps": (1, 1_000_000),
    "per_device_train_batch_size": (1, 1024),
    "gradient_accumulation_steps": (1, 1024),
    "max_source_length": (4, 32768),
    "max_target_length": (4, 32768),
    "seed": (0, 2**31 - 1),
    "warmup_steps": (0, 1_000_000),
    "weight_decay": (0.0, 1.0),
    "logging_steps": (1, 10_000),
    "save_steps": (1, 1_000_000),
    "max_grad_norm": (0.0, 1000.0),
    "prefix_dropout": (0.0, 0.9),
    "kl_weight": (0.0, 100.0),
    "kl_share": (0.0, 1.0),
    "eval_steps": (0, 1_000_000),
    "early_stopping": (0, 1000),
    "lora_r": (1, 1024),
    "lora_alpha": (1, 8192),
    "lora_dropout": (0.0, 0.9),
    "devices": (1, 64),
    "beside_share": (0.0, 1.0),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "method": METHODS,
    "lr_scheduler_type": SCHEDULES,
    "precision": PRECISIONS,
    "quantization_bit": (None, 4, 8),
    "prefix_projection": (False, True),
    "init": INITS,
    "overlong": OVERLONG,
    "freeze_first": (False, True),
}
# field -> most characters
TEXTS = {"init_text": 4000, "init_adapter": 120, "lora_targets": 400, "beside": 1000}
BOOLEANS = frozenset(name for name, choices in CHOICES.items() if choices == (False, True))
MAX_SAMPLES_PER_STEP = 4096
# what a prefix alone has: the value that says nothing of it
_OF_A_PREFIX: dict[str, Any] = {
    "init": "random",
    "freeze_first": False,
    "prefix_projection": False,
    "prefix_dropout": 0.0,
    "quantization_bit": None,
    "beside": "",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe. `code`: not_a_number | out_of_range | not_a_choice |
    too_many_samples | warmup_too_long | no_init_text | no_init_adapter | text_too_long |
    init_with_projection | no_general_prompts | no_eval_steps | no_beside_share |
    not_with_method | float16_on_several | too_many_devices | beside_on_several.
    """

    field: str
    code: str
    message: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, besides base weights and examples; the defaults
    are the original's train.sh.

    One step reads per_device_train_batch_size * gradient_accumulation_steps examples. Its loss is
    the original's: the mean over tokens inside each batch of per_device_train_batch_size examples,
    then the mean over the accumulated batches.
    """

    # ptuning_v2: a prefix learns. full: all weights. lora: low-rank changes of weights (peft) that
    # are merged at the end. The last two end as a checkpoint of their own (tuning/weights/), and
    # what is said of prefixes below does not concern them.
    method: str = METHOD
    pre_seq_len: int = 128
    prefix_projection: bool = False
    learning_rate: float = 2e-2
    max_steps: int = 3000
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 16
    max_source_length: int = 64
    max_target_length: int = 64
    quantization_bit: int | None = None
    seed: int = 42
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    logging_steps: int = 10
    save_steps: int = 1000
    max_grad_norm: float = 1.0  # 0: no clipping
    prefix_dropout: float = 0.0  # upstream: 0.1
    precision: str = "auto"  # of the frozen base; the prefix itself is always float32
    # How the prefix begins (tuning/ptuning/initial.py): drawn from N(0, 1) as the original, at
    # zero, as the keys and values of `init_text` and some examples behind it, or as another
    # adapter of the same base, whose sha256 `init_adapter` is.
    init: str = "random"
    init_text: str = ""
    init_adapter: str = ""
    freeze_first: bool = False
    # Forgetting held (tuning/ptuning/teacher.py): the loss gains kl_weight * KL(base || prefixed)
    # on general prompts, read in addition at kl_share of a step's examples. 0: not at all.
    kl_weight: float = 0.0
    kl_share: float = 0.25
    # Steps between two measurements of the loss on validation rows (0: never), and after how many
    # of them without a better one the run ends with its best step (0: it runs to max_steps).
    eval_steps: int = 0
    early_stopping: int = 0
    # Examples longer than max_source_length or max_target_length: cut as upstream does, left out,
    # or a reason not to begin (tuning/ptuning/encoded.py).
    overlong: str = "truncate"
    # Of LoRA, as peft has them. lora_targets: names of modules, comma-separated; empty: those of
    # the family (tuning/weights/lora.py).
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: str = ""
    # Processes that share the examples of a step, each on a device of its own (tuning/processes/).
    # The update is the same.
    devices: int = 1
    # Adapters of the same base, by their sha256 with commas between them, one of which stands in
    # front of this prefix in beside_share of the steps, so that both can be served together.
    beside: str = ""
    beside_share: float = 0.5

    @property
    def samples_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """From a stored plan; keys that are no hyper-parameters are left out."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def problems(self) -> list[Problem]:
        """Everything that is wrong, not only the first."""
        found = []
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            whole = name in WHOLE_NUMBERS
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                found.append(
                    Problem(
                        name,
                        "not_a_number",
                        f"{name} must be a {'whole ' if whole else ''}number",
                        {},
                    )
                )
            elif not low <= value <= high:  # not-a-number lies nowhere
                message = f"{name} must lie between {low} and {high}"
                found.append(Problem(name, "out_of_range", message, {"low": low, "high": high}))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices or isinstance(value, bool) != any(
                isinstance(choice, bool) for choice in choices
            ):
                message = f"{name} must be one of {', '.join(map(str, choices))}"
                found.append(
                    Problem(
                        name, "not_a_choice", message, {"choices": ", ".join(map(str, choices))}
                    )
                )
        if found:
            return found
        found += self._contradictions()
        if self.samples_per_step > MAX_SAMPLES_PER_STEP:
            message = f"at most {MAX_SAMPLES_PER_STEP} examples a step"
            name = "gradient_accumulation_steps"
            found.append(Problem(name, "too_many_samples", message, {"most": MAX_SAMPLES_PER_STEP}))
        if self.warmup_steps and self.warmup_steps >= self.max_steps:
            found.append(
                Problem(
                    "warmup_steps",
                    "warmup_too_long",
                    "warmup_steps must be less than max_steps",
                    {},
                )
            )
        return found

    @property
    def prefix_length(self) -> int:
        """Positions that stand before every prompt."""
        return self.pre_seq_len if self.method == METHOD else 0

    def _contradictions(self) -> list[Problem]:
        """Settings of the method, of the start and of the base's own answers that do not go
        together.
        """
        found = []

        def refuse(field: str, code: str, message: str, **params: Any) -> None:
            found.append(Problem(field, code, message, params))

        if self.method != METHOD:
            for name, nothing in _OF_A_PREFIX.items():
                if getattr(self, name) != nothing:
                    message = f"{name} belongs to {METHOD}, the method is {self.method}"
                    refuse(name, "not_with_method", message, method=self.method)
        if self.devices > self.samples_per_step:
            message = f"{self.devices} devices share {self.samples_per_step} examples a step"
            refuse("devices", "too_many_devices", message, most=self.samples_per_step)
        if self.method == FULL and self.devices > 1 and self.precision == "float16":
            message = "weights that are shared out over devices need bfloat16 or float32"
            refuse("precision", "float16_on_several", message)
        if self.init == "prompt" and not self.init_text.strip():
            refuse("init_text", "no_init_text", "init prompt needs a text that describes the task")
        if self.init == "adapter" and not self.init_adapter.strip():
            refuse("init_adapter", "no_init_adapter", "init adapter needs one to go on from")
        for name, most in TEXTS.items():
            if len(getattr(self, name)) > most:
                refuse(name, "text_too_long", f"{name} has at most {most} characters", most=most)
        if self.init != "random" and self.prefix_projection:
            refuse(
                "init",
                "init_with_projection",
                "a prefix behind a projection can only begin at random",
            )
        if self.kl_weight and not self.kl_share:
            refuse("kl_share", "no_general_prompts", "kl_weight needs a share of general prompts")
        if self.beside and not self.beside_share:
            refuse("beside_share", "no_beside_share", "beside needs a share of steps above 0")
        if self.beside and self.devices > 1:
            message = "a prefix that learns beside others learns on one device"
            refuse("devices", "beside_on_several", message)
        if self.early_stopping and not self.eval_steps:
            refuse("eval_steps", "no_eval_steps", "early_stopping needs eval_steps")
        return found

    @property
    def general_prompts_per_step(self) -> int:
        """Rows of the base's own answers that a step reads beside the task's examples."""
        if not self.kl_weight:
            return 0
        return max(1, round(self.kl_share * self.samples_per_step))

    def learning_rate_at(self, step: int) -> float:
        """The rate of update `step` (0 is the first): warm-up from 0, then decay to 0 at max_steps,
        or constant.
        """
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        if self.lr_scheduler_type == "constant":
            return self.learning_rate
        left = (
            1.0 - done
            if self.lr_scheduler_type == "linear"
            else 0.5 * (1.0 + math.cos(math.pi * done))
        )
        return self.learning_rate * max(0.0, left)


WHOLE_NUMBERS = frozenset(field.name for field in fields(Recipe) if field.type == "int")
