"""`manage.py import_adapter PATH --checkpoint N`: a prefix that was trained elsewhere becomes an
adapter.
"""

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from chat.adapter_import import import_adapter
from chat.models import Checkpoint
from portal.terminal import row_named, user_named


class Command(BaseCommand):
    help = (
        "Import an upstream ptuning checkpoint-N/ folder, a peft prefix folder or an unpacked "
        "download of a portal as an "
        "adapter. Example: import_adapter output/adgen-chatglm-6b-pt-128-2e-2/checkpoint-3000 "
        "--checkpoint chatglm-6b"
    )

    def add_arguments(self, parser):
        parser.add_argument("path", help="the folder, or the weights in it; it is read, not moved")
        parser.add_argument(
            "--checkpoint", required=True, help="name of the base checkpoint that it was trained on"
        )
        parser.add_argument(
            "--name",
            "--adapter",
            help="how people and the API call it (default: the folder's name)",
        )
        parser.add_argument(
            "--owner", help="user name; without one the adapter belongs to the whole team"
        )
        parser.add_argument(
            "--history",
            choices=["yes", "no"],
            help="whether its training rows had earlier turns; without them it is asked without "
            "(default: what the folder says, else not known)",
        )

    def handle(self, *, path, checkpoint, name, owner, history, **options):
        base = row_named(Checkpoint.objects.all(), checkpoint)
        user = user_named(owner) if owner else None
        try:
            imported = import_adapter(path, base, name=name or "", owner=user)
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from error
        adapter = imported.adapter
        if history:
            adapter.with_history = history == "yes"
            adapter.save(update_fields=["with_history"])
        if adapter.with_history is None:
            self.stdout.write(
                "Whether it was trained on conversations is not known, so it is shown the earlier "
                "turns; --history no says that it was not."
            )
        self.stdout.write(
            f"{adapter.name}: {imported.kind}, pre_seq_len {adapter.pre_seq_len}, for {base.name}"
        )
