"""The web process as people run it, in front of a worker process that needs no model."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tests.support import ROOT
from tests.support.live_portal import free_port, wait_for
from tests.support.worker_process import CHECKPOINT, TOKEN, PretendWorker

ROWS = f"""
from chat.models import Checkpoint, Conversation
from importlib import import_module
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from portal.models import ApiKey, User
Checkpoint.objects.create(
    name={CHECKPOINT.name!r}, path="/nowhere",
    fingerprint={CHECKPOINT.fingerprint!r}, is_default=True
)
user = User.objects.create(username="member")
session = import_module(settings.SESSION_ENGINE).SessionStore()
session[SESSION_KEY], session[HASH_SESSION_KEY] = str(user.pk), user.get_session_auth_hash()
session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
session.create()
conversation = Conversation.objects.create(owner=user)
print(ApiKey.create_for(user)[1], session.session_key, conversation.pk)
"""


class Web:
    """`with Web() as web:` has `web.url`, `.key`, `.cookie`, `.conversation` and `.worker`.

    `pages`: for a browser, which needs the static files. Others are settings of its environment.
    """

    def __init__(self, pages: bool = False, **environment: str):
        self.pages, self.more = pages, environment

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="web-")
        self.worker = PretendWorker(grace=1).start()
        self.environment = {
            **os.environ,
            "PORTAL_DATA_DIR": self.folder.name,
            "PORTAL_WORKERS": self.worker.url,
            "PORTAL_WORKER_TOKEN": TOKEN,
            "PORTAL_LOG_LEVEL": "WARNING",
            **self.more,
        }
        self.manage("migrate", "-v", "0")
        if self.pages:
            self.manage("collectstatic", "--noinput", "-v", "0")
        self.key, self.cookie, self.conversation = self.manage(
            "shell", "-v", "0", "-c", ROWS
        ).split()[-3:]
        static = Path(self.folder.name) / "static"  # collecting the real ones takes seconds
        static.mkdir(exist_ok=True)
        (static / "x.js").write_text("1")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = open(Path(self.folder.name) / "web.log", "w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "portal.web_server", "--port", str(self.port)],
            cwd=ROOT,
            env=self.environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        wait_for(self.answers, 60, "the web process")
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(20)
        self.worker.__exit__()
        self.log.close()
        self.folder.cleanup()

    def manage(self, *arguments: str) -> str:
        command = [sys.executable, "manage.py", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def call(self, method: str, path: str, body=None, headers=None) -> tuple[int, dict]:
        """(status, parsed JSON) with the member's key. `body`: bytes, or what becomes JSON."""
        sent = {"Authorization": f"Bearer {self.key}", **(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self.url + path, body, sent, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as refused:
            answer = refused
        with answer:
            return answer.status, json.loads(answer.read() or b"null")

    def answers(self) -> bool:
        """The web answers and its worker has taken its first look at its engine."""
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:
                return b"ready" in answer.read()
        except (urllib.error.URLError, OSError):
            return False
