"""Checks of a dataset as runs: started, carried out, asked; and rows too long for a run."""

import pytest

from portal.models import Run
from portal.runs import lifecycle
from portal.runs.heartbeat import CANCEL, StopRequested
from portal.runs.work import work_of
from tests.support import tiny_training as tiny
from tests.support.uploads import lines, upload
from tests.tuning.datasets.test_api import client_of
from tuning.datasets import store
from tuning.datasets.measuring import row_as_trained
from tuning.models import CheckRun, Dataset, TuningRun
from tuning.plan import create_run
from tuning.ptuning.encoded import Encoded, TooLong

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]
URL = "/api/v1/check-runs/"
ROWS = [{"prompt": "a" * (3 * n + 1), "response": "b" * (5 * n + 1)} for n in range(12)]


class Beat:
    """A heartbeat that writes at once."""

    def __init__(self, run, stop=False):
        self.run, self.stop, self.work_asks, self.told = run, stop, False, []

    def tell(self, *writes, **progress):
        for write in writes:
            write()
        Run.objects.filter(pk=self.run.pk).update(**progress)
        self.told.append(progress)

    def check(self):
        if self.stop:
            raise StopRequested(CANCEL)


def carry_out(run: CheckRun, **options) -> CheckRun:
    token, log = lifecycle.claim(run.pk), []
    work_of("check")(run.pk, log.append).work(Beat(run, **options))
    lifecycle.succeed(run.pk, token)
    return CheckRun.objects.get(pk=run.pk)


@pytest.fixture
def client(member):
    return client_of(member)


@pytest.fixture
def dataset(member):
    return store.ingest(upload(lines(*ROWS)), name="x", owner=member)


def start(client, dataset, checkpoint, **more):
    body = {"dataset": dataset.pk, "checkpoint": checkpoint.pk, **more}
    return client.post(URL, body, format="json")


def test_a_check_counts_every_row_once_and_answers_for_any_lengths(
    client, dataset, tiny_checkpoint
):
    made = start(client, dataset, tiny_checkpoint)
    assert (made.status_code, made.json()["status"], made.json()["report"]) == (201, "queued", {})
    again = start(client, dataset, tiny_checkpoint)
    assert (again.status_code, again.json()["id"]) == (200, made.json()["id"])
    cuts = f"{URL}{made.json()['id']}/cuts/"
    assert client.get(f"{cuts}?max_source_length=9&max_target_length=9").status_code == 404
    run = carry_out(CheckRun.objects.get())
    assert run.progress == run.total == 12 and run.queue == "default"
    report = client.get(f"{URL}{run.pk}/").json()["report"]
    prompter = tiny.loaded().prompter
    whole = Encoded(ROWS, prompter, 10_000, 10_000)
    responses = [sum(label >= 0 for label in whole[row][1]) for row in range(12)]
    assert report["response"]["lengths"] == sorted([count, 1] for count in responses)
    assert report["response"]["longest"][0] == [12, max(responses)]
    limit = sorted(responses)[-4]
    told = client.get(f"{cuts}?max_source_length=500&max_target_length={limit}").json()
    assert (told["rows"], told["prompts"], told["responses"]) == (12, 0, 3)
    assert told["told"] == [
        f"3 of 12 responses are longer than {limit} tokens and are cut in mid-sentence."
    ]
    assert client.get(f"{cuts}?max_source_length=0&max_target_length=9").status_code == 400


def test_a_check_that_is_asked_to_stop_leaves_no_process(client, dataset, tiny_checkpoint):
    import multiprocessing

    start(client, dataset, tiny_checkpoint)
    with pytest.raises(StopRequested):
        carry_out(CheckRun.objects.get(), stop=True)
    assert not multiprocessing.active_children()


