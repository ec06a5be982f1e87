"""`manage.py restore FOLDER`: a backup into an empty portal."""

from pathlib import Path

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError

from portal.backup import BackupProblem, restore
from portal.runs.supervisor import AlreadySupervised, only_one


class Command(BaseCommand):
    requires_system_checks: list[str] = []
    help = (
        "Fill an empty portal (no database, no datasets) from a folder that `backup` has made, and "
        "bring it to this version. Example: PORTAL_DATA_DIR=/srv/portal python manage.py restore "
        "/backups/portal-2025-01-31"
    )

    def add_arguments(self, parser):
        parser.add_argument("folder", type=Path)

    def handle(self, *, folder, **options):
        try:
            with only_one(settings.DATA_DIR, "restore"):
                manifest = restore(folder)
                call_command("migrate", verbosity=0, interactive=False)
        except AlreadySupervised as other:
            raise CommandError(f"Stop the portal first: {other}") from other
        except (BackupProblem, OSError) as problem:
            raise CommandError(str(problem)) from problem
        self.stdout.write(
            f"Restored the backup of {manifest['created_at']} (version {manifest['version']}); "
            "start the portal with: python manage.py up"
        )
