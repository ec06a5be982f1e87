"""`manage.py prune`: what nobody has touched for long, counted, and deleted when that is said."""

import contextlib
import shutil
from datetime import timedelta
from pathlib import Path

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from chat.conversations import live
from chat.models import Conversation, Message
from portal.models import Run

NEW_FOLDER = timedelta(days=1)  # a folder without a row may be that of a run just being made


class Command(BaseCommand):
    help = (
        "Delete old conversations and what ended runs keep in order to go on. A dry run unless "
        "--delete is given. Datasets, adapters, runs and scores stay. Example: python manage.py "
        "prune --conversations 365 --runs 90 --delete"
    )

    def add_arguments(self, parser):
        parser.add_argument(
            "--conversations", type=int, metavar="DAYS", help="unchanged for so long: deleted"
        )
        parser.add_argument(
            "--runs",
            type=int,
            metavar="DAYS",
            help="ended so long ago: saved training state deleted (they cannot be resumed then), "
            "and folders of runs that are no longer there",
        )
        parser.add_argument("--delete", action="store_true", help="not only count")

    def handle(self, *, conversations, runs, delete, **options):
        if conversations is None and runs is None:
            raise CommandError("Say what: --conversations DAYS, --runs DAYS, or both.")
        if min(days for days in (conversations, runs) if days is not None) < 1:
            raise CommandError("DAYS must be at least 1.")
        if conversations is not None:
            self.prune_conversations(timezone.now() - timedelta(days=conversations), delete)
        if runs is not None:
            self.prune_runs(timezone.now() - timedelta(days=runs), delete)
        if not delete:
            self.stdout.write("Nothing was deleted: add --delete.")

    def prune_conversations(self, before, delete: bool) -> None:
        old = Conversation.objects.filter(updated_at__lt=before).exclude(
            messages__status__in=Message.IN_FLIGHT
        )
        messages = Message.objects.filter(conversation__in=old).count()
        self.stdout.write(
            f"{old.count()} conversations unchanged since {before:%Y-%m-%d}, {messages} messages"
        )
        if delete:
            for conversation in old:
                live.discard(conversation)

    def prune_runs(self, before, delete: bool) -> None:
        ended = Run.objects.exclude(status__in=Run.ACTIVE).filter(finished_at__lt=before)
        folders = [run.state_folder for run in ended.iterator() if run.state_folder.is_dir()]
        known = {run.folder.name for run in Run.objects.only("id", "key").iterator()}
        root = settings.DATA_DIR / "runs"
        for folder in root.iterdir() if root.is_dir() else ():
            touched = timezone.now().timestamp() - folder.stat().st_mtime
            if folder.name not in known and touched > NEW_FOLDER.total_seconds():
                folders.append(folder)
        size = sum(map(_size, folders))
        self.stdout.write(
            f"{len(folders)} folders of runs ended before {before:%Y-%m-%d} or without a row, "
            f"{size / 2**20:.1f} MB"
        )
        if delete:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total
