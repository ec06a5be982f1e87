"""`manage.py train`: one tuning run in the foreground, the same plan, trainer and adapter as
through the queue.
"""

import json
import math
import sys
from pathlib import Path

from django.core.exceptions import ValidationError
from django.core.management.base import CommandError
from django.db import transaction
from django.utils.translation import gettext as _

from chat.models import Checkpoint
from portal.models import Run
from portal.runs import lifecycle
from portal.runs.process import carry_out, print_line
from portal.terminal import row_named, user_named
from tuning.datasets import store
from tuning.models import Dataset, TuningRun
from tuning.plan import PRESETS, create_run, recipe_for, steps_of
from tuning.ptuning.recipe import BOOLEANS, CHOICES, LIMITS, TEXTS, WHOLE_NUMBERS
from tuning.sweeps import parsed
from tuning.terminal import ForegroundCommand, flag, lines

EXAMPLE = (
    "Example: python manage.py train --train-file train.json --prompt-column content "
    "--response-column summary "
    "--checkpoint starter --pre-seq-len 128 --learning-rate 2e-2 --max-steps 3000"
)


class Command(ForegroundCommand):
    help = (
        "Tune a prefix (P-tuning v2), or weights (--method lora, full), in the foreground. "
        f"Ctrl-C saves its state and cancels the run. {EXAMPLE}"
    )

    def add_arguments(self, parser):
        self.add_source(parser, "--train-file")
        parser.add_argument(
            "--validation-file", type=Path, help="becomes the dataset's validation split"
        )
        parser.add_argument(
            "--checkpoint",
            "--model-name-or-path",
            help="name, number, folder or hub name of a registered checkpoint; default: the "
            "portal's default",
        )
        parser.add_argument(
            "--name", default="", help="of the run and of the adapter; default: the dataset's"
        )
        parser.add_argument(
            "--preset", choices=list(PRESETS), help="default: that of the checkpoint"
        )
        parser.add_argument(
            "--variant",
            action="append",
            default=[],
            metavar="NAME=VALUE,...",
            help="train several prefixes at once: what this one changes, such as "
            "seed=1,learning_rate=1e-2; given once for each",
        )
        parser.add_argument(
            "--output-dir",
            help="without effect: the adapter goes into the portal; export_adapter writes it",
        )
        pasted = parser.add_argument_group("turned into hyper-parameters")
        pasted.add_argument("--num-train-epochs", type=float, help="turned into --max-steps")
        pasted.add_argument("--warmup-ratio", type=float, help="turned into --warmup-steps")
        pasted.add_argument("--fp16", action="store_true", help="--precision float16")
        pasted.add_argument("--bf16", action="store_true", help="--precision bfloat16")
        pasted.add_argument("--test-file", help="without effect: `evaluate` reads it")
        hyper = parser.add_argument_group("hyper-parameters (left out: from the preset)")
        for name, (low, high) in LIMITS.items():
            kind = int if name in WHOLE_NUMBERS else float
            hyper.add_argument(flag(name), type=kind, default=None, metavar=f"{low:g}..{high:g}")
        for name, choices in CHOICES.items():
            if name in BOOLEANS:
                hyper.add_argument(flag(name), action="store_true", default=None)
            else:
                known = [choice for choice in choices if choice is not None]
                kind = type(known[0])
                hyper.add_argument(
                    flag(name),
                    type=kind,
                    choices=known + [kind()] * (None in choices),
                    default=None,
                )

        for name in TEXTS:
            hyper.add_argument(flag(name), default=None, metavar="TEXT")

    def handle(self, **options):
        owner = user_named(options["user"])
        checkpoint = (
            self.checkpoint(options["checkpoint"], owner) if options["checkpoint"] else None
        )
        checkpoint = checkpoint or Checkpoint.default()
        if checkpoint is None:
            raise CommandError(_("There is no checkpoint yet; add one with add_checkpoint."))
        hyper = {
            name: options[name] for name in (*LIMITS, *CHOICES, *TEXTS) if options[name] is not None
        }
        if hyper.get("quantization_bit") == 0:
            hyper["quantization_bit"] = None
        for name, precision in (("fp16", "float16"), ("bf16", "bfloat16")):
            if options[name]:
                hyper.setdefault("precision", precision)
        if options["test_file"]:
            self.say(_("--test-file is not read here: manage.py evaluate does that afterwards."))
        dataset = self._dataset(options, owner)
        try:
            sweep = parsed("\n".join(options["variant"]))
            self._turn(options, hyper, checkpoint, dataset)
            with transaction.atomic():  # claimed before anybody else sees it
                run = create_run(
                    owner,
                    dataset=dataset,
                    checkpoint=checkpoint,
                    name=options["name"],
                    preset=options["preset"],
                    sweep=sweep or None,
                    in_queue=False,
                    **hyper,
                )
                token = lifecycle.claim(run.pk)
        except ValidationError as error:
            if not options["dataset"]:
                store.delete(dataset)  # nobody asked for more than the run
            raise CommandError("\n".join(lines(error))) from error
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.log_path, "a", encoding="utf-8") as file:

            def log(line: str) -> None:
                print_line(line, file)
                print_line(line, sys.stderr)

            status = carry_out(run.pk, token, log)
        run.refresh_from_db()
        self._tell(run, options["json"])
        if status != Run.Status.SUCCEEDED:
            sys.exit(1)

    def _turn(self, options: dict, hyper: dict, checkpoint: Checkpoint, dataset: Dataset) -> None:
        """Epochs and a part of the steps become steps in `hyper`, as in transformers' Trainer: a
        number of steps that is given comes first.
        """
        epochs, ratio = options["num_train_epochs"], options["warmup_ratio"]
        problems = {}
        if epochs is not None and not 0 < epochs < 1e6:
            problems["num_train_epochs"] = _("Must be above 0.")
        if ratio is not None and not 0 <= ratio < 1:
            problems["warmup_ratio"] = _("Must be at least 0 and below 1.")
        if problems:
            raise ValidationError(problems)
        version = dataset.current
        if epochs is not None and "max_steps" not in hyper and version is not None:
            rows = version.splits.get(store.TRAIN, {}).get("rows", 0)
            recipe = recipe_for(checkpoint, options["preset"], **hyper)
            hyper["max_steps"] = steps_of(epochs, recipe, rows)
            message = _("%(epochs)s epochs of %(rows)s examples, %(each)s a step: %(steps)s steps.")
            self.say(
                message
                % {
                    "epochs": f"{epochs:g}",
                    "rows": f"{rows:,}",
                    "each": recipe.samples_per_step,
                    "steps": f"{hyper['max_steps']:,}",
                }
            )
        if ratio is not None and "warmup_steps" not in hyper:
            steps = recipe_for(checkpoint, options["preset"], **hyper).max_steps
            hyper["warmup_steps"] = math.ceil(ratio * steps)
            message = _("Warm-up over %(ratio)s of the steps: %(steps)s steps.")
            self.say(message % {"ratio": f"{ratio:g}", "steps": f"{hyper['warmup_steps']:,}"})

    def _dataset(self, options: dict, owner) -> Dataset:
        if options["dataset"]:
            return row_named(Dataset.objects.visible_to(owner), options["dataset"])
        return self.ingest(options["train_file"], options, owner, options["validation_file"])

    def _tell(self, run: TuningRun, as_json: bool) -> None:
        adapter, checkpoint = run.result(), run.made_checkpoint
        result = {
            "run": run.pk,
            "status": run.status,
            "step": run.progress,
            "max_steps": run.total,
            "loss": run.loss,
            "samples_per_second": run.samples_per_second,
            "seconds": run.seconds,
            "adapter": adapter
            and {"id": adapter.pk, "name": adapter.name, "folder": str(adapter.path)},
            "checkpoint": checkpoint
            and {"id": checkpoint.pk, "name": checkpoint.name, "folder": checkpoint.path},
            **({"variants": run.variants} if run.variants else {}),
            "error": run.error,
        }
        if as_json:
            self.stdout.write(json.dumps(result, ensure_ascii=False))
        elif run.error:
            self.stderr.write(run.error["message"])
        elif checkpoint:
            self.stdout.write(
                _("Checkpoint “%(name)s” in %(folder)s")
                % {"name": checkpoint.name, "folder": checkpoint.path}
            )
        elif adapter:
            self.stdout.write(
                _("Adapter “%(name)s” in %(folder)s")
                % {"name": adapter.name, "folder": adapter.path}
            )
