"""What the supervisor sees of its children; as a whole it is in test_up.py."""

import signal
import socket
import sys

import pytest

from portal.runs import children, supervisor
from portal.runs.supervisor import Child, Probe
from tests.support.live_portal import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(supervisor, "PROBE_EVERY", 0.01)
    monkeypatch.setattr(supervisor, "PROBE_TIMEOUT", 0.05)


def test_a_process_that_no_longer_answers_is_killed_and_one_that_never_did_is_not_yet(quick):
    with socket.create_server(("127.0.0.1", 0)) as server:
        probe = Probe(lambda timeout: socket.create_connection(server.getsockname(), timeout), "/")
        child = Child("web", SLEEP, probe=probe)
        child.start()
        probe.begin()
        try:
            for _ in range(supervisor.MOST_MISSES + 1):  # it listens, and says nothing
                server.accept()[0].close()
            child.kill_if_hung()
            assert child.process.poll() is None and probe.misses is None, "it may still be starting"
            answered = False
            while not answered:
                connection = server.accept()[0]
                with connection:
                    connection.settimeout(1.0)
                    answered = connection.recv(1000).startswith(b"HEAD / HTTP/1.0")
                    connection.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")  # an answer is an answer
                answered = bool(wait_for(lambda: probe.misses is not None, 10, "the answer"))
            wait_for(lambda: probe.misses >= supervisor.MOST_MISSES, 20, "the misses")
            child.kill_if_hung()
            wait_for(child.died, 10, "its end")
        finally:
            if child.process is not None:
                children.kill_group(child.process)


def test_a_run_process_without_a_queue_worker_is_killed_after_a_grace(data_dir, monkeypatch):
    monkeypatch.setattr(children, "GRACE", 0.0)
    monkeypatch.setenv("PORTAL_DATA_DIR", str(data_dir))
    stray = children.spawn([*SLEEP, children.RUN_PROCESS])
    stray.send_signal(signal.SIGSTOP)  # SIGTERM would wait for ever
    wait_for(lambda: children.stray_run_processes(), 10, "the stray")
    watching = supervisor.Supervisor([])
    watching._end_strays()  # seen
    watching._end_strays()
    assert stray.wait(10) == -signal.SIGKILL
    assert children.stray_run_processes() == []


def test_one_supervisor_for_a_folder(tmp_path):
    with (
        supervisor.only_one(tmp_path, "http://127.0.0.1:8000"),
        pytest.raises(supervisor.AlreadySupervised, match=r"127.0.0.1:8000, process \d+ on "),
        supervisor.only_one(tmp_path, "http://127.0.0.1:8001"),
    ):
        pytest.fail("held twice")
    with supervisor.only_one(tmp_path, "http://127.0.0.1:8001"):
        assert "8000" not in (tmp_path / "supervisor.lock").read_text()
