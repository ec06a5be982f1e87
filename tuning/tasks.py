"""What django-q2 calls."""

from portal.runs.children import supervise


def run(run_id: int) -> str:
    """Carries out a tuning run in a process of its own; does nothing when somebody else has claimed
    it.
    """
    return supervise(run_id, "tuning.train")
