"""What `manage.py train` and `manage.py evaluate` share: whose run it is, rows by name or number, a
file as a dataset.
"""

import contextlib
import difflib
from pathlib import Path

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from chat.models import Checkpoint
from portal.models import User
from portal.terminal import row_named
from tuning.datasets import store
from tuning.models import Dataset

COLUMNS = ("prompt_column", "response_column", "history_column")
MOST_PROBLEMS = 20
# Of ChatGLM-6B's train.sh and evaluate.sh: what is always so here, or the engine's own business.
SWITCHES = (
    "do_train",
    "do_eval",
    "do_predict",
    "overwrite_cache",
    "overwrite_output_dir",
    "predict_with_generate",
    "fp16_full_eval",
    "trust_remote_code",
)
VALUES = (
    "per_device_eval_batch_size",
    "preprocessing_num_workers",
    "dataloader_num_workers",
    "ignore_pad_token_for_loss",
    "save_total_limit",
    "evaluation_strategy",
    "logging_dir",
    "report_to",
)
_DEVICES = gettext_noop("--devices N shares a step's examples out; accelerate starts the processes")
_RESUME = gettext_noop("a run goes on from its own saved state: resume it on its page")
_LORA = gettext_noop("--method lora, with --lora-r and --lora-alpha")
_FOLDER = gettext_noop("it is read from the checkpoint's folder")
# Of the same scripts and their relatives: what would change the result, and what to use instead.
INSTEAD = {
    "ptuning-checkpoint": _RESUME,
    "resume-from-checkpoint": _RESUME,
    "num-beams": gettext_noop("answers are searched for greedily or drawn: --decoding"),
    "source-prefix": gettext_noop("write it in front of the prompts of your file"),
    "max-train-samples": gettext_noop("give a shorter file"),
    "train-file": gettext_noop("evaluate reads --test-file"),
    "deepspeed": _DEVICES,
    "fsdp": _DEVICES,
    "local-rank": _DEVICES,
    "lora-rank": _LORA,
    "use-lora": _LORA,
    "config-name": _FOLDER,
    "tokenizer-name": _FOLDER,
}


class ForegroundCommand(BaseCommand):
    """A run in the foreground. Flags may be spelt as the original spells them, with underscores;
    those that are not taken are refused by name, with what to use instead.
    """

    def create_parser(self, prog_name, subcommand, **more):
        parser = super().create_parser(prog_name, subcommand, **more)

        def parse_args(args=None, namespace=None):
            found, left = parser.parse_known_args(args, namespace)
            if left:
                parser.error(_why_not(left, parser))
            return found

        parser.parse_args = parse_args
        return parser

    def run_from_argv(self, argv):
        super().run_from_argv([_with_dashes(argument) for argument in argv])

    def add_source(self, parser, file_flag: str, required: bool = True) -> None:
        """The arguments that say what is read: a file, or a dataset of the portal."""
        source = parser.add_mutually_exclusive_group(required=required)
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
        for name in VALUES:
            pasted.add_argument(flag(name), metavar="X")

    def say(self, line: str) -> None:
        """What was made of a pasted flag; standard output is the result's."""
        self.stderr.write(line)

    def checkpoint(self, wish: str, owner: User) -> Checkpoint:
        """By name or number, by its folder, or by its name on a hub (`org/name`)."""
        visible = Checkpoint.objects.visible_to(owner)
        found = visible.named(wish)
        folder = Path(wish).expanduser()
        if found is None and folder.is_dir():
            found = visible.filter(path=str(folder.resolve())).first()
            if found is None:
                message = _("%(path)s is not registered: python manage.py add_checkpoint %(path)s")
                raise CommandError(message % {"path": wish})
        if found is not None:
            return found
        if "/" not in wish:
            return row_named(visible, wish)  # refuses, with what there is
        short = wish.rstrip("/").rpartition("/")[2].casefold()
        cached = f"models--{wish.replace('/', '--')}".casefold()
        for row in visible:
            folders = {part.casefold() for part in Path(row.path).parts}
            if short in (row.name.casefold(), Path(row.path).name.casefold()) or cached in folders:
                self.say(_("%(wish)s is taken as “%(name)s”.") % {"wish": wish, "name": row.name})
                return row
        message = _(
            "“%(wish)s” is not registered: python manage.py fetch_checkpoint hf:%(wish)s --name "
            "%(short)s fetches it, add_checkpoint FOLDER takes one that is here. There are: "
            "%(known)s"
        )
        known = ", ".join(visible.values_list("name", flat=True)[:20]) or "-"
        raise CommandError(message % {"wish": wish, "short": short, "known": known})

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
                held_out = stack.enter_context(open(validation, "rb")) if validation else None
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


def _why_not(left: list[str], parser) -> str:
    """Every argument that is not taken, a line each."""
    known = [option for action in parser._actions for option in action.option_strings]
    told = []
    for argument in left:
        name = argument.partition("=")[0]
        if not name.startswith("--"):
            continue  # the value of such a flag
        instead = INSTEAD.get(name[2:])
        near = difflib.get_close_matches(name, known, 1)
        if instead is not None:
            reason = _("not taken here: %(instead)s") % {"instead": _(instead)}
        elif near:
            reason = _("there is no such flag; did you mean %(near)s?") % {"near": near[0]}
        else:
            reason = _("there is no such flag; --help lists them")
        told.append(f"{name}: {reason}")
    return "\n".join(told) or _("not understood: %(left)s") % {"left": " ".join(left)}


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
