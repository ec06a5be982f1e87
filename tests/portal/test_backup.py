"""`manage.py backup` while the portal writes, `manage.py restore` into an empty folder."""

import json
import os
import subprocess
import sys
from urllib.parse import urlsplit

import psycopg
import pytest
from django.core.management import CommandError, call_command

from portal.backup import BackupProblem, restore
from portal.runs.supervisor import only_one
from tests.support import ROOT

WRITES = """
import django; django.setup()
import json, sys, io
from django.core.management import call_command
call_command("migrate", verbosity=0)
from chat.models import Conversation
from chat.registry import ensure_starter
from portal.models import User
from tuning.datasets.store import ingest
from tuning.plan import create_run
user = User.objects.create_user("member", password="secret of the member")
base = ensure_starter()
number = 0
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(20):
        number += 1
        row = json.dumps({"prompt": f"question {number}", "response": "answer"}).encode()
        dataset = ingest(io.BytesIO(row), name=f"rows {number}", owner=user)
        conversation = Conversation.objects.create(owner=user, title=f"{number}")
        conversation.messages.create(role="user", content=f"{number}")
    print("written", number, flush=True)
"""

READS = """
import django; django.setup()
import json
from chat.models import Conversation, Message
from portal.models import User
from tuning.datasets.store import examples
from tuning.models import Dataset
from django.db import connection
with connection.cursor() as cursor:
    cursor.execute("PRAGMA integrity_check")
    whole = cursor.fetchall()
for dataset in Dataset.objects.exclude(owner=None):
    (row,) = examples(dataset.current, "train", 0, 2)
    assert row["prompt"] == "question " + dataset.name.split()[1]
print(json.dumps({
    "whole": whole, "datasets": Dataset.objects.exclude(owner=None).count(),
    "conversations": Conversation.objects.count(), "messages": Message.objects.count(),
    "login": User.objects.get(username="member").check_password("secret of the member"),
}))
"""


def environment(folder):
    return {
        **os.environ,
        "PORTAL_DATA_DIR": str(folder),
        "DJANGO_SETTINGS_MODULE": "portal.settings",
        "PORTAL_WORKER_TOKEN": "not to be kept",
    }


def manage(folder, *arguments, **more):
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env=environment(folder) | more,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def backup(tmp_path_factory):
    """Taken in the middle of writing; (folder, rows that were there for certain)."""
    root = tmp_path_factory.mktemp("backup")
    with subprocess.Popen(
        [sys.executable, "-c", WRITES],
        cwd=ROOT,
        env=environment(root / "data"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writing:
        assert writing.stdout.readline() == "ready\n"
        writing.stdin.write("\n")
        writing.stdin.flush()
        before = int(writing.stdout.readline().split()[1])
        writing.stdin.write("\n" * 3)
        writing.stdin.flush()
        done = manage(root / "data", "backup", str(root / "copy"))
        writing.stdin.close()
    assert done.returncode == 0, done.stderr
    return root / "copy", before


def test_a_backup_taken_while_rows_are_written_is_whole(backup, tmp_path):
    copy, before = backup
    done = manage(tmp_path / "new", "restore", str(copy))
    assert done.returncode == 0, done.stderr
    script = [sys.executable, "-c", READS]
    read = subprocess.run(
        script, cwd=ROOT, env=environment(tmp_path / "new"), capture_output=True, text=True
    )
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout)
    assert found["whole"] == [["ok"]] and found["login"]
    assert found["datasets"] >= before and found["conversations"] >= before
    assert found["datasets"] - found["messages"] in (0, 1), "cut between two rows, not through one"
    assert (tmp_path / "new" / "secret_key").read_text() == (copy / "secret_key").read_text()


def test_a_backup_is_private_and_names_no_secret_in_clear(backup):
    copy, _before = backup
    assert not [path for path in copy.rglob("*") if path.stat().st_mode & 0o077]
    assert "not to be kept" not in (copy / "environment.txt").read_text()


def test_what_is_damaged_is_refused_before_anything_changes(backup, data_dir, db):
    copy, _before = backup
    victim = next((copy / "datasets").glob("*.jsonl"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    try:
        with pytest.raises(BackupProblem, match=f"{victim.name} is damaged"):
            restore(copy)
    finally:
        victim.write_bytes(whole)
    assert not (data_dir / "datasets").exists()
    (data_dir / "half").mkdir()
    with pytest.raises(BackupProblem, match="not a complete backup"):
        restore(data_dir / "half")


def test_what_is_not_empty_is_refused(backup, data_dir, db):
    copy, _before = backup
    with pytest.raises(CommandError, match="database of this portal is not empty"):
        call_command("restore", str(copy))
    with pytest.raises(CommandError, match="is not empty"):
        call_command("backup", str(copy))
    with pytest.raises(CommandError, match="lies in the data folder"):
        call_command("backup", str(data_dir / "backups"))
    with (
        only_one(data_dir, "another portal"),
        pytest.raises(CommandError, match="another portal, process"),
    ):
        call_command("restore", str(copy))


@pytest.mark.postgres
@pytest.mark.skipif(not os.environ.get("TEST_POSTGRES_URL"), reason="TEST_POSTGRES_URL is not set")
def test_postgresql_is_dumped_and_restored_with_its_own_programs(tmp_path):
    """Into a second database of the same server, which is made and dropped here."""
    url = os.environ["TEST_POSTGRES_URL"]
    names = [f"portal_{os.getpid()}_{part}" for part in ("from", "to")]
    with psycopg.connect(url, autocommit=True) as server:
        for name in names:
            server.execute(f'CREATE DATABASE "{name}"')
        urls = [urlsplit(url)._replace(path=f"/{name}").geturl() for name in names]
        try:
            source, target = tmp_path / "from", tmp_path / "to"
            made = (
                "from django.contrib.auth import get_user_model as m;"
                "m().objects.create_user('member', password='secret of the member')"
            )
            for arguments in (["migrate", "-v", "0"], ["shell", "-v", "0", "-c", made]):
                done = manage(source, *arguments, PORTAL_DATABASE_URL=urls[0])
                assert done.returncode == 0, done.stderr
            done = manage(source, "backup", str(tmp_path / "copy"), PORTAL_DATABASE_URL=urls[0])
            assert done.returncode == 0, done.stderr
            other = manage(target, "restore", str(tmp_path / "copy"))
            assert "PORTAL_DATABASE_URL" in other.stderr, "not into SQLite"
            done = manage(target, "restore", str(tmp_path / "copy"), PORTAL_DATABASE_URL=urls[1])
            assert done.returncode == 0, done.stderr
            with psycopg.connect(urls[1]) as restored:
                found = restored.execute("SELECT username FROM portal_user").fetchall()
            assert found == [("member",)]
        finally:
            for name in names:
                server.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
