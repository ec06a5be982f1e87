"""A tuning run with several variants, carried out: trained side by side, every one published, the
best by its validation loss under the run's own name.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from portal.runs.heartbeat import Heartbeat
from tuning.models import TuningRun
from tuning.sweeps import variants_of

if TYPE_CHECKING:
    from tuning.work import TuningWork


def carry_out_sweep(work: TuningWork, loaded, heartbeat: Heartbeat) -> None:
    """Returns when all adapters are published and `run.variants` tells of them."""
    from tuning.ptuning.sweep import Sweep

    run, recipes = work.run, variants_of(work.run.recipe)

    def report(number: int, progress) -> bool:
        return work.report(heartbeat, recipes[0].save_steps, progress, number)

    with work.trainers(loaded) as make:
        sweep = Sweep([partial(make, recipe) for recipe in recipes], run.state_folder, report)
        work.begin(
            heartbeat,
            step=sweep.step,
            learning=sweep.trainable_parameters,
            dropped=sweep.trainers[0].dropped,
        )
        with work.stopping(heartbeat):
            prefixes = sweep.train()
    told: list[dict[str, Any]] = []
    for number, trainer in enumerate(sweep.trainers):
        failure = sweep.failures.get(number)
        told.append(
            {
                "changes": run.recipe["sweep"][number],
                "step": trainer.best_step,
                "loss": _finite(trainer.last_loss),
                "validation_loss": _finite(trainer.result_loss),
                "adapter": None,
                "best": False,
                "error": failure and {"code": failure.code, "message": str(failure)},
            }
        )
        if failure:
            work.log(f"variant {number + 1} was given up: {failure}")
    losses = {
        number: one["validation_loss"]
        for number, one in enumerate(told)
        if number not in sweep.failures
    }
    # a loss that is no number comes last
    ranked = sorted(losses, key=lambda number: (losses[number] is None, losses[number] or 0.0))
    for place, number in enumerate(ranked):  # the best first: it has the run's own name
        prefix = prefixes[number]
        assert prefix is not None  # those that diverged are not ranked
        prefix.metadata["variant"] = number + 1
        name = f"{run.name}-v{number + 1}"[-120:] if place else ""
        folder = run.folder / f"variant-{number + 1}"
        adapter = work.publish(sweep.trainers[number], prefix, heartbeat, folder, name)
        told[number] |= {"adapter": adapter.pk, "best": not place}
        work.log(f"variant {number + 1}: adapter “{adapter.name}”, {adapter.sha256}")
    best = told[ranked[0]]
    TuningRun.objects.filter(pk=run.pk).update(
        variants=told, loss=best["loss"], validation_loss=best["validation_loss"]
    )


def _finite(value: float | None) -> float | None:
    """JSON has no other numbers."""
    return value if value is not None and abs(value) < float("inf") else None
