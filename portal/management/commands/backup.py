"""`manage.py backup FOLDER`: everything that the portal knows, while it runs."""

import sqlite3
from pathlib import Path

from django.core.management.base import BaseCommand, CommandError

from portal.backup import BackupProblem, back_up


class Command(BaseCommand):
    help = (
        "Copy database, datasets, adapters, runs and secrets into a new folder; the portal may be "
        "running. Example: python manage.py backup /backups/portal-2025-01-31"
    )

    def add_arguments(self, parser):
        parser.add_argument("folder", type=Path, help="new or empty; must not lie in the data")

    def handle(self, *, folder, **options):
        try:
            manifest = back_up(folder)
        except (BackupProblem, OSError, sqlite3.Error) as problem:  # the last: a full disk
            raise CommandError(str(problem)) from problem
        self.stdout.write(f"{folder}: {len(manifest['files'])} files")
