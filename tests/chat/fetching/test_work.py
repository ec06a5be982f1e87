"""A download's work, as its process does it, in this one and without threads."""

import json

import pytest
from django.core.exceptions import ValidationError

from chat import inventory
from chat.fetching import work
from chat.fetching.plan import create_fetch
from chat.fetching.work import FetchWork
from chat.models import Checkpoint, FetchRun
from chat.registry import register_checkpoint
from portal.models import Run
from portal.runs import lifecycle
from portal.runs.heartbeat import CANCEL, RunFailed, StopRequested
from tests.support.file_server import COMMIT, Fault
from tests.support.folders import checkpoint_folder

pytestmark = pytest.mark.django_db
WEIGHTS = f"/org/name/resolve/{COMMIT}/model.safetensors"


class QuietHeartbeat:
    """Heartbeat without its thread, which writes at once. `stop_in`: the phase in which somebody
    asks to stop.
    """

    def __init__(self, run, stop_in: str = ""):
        self.rows, self.stop_in, self.phases = Run.objects.filter(pk=run.pk), stop_in, []
        self.stop_requested, self.work_asks = None, False

    def tell(self, *writes, **progress):
        for write in writes:
            write()
        self.rows.update(**progress)
        if "phase" in progress and progress["phase"] not in self.phases:
            self.phases.append(progress["phase"])
        if self.stop_in and self.stop_in in self.phases:
            self.stop_requested = CANCEL

    def check(self):
        if self.stop_requested:
            raise StopRequested(self.stop_requested)

    def flush(self):
        pass


def carry_out(run, **options) -> FetchRun:
    token = lifecycle.claim(run.pk)
    try:
        FetchWork(run.pk, print).work(QuietHeartbeat(run, **options))
    except RunFailed as failure:
        lifecycle.fail(run.pk, token, failure.code, str(failure))
    except StopRequested:
        lifecycle.acknowledge_cancel(run.pk, token)
    else:
        lifecycle.succeed(run.pk, token)
    return FetchRun.objects.get(pk=run.pk)


def wish(owner, source="hf:org/name", **options) -> FetchRun:
    return create_fetch(owner, source, **options)[0]


def test_a_download_becomes_a_checkpoint_and_says_all_on_the_way(hub, staff, data_dir):
    register_checkpoint(checkpoint_folder(data_dir / "base", seed=1))
    run = carry_out(wish(staff, default=True))
    assert run.status == Run.Status.SUCCEEDED and run.error is None
    checkpoint = run.checkpoint
    assert checkpoint.name == "name" and checkpoint.is_default
    assert checkpoint.path == str(data_dir / "checkpoints" / "name")
    assert checkpoint.description["source"]["revision"] == COMMIT
    assert checkpoint.description["licence"] == "mit"
    assert run.transfer["done"] == run.transfer["total"] > 0
    assert run.progress == run.total and {"size", "done", "name"} == set(run.transfer["files"][0])
    assert not list(inventory.incoming().iterdir())


def test_two_wishes_for_the_same_thing_are_one_run(hub, staff, member):
    run, new = create_fetch(staff, "hf:org/name")
    again, newer = create_fetch(staff, " hf:org/name ")
    assert (new, newer) == (True, False) and again == run
    carry_out(run)
    with pytest.raises(ValidationError, match="name"):
        create_fetch(staff, "hf:org/name")
    other = carry_out(wish(staff, name="second"))
    assert other.checkpoint.name == "second" and Checkpoint.objects.count() == 2


def test_a_cancelled_download_goes_on_at_its_byte(hub, staff, files):
    hub.fault(WEIGHTS, Fault(cut=2000), *[Fault(status=503)] * 5)
    run = carry_out(wish(staff))
    assert run.status == Run.Status.FAILED and run.error["code"] == "connection_lost"
    assert not Checkpoint.objects.exists()
    assert lifecycle.resume(run)
    run = carry_out(run)
    assert run.status == Run.Status.SUCCEEDED
    assert hub.asked(WEIGHTS)[-1]["Range"] == "bytes=2000-"


def test_a_wish_to_stop_is_heard_in_the_middle(hub, staff):
    run = carry_out(wish(staff), stop_in="downloading")
    assert run.status == Run.Status.CANCELLED and not Checkpoint.objects.exists()
    lifecycle.resume(run)
    assert carry_out(run).status == Run.Status.SUCCEEDED


def test_killed_between_the_move_and_the_registration(hub, staff, monkeypatch):
    run = wish(staff)

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "register_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            FetchWork(run.pk, print).work(QuietHeartbeat(run))
    asked = len(hub.requests)
    assert carry_out(run).checkpoint.name == "name"
    assert len(hub.requests) == asked  # nothing was fetched again


FAILURES = {
    "repository_not_found": "hf:org/nothing",
    "revision_not_found": "hf:org/name@v9",
    "no_weights": "hf:org/empty",
    "no_config": "hf:org/partial",
    "unknown_model_type": "hf:org/tomorrow",
    "too_large": "hf:org/huge",
    "gguf_damaged": "hf:org/gguf",
}


@pytest.mark.parametrize("code", FAILURES)
def test_what_cannot_be_had_is_said_and_nothing_is_registered(hub, staff, files, code, data_dir):
    hub.add_repository("org/empty", {"config.json": b"{}", "tokenizer.json": b"{}"})
    hub.add_repository("org/partial", {"model.safetensors": files["model.safetensors"]})
    unknown = json.dumps({"model_type": "of_tomorrow"}).encode()
    hub.add_repository("org/tomorrow", {**files, "config.json": unknown})
    hub.add_repository("org/gguf", {"m.gguf": b"GGUF and no more"})
    hub.add_repository("org/huge", files)
    info = json.loads(hub.answers["/api/models/org/huge"].content)
    for file in info["siblings"]:
        if file["rfilename"] == "model.safetensors":
            file["size"] = 1 << 50
    hub.answers["/api/models/org/huge"].content = json.dumps(info).encode()
    hub.fault(
        "/api/models/org/name/revision/v9",
        Fault(status=404, headers={"X-Error-Code": "RevisionNotFound"}),
    )
    run = carry_out(wish(staff, FAILURES[code]))
    assert run.error["code"] == code
    assert not Checkpoint.objects.exists()
    assert [one.name for one in (data_dir / "checkpoints").iterdir()] == [".incoming"]
