"""The short form of `make chaos`."""

import json
import subprocess
import sys

import pytest

from tests.support import ROOT


def chaos(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_loses_nothing():
    figures = chaos(
        "--faults", "2", "--steps", "40", "--runs", "1", "--pause", "3", "--no-chat", "--kills",
        "--victim", "run's process",
    )  # fmt: skip
    assert sum(figures["faults"].values()) == 2 and figures["runs"] >= 1


@pytest.mark.slow  # two minutes
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_few_faults_lose_nothing():
    figures = chaos(
        "--faults", "3", "--steps", "60", "--runs", "1", "--pause", "2", "--no-chat", "--kills"
    )  # fmt: skip
    assert sum(figures["faults"].values()) == 3 and figures["runs"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_faults_lose_nothing():
    assert chaos("--seed", "1", "--faults", "50")["messages"] > 0
