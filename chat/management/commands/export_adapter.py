"""`manage.py export_adapter NAME --format upstream --output FOLDER`: an adapter for other people's
programs.
"""

from pathlib import Path

from django.core.management.base import BaseCommand, CommandError

from chat.models import Adapter
from portal.terminal import row_named


class Command(BaseCommand):
    help = (
        "Write an adapter in another program's format: upstream (ChatGLM-6B's ptuning scripts "
        "load it as --ptuning_checkpoint), peft (PREFIX_TUNING) or cartridge (peft's CARTRIDGE, "
        "with its frozen positions). Example: export_adapter house-v1 --format upstream --output "
        "exported/"
    )

    def add_arguments(self, parser):
        parser.add_argument("name")
        parser.add_argument("--format", choices=["upstream", "peft", "cartridge"], default="peft")
        parser.add_argument("--output", required=True, help="a folder, made if it is missing")

    def handle(self, *, name, format, output, **options):
        adapter = row_named(Adapter.objects.select_related("checkpoint"), name)
        from chat.checkpoints.describe import CheckpointInvalid, read_config
        from chat.checkpoints.foreign_adapters import write_original, write_peft
        from chat.engine import adapters

        try:
            prefix = adapters.load(adapter.path)
            if format != "upstream":
                folder = write_peft(
                    prefix, Path(output), adapter.checkpoint.name, cartridge=format == "cartridge"
                )
            else:
                folder = write_original(prefix, Path(output), read_config(adapter.checkpoint.path))
        except (adapters.AdapterInvalid, CheckpointInvalid, OSError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(str(folder))
