"""What the queue calls. The work itself is in a process of its own, evaluation/evaluate.py."""

from portal.runs.children import supervise


def evaluate(run_id: int) -> str:
    return supervise(run_id, "evaluation.evaluate")
