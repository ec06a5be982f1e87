"""A disk that is really full, under every writer. Needs to mount one of its own (root, Linux)."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from chat.engine import adapters
from portal.runs import process
from tests.support import ROOT
from tests.support.web_process import Web
from tuning.ptuning import training_state

FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FILE = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.json"\r\n\r\n'
    + b'{"content": "a", "summary": "b"}\n' * 3000
    + b"\r\n--x--\r\n"
)


@pytest.fixture
def disk(tmp_path):
    """A folder with room for 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def full(disk: Path):
    """Not a byte is free within the block."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65536) == 65536:
                pass
            while file.write(b"\0"):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    yield
    filler.unlink()


def test_the_portal_says_so_at_every_door_and_goes_on_when_there_is_room(disk):
    with Web(PORTAL_DATA_DIR=str(disk)) as web:
        said = {"model": "pretend", "messages": [{"role": "user", "content": "words 2"}]}
        with full(disk):
            for status, told in (
                web.call("POST", "/api/v1/datasets/", FILE, FORM),
                _first_refusal_of_a_message(web),
            ):
                assert (status, told["error"]["code"]) == (507, "disk_full")
            for path in ("/api/v1/conversations/", "/v1/models", "/api/v1/datasets/"):
                assert web.call("GET", path)[0] == 200
            assert web.call("POST", "/v1/chat/completions", said)[0] == 200  # keeps nothing
            status, health = web.call("GET", "/healthz")
            assert status == 200 and "disk_full" in health["problems"]
        assert web.call("POST", "/api/v1/datasets/", FILE, FORM)[0] == 201
        assert web.call("POST", "/api/v1/conversations/", {"title": "x"})[0] == 201
        with closing(sqlite3.connect(disk / "portal.sqlite3")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        left = [path for path in disk.rglob("*") if "import-" in path.name or ".part" in path.name]
        assert left == []


def _first_refusal_of_a_message(web) -> tuple[int, dict]:
    """The database's own log has room for some more rows, so not the first one is refused."""
    said = {"content": "refuse queue_full " + "x" * 150_000}
    for _message in range(100):
        status, told = web.call("POST", "/api/v1/conversations/", {"title": "x"})
        if status == 201:
            path = f"/api/v1/conversations/{told['id']}/messages/"
            status, told = web.call("POST", path, said)
        if status == 507:
            return status, told
    raise AssertionError("a full disk still takes messages")


def test_a_run_that_cannot_write_fails_with_that_code_and_leaves_nothing_half_written(disk):
    states, prefix = (
        disk / "states",
        adapters.KVPrefix(torch.zeros(8, 2, 4, 128, 64), True, "f" * 64),
    )
    state = {"prefix": torch.zeros(1000, 100)}
    training_state.save(states, 1, state)
    adapters.save(prefix, disk / "adapter")  # what fits, fits
    with full(disk):
        for write in (
            lambda: training_state.save(states, 2, state),
            lambda: adapters.save(prefix, disk / "another"),
        ):
            with pytest.raises(Exception) as fault:
                write()
            assert process._code_and_message(fault.value)[0] == "disk_full"
        with open(disk / "run.log", "a") as log:
            process.print_line("x" * 100_000, log)  # is no reason to stop
    assert training_state.load_newest(states, torch.device("cpu")).keys() == state.keys()
    assert [path.name for path in states.iterdir()] == ["step-00000001"]


def test_a_backup_without_room_says_so_and_is_none(disk, tmp_path):
    environment = {**os.environ, "PORTAL_DATA_DIR": str(tmp_path / "data")}

    def manage(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "manage.py", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert manage("migrate", "-v", "0").returncode == 0
    with full(disk):
        refused = manage("backup", str(disk / "backup"))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr
    assert "disk is full" in refused.stderr or "No space left" in refused.stderr
    assert not (disk / "backup" / "manifest.json").exists()
    assert manage("backup", str(disk / "again")).returncode == 0


def test_a_database_without_room_is_a_full_disk_to_a_run_too():
    from django.db import OperationalError

    fault = OperationalError("database or disk is full")
    assert process._code_and_message(fault)[0] == "disk_full"
    assert json.dumps(process._code_and_message(fault))
