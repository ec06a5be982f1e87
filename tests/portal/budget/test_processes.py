"""Real processes: a trainer that is killed is paid once, one whose units end saves its state."""

import os
import signal
import time

import pytest

from tests.support.live_portal import Portal, wait_for
from tests.tuning.test_processes import Runs

pytestmark = pytest.mark.slow

# as if runs like these had been done in no time: what is held is too little then
FAST = """
from datetime import timedelta
from django.utils import timezone
from portal.models import Run
like = Run.objects.order_by("-id").first()
for _ in range(5):
    Run.objects.create(owner=like.owner, kind="tuning", name="fast", status="succeeded",
        recipe=like.recipe, finished_at=timezone.now(),
        started_at=timezone.now() - timedelta(seconds=0.001))
"""


def test_killed_stopped_at_the_limit_and_gone_on(tmp_path):
    a_unit_a_second = {"PORTAL_DEVICE_RATE": "3600", "PORTAL_DEVICE": "cpu"}
    with Portal(tmp_path / "data", "--no-worker", **a_unit_a_second) as portal:
        wait_for(lambda: portal.healthy(worker=False), 90, "the portal")
        runs = Runs(portal, tmp_path)

        def give(units):
            body = {"user": "admin", "units": units, "expires_at": "2035-01-01T00:00:00Z"}
            status, made = portal.call("POST", "/api/v1/budget/grants/", body, key=runs.key)
            assert status == 201, made
            return made["id"]

        grant, began = give(5000), time.monotonic()
        first = runs.start(60)
        assert runs.get("budget")["held"] == "3600.000000"  # of unknown speed: an hour
        runs.after_step(first, 20)
        os.kill(runs.trainer(), signal.SIGKILL)
        runs.end(first)
        told = runs.get("budget")
        used = float(told["used"])
        assert told["held"] == "0.000000" and 0 < used < time.monotonic() - began
        assert [entry["kind"] for entry in told["entries"]] == ["settle", "hold", "grant"]
        device = runs.get("usage")[0]
        assert device["device_seconds"] == pytest.approx(used, abs=0.01)

        portal.manage("shell", "-v", "0", "-c", FAST)
        path = f"/api/v1/budget/grants/{grant}/withdraw/"
        assert portal.call("POST", path, key=runs.key)[0] == 200
        give(int(used) + 15)  # loading takes part of it
        second = runs.start(20_000)
        state = runs.end(second, "cancelled")
        assert state["error"]["code"] == "budget_spent"
        assert "state saved" in runs.log(second)
        assert runs.get("budget")["left"] == "0.000000"
        status, refused = runs.post(second, "resume")
        assert (status, refused["error"]["code"]) == (429, "budget_too_small")
        give(3000)
        assert runs.post(second, "resume")[0] in (200, 202)
        runs.after_step(second, state["step"])
        assert "going on after step" in runs.log(second)
        runs.post(second, "cancel")
        runs.end(second, "cancelled")
        settled = [entry for entry in runs.get("budget")["entries"] if entry["kind"] == "settle"]
        assert len(settled) == 3
