"""The evaluation process on the starter model, killed and stopped on the way.

In a driver of its own, because the processes need a real database file. A run through the real
queue is in test_whole_loop.py.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow

DRIVER = """
import json, os, signal, subprocess, sys, time
import django
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from chat.models import Checkpoint
from chat.registry import ensure_starter
from evaluation.models import EvaluationRun
from evaluation.plan import create_evaluation
from portal.runs import lifecycle
from portal.models import Run, User
from tuning.datasets.store import ensure_sample
from tuning.models import Dataset

ensure_starter()
ensure_sample()
user = User.objects.create(username="member")
plan = {"dataset": Dataset.objects.get(), "checkpoint": Checkpoint.objects.get()}
plan |= {"max_source_length": 64}

def start(run):
    token = lifecycle.claim(run.pk)
    argv = [sys.executable, "-m", "portal.runs.process", str(run.pk), token]
    return subprocess.Popen(argv), token

def wait_for_rows(run, count):
    deadline = time.monotonic() + 300
    while run.predictions.count() < count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)

def told(run):
    run = EvaluationRun.objects.get(pk=run.pk)
    rows = list(run.predictions.values_list("row", "text"))
    fields = ("status", "attempt", "progress", "scores", "phase")
    return {"rows": rows, **{field: getattr(run, field) for field in fields}}

said = {}
"""


def drive(folder, script: str) -> dict:
    environment = {
        **os.environ,
        "PORTAL_DATA_DIR": str(folder),
        "DJANGO_SETTINGS_MODULE": "portal.settings",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + textwrap.dedent(script) + "\nprint(json.dumps(said))"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_goes_through_on_the_starter_model(tmp_path):
    said = drive(
        tmp_path,
        """
        run = create_evaluation(user, **plan, max_examples=6, max_target_length=24)
        process, token = start(run)
        said["exit"] = process.wait()
        said["run"] = told(run)
        """,
    )
    run = said["run"]
    assert (said["exit"], run["status"], run["progress"], run["phase"]) == (0, "succeeded", 6, "")
    assert len(run["rows"]) == 6 and all(text.strip() for _, text in run["rows"])
    assert 0 < run["scores"]["rouge-1"]["value"] < 100


def test_killed_stopped_cancelled_and_fenced_off(tmp_path):
    said = drive(
        tmp_path,
        """
        whole = create_evaluation(
            user, **plan, split="train", max_examples=300, decoding="upstream", max_target_length=64
        )
        process, token = start(whole)
        process.wait()
        said["whole"] = told(whole)

        run = create_evaluation(

            user, **plan, split="train", max_examples=300, decoding="upstream", max_target_length=64

        )
        process, token = start(run)
        wait_for_rows(run, 1)
        process.kill()
        process.wait()
        said["after_kill"] = told(run)
        lifecycle.lost(run.pk, token, "killed")  # what the supervising task does
        process, token = start(run)
        wait_for_rows(run, len(said["after_kill"]["rows"]) + 1)
        process.send_signal(signal.SIGTERM)
        said["exit_of_sigterm"] = process.wait()
        said["after_sigterm"] = told(run)
        process, token = start(run)
        process.wait()
        said["resumed"] = told(run)

        cancelled = create_evaluation(

            user, **plan, split="train", max_examples=400, max_target_length=64

        )
        process, token = start(cancelled)
        wait_for_rows(cancelled, 1)
        lifecycle.cancel(cancelled)
        process.wait()
        said["cancelled"] = told(cancelled)

        fenced = create_evaluation(

            user, **plan, split="train", max_examples=399, max_target_length=64

        )
        process, token = start(fenced)
        wait_for_rows(fenced, 1)
        Run.objects.filter(pk=fenced.pk).update(token="another")
        said["exit_of_fenced"] = process.wait()
        said["fenced"] = told(fenced)
        """,
    )
    assert said["whole"]["status"] == "succeeded" and len(said["whole"]["rows"]) == 300
    assert said["after_kill"]["status"] == "running" and 0 < len(said["after_kill"]["rows"]) < 300
    assert said["exit_of_sigterm"] == 0
    stopped = said["after_sigterm"]
    # stepping aside costs no attempt
    assert stopped["status"] == "queued" and stopped["attempt"] == 1
    assert len(said["after_kill"]["rows"]) < len(stopped["rows"]) < 300
    resumed = said["resumed"]
    assert resumed["status"] == "succeeded" and resumed["attempt"] == 2
    assert resumed["rows"] == said["whole"]["rows"] and resumed["scores"] == said["whole"]["scores"]
    assert said["cancelled"]["status"] == "cancelled" and 0 < len(said["cancelled"]["rows"]) < 400
    assert said["exit_of_fenced"] == 3
    assert said["fenced"]["status"] == "running" and said["fenced"]["scores"] is None
