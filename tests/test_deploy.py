"""The files of deploy/ name what there is."""

import re
import shutil
import subprocess

import pytest
import yaml

from portal.checks import VARIABLES
from tests.support import ROOT

DEPLOY = ROOT / "deploy"


def test_every_variable_and_command_exists():
    for path in DEPLOY.iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"PORTAL_[A-Z_]+", text)) <= VARIABLES, path.name
        for command in re.findall(r"manage\.py (\w+)", text):
            assert (ROOT / "portal/management/commands" / f"{command}.py").exists(), path.name


def test_compose_builds_this_repository_and_waits_for_its_database():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    portal = compose["services"]["portal"]
    assert (DEPLOY / portal["build"]["context"] / portal["build"]["dockerfile"]).exists()
    assert set(portal["depends_on"]) == set(compose["services"]) - {"portal"}
    assert {volume.split(":")[0] for volume in portal["volumes"]} <= set(compose["volumes"])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_understands_the_units():
    units = [str(path) for kind in ("service", "timer") for path in DEPLOY.glob(f"*.{kind}")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert "Unknown" not in done.stderr
