"""`manage.py fetch_checkpoint SOURCE`: a checkpoint from elsewhere, in the foreground."""

import sys
import threading
import time

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.db import connection, transaction
from django.template.defaultfilters import filesizeformat
from django.utils.translation import gettext as _

from chat.checkpoints.fetch.catalogue import CATALOGUE
from chat.fetching.plan import create_fetch
from chat.models import FetchRun
from portal.models import Run
from portal.runs import lifecycle
from portal.runs.process import carry_out, stamped
from portal.terminal import user_named


class _Progress(threading.Thread):
    """One line on the terminal, rewritten every second from the run's row."""

    def __init__(self, run_id: int):
        super().__init__(daemon=True)
        self._run_id, self._ended = run_id, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(1.0):
            run = FetchRun.objects.get(pk=self._run_id)
            print(f"\r\033[K{_line(run)}", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        connection.close()

    def stop(self) -> None:
        self._ended.set()
        self.join()


class Command(BaseCommand):
    help = (
        "Fetch a checkpoint and register it. Ctrl-C ends it; every byte that has come stays, and "
        "the same command goes on with it. Example: fetch_checkpoint smollm2-135m-instruct "
        "--default"
    )

    def add_arguments(self, parser):
        parser.add_argument(
            "source",
            help=f"{', '.join(CATALOGUE)}; hf:ORG/NAME[@REVISION]; modelscope:ORG/NAME[@REVISION]; "
            "a folder, an archive or a .gguf file",
        )
        parser.add_argument("--name", default="", help="how people and the API call it")
        parser.add_argument("--default", action="store_true", help="serve it from now on")
        parser.add_argument(
            "--accept-licence", action="store_true", help="accept the terms where a model has some"
        )
        parser.add_argument("--user", help="whose run it is; default: the first administrator")

    def handle(self, *, source, name, default, accept_licence, user, **options):
        owner = user_named(user)
        if not owner.is_staff:
            raise CommandError(_("Only administrators fetch checkpoints."))
        try:
            with transaction.atomic():  # claimed before anybody else sees it
                run, new = create_fetch(
                    owner,
                    source,
                    name=name,
                    default=default,
                    accept_licence=accept_licence,
                    in_queue=False,
                )
                token = lifecycle.claim(run.pk) if new else None
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from error
        if token is None:
            self.stderr.write(
                _("This is being downloaded already: watching run %(run)s.") % {"run": run.pk}
            )
            self._watch(run)
        else:
            self._carry_out(run, token)
        run.refresh_from_db()
        if run.status != Run.Status.SUCCEEDED or run.checkpoint is None:
            raise CommandError(run.error["message"] if run.error else run.get_status_display())
        told = run.checkpoint.description
        self.stdout.write(
            f"{run.checkpoint.name}: {told['architecture']}, "
            f"{told['parameters'] or 0:,} parameters, context {told['context_length']}, "
            f"licence {told.get('licence') or '?'}, in {run.checkpoint.path}"
        )

    def _carry_out(self, run: FetchRun, token: str) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.log_path, "a", encoding="utf-8") as file:

            def log(line: str) -> None:
                print(stamped(line), file=file, flush=True)
                print(stamped(line), file=sys.stderr, flush=True)

            watcher = _Progress(run.pk) if sys.stderr.isatty() else None
            if watcher:
                watcher.start()
            try:
                carry_out(run.pk, token, log)
            finally:
                if watcher:
                    watcher.stop()

    def _watch(self, run: FetchRun) -> None:
        told = -1
        while run.is_active:
            time.sleep(1.0)
            run.refresh_from_db()
            if run.percent != told:
                told = run.percent
                self.stderr.write(_line(run))


def _line(run: FetchRun) -> str:
    transfer = run.transfer
    speed = transfer.get("bytes_per_second")
    text = f"{run.percent:3d} %  {filesizeformat(transfer.get('done', 0))}"
    return f"{text}  {filesizeformat(speed)}/s" if speed else text
