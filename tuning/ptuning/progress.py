"""What a training says of itself: each step, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class TrainingFailed(Exception):
    """The run cannot go on and would fail again. `code`: loss_not_finite | no_examples |
    does_not_fit | out_of_memory | state_mismatch | init_text_too_long | no_general_answers |
    no_adapter_to_go_on_from.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """`report` asked to stop; the state after `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class Progress:
    """What `report` is told after each step. `logged` is the mean loss since the last logged step,
    on logged steps only; `validation` the loss on held-out rows, on steps where it was measured.
    """

    step: int  # updates done
    max_steps: int
    loss: float  # of this update
    learning_rate: float  # used in this update
    gradient_norm: float  # before clipping
    samples_per_second: float | None  # over the logging interval; None until it can be told
    logged: float | None = None
    divergence: float | None = None  # KL(base || prefixed) of this update's general prompts
    validation: float | None = None


# a true answer asks the trainer to save its state and stop
Report = Callable[[Progress], object]
