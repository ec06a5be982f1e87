"""`manage.py up`: first-run set-up, then every process of the portal under one supervisor."""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import sys
import time
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from django.conf import settings
from django.contrib.staticfiles.finders import get_finders
from django.core.management import CommandError, call_command
from django.core.management.base import BaseCommand
from django.utils.module_loading import import_string
from django.utils.translation import gettext as _

from portal import __version__
from portal.models import User
from portal.runs.supervisor import (
    AlreadySupervised,
    Supervisor,
    child_processes,
    only_one,
    reached,
)


class Command(BaseCommand):
    help = (
        "Set up what is missing and run the whole portal. Example: python manage.py up --port 8000"
    )

    def add_arguments(self, parser):
        parser.add_argument(
            "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
        )
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument(
            "--no-worker", action="store_true", help="do not start an inference worker here"
        )

    def handle(self, *, host, port, no_worker, **options):
        host = host.strip("[]")  # as an IPv6 address stands in a URL
        refuse_taken_port(host, port)
        url = f"http://{f'[{reached(host)}]' if ':' in host else reached(host)}:{port}"
        try:
            with only_one(settings.DATA_DIR, url):
                worker = bool(settings.OWN_WORKER_URLS) and not no_worker
                self.run_portal(host, port, url, worker=worker)
        except AlreadySupervised as other:
            raise CommandError(
                _("The portal runs already on the data folder %(folder)s: %(other)s.")
                % {"folder": settings.DATA_DIR, "other": other}
            ) from other
        except BrokenPipeError as error:
            raise CommandError(f"standard output: {error}") from error

    def run_portal(self, host: str, port: int, url: str, *, worker: bool) -> None:
        self.stdout.write(f"Model portal {__version__}")
        call_command("check", deploy=False)
        call_command("migrate", verbosity=0, interactive=False)
        collect_static()
        for function in settings.FIRST_RUN:
            import_string(function)()
        self.first_admin()
        announcement = Announcement(self.stdout, url, worker=worker)
        Supervisor(child_processes(host, port, worker=worker)).run(announcement)

    def first_admin(self) -> None:
        """A staff account with a random password, printed this once, when there is no account at
        all. Where it cannot be shown there is none yet.
        """
        if User.objects.exists():
            return
        password = secrets.token_urlsafe(12)
        try:
            if sys.stdout.name == os.devnull:  # it was closed (manage.py)
                raise OSError("closed")
            heading = _("First administrator (shown once; change the password under Account):")
            user_word, password_word = _("user"), _("password")
            self.stdout.write(
                f"\n{heading}\n    {user_word}: admin\n    {password_word}: {password}\n"
            )
            self.stdout.flush()
        except OSError as error:
            raise CommandError(
                _(
                    "The first administrator's password cannot be shown, so there is no account "
                    "yet (standard output: %(error)s)."
                )
                % {"error": error}
            ) from error
        User.objects.create_superuser("admin", password=password)


_direct = build_opener(ProxyHandler({}))  # http_proxy is not for this machine


class Announcement:
    """Tells once that the pages answer, and once that the model does; called until it returns
    True.
    """

    def __init__(self, stdout, url: str, *, worker: bool):
        self.stdout, self.url, self.worker = stdout, url, worker
        self.begun, self.web_told, self.asked = time.monotonic(), False, 0.0

    def __call__(self) -> bool:
        if self.web_told and time.monotonic() - self.asked < 1.0:
            return False
        self.asked = time.monotonic()
        try:
            with _direct.open(f"{self.url}/healthz", timeout=3) as answer:
                health = json.load(answer)
        except (URLError, OSError):
            return False
        seconds = time.monotonic() - self.begun
        if not self.web_told:
            self.web_told = True
            self.tell(
                _("The portal is ready: %(url)s") % {"url": self.url} + f"  ({seconds:.1f} s)"
            )
            self.tell(
                _("Ctrl-C stops everything. Data: %(folder)s") % {"folder": settings.DATA_DIR}
            )
        if self.worker and health["worker"].get("state") != "ready":
            return False
        if self.worker:
            self.tell(
                _("The model is loaded: %(name)s") % {"name": health["worker"].get("checkpoint")}
                + f"  ({seconds:.1f} s)"
            )
        return True

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that has gone
            self.stdout.write(line)
            self.stdout.flush()


def refuse_taken_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise CommandError(
                _("Cannot listen on %(host)s:%(port)s (%(error)s). Choose another with --port.")
                % {"host": host, "port": port, "error": getattr(error, "strerror", error)}
            ) from error


def collect_static() -> None:
    """collectstatic, skipped when no source file has changed since the last time (it takes
    seconds).
    """
    digest = hashlib.sha256()
    for finder in get_finders():
        for path, storage in finder.list([]):
            digest.update(
                f"{path} {storage.size(path)} "
                f"{storage.get_modified_time(path).timestamp()}\n".encode()
            )
    stamp = settings.STATIC_ROOT / ".digest"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    call_command("collectstatic", verbosity=0, interactive=False)
    stamp.write_text(digest.hexdigest())
