"""The published schema against what answers: every operation, bodies that fit it and bodies that do
not, by schemathesis.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.web_process import Web

EXAMPLES = 15  # of every operation and phase
_ROWS = "it names rows by their ids, and no schema says which there are: 400"
# where a body that fits the schema may still be refused
REFUSED_ALL_THE_SAME = {
    "POST /api/v1/check-runs/": _ROWS,
    "POST /api/v1/evaluation-runs/": _ROWS,
    "POST /api/v1/tuning-runs/": _ROWS,
    "POST /api/v1/conversations/{id}/messages/": _ROWS,
    "POST /api/v1/datasets/": "not every file holds rows",
}
CONFIGURATION = "".join(
    f"""[[operations]]
include-name = "{name}"
checks.positive_data_acceptance.enabled = false
"""
    for name in REFUSED_ALL_THE_SAME
)


@pytest.mark.slow  # minutes
@pytest.mark.timeout(1800)
def test_every_operation_answers_as_the_schema_says(tmp_path):
    program = Path(sys.executable).with_name("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)  # where it runs, it is read
    with Web() as web:
        done = subprocess.run(
            [
                str(program), "run", f"{web.url}/api/schema/",
                "--header", f"Authorization: Bearer {web.key}",
                "--phases", "examples,coverage,fuzzing",
                "--max-examples", str(EXAMPLES),
                "--seed", "1",
                "--request-timeout", "30",
                "--generation-database", "none",
                "--no-color",
            ],
            cwd=tmp_path, env={**web.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        log = Path(web.log.name).read_text()
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert " ERROR " not in log, log[-5000:]
