"""`manage.py inference_worker` and `manage.py chat` as people run them: processes of their own, the
starter model, a database.
"""

import asyncio
import fcntl
import os
import pty
import select
import signal
import sqlite3
import stat
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from chat.engine.request import AdapterRef, Request, RequestRefused, SamplingParams
from chat.worker import router
from chat.worker.router import CheckpointRef, Router, SequenceLost, WorkerUnavailable
from tests.support import ROOT
from tests.support.live_portal import wait_for

pytestmark = pytest.mark.slow  # each start of a worker imports torch
REGISTER = (
    "import django; django.setup(); from chat.registry import ensure_starter; ensure_starter()"
)


class Installation:
    """A data folder with a database in which the starter model is registered."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PORTAL_DATA_DIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "DJANGO_SETTINGS_MODULE": "portal.settings",
        }
        self.url = f"unix:{folder}/worker.sock"
        self.manage("migrate", "-v", "0")
        subprocess.run([sys.executable, "-c", REGISTER], cwd=ROOT, env=self.environment, check=True)
        self.token = (folder / "worker_token").read_text()

    def manage(self, *arguments, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )

    def start_worker(self) -> subprocess.Popen:
        with open(self.folder / "worker.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "manage.py", "inference_worker"],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def status(self) -> dict:
        known = router._worker_settings
        router.configure(lambda: router.WorkerSettings((self.url,), self.token))
        try:
            return router.status_sync(timeout=2.0)
        except WorkerUnavailable as error:
            return {"state": "unavailable", "reason": error.message}
        finally:
            router.configure(known)

    def reaches(self, state: str, process: subprocess.Popen):
        def look():
            assert process.poll() is None, (self.folder / "worker.log").read_text()[-2000:]
            status = self.status()
            return status if status["state"] == state else None

        return wait_for(look, 90, f"the worker to be {state}")


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    return Installation(tmp_path_factory.mktemp("data"))


async def ask(router, status, content, **sampling):
    request = Request(
        os.urandom(8).hex(),
        ({"role": "user", "content": content},),
        sampling=SamplingParams(do_sample=False, **sampling),
    )
    await router.submit(request, CheckpointRef(status["checkpoint"], status["fingerprint"]))
    return request.id


async def read(router, id) -> list:
    async with asyncio.timeout(60):
        return [event async for events in router.events(id) for event in events]


def test_a_worker_from_start_to_replacement(installation):
    """One process after another, because each start costs seconds: ready, answers, killed, back,
    terminated, replaced.
    """
    worker = installation.start_worker()
    try:
        installation.reaches("loading", worker)  # it listens before it can answer
        status = installation.reaches("ready", worker)
        assert (status["checkpoint"], status["pid"]) == ("starter", worker.pid)
        assert {
            "active_rows",
            "queue",
            "max_rows",
            "tokens_per_second",
            "adapters",
            "memory",
        } <= status.keys()
        socket = os.stat(installation.folder / "worker.sock")
        assert stat.S_IMODE(socket.st_mode) == 0o600

        async def talk_and_be_killed():
            router = Router([installation.url], installation.token)
            answer = await read(router, await ask(router, status, "你好"))
            assert "".join(event.data["text"] for event in answer if event.type == "delta")
            assert answer[-1].data["usage"]["completion_tokens"] > 1
            with pytest.raises(RequestRefused) as refusal:
                await ask(router, status, "你好" * 5000)
            assert refusal.value.code == "context_length_exceeded"
            with pytest.raises(RequestRefused) as refusal:
                bad = Request(
                    "bad",
                    ({"role": "user", "content": "x"},),
                    adapter=AdapterRef("none", "/nowhere"),
                )
                await router.submit(bad, CheckpointRef(status["checkpoint"], status["fingerprint"]))
            assert refusal.value.code == "invalid_adapter"
            # so that the answer cannot be finished before the kill
            os.kill(worker.pid, signal.SIGSTOP)
            pending = asyncio.create_task(ask(router, status, "你好"))
            await asyncio.sleep(0.1)
            worker.kill()
            with pytest.raises((WorkerUnavailable, SequenceLost)):
                await read(router, await pending)
            await router.close()

        asyncio.run(talk_and_be_killed())
        worker.wait()
        assert installation.status()["state"] == "unavailable"

        worker = installation.start_worker()  # over the socket file that the killed one left
        status = installation.reaches("ready", worker)

        async def talk_again():
            router = Router([installation.url], installation.token)
            answer = await read(router, await ask(router, status, "你好"))
            assert answer[-1].data["finish_reason"] in ("stop", "length")
            await router.close()

        asyncio.run(talk_again())
        chat = installation.manage("chat", "--temperature", "0", input="你好\nclear\n你好\nstop\n")
        lines = chat.stdout.split("\n")
        assert chat.returncode == 0 and lines[0] == lines[2] != "", chat.stdout + chat.stderr
        assert "loading" not in chat.stderr.lower()

        with sqlite3.connect(installation.folder / "portal.sqlite3") as database:
            database.execute("DELETE FROM chat_checkpoint")
        assert worker.wait(30) == 3
    finally:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def test_terminated_while_loading_it_ends_at_once(installation):
    worker = installation.start_worker()
    try:
        installation.reaches("loading", worker)
        worker.terminate()
        assert worker.wait(10) == 0
    finally:
        worker.kill()


def test_what_is_not_there_is_named(installation):
    result = installation.manage("inference_worker", "--checkpoint", "glm-9000")
    assert result.returncode == 3 and "glm-9000" in result.stderr
    result = installation.manage("inference_worker", "--listen", "somewhere")
    assert result.returncode == 1 and "somewhere" in result.stderr
    result = installation.manage("chat", "--adapter", "unknown", input="")
    assert result.returncode == 1 and "unknown" in result.stderr
    result = installation.manage("chat", "--temperature", "9", "--top-p", "0", input="")
    assert (
        result.returncode == 1
        and "--temperature: " in result.stderr
        and "--top-p: " in result.stderr
    )


def test_chat_without_a_worker_loads_the_model_itself(installation):
    chat = installation.manage("chat", "--temperature", "0", input="你好\n")
    assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr
    asked = "你好\n/model nobody\n/adapter\n/nonsense\n你好\n"
    many = installation.manage("chat", "--max-new-tokens", "100000", "--seed", "1", input=asked)
    assert many.returncode == 0 and "nobody" in many.stderr, many.stderr
    assert "/adapter" in many.stdout, "what is no command is told the commands"


def test_chat_asks_again_for_what_is_not_in_its_encoding(installation):
    chat = subprocess.run(
        [sys.executable, "manage.py", "chat", "--temperature", "0"],
        cwd=ROOT,
        env={**installation.environment, "PYTHONIOENCODING": "utf-8:strict"},
        input=b"\xc4\xe3\xba\xc3\n" + "你好\nstop\n".encode(),
        capture_output=True,
    )
    assert b"UTF-8" in chat.stderr and b"Traceback" not in chat.stderr, chat.stderr.decode()
    assert chat.stdout.decode().strip()


def test_ctrl_c_at_the_prompt_does_not_end_the_chat(installation):
    """As in a terminal: the key comes just after the answer's end, and the conversation goes on."""
    command = [sys.executable, "manage.py", "chat", "--temperature", "0"]
    ours, theirs = pty.openpty()
    chat = subprocess.Popen(
        command,
        cwd=ROOT,
        env=installation.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown = bytearray()

    def hears(mark: str):
        def look():
            if select.select([ours], [], [], 0)[0]:
                shown.extend(os.read(ours, 65536))
            return mark.encode() in shown

        wait_for(look, 60, f"{mark!r} in the terminal")
        shown.clear()

    try:
        hears("你：")
        os.write(ours, b"\x03")
        hears("你：")
        os.write(ours, "你好\n".encode())
        hears("你：")
        os.write(ours, b"stop\n")
        assert chat.wait(30) == 0
    finally:
        chat.kill()
        os.close(ours)
