"""The model tests again, on PostgreSQL. Needs TEST_POSTGRES_URL, e.g.
postgres://postgres@127.0.0.1:5432/test.
"""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

MODEL_TESTS = [
    "tests/portal/runs/test_lifecycle.py",
    "tests/portal/runs/test_board.py",
    "tests/portal/budget",
    "tests/portal/devices",
    "tests/portal/test_once.py",
    "tests/portal/test_access.py",
    "tests/chat/conversations/test_turns.py",
    "tests/chat/test_registry.py",
    "tests/tuning/test_plan.py",
    "tests/tuning/test_api.py",
    "tests/tuning/datasets",
    "tests/evaluation",
]


@pytest.mark.postgres
@pytest.mark.skipif(not os.environ.get("TEST_POSTGRES_URL"), reason="TEST_POSTGRES_URL is not set")
def test_the_model_tests_pass_on_postgresql():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *MODEL_TESTS],
        cwd=ROOT,
        env={**os.environ, "PORTAL_DATABASE_URL": os.environ["TEST_POSTGRES_URL"]},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
