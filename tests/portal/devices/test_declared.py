"""PORTAL_DEVICES: what it may say, and what is told of what it may not."""

import os
import subprocess
import sys

import pytest
from django.utils.translation import override

from portal import checks
from portal.devices import inventory
from portal.devices.declared import Declared, Problem, parse
from tests.support import ROOT


def test_devices_with_their_memory():
    assert parse(" cuda:0=24GB, cuda:1 = 1.5 gib ,") == (
        (Declared("cuda:0", 24 * 10**9), Declared("cuda:1", 3 << 29)),
        (),
    )
    assert parse("cpu=512MiB")[0] == (Declared("cpu", 512 << 20),)
    assert parse("") == ((), ())


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("cuda:0=-24GB", "amount"),
        ("cuda:0=0GB", "too_small"),
        ("cuda:0=1MB", "too_small"),
        ("cuda:0=9999999GB", "too_large"),
        ("cuda:0=nanGB", "amount"),
        ("cuda:0=24", "amount"),
        ("cuda:0=24 apples", "amount"),
        ("cuda:0=1e3GB", "amount"),
        ("cuda:0", "amount"),
        ("gpu0=24GB", "name"),
        ("=24GB", "name"),
        ("cuda:-1=24GB", "name"),
        ("; rm -rf /", "name"),
        ("cpu=1GB,cpu=2GB", "twice"),
    ],
)
def test_what_is_no_capacity_is_told_in_both_languages(text, code, settings):
    settings.DEVICE_PROBLEMS = parse(text)[1]
    (problem,) = settings.DEVICE_PROBLEMS
    assert problem == Problem(text.split(",")[-1].strip(), code)
    (error,) = checks.devices()
    assert error.id == "portal.E011" and problem.part in error.msg
    with override("zh-hans"):
        chinese = inventory.problem_in_words(problem)
    assert problem.part in chinese and any("\u4e00" <= c <= "\u9fff" for c in chinese)


def test_the_portal_does_not_start_with_a_wrong_one(tmp_path):
    told = subprocess.run(
        [sys.executable, "manage.py", "check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PORTAL_DEVICES": "cuda:0=-1GB", "PORTAL_DATA_DIR": str(tmp_path)},
    )
    assert told.returncode == 1 and "“cuda:0=-1GB”: its memory is a positive number" in told.stderr
