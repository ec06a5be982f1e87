"""The evaluation process's work, step by step; the life of the process itself is in
test_process.py.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from chat.models import Adapter
from evaluation import predict as predicting
from evaluation.comparison import compare, update_differences
from evaluation.general_questions import QUESTIONS
from evaluation.metrics import known, original
from evaluation.models import EvaluationRun, Prediction
from evaluation.plan import create_evaluation
from evaluation.work import EvaluationWork
from portal.models import Run
from portal.runs import lifecycle
from portal.runs.heartbeat import CANCEL, RunFailed, StopRequested
from tests.support.completions_server import KEY, CompletionsServer
from tests.support.live_portal import wait_for
from tests.support.uploads import lines, upload
from tuning.datasets import store

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]
SHORT = {"max_source_length": 48, "max_target_length": 12}


class QuietHeartbeat:
    """Heartbeat without its thread, which writes at once; after `stop_after` rows somebody asks to
    stop.
    """

    def __init__(self, stop_after: int | None = None):
        self.progress, self.stop_after = 0, stop_after

    @property
    def stop_requested(self) -> str | None:
        return CANCEL if self.stop_after is not None and self.progress >= self.stop_after else None

    def tell(self, *writes, progress=None, **more) -> None:
        self.progress = self.progress if progress is None else progress
        for write in writes:
            write()

    def check(self) -> None:
        if self.stop_requested:
            raise StopRequested(self.stop_requested)

    def waiting(self) -> None:
        self.check()

    def flush(self) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch, scorer):
    """jieba's dictionary is loaded once for all tests."""
    monkeypatch.setattr(original, "Scorer", lambda folder: scorer)


def evaluate(run, heartbeat=None) -> None:
    EvaluationWork(run.pk, print).work(heartbeat or QuietHeartbeat())


def carry_out(run, heartbeat=None) -> EvaluationRun:
    """As the process does it, in this one and without threads."""
    token = lifecycle.claim(run.pk)
    try:
        evaluate(run, heartbeat)
    except RunFailed as failure:
        lifecycle.fail(run.pk, token, failure.code, str(failure))
    else:
        lifecycle.succeed(run.pk, token)
        update_differences(run.pk)
    return EvaluationRun.objects.get(pk=run.pk)


def test_base_and_tuned_are_scored_and_compared(member, dataset, checkpoint, adapter):
    tuned = create_evaluation(
        member, dataset=dataset, checkpoint=checkpoint, adapter=adapter, **SHORT
    )
    base = carry_out(tuned.baseline)
    assert base.status == Run.Status.SUCCEEDED and base.difference is None
    tuned = carry_out(tuned)
    assert set(tuned.scores) == set(known()) == set(tuned.difference)
    assert base.general == {} and tuned.general["questions"] == len(QUESTIONS)
    assert tuned.general["loss"]["tuned"] != tuned.general["loss"]["base"]
    assert tuned.scores["perplexity"]["low"] > 1
    assert set(tuned.scores["rouge-l"]) == {"value", "low", "high"}
    rows = list(tuned.predictions.all())
    assert [row.row for row in rows] == list(range(8))
    expected = store.examples(dataset.current, "validation", 0, 8)
    assert [row.prompt for row in rows] == [example["prompt"] for example in expected]
    assert [row.text for row in rows] != [row.text for row in base.predictions.all()]
    mean = sum(row.scores["bleu-4"] for row in rows) / 8
    assert tuned.scores["bleu-4"]["value"] == pytest.approx(mean, abs=1e-4)
    told = compare(tuned, base)
    assert told["rows"] == 8 and told["difference"] == tuned.difference


def test_a_baseline_that_ends_later_fills_the_difference_in(member, dataset, checkpoint, adapter):
    tuned = create_evaluation(
        member, dataset=dataset, checkpoint=checkpoint, adapter=adapter, **SHORT
    )
    base = tuned.baseline
    assert carry_out(tuned).difference is None
    carry_out(base)
    tuned.refresh_from_db()
    assert set(tuned.difference) == set(known())


