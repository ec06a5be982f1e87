"""Runs through a launcher: PORTAL_LAUNCHER, what the queue does, a real process at its end.

In a driver of its own, because the processes need a real database file.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.evaluation.test_process import DRIVER
from tests.support import ROOT

pytestmark = pytest.mark.slow

LAUNCH = """
from datetime import timedelta
from pathlib import Path
from portal.runs import children

lifecycle.LEASE = timedelta(seconds=12)
WATCH = "import django; django.setup(); from portal.runs import children, lifecycle;"
WATCH += "children.answer_bell('gpu')"

def watcher():
    return subprocess.Popen([sys.executable, "-c", WATCH])

def until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

def status(run):
    return EvaluationRun.objects.get(pk=run.pk).status
"""


def drive(folder, seconds: float, script: str) -> dict:
    environment = {
        **os.environ,
        "PORTAL_DATA_DIR": str(folder),
        "PORTAL_LAUNCHER": f"{sys.executable} -m tests.support.launcher {seconds}",
        "LAUNCHER_KILLS": str(folder / "kill"),
        "DJANGO_SETTINGS_MODULE": "portal.settings",
        "OMP_NUM_THREADS": "1",
    }
    code = DRIVER + LAUNCH + textwrap.dedent(script) + "\nprint(json.dumps(said))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_that_waits_for_a_machine_keeps_its_lease_and_can_be_cancelled(tmp_path):
    said = drive(
        tmp_path,
        600,
        """
        run = create_evaluation(user, **plan, max_examples=2, max_target_length=8)
        process = watcher()
        until(lambda: EvaluationRun.objects.get(pk=run.pk).phase == "waiting")
        began = EvaluationRun.objects.get(pk=run.pk).heartbeat_at
        until(lambda: EvaluationRun.objects.get(pk=run.pk).heartbeat_at - began > lifecycle.LEASE)
        said["waiting"] = told(run)
        lifecycle.cancel(run)
        process.wait()
        said["cancelled"] = told(run)
        """,
    )
    waiting, cancelled = said["waiting"], said["cancelled"]
    assert (waiting["status"], waiting["attempt"]) == ("running", 1)
    assert (cancelled["status"], cancelled["rows"]) == ("cancelled", [])


def test_delays_kills_and_signals_of_a_launcher(tmp_path):
    said = drive(
        tmp_path,
        16,
        """
        short = create_evaluation(user, **plan, max_examples=4, max_target_length=8)
        children.answer_bell("gpu")
        said["delayed"] = told(short)

        run = create_evaluation(
            user, **plan, split="train", max_examples=300, max_target_length=64
        )
        # Its machine dies: the run is lost, and queued again.
        process = watcher()
        until(lambda: run.predictions.count() >= 1)
        Path(os.environ["LAUNCHER_KILLS"]).touch()
        process.wait()
        said["killed"] = told(run)
        # The queue's process is killed: the launcher forwards the SIGTERM that this sends it.
        process = watcher()
        until(lambda: run.predictions.count() > len(said["killed"]["rows"]))
        process.kill()
        until(lambda: status(run) == "queued")
        said["stopped"] = told(run)
        children.answer_bell("gpu")
        said["end"] = told(run)
        """,
    )
    delayed, killed, stopped, end = (said[name] for name in ("delayed", "killed", "stopped", "end"))
    assert (delayed["status"], delayed["attempt"], len(delayed["rows"])) == ("succeeded", 1, 4)
    assert (killed["status"], killed["attempt"]) == ("queued", 1)
    assert stopped["status"] == "queued" and len(stopped["rows"]) > len(killed["rows"])
    assert (end["status"], len(end["rows"])) == ("succeeded", 300)
    # what was saved before is not done again
    assert set(map(tuple, stopped["rows"])) <= set(map(tuple, end["rows"]))
