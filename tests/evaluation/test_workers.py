"""An evaluation's rows on several workers of the portal at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from chat.remote_engine import RemoteEngine
from evaluation.plan import create_evaluation
from portal.models import Run
from tests.evaluation.test_work import QuietHeartbeat, carry_out, quick  # noqa: F401  a fixture
from tests.support import tiny_training as tiny
from tests.support.live_portal import wait_for
from tests.support.uploads import lines, upload
from tests.support.worker_process import TOKEN, EngineWorker
from tuning.datasets.store import ingest

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir"), pytest.mark.slow]
ROWS = 150


@pytest.fixture
def workers(checkpoint, checkpoint_folder, settings):
    """Two, both ready."""
    with EngineWorker(checkpoint_folder) as first, EngineWorker(checkpoint_folder) as second:
        settings.WORKER_TOKEN = TOKEN
        both = [first.url, second.url]

        def ready():
            servers = RemoteEngine.where_held(both, TOKEN, checkpoint.ref(), with_adapter=False)
            servers.close()
            return servers.own == 2

        wait_for(ready, 240, "two workers")
        settings.WORKER_URLS = both
        yield first, second


@pytest.fixture
def plan(member, checkpoint):
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in tiny.examples(ROWS)]
    dataset = ingest(upload(lines(*rows)), name="many", owner=member)
    lengths = {"max_source_length": 48, "max_target_length": 48}
    return {"dataset": dataset, "checkpoint": checkpoint, "split": "train", **lengths}


def rows_of(run):
    return list(run.predictions.values_list("row", "text", "scores"))


class Killing(QuietHeartbeat):
    """When some rows have been written, a worker is killed: once, from outside."""

    def __init__(self, worker):
        super().__init__()
        self.worker, self.threads, self.killed = worker, ThreadPoolExecutor(1), None

    def tell(self, *writes, progress=None, **more):
        super().tell(*writes, progress=progress, **more)
        if self.progress >= 5 and self.killed is None:
            self.killed = self.threads.submit(self.worker.kill)


def test_rows_go_to_all_workers_and_from_a_killed_one_to_the_others(
    member, plan, adapter, workers, settings
):
    first, second = workers
    heartbeat = Killing(first)
    run = carry_out(
        create_evaluation(member, adapter=adapter, with_baseline=False, **plan), heartbeat
    )
    heartbeat.killed.result()
    second.kill()

    assert (run.status, run.failed_rows) == (Run.Status.SUCCEEDED, 0)
    assert [row for row, _, _ in rows_of(run)] == list(range(ROWS))  # none lost, none twice
    rows = [{each.split("row-")[1].split("-")[0] for each in worker.taken if "row-" in each}
            for worker in workers]  # fmt: skip
    assert len(rows[0]) >= 5 and len(rows[1]) > ROWS / 2
    assert rows[0] | rows[1] == {str(row) for row in range(ROWS)}
    assert run.general["loss"]["tuned"] and run.scores["perplexity"]  # the model itself was asked

    settings.WORKER_URLS = []  # as one process does it alone
    alone = carry_out(create_evaluation(member, adapter=adapter, with_baseline=False, **plan))
    assert rows_of(run) == rows_of(alone) and run.scores == alone.scores


def test_when_no_worker_is_left_the_rest_is_done_here(member, plan, workers):
    first, second = workers

    class Both(Killing):
        def tell(self, *writes, **more):
            super().tell(*writes, **more)
            if self.killed is not None and second.process.poll() is None:
                second.kill()

    run = carry_out(create_evaluation(member, **plan), Both(first))
    assert (run.status, run.failed_rows) == (Run.Status.SUCCEEDED, 0)
    assert [row for row, _, _ in rows_of(run)] == list(range(ROWS))


def test_a_second_evaluation_is_not_given_the_answers_of_the_first(member, plan, adapter, workers):
    base = carry_out(create_evaluation(member, max_examples=6, **plan))
    tuned = carry_out(create_evaluation(member, max_examples=6, adapter=adapter, **plan))
    assert [text for _, text, _ in rows_of(base)] != [text for _, text, _ in rows_of(tuned)]