def test_a_stopped_run_goes_on_behind_its_rows(member, dataset, checkpoint, monkeypatch):
    monkeypatch.setattr(predicting, "predict", partial(predicting.predict, in_flight=2))
    whole = carry_out(
        create_evaluation(
            member, dataset=dataset, checkpoint=checkpoint, decoding="upstream", **SHORT
        )
    )
    run = create_evaluation(
        member, dataset=dataset, checkpoint=checkpoint, decoding="upstream", **SHORT
    )
    token = lifecycle.claim(run.pk)
    with pytest.raises(StopRequested):
        evaluate(run, QuietHeartbeat(stop_after=3))
    lifecycle.step_aside(run.pk, token)
    done = set(run.predictions.values_list("row", flat=True))
    assert 3 <= len(done) < 8
    before = dict(run.predictions.values_list("row", "pk"))
    heartbeat = QuietHeartbeat()
    run = carry_out(run, heartbeat)
    assert heartbeat.progress == 8  # nothing was done twice
    assert {
        row: pk for row, pk in run.predictions.values_list("row", "pk") if row in done
    } == before
    texts = [list(each.predictions.values_list("text", flat=True)) for each in (whole, run)]
    assert texts[0] == texts[1] and run.scores == whole.scores


def test_rows_that_fail_count_as_empty_and_all_of_them_fail_the_run(member, checkpoint, data_dir):
    content = lines({"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"})
    dataset = store.ingest(upload(content), name="x", owner=member)
    run = create_evaluation(member, dataset=dataset, checkpoint=checkpoint, **SHORT)
    error = {"message": "not finite", "type": "server_error", "param": None, "code": "nan_logits"}

    def some(engine, rows, **options):
        yield predicting.Predicted(0, "b")
        yield predicting.Predicted(1, "", error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicting, "predict", some)
        run = carry_out(run)
    assert (run.status, run.failed_rows) == (Run.Status.SUCCEEDED, 1)
    assert run.scores["rouge-1"]["value"] == 50.0
    run = create_evaluation(member, dataset=dataset, checkpoint=checkpoint, **SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            predicting,
            "predict",
            lambda engine, rows, **options: (
                predicting.Predicted(row, "", error) for row, _ in rows
            ),
        )
        run = carry_out(run)
    assert run.status == Run.Status.FAILED and run.error["code"] == "all_rows_failed"


@pytest.mark.parametrize(
    "code", ["checkpoint_changed", "adapter_deleted", "dataset_missing", "checkpoint_invalid"]
)
def test_what_cannot_work_fails_with_a_reason(member, dataset, checkpoint, adapter, data_dir, code):
    run = create_evaluation(
        member, dataset=dataset, checkpoint=checkpoint, adapter=adapter, **SHORT
    )
    if code == "checkpoint_changed":
        run.recipe["checkpoint"]["fingerprint"] = "another"
    elif code == "adapter_deleted":
        adapter.delete()
    elif code == "dataset_missing":
        for path in (data_dir / "datasets").glob("*.jsonl"):
            path.unlink()
    else:
        checkpoint.path = str(data_dir / "nowhere")
        checkpoint.save()
    EvaluationRun.objects.filter(pk=run.pk).update(recipe=run.recipe)
    lifecycle.claim(run.pk)
    with pytest.raises(RunFailed) as caught:
        evaluate(EvaluationRun.objects.get(pk=run.pk))
    assert caught.value.code == code and str(caught.value)


def test_differences_wait_for_both_sides(member, dataset, checkpoint, adapter):
    tuned = create_evaluation(
        member, dataset=dataset, checkpoint=checkpoint, adapter=adapter, **SHORT
    )
    Prediction.objects.all().delete()
    update_differences(tuned.pk)
    assert EvaluationRun.objects.get(pk=tuned.pk).difference is None


def test_rows_go_to_the_vllm_servers_that_have_the_checkpoint(
    member, dataset, checkpoint, adapter, settings, data_dir
):
    """To all of them; what one that dies had in hand is answered by another."""
    (data_dir / "adapters" / "one").rename(data_dir / "adapters" / adapter.sha256)
    Adapter.objects.update(folder=f"adapters/{adapter.sha256}")
    known = (checkpoint.fingerprint, data_dir / "adapters")
    with (
        CompletionsServer(*known, SLOW_SERVER="1") as first,
        CompletionsServer(*known, SLOW_SERVER="1") as second,
    ):
        settings.WORKER_URLS = [f"vllm+{first.url}", f"two=vllm+{second.url}"]
        settings.WORKER_TOKEN = KEY
        run = create_evaluation(
            member, dataset=dataset, checkpoint=checkpoint, adapter=adapter, **SHORT
        )

        def kill_first():
            wait_for(lambda: first.ask("asked") >= 3, 30, "rows at the first server")
            first.kill()

        with ThreadPoolExecutor(1) as threads:
            killed = threads.submit(kill_first)
            run = carry_out(run)
            killed.result()
        assert second.ask("last")["kv_transfer_params"]["prefix"] == adapter.sha256
    assert run.status == Run.Status.SUCCEEDED
    assert (run.predictions.count(), run.failed_rows) == (8, 0)
    assert {row.text for row in run.predictions.all()} == {"a b c d e f g h i j k l "}
