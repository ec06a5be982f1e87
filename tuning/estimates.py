"""What a new run will take, by what an earlier one on the same base took."""

from typing import Any

from tuning.models import TuningRun

LOOKED_AT = 200  # of the newest runs


def measured(user) -> dict[int, dict[str, Any]]:
    """checkpoint id -> {"run", "rows_per_second", "memory" (bytes or None), "tokens"} of the newest
    run that `user` sees and that told its speed. Rows: those of the task and the general ones.
    tokens: of the longest row behind the prefix, by which another recipe's rows are compared.
    """
    found: dict[int, dict[str, Any]] = {}
    runs = TuningRun.objects.visible_to(user).filter(samples_per_second__gt=0)
    for run in runs.only("recipe", "samples_per_second", "peak_memory", "checkpoint")[:LOOKED_AT]:
        recipe = run.recipe
        lengths = ("max_source_length", "max_target_length", "pre_seq_len")
        found.setdefault(
            run.checkpoint_id,
            {
                "run": run.pk,
                "rows_per_second": run.samples_per_second
                * (1 + (recipe.get("kl_share") or 0 if recipe.get("kl_weight") else 0))
                * max(1, len(recipe.get("sweep") or ())),
                "memory": run.peak_memory,
                "tokens": sum(recipe.get(name) or 0 for name in lengths),
            },
        )
    return found
