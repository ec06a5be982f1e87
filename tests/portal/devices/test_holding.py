"""A run's process and its devices: waits with the reason, steps aside when one vanishes, frees them
whatever happens.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from portal.devices import arbiter, holding, inventory, overview
from portal.devices.declared import Declared
from portal.devices.models import Device, DeviceClaim
from portal.devices.placing import Wish
from portal.models import QueueHold, Run
from portal.runs import lifecycle
from portal.runs.heartbeat import STEP_ASIDE, RunFailed, StopRequested

GB = 10**9


class Beating:
    """A heartbeat that is only told of waiting. then: called the first time."""

    def __init__(self, then=None):
        self._then = then

    def waiting(self):
        then, self._then = self._then, None
        if then is not None:
            then()


@pytest.fixture
def here(settings, data_dir, monkeypatch):
    settings.BESIDE_CHAT, settings.DEVICES = "queue", (Declared("cpu", 8 * GB),)
    monkeypatch.setattr(holding, "POLL", 0.02)
    monkeypatch.setattr(holding, "WATCH", 0.05)


@pytest.fixture
def begin(member):
    def started():
        run = Run.objects.create(owner=member, kind="tuning", name="r")
        return run, lifecycle.claim(run.pk)

    return started


def hold(run, needs=1, lines=None, beating=None):
    lines = [] if lines is None else lines
    wish = Wish(arbiter.holder_of(run), "tuning", int(needs * GB), int(needs * GB))
    return holding.hold(run, wish, beating or Beating(), lines.append, label="tiny")


@pytest.mark.django_db
def test_the_claim_lasts_as_long_as_the_work(here, begin):
    run, token = begin()
    with hold(run) as granted:
        claim = DeviceClaim.objects.get()
        assert granted.shares == {"cpu": 1 * GB}
        assert (claim.bytes, claim.label, claim.token) == (1 * GB, "tiny", token)
    assert not DeviceClaim.objects.exists()
    with pytest.raises(ValueError), hold(run):
        raise ValueError("the work's own fault stays that")
    assert not DeviceClaim.objects.exists()


@pytest.mark.django_db
def test_what_never_fits_fails_with_the_figures(here, begin):
    run, _token = begin()
    with pytest.raises(RunFailed, match=r"9\.0 GB.*8\.0 GB") as failed, hold(run, 9):
        pass
    assert failed.value.code == "too_large_for_devices" and not DeviceClaim.objects.exists()


@pytest.mark.django_db
def test_a_held_queue_sends_back_who_has_not_begun(here, begin):
    (first, _t), (second, _u) = begin(), begin()
    with hold(first):
        QueueHold.objects.create(queue="gpu")
        with pytest.raises(StopRequested) as stopped, hold(second):
            pass
        assert stopped.value.reason == STEP_ASIDE
        assert DeviceClaim.objects.get().run == first  # nor does it stand in the line


@pytest.mark.django_db
def test_the_next_waits_says_why_and_goes_on_by_itself(here, begin):
    (first, _t), (second, _u) = begin(), begin()
    lines, ends = [], contextlib.ExitStack()
    ends.enter_context(hold(first, 7))

    def the_first_ends():
        assert overview.why_runs_wait().keys() == {second.pk}
        ends.close()

    with hold(second, 2, lines, Beating(the_first_ends)):
        assert DeviceClaim.objects.get().run == second
    assert len(lines) == 1 and f"#{first.pk}" in lines[0] and "cpu" in lines[0]


@pytest.mark.django_db
def test_a_fault_on_a_device_that_vanished_is_none_of_the_run(here, begin, staff):
    run, _token = begin()
    with pytest.raises(StopRequested) as stopped, hold(run):
        overview.take_out(staff, Device.objects.get())
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert stopped.value.reason == STEP_ASIDE


@pytest.mark.django_db
def test_a_device_that_vanishes_stops_the_work_as_sigterm_does(here, begin, monkeypatch):
    heard, gone = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: heard.set())
    try:
        run, _token = begin()
        with hold(run):
            monkeypatch.setattr(inventory, "register", list)
            monkeypatch.setattr(arbiter, "usable", lambda names: not gone.is_set())
            time.sleep(0.15)
            assert not heard.is_set()
            gone.set()
            deadline = time.monotonic() + 10
            while not heard.is_set() and time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard.is_set() and not DeviceClaim.objects.exists()


HOLD = """
import os, time, django
os.environ["DJANGO_SETTINGS_MODULE"] = "portal.settings"
django.setup()
from django.core.management import call_command
from portal.devices import holding, arbiter
from portal.devices.placing import Wish
from portal.models import Run, User
from portal.runs import lifecycle
call_command("migrate", verbosity=0)
run = Run.objects.create(owner=User.objects.create_user("a"), kind="tuning", name="r")
lifecycle.claim(run.pk)
class Beating:
    def waiting(self): pass
with holding.hold(run, Wish(arbiter.holder_of(run), "tuning", 1, 1), Beating(), print):
    print("holds", flush=True)
    time.sleep(600)
"""
LOOK = """
import os, django
os.environ["DJANGO_SETTINGS_MODULE"] = "portal.settings"
django.setup()
from portal.devices import arbiter
from portal.models import Run
from portal.runs import lifecycle
run = Run.objects.get()
print(arbiter.claims().count())
lifecycle.lost(run.pk, run.token, "exit code -9")
print(arbiter.claims().count())
"""


@pytest.mark.slow
def test_a_process_killed_while_it_holds(tmp_path):
    """The claim goes with the run's row, the lock with the process."""
    environment = {**os.environ, "PORTAL_DATA_DIR": str(tmp_path), "PORTAL_DEVICES": "cpu=8GB"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "holds\n"
    finally:
        process.kill()
        process.wait()
    told = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["1", "0"], told.stderr
    locks = list((tmp_path / "locks").iterdir())
    with contextlib.ExitStack() as opened:
        import fcntl

        for path in locks:
            fcntl.flock(opened.enter_context(open(path)), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert locks


@pytest.mark.django_db
def test_without_a_declaration_it_is_as_it_was(settings, data_dir, begin, monkeypatch):
    """No memory is counted: one run on the device, whatever the chat there takes."""
    monkeypatch.setattr(inventory, "_cards", lambda: None)
    assert (settings.DEVICES, settings.BESIDE_CHAT) == ((), "any")
    run, _token = begin()
    with hold(run, 10_000) as granted:
        assert list(granted.shares) == ["cpu"]
