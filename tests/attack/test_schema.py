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
NOT_ASKED = {
    "positive_data_acceptance": "what fits the schema may still name a row that is not there",
    "negative_data_rejection": "a number where a text is asked is taken as its text",
}


@pytest.mark.slow  # minutes
@pytest.mark.timeout(1800)
def test_every_operation_answers_as_the_schema_says(tmp_path):
    program = Path(sys.executable).with_name("schemathesis")
    with Web() as web:
        done = subprocess.run(
            [
                str(program), "run", f"{web.url}/api/schema/",
                "--header", f"Authorization: Bearer {web.key}",
                "--phases", "examples,coverage,fuzzing",
                "--max-examples", str(EXAMPLES),
                "--seed", "1",
                "--exclude-checks", ",".join(NOT_ASKED),
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