def test_others_see_no_check_and_a_checked_dataset_can_go(
    client, member, other_member, dataset, tiny_checkpoint, django_capture_on_commit_callbacks
):
    made = start(client, dataset, tiny_checkpoint).json()
    outsider = client_of(other_member)
    assert outsider.get(f"{URL}{made['id']}/").status_code == 404
    assert start(outsider, dataset, tiny_checkpoint).status_code == 400
    # while it counts, the rows stay
    assert client.delete(f"/api/v1/datasets/{dataset.pk}/").status_code == 409
    assert client.post(f"{URL}{made['id']}/cancel/").json()["status"] == "cancelled"
    assert client.delete(f"/api/v1/datasets/{dataset.pk}/").status_code == 204
    assert not Dataset.objects.exists() and not Run.objects.exists()


def test_rows_too_long_are_cut_left_out_or_refused_as_asked():
    prompter = tiny.loaded().prompter
    whole = Encoded(ROWS, prompter, 10_000, 10_000)
    fits = [
        row
        for row in range(12)
        if (trained := sum(label >= 0 for label in whole[row][1])) <= 30
        and len(whole[row][0]) - trained <= 30
    ]
    assert 0 < len(fits) < 12
    cut = Encoded(ROWS, prompter, 30, 30)
    assert (len(cut), cut.dropped) == (12, 0) and cut[11] != whole[11]
    left = Encoded(ROWS, prompter, 30, 30, "drop")
    assert left.dropped == 12 - len(fits)
    assert [left[row] for row in range(len(left))] == [whole[row] for row in fits]
    with pytest.raises(TooLong) as refused:
        Encoded(ROWS, prompter, 30, 30, "refuse")
    assert (refused.value.rows, refused.value.count) == (12 - len(fits), 12)
    assert len(Encoded(ROWS, prompter, 10_000, 10_000, "refuse")) == 12


def test_a_run_that_refuses_long_rows_is_not_created_where_a_check_knows_them(
    client, member, dataset, tiny_checkpoint
):
    lengths = {"max_source_length": 30, "max_target_length": 30}
    plan = {"dataset": dataset.pk, "checkpoint": tiny_checkpoint.pk, **lengths}
    start(client, dataset, tiny_checkpoint)
    carry_out(CheckRun.objects.get())
    refused = client.post("/api/v1/tuning-runs/", {**plan, "overlong": "refuse"}, format="json")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "overlong")
    assert "longer than 30 tokens" in refused.json()["error"]["message"]
    for choice in ("drop", "truncate"):
        made = client.post("/api/v1/tuning-runs/", {**plan, "overlong": choice}, format="json")
        assert made.status_code == 201 and made.json()["recipe"]["overlong"] == choice
    # another base, or longer lengths: nothing known, nothing refused
    tiny_checkpoint.fingerprint = "y"
    assert create_run(member, dataset=dataset, checkpoint=tiny_checkpoint, overlong="refuse")
    assert TuningRun.objects.count() == 3


def test_a_row_is_shown_as_the_trainer_reads_it(client, dataset, tiny_checkpoint):
    path = f"/api/v1/datasets/{dataset.pk}/trained/"
    query = f"checkpoint={tiny_checkpoint.pk}&max_source_length=20&max_target_length=9"
    shown = client.get(f"{path}?line=12&{query}")
    assert shown.status_code == 200
    ids, labels = Encoded(ROWS, tiny.loaded().prompter, 20, 9)[11]
    tokens = shown.json()["tokens"]
    assert [token["id"] for token in tokens] == ids
    assert [token["trained"] for token in tokens] == [label >= 0 for label in labels]
    assert shown.json()["trained"] == 9
    sha256 = dataset.current.splits["train"]["sha256"]
    assert tokens == row_as_trained(tiny_checkpoint.path, sha256, 12, 20, 9)
    assert client.get(f"{path}?line=13&{query}").status_code == 400
    assert client.get(f"{path}?line=1&split=dev&{query}").status_code == 404
    tiny_checkpoint.path = "/nowhere"
    tiny_checkpoint.save()
    gone = client.get(f"{path}?line=1&{query}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (400, "unreadable")
