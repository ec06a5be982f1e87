"""An update: the database that the first version filled serves the newest one's pages."""

import json
import os
import subprocess
import sys

from tests.support import ROOT
from tests.support.earlier_portal import ANSWER


def test_a_database_of_the_first_version_migrates_and_its_rows_are_shown(tmp_path):
    environment = {**os.environ, "PORTAL_DATA_DIR": str(tmp_path), "PORTAL_LOG_LEVEL": "ERROR"}
    environment.pop("PORTAL_DATABASE_URL", None)

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    python("-m", "tests.support.earlier_portal", "fill")
    python("manage.py", "migrate", "-v", "0")
    assert "No changes" in python("manage.py", "makemigrations", "--check", "--dry-run")
    told = json.loads(python("-m", "tests.support.earlier_portal", "look").splitlines()[-1])
    assert {path: status for path, (status, _text) in told.items() if status != 200} == {}
    texts = {path: text for path, (_status, text) in told.items()}
    talk = next(path for path in texts if path.startswith("/chat/"))
    assert ANSWER.replace("**answer**", "<strong>answer</strong>") in texts[talk]
    assert "waiting" in texts["/tasks/"] and "tuned" in texts["/adapters/"]
    assert '"pre_seq_len":4' in texts["/api/v1/tuning-runs/"].replace(" ", "")
