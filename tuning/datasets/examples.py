"""A row of a dataset as a conversation: what training, evaluation and the benchmarks show a model.
Pure.
"""

from collections.abc import Sequence


def messages_of(prompt: str, history: Sequence[Sequence[str]] = ()) -> tuple[dict[str, str], ...]:
    """The messages before the response. history: [[question, answer], ...]."""
    turns = [
        turn for question, answer in history for turn in (("user", question), ("assistant", answer))
    ]
    return tuple({"role": role, "content": content} for role, content in [*turns, ("user", prompt)])
