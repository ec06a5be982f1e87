"""What `manage.py train` and `manage.py evaluate` share: whose run it is, rows by name or number, a
file as a dataset.
"""

import contextlib
from pathlib import Path

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.utils.translation import gettext as _

from portal.models import User
from portal.numbers import whole_number
from tuning.datasets import store
from tuning.models import Dataset

COLUMNS = ("prompt_column", "response_column", "history_column")
MOST_PROBLEMS = 20
# Of ChatGLM-6B's train.sh and evaluate.sh: what is always so here, or the engine's own business.
SWITCHES = (
    "do_train",
    "do_predict",
    "overwrite_cache",
    "overwrite_output_dir",
    "predict_with_generate",
)
NUMBERS = ("per_device_eval_batch_size", "preprocessing_num_workers")


class ForegroundCommand(BaseCommand):
    """A run in the foreground. Flags may be spelt as upstream spells them, with underscores."""

    def run_from_argv(self, argv):
        super().run_from_argv([_with_dashes(argument) for argument in argv])

    def add_source(self, parser, file_flag: str) -> None:
        """The arguments that say what is read: a file, or a dataset of the portal."""
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument(
            file_flag, type=Path, help="JSON lines, JSON or CSV; also packed, as in an upload"
        )
        source.add_argument("--dataset", help="number or name of a dataset in the portal")
        parser.add_argument(
            "--prompt-column", default="", help="default: recognised from the first row"
        )
        parser.add_argument("--response-column", default="")
        parser.add_argument("--history-column", default="")
        parser.add_argument("--user", help="whose run it is; default: the first administrator")
        parser.add_argument(
            "--json", action="store_true", help="the result as one JSON object on standard output"
        )
        pasted = parser.add_argument_group("from train.sh and evaluate.sh, accepted without effect")
        for name in SWITCHES:
            pasted.add_argument(flag(name), action="store_true")
        for name in NUMBERS:
            pasted.add_argument(flag(name), type=int, metavar="N")

    def owner(self, username: str | None) -> User:
        found = (
            User.objects.filter(username=username)
            if username
            else User.objects.filter(is_superuser=True)
        )
        user = found.filter(is_active=True).order_by("id").first()
        if user is None:
            raise CommandError(_("There is no such user. Name one with --user."))
        return user

    def named(self, model, wish: str, owner: User):
        """The newest row of this name that the owner sees, or the one with this number."""
        visible = model.objects.visible_to(owner)
        found = visible.filter(name=wish).order_by("-id").first()
        if found is None:
            found = visible.filter(pk=whole_number(wish)).first()
        if found is None:
            known = ", ".join(visible.values_list("name", flat=True)[:20])
            raise CommandError(
                _("There is no “%(name)s”. There are: %(known)s") % {"name": wish, "known": known}
            )
        return found

    def ingest(
        self, path: Path, options: dict, owner: User, validation: Path | None = None
    ) -> Dataset:
        """The file as a dataset named after it, the second one as its validation split; the
        problems as lines when it is refused.
        """
        columns = {name: options[name] for name in COLUMNS}
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(open(path, "rb"))
                held_out = validation and stack.enter_context(open(validation, "rb"))
                return store.ingest(
                    file, name=path.stem, owner=owner, validation=held_out, **columns
                )
        except OSError as error:
            raise CommandError(f"{error.filename}: {error.strerror}") from error
        except store.DatasetRejected as rejected:
            told = [
                f"{found.get('member', path)}:{found['line'] or ''} {found['message']}"
                + (f" (x{found['count']})" if found["count"] > 1 else "")
                for found in rejected.problems[:MOST_PROBLEMS]
            ]
            raise CommandError("\n".join(told)) from rejected


def _with_dashes(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def lines(error: ValidationError) -> list[str]:
    """Every problem as "--flag: what is wrong"."""
    if not hasattr(error, "error_dict"):
        return error.messages
    return [
        f"{flag(field)}: {text}" for field, found in error.message_dict.items() for text in found
    ]
