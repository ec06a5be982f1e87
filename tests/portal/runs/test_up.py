"""`manage.py up` as people meet it: set-up, one account, children that come back, nothing left
behind.
"""

import contextlib
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
from http.cookiejar import CookieJar
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

import psutil
import pytest
from django.core.management import CommandError, call_command

from tests.support import ROOT
from tests.support.live_portal import Portal, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def portal(tmp_path_factory):
    before = os.umask(0o002)  # of a careless account, and its folder is there already
    portal = Portal(tmp_path_factory.mktemp("up") / "data", PORTAL_ALLOWED_HOSTS="portal.example")
    with portal as running:
        os.umask(before)
        wait_for(running.healthy, 180, "the portal with its model")
        yield running


def test_the_first_administrator_can_log_in_with_the_printed_password(portal):
    browser = build_opener(HTTPCookieProcessor(CookieJar()))
    page = browser.open(f"{portal.url}/login/").read().decode()
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page).group(1)
    form = urlencode(
        {"username": "admin", "password": portal.password(), "csrfmiddlewaretoken": token}
    ).encode()
    assert browser.open(f"{portal.url}/login/", form).url == f"{portal.url}/"
    assert browser.open(f"{portal.url}/admin/").status == 200


def test_nothing_it_writes_is_open_to_other_accounts(portal):
    assert stat.S_IMODE(portal.data_dir.stat().st_mode) == 0o700
    written = [path for path in portal.data_dir.rglob("*") if path != portal.log]
    assert portal.data_dir / "portal.sqlite3" in written and len(written) > 50
    assert not [path for path in written if path.lstat().st_mode & 0o077 and not path.is_symlink()]


def test_under_a_public_name_it_still_tells_when_it_is_ready(portal):
    wait_for(lambda: portal.url in portal.output(), 20, "the announcement")
    assert portal.get("/healthz", headers={"Host": "portal.example"})[0] == 200
    assert portal.get("/healthz", headers={"Host": "evil.example"})[0] == 400


def test_a_killed_web_process_comes_back(portal):
    killed = portal.pid_of("portal.web_server")
    os.kill(killed, signal.SIGKILL)
    wait_for(
        lambda: portal.healthy() and portal.pid_of("portal.web_server") != killed,
        20,
        "the web process to come back",
    )


def test_the_portal_answers_while_the_worker_restarts(portal):
    killed = portal.pid_of("inference_worker")
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: killed not in portal.processes(), 10, "the worker to be gone")
    status, report = portal.get("/healthz")
    assert status == 200 and report["status"] == "degraded"
    wait_for(portal.healthy, 40, "the worker to come back")


def test_a_killed_queue_cluster_leaves_no_orphans_and_comes_back(portal):
    before = {pid for pid, command in portal.processes().items() if "qcluster" in command}
    cluster = min(before)  # one of several queues'
    whole = {cluster, *(child.pid for child in psutil.Process(cluster).children(recursive=True))}
    os.kill(cluster, signal.SIGKILL)

    def renewed():
        now = {pid for pid, command in portal.processes().items() if "qcluster" in command}
        return len(now) >= len(before) and not now & whole

    wait_for(renewed, 20, "the cluster to be replaced as a whole")


def test_a_second_start_prints_no_password_and_a_taken_port_is_named(portal):
    second = Portal(portal.data_dir.parent / "second")
    second.port = portal.port
    with second:
        assert second.process.wait(30) != 0
        assert str(portal.port) in second.output() and "Traceback" not in second.output()


def test_a_port_that_is_none_is_named():
    with pytest.raises(CommandError, match="99999"):
        call_command("up", "--port", "99999")


def test_outside_the_virtual_environment_it_says_what_to_do():
    bare = subprocess.run(
        [sys.executable, "-S", "manage.py", "check"], cwd=ROOT, capture_output=True, text=True
    )
    assert bare.returncode == 1 and "make up" in bare.stderr and "Traceback" not in bare.stderr


def test_a_second_supervisor_on_the_same_folder_is_refused_by_name(portal):
    second = Portal(portal.data_dir)
    second.log = portal.data_dir / "second.log"
    second.start()
    assert second.process.wait(30) != 0
    told = second.output()
    assert portal.url in told and str(portal.process.pid) in told and "Traceback" not in told
    assert portal.healthy()


@pytest.mark.slow
@pytest.mark.parametrize("word", ["daphne", "inference_worker"])
def test_a_hung_child_is_noticed(portal, word):
    hung = portal.pid_of(word)
    os.kill(hung, signal.SIGSTOP)
    wait_for(lambda: portal.processes() and hung not in portal.processes(), 90, "its end")
    wait_for(portal.healthy, 90, "the portal to be well again")


@pytest.mark.slow
def test_a_worker_whose_socket_was_removed_comes_back(portal):
    (portal.data_dir / "worker.sock").unlink()
    (portal.data_dir / "worker_token").unlink()
    wait_for(lambda: portal.get("/healthz")[1]["status"] == "degraded", 10, "the loss")
    os.kill(portal.pid_of("daphne"), signal.SIGKILL)  # the next must still know the token
    wait_for(portal.healthy, 120, "the portal to be well again")


STOPS = [signal.SIGHUP, signal.SIGINT, signal.SIGKILL]
STOPS += [
    pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGQUIT)
]


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_it_starts_behind_a_proxy_in_an_old_terminal_on_an_ipv6_address(tmp_path):
    odd = {"http_proxy": "http://127.0.0.1:9", "PYTHONIOENCODING": "latin-1"}
    with Portal(tmp_path / "data", "--no-worker", "--host", "::1", **odd) as portal:
        url = f"http://[::1]:{portal.port}"
        wait_for(lambda: url in portal.output().replace("Data", ""), 180, "the announcement")
        shown = re.search(r"admin\n.*: (\S{16})\n", portal.output())
        assert shown and "Traceback" not in portal.output()
        login = build_opener(ProxyHandler({}), HTTPCookieProcessor(CookieJar()))
        page = login.open(f"{url}/login/").read().decode()
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page).group(1)
        form = {"username": "admin", "password": shown[1], "csrfmiddlewaretoken": token}
        assert login.open(f"{url}/login/", urlencode(form).encode()).url == f"{url}/"


@pytest.mark.parametrize("closed", [">&-", "| true"])
def test_a_password_that_nobody_can_read_is_not_given(tmp_path, closed):
    data = tmp_path / "data"
    environment = {**os.environ, "PORTAL_DATA_DIR": str(data), "PYTHONUNBUFFERED": "1"}
    command = f"{sys.executable} manage.py up --no-worker --port 0 {closed}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    with (
        contextlib.closing(sqlite3.connect(data / "portal.sqlite3")) as database,
        contextlib.suppress(sqlite3.OperationalError),  # it may have ended before there was a table
    ):
        assert database.execute("SELECT count(*) FROM portal_user").fetchone() == (0,)


@pytest.mark.parametrize("number", STOPS)
def test_nothing_is_left_behind(tmp_path, number):
    with Portal(tmp_path / "data", "--no-worker") as portal:
        wait_for(lambda: portal.healthy(worker=False), 180, "the web")
        assert len(portal.processes()) >= 4
        # A cluster whose idle worker was killed waits for ever (django-q2 #23), also to end.
        queue_workers = [
            pid for pid, command in portal.processes().items() if "qcluster" in command
        ]
        os.kill(max(queue_workers), signal.SIGKILL)
        portal.stop(number)
        wait_for(lambda: not portal.processes(), 10, "all processes to end")
