"""What a worker loads, and what it writes down when it cannot."""

import pytest

from chat import serving, supply
from chat.checkpoints import memory
from chat.models import Checkpoint, ServingSwitch
from chat.registry import register_checkpoint
from chat.worker_claims import WorkerClaims
from portal.devices import arbiter, inventory, reasons
from portal.devices.declared import Declared
from portal.devices.placing import Wish
from portal.explanations import explained
from portal.models import Run
from portal.rest.conventions import Conflict
from portal.runs import lifecycle
from tests.support.folders import checkpoint_folder

pytestmark = pytest.mark.django_db


@pytest.fixture
def pair(tmp_path, data_dir):
    """(the default, another one)"""
    return tuple(
        register_checkpoint(checkpoint_folder(tmp_path / name, seed=seed), name)
        for seed, name in enumerate(("old", "new"))
    )


@pytest.fixture
def worker(pair):
    """A worker's supply that serves the default already."""
    found = supply.DatabaseSupply()
    found.succeeded(found.first(), "hello", 1.0)
    return found


def begun(worker, checkpoint, staff) -> tuple[ServingSwitch, object]:
    switch = serving.serve(checkpoint, staff)
    target = worker.wanted()
    worker.tell(target, "loading")
    switch.refresh_from_db()
    assert switch.status == "loading" and target.name == checkpoint.name
    return switch, target


def test_a_change_that_fails_gives_the_default_back(pair, worker, staff):
    old, new = pair
    switch, target = begun(worker, new, staff)
    back = worker.failed(target, supply.LoadFailed("try_out_failed", "NaN"))
    switch.refresh_from_db()
    assert (switch.status, switch.error["code"]) == ("failed", "try_out_failed")
    assert back.name == "old" and Checkpoint.default() == old


def test_a_later_wish_is_not_undone(pair, worker, staff, tmp_path):
    _old, new = pair
    third = register_checkpoint(checkpoint_folder(tmp_path / "third", seed=3), "third")
    switch, target = begun(worker, new, staff)
    serving.serve(third, staff)
    worker.failed(target, RuntimeError("no"))
    assert Checkpoint.default() == third
    switch.refresh_from_db()
    assert switch.status == "failed"


def test_what_nobody_has_begun_is_superseded(pair, staff, tmp_path):
    old, new = pair
    first = serving.serve(new, staff)
    second = serving.serve(old, staff)
    first.refresh_from_db()
    assert (first.status, first.error["code"], second.status) == ("failed", "superseded", "waiting")


def test_a_worker_that_died_while_it_loaded_leaves_the_old_default(pair, worker, staff):
    old, new = pair
    switch, _target = begun(worker, new, staff)
    host = switch.worker.rpartition(":")[0]
    ServingSwitch.objects.update(worker=f"{host}:{2**22 + 1}")  # no such process
    assert supply.DatabaseSupply().first().name == "old"
    switch.refresh_from_db()
    assert switch.error["code"] == "worker_died" and Checkpoint.default() == old


@pytest.mark.parametrize(
    ("has", "free", "code"),
    [(1 << 20, 1 << 40, "too_large"), (1 << 40, 1 << 20, "memory_too_small")],
)
def test_what_does_not_fit_is_not_loaded(pair, monkeypatch, has, free, code):
    monkeypatch.setattr(supply, "machine", lambda: memory.Machine("cpu", has))
    monkeypatch.setattr(supply, "_free", lambda: free)
    with pytest.raises(supply.LoadFailed, match="new needs about") as failed:
        supply._check_room(pair[1])
    assert failed.value.code == code


CODES = [
    "too_large",
    "memory_too_small",
    "try_out_failed",
    "weights_invalid",
    "worker_died",
    "checkpoint_changed",
    "superseded",
    "loading_failed",
    "worker_loading",
]


@pytest.mark.parametrize("language", ["en", "zh-hans"])
@pytest.mark.parametrize("code", CODES)
def test_every_reason_is_explained(settings, language, code):
    from django.utils import translation

    with translation.override(language):
        text = explained({"code": code, "message": "-"})
    chinese = any("\u4e00" <= character <= "\u9fff" for character in text)
    assert text != "-" and chinese == (language == "zh-hans")


def test_precision_is_a_change_of_the_served_one_alone(pair, staff):
    old, new = pair
    serving.set_precision(new, "int8", staff)
    assert not ServingSwitch.objects.exists()
    serving.set_precision(old, "int4", staff)
    switch = ServingSwitch.objects.get()
    assert (switch.precision, switch.previous_precision, switch.previous) == ("int4", "", old)
    with pytest.raises(Conflict):
        serving.set_precision(old, "int2", staff)


