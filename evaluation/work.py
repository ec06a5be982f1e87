"""An evaluation, carried out: predict the rows that have no prediction yet, then score all.

Every prediction is a row about a second after it is finished, so a process that is lost, or asked
to stop (portal/runs/heartbeat.py), costs only what was in flight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from django.conf import settings
from django.db.models import F

from chat.model_work import ModelWork
from chat.worker.addresses import WorkerAddress
from evaluation import reviewing
from evaluation.comparison import update_differences
from evaluation.figures import figures_of
from evaluation.metrics import PERPLEXITY, measured
from evaluation.models import EvaluationRun, Prediction
from portal.models import Run
from portal.runs.figures import Figure
from portal.runs.heartbeat import STEP_ASIDE, Heartbeat, RunFailed, StopRequested
from tuning.datasets.examples import messages_of
from tuning.datasets.store import Split, open_split

if TYPE_CHECKING:
    import torch

    from chat.engine.engine import Engine
    from chat.remote_engine import RemoteEngine
    from evaluation.metrics.original import Scorer
    from evaluation.predict import Predicted


ROWS_AT_ONCE = 64  # between two looks at whether somebody wants the run to stop


class EvaluationWork(ModelWork):
    kind = Run.Kind.EVALUATION
    model = EvaluationRun

    @classmethod
    def size(cls, recipe: dict) -> int:
        return recipe.get("rows") or 0

    def load(self, run_id: int) -> EvaluationRun:
        return EvaluationRun.objects.select_related("dataset_version", "checkpoint", "adapter").get(
            pk=run_id
        )

    def work(self, heartbeat: Heartbeat) -> None:
        run, recipe = self.run, self.run.recipe
        heartbeat.tell(phase=Run.Phase.LOADING, total=recipe["rows"])
        if "adapter" in recipe and run.adapter is None:
            raise RunFailed(
                "adapter_deleted", f"The adapter “{run.adapter_name}” has been deleted."
            )
        try:
            split = open_split(run.dataset_version, run.split)
        except FileNotFoundError as missing:
            raise RunFailed(
                "dataset_missing", f"The dataset's files are gone: {missing.filename}"
            ) from missing

        with split:
            done = set(run.predictions.values_list("row", flat=True))
            waiting = [row for row in range(min(recipe["rows"], len(split))) if row not in done]
            heartbeat.tell(progress=len(done))
            if waiting or run.general is None:
                self._compute(heartbeat, split, waiting)
        heartbeat.flush()

        scores = self._scores()
        self.log("  ".join(f"{metric} {score['value']:.2f}" for metric, score in scores.items()))
        heartbeat.tell(lambda: EvaluationRun.objects.filter(pk=run.pk).update(scores=scores))

    def _compute(self, heartbeat: Heartbeat, split: Split, waiting: list[int]) -> None:
        """Rows by the servers that hold the checkpoint, where there are several or a vLLM; else,
        and what only the model itself can tell, by an engine in this process.
        """
        from chat.worker.router import WorkerUnavailable

        run = self.run
        plan = f"{run.adapter_name or 'no adapter'}, {len(waiting)} rows, {run.decoding}"
        with self._elsewhere() as servers:
            if servers is not None:
                count = f"{servers.own} workers and {servers.vllm} vLLM servers"
                self.log(f"run {run.pk}, attempt {run.attempt}: on {count}, {plan}")
                try:
                    self._predict(heartbeat, split, waiting, servers)
                    if not servers.own:
                        heartbeat.flush()
                        return self._look_closer(heartbeat, split, servers)
                except WorkerUnavailable as lost:
                    if not servers.own:
                        raise
                    self.log(f"no worker is left ({lost}); the rest is done here")
                heartbeat.flush()
                heartbeat.work_asks = False
                done = set(run.predictions.values_list("row", flat=True))
                waiting = [row for row in waiting if row not in done]
        with self._engine(heartbeat, plan) as engine:
            if waiting:
                self._predict(heartbeat, split, waiting, engine)
                heartbeat.flush()
            self._look_closer(heartbeat, split, engine)

    @contextlib.contextmanager
    def _elsewhere(self) -> Iterator[RemoteEngine | None]:
        """All servers that have these very weights; None: this process is as good. One worker
        would only be kept from its chats.
        """
        from chat.remote_engine import RemoteEngine

        run = self.run
        urls = settings.WORKER_URLS
        if (
            run.checkpoint.precision
        ):  # workers serve it so, and the plan is of the weights as stored
            urls = [url for url in urls if WorkerAddress.parse(url).vllm]
        if not urls or self.run.recipe["quantization_bit"] is not None:
            yield None
            return
        servers = RemoteEngine.where_held(
            urls, settings.WORKER_TOKEN, run.checkpoint.ref(), with_adapter=run.adapter is not None
        )
        with contextlib.closing(servers):
            yield servers if servers.vllm or servers.own > 1 else None

    @contextlib.contextmanager
    def _engine(self, heartbeat: Heartbeat, plan: str) -> Iterator[Engine]:
        """An engine in this process."""
        from evaluation import forgetting, predict

        run, recipe = self.run, self.run.recipe
        lengths = recipe["max_source_length"], recipe["max_target_length"]
        quantization = recipe["quantization_bit"]
        with self.loaded_model(heartbeat, plan, quantization_bit=quantization) as loaded:
            pre_seq_len = recipe["adapter"]["pre_seq_len"] if run.adapter is not None else 0
            if run.adapter is not None:  # the general questions must fit too
                room = forgetting.SOURCE, forgetting.TARGET
                lengths = max(lengths[0], room[0]), max(lengths[1], room[1])
            yield predict.engine_for(loaded, *lengths, pre_seq_len=pre_seq_len)

    def _predict(
        self,
        heartbeat: Heartbeat,
        split: Split,
        waiting: list[int],
        engine: Engine | RemoteEngine,
    ) -> None:
        """Raises StopRequested before the end when somebody wants the run to stop."""
        from evaluation import predict
        from evaluation.metrics.original import Scorer

        run, recipe = self.run, self.run.recipe
        lengths = recipe["max_source_length"], recipe["max_target_length"]
        scorer = Scorer(settings.DATA_DIR / "cache")

        heartbeat.check()
        heartbeat.work_asks = True
        heartbeat.tell(phase=Run.Phase.PREDICTING)
        examples = (
            (row, messages_of(split[row]["prompt"], split[row]["history"])) for row in waiting
        )
        predictions = predict.predict(
            engine,
            examples,
            adapter=run.adapter.ref() if run.adapter is not None else None,
            decoding=recipe["decoding"],
            max_source_length=lengths[0],
            max_target_length=lengths[1],
            seed=recipe["seed"],
            should_stop=lambda: heartbeat.stop_requested is not None,
            resembles=self._base_predictions(),
        )
        finished = recipe["rows"] - len(waiting)
        for predicted in predictions:
            if predicted.error is not None:
                self.log(f"row {predicted.row}: {predicted.error['message']}")
            finished += 1
            example = split[predicted.row]
            reference = predict.reference_of(
                engine.prompter, example["prompt"], example["response"], *lengths
            )
            prediction = _prediction(run, predicted, example["prompt"], reference, scorer)
            heartbeat.tell(
                partial(_write, prediction, failed=predicted.error is not None), progress=finished
            )
        if finished < recipe["rows"]:
            raise StopRequested(heartbeat.stop_requested or STEP_ASIDE)

    def _look_closer(
        self, heartbeat: Heartbeat, split: Split, engine: Engine | RemoteEngine
    ) -> None:
        """What the rows' texts do not tell: how likely the references were, and what the prefix
        cost of everything else.
        """
        from chat.engine import adapters
        from chat.engine.engine import Engine
        from evaluation import forgetting

        run, recipe = self.run, self.run.recipe
        here = isinstance(engine, Engine)
        prefix = adapters.load(run.adapter.path).tensor if run.adapter is not None else None
        if here:
            self._measure_likelihood(heartbeat, split, engine, prefix)
        told = EvaluationRun.objects.filter(pk=run.pk)
        if run.adapter is None:
            heartbeat.tell(lambda: told.update(general={}))
            return
        precision = str(engine.loaded.dtype) if isinstance(engine, Engine) else "elsewhere"
        found = forgetting.card(
            engine,
            run.adapter.ref(),
            prefix,
            kept_as=f"{run.checkpoint.fingerprint} {precision} {recipe['quantization_bit']}",
            folder=settings.DATA_DIR / "general",
            should_stop=lambda: heartbeat.stop_requested is not None,
        )
        if found is None:
            raise StopRequested(heartbeat.stop_requested or STEP_ASIDE)
        kept = f"{found['kept']} of {found['base_right']} general answers kept"
        self.log(f"{kept}, {found['right']} of {found['questions']} right")
        heartbeat.tell(lambda: told.update(general=found))

    def _measure_likelihood(
        self, heartbeat: Heartbeat, split: Split, engine: Engine, prefix: torch.Tensor | None
    ) -> None:
        """The references' perplexity, for the rows that do not have it yet."""
        from evaluation.likelihood import losses

        recipe = self.run.recipe
        lengths = recipe["max_source_length"], recipe["max_target_length"]
        name = PERPLEXITY.name
        left = [row for row in self.run.predictions.order_by("row") if name not in row.counts]
        for start in range(0, len(left), ROWS_AT_ONCE):
            heartbeat.check()
            some = left[start : start + ROWS_AT_ONCE]
            rows = [
                engine.prompter.training_ids(
                    messages_of(split[each.row]["prompt"], split[each.row]["history"]),
                    split[each.row]["response"],
                    *lengths,
                )
                for each in some
            ]
            for each, (nats, tokens) in zip(some, losses(engine.loaded, rows, prefix), strict=True):
                if tokens and math.isfinite(nats):
                    each.counts[name] = [round(nats, 4), tokens]
                    each.scores[name] = round(math.exp(min(nats / tokens, 50.0)), 4)
            heartbeat.tell(partial(_update, some))

    def _base_predictions(self) -> dict[int, str]:
        """What the base alone said about the rows, if that is known."""
        run = self.run
        if run.adapter is None or run.baseline is None or run.decoding != run.Decoding.GREEDY:
            return {}
        return dict(run.baseline.predictions.values_list("row", "text"))

    def _scores(self) -> dict:
        """Over all rows."""
        from evaluation.intervals import average

        run = self.run
        run.refresh_from_db(fields=["failed_rows"])
        if run.failed_rows >= run.recipe["rows"]:
            raise RunFailed(
                "all_rows_failed",
                "The model gave no answer to any row; the log names the reasons.",
            )
        rows = list(run.predictions.order_by("row").values_list("scores", "counts"))
        return average([scores for scores, _ in rows], [counts for _, counts in rows])

    def after_success(self) -> None:
        update_differences(self.run.pk)
        reviewing.ask_for_review(self.run)

    def figures(self) -> list[Figure]:
        return figures_of(EvaluationRun.objects.get(pk=self.run.pk))


def _prediction(
    run: EvaluationRun, predicted: Predicted, prompt: str, reference: str, scorer: Scorer
) -> Prediction:
    """A finished row with its scores. NUL is taken out: PostgreSQL has no room for it."""
    prompt, reference, text = (
        part.replace("\0", "") for part in (prompt, reference, predicted.text)
    )
    found = measured(scorer, text, reference)
    return Prediction(
        run=run,
        row=predicted.row,
        prompt=prompt,
        reference=reference,
        text=text,
        scores=found.scores,
        counts=found.counts,
    )


def _update(predictions: list[Prediction]) -> None:
    Prediction.objects.bulk_update(predictions, ["scores", "counts"])


def _write(prediction: Prediction, failed: bool) -> None:
    Prediction.objects.bulk_create([prediction], ignore_conflicts=True)
    if failed:
        EvaluationRun.objects.filter(pk=prediction.run_id).update(failed_rows=F("failed_rows") + 1)