def test_doors(pair, client, staff, member, django_user_model):
    _old, new = pair
    client.force_login(member)
    assert client.post(f"/checkpoints/{new.pk}/change/", {"action": "default"}).status_code == 403
    client.force_login(staff)
    client.post(f"/checkpoints/{new.pk}/change/", {"action": "precision", "precision": "int8"})
    client.post(f"/checkpoints/{new.pk}/change/", {"action": "default"})
    switch = ServingSwitch.objects.get()
    assert (switch.checkpoint, switch.precision, switch.requested_by) == (new, "int8", staff)
    page = client.get(f"/checkpoints/{new.pk}/").content.decode()
    assert "等待推理进程" in page or "Waiting for the worker" in page
    again = client.post(f"/api/v1/checkpoints/{new.pk}/serve/")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "served_already")
    patched = client.patch(
        f"/api/v1/checkpoints/{new.pk}/", {"precision": "int3"}, content_type="application/json"
    )
    assert patched.status_code == 400
    told = client.get(f"/api/v1/serving-switches/{switch.pk}/").json()
    assert (told["status"], told["requested_by"]) == ("waiting", staff.username)


@pytest.mark.parametrize("language", ["en", "zh-hans"])
def test_the_page_tells_the_outcome(pair, worker, client, staff, language):
    _old, new = pair
    client.force_login(staff)
    client.defaults["HTTP_ACCEPT_LANGUAGE"] = language
    _switch, target = begun(worker, new, staff)
    worker.failed(target, supply.LoadFailed("memory_too_small", "4.0 GiB"))
    page = client.get(f"/checkpoints/{new.pk}/").content.decode()
    assert "4.0 GiB" in page and explained({"code": "memory_too_small"}) in page
    assert "“old” is served as before." in page or "仍由「old」提供服务。" in page
    _switch, target = begun(worker, new, staff)
    worker.succeeded(target, "Paris <b>is</b>", 2.5)
    page = client.get(f"/checkpoints/{new.pk}/").content.decode()
    assert "Paris &lt;b&gt;is" in page and "2.5" in page


@pytest.fixture
def declared(settings, monkeypatch):
    """One device of 8 GB; a model needs 3 of them, whatever its files say."""
    settings.DEVICES, settings.BESIDE_CHAT = (Declared("cuda:0", 8 * 10**9),), "queue"
    monkeypatch.setattr(inventory, "_cards", lambda: None)
    monkeypatch.setattr(WorkerClaims, "_renew", lambda self: None)  # a thread of the process
    monkeypatch.setattr(supply, "_bytes_needed", lambda checkpoint: 3 * 10**9)
    monkeypatch.setattr(supply, "_free", lambda: 100 * 10**9)
    inventory.register()


def held() -> list[tuple[str, int]]:
    return [(claim.label, claim.bytes // 10**9) for claim in arbiter.claims() if claim.device_id]


def test_a_worker_claims_what_it_has_in_memory(pair, declared):
    old, new = (supply._target(row) for row in pair)
    worker = supply.DatabaseSupply(address="unix:/a")
    assert worker.reserve(old) and held() == [("old", 3)]
    assert worker.reserve(new) and worker.fits_beside(new) and held() == [("new", 6)]
    worker.keep([new])
    assert held() == [("new", 3)]
    # started again it takes its own place, not another one
    again = supply.DatabaseSupply(address="unix:/a")
    assert again.reserve(old) and held() == [("old", 3)]
    assert again._claims.torch_device() == "cuda:0"
    again.keep([])
    assert held() == []


def test_a_worker_waits_for_a_run_and_a_switch_keeps_what_is_served(pair, declared, member):
    old, new = (supply._target(row) for row in pair)
    worker = supply.DatabaseSupply(address="unix:/a")
    assert worker.reserve(old)
    run = Run.objects.create(owner=member, kind="tuning", name="r")
    token = lifecycle.claim(run.pk)
    wish = Wish(arbiter.holder_of(run), "tuning", 4 * 10**9, 4 * 10**9)
    assert arbiter.ask(wish, run=run, token=token)
    assert worker.reserve(new) and not worker.fits_beside(new)  # the old one has to leave first
    other = supply.DatabaseSupply(address="unix:/b")
    assert not other.reserve(old)
    (waiting,) = arbiter.claims().filter(device=None)
    assert f"#{run.pk}" in reasons.in_words(waiting.reason)
    lifecycle.succeed(run.pk, token)
    assert other.reserve(old)
    assert not arbiter.claims().filter(device=None).exists()
