"""`manage.py evaluate`: one evaluation in the foreground, with ChatGLM-6B's result files; a run of
the portal like any other.
"""

import json
import sys
from pathlib import Path

from django.core.exceptions import ValidationError
from django.core.management.base import CommandError
from django.db import transaction
from django.utils.translation import gettext as _

from chat.adapter_import import import_adapter
from chat.models import Adapter, Checkpoint
from evaluation import upstream_files
from evaluation.metrics import in_order
from evaluation.models import EvaluationRun
from evaluation.plan import SEED, create_evaluation
from portal.models import Run
from portal.runs import lifecycle
from portal.runs.process import carry_out, print_line
from portal.terminal import row_named, user_named
from tuning.datasets import store
from tuning.models import Dataset
from tuning.terminal import ForegroundCommand, lines

EXAMPLE = (
    "Example: python manage.py evaluate --test-file dev.json --prompt-column content "
    "--response-column summary "
    "--checkpoint starter --adapter my-adapter --output-dir output"
)


class Command(ForegroundCommand):
    help = (
        "Predict the rows of a file and score the predictions. "
        f"Ctrl-C cancels; what was predicted stays. {EXAMPLE}"
    )

    def add_arguments(self, parser):
        self.add_source(parser, "--test-file", required=False)
        parser.add_argument(
            "--validation-file", type=Path, help="read where --test-file is left out"
        )
        parser.add_argument(
            "--checkpoint",
            "--model-name-or-path",
            help="name, number, folder or hub name of a registered checkpoint; default: the "
            "adapter's, else the portal's default",
        )
        parser.add_argument("--adapter", help="name or number; default: none, the bare checkpoint")
        parser.add_argument("--decoding", choices=EvaluationRun.Decoding.values, default="greedy")
        parser.add_argument("--max-examples", "--max-predict-samples", type=int)
        parser.add_argument(
            "--ptuning-checkpoint",
            type=Path,
            help="a folder as import_adapter takes it, in place of --adapter",
        )
        parser.add_argument("--pre-seq-len", type=int, help="checked: it is the adapter's own")
        parser.add_argument(
            "--quantization-bit",
            type=int,
            choices=[0, 4, 8],
            help="default: as the adapter was tuned",
        )
        parser.add_argument("--fp16", action="store_true", help="without effect")
        parser.add_argument("--max-source-length", type=int)
        parser.add_argument("--max-target-length", type=int)
        parser.add_argument("--seed", type=int, default=SEED)
        parser.add_argument(
            "--output-dir", type=Path, help="for generated_predictions.txt and predict_results.json"
        )

    def handle(self, **options):
        owner = user_named(options["user"])
        adapter = (
            row_named(Adapter.objects.visible_to(owner), options["adapter"])
            if options["adapter"]
            else None
        )
        if options["checkpoint"]:
            checkpoint = self.checkpoint(options["checkpoint"], owner)
        else:
            checkpoint = adapter.checkpoint if adapter else Checkpoint.default()
        if checkpoint is None:
            raise CommandError(_("There is no checkpoint yet; add one with add_checkpoint."))
        if options["ptuning_checkpoint"] and adapter is None:
            adapter = self._imported(options["ptuning_checkpoint"], checkpoint, owner)
        self._check_length(options["pre_seq_len"], adapter)
        if not options["dataset"] and not options["test_file"]:
            options["test_file"] = options["validation_file"]
            if options["test_file"] is None:
                raise CommandError(_("Name a file with --test-file, or a dataset with --dataset."))
        chosen = (
            "decoding",
            "max_examples",
            "max_source_length",
            "max_target_length",
            "seed",
            "quantization_bit",
        )
        dataset = self._dataset(options, owner)
        try:
            with transaction.atomic():  # claimed before anybody else sees it
                run = create_evaluation(
                    owner,
                    dataset=dataset,
                    checkpoint=checkpoint,
                    adapter=adapter,
                    with_baseline=False,
                    in_queue=False,
                    **{name: options[name] for name in chosen},
                )
                token = lifecycle.claim(run.pk)
        except ValidationError as fault:
            if not options["dataset"]:
                store.delete(dataset)  # nobody asked for more than the run
            raise CommandError("\n".join(lines(fault))) from fault

        carry_out(run.pk, token, lambda line: print_line(line, sys.stderr))
        run.refresh_from_db()
        if run.status == Run.Status.SUCCEEDED and options["output_dir"]:
            _write_files(run, options["output_dir"])
        self._tell(run, options["json"])
        if run.status != Run.Status.SUCCEEDED:
            sys.exit(1)

    def _imported(self, path: Path, checkpoint: Checkpoint, owner) -> Adapter:
        try:
            found = import_adapter(path, checkpoint, owner=owner, again=False)
        except ValidationError as fault:
            raise CommandError(f"--ptuning-checkpoint: {' '.join(fault.messages)}") from fault
        message = (
            _("%(path)s is the adapter “%(name)s”.")
            if found.known
            else _("%(path)s was imported as the adapter “%(name)s”.")
        )
        self.say(message % {"path": path, "name": found.adapter.name})
        return found.adapter

    def _check_length(self, pre_seq_len: int | None, adapter: Adapter | None) -> None:
        if pre_seq_len is None:
            return
        if adapter is None:
            self.say(_("--pre-seq-len has no effect without --adapter or --ptuning-checkpoint."))
        elif adapter.pre_seq_len != pre_seq_len:
            message = _("--pre-seq-len %(asked)s: the prefix of “%(name)s” is %(its)s long.")
            names = {"asked": pre_seq_len, "name": adapter.name, "its": adapter.pre_seq_len}
            raise CommandError(message % names)

    def _dataset(self, options: dict, owner) -> Dataset:
        if options["dataset"]:
            return row_named(Dataset.objects.visible_to(owner), options["dataset"])
        return self.ingest(options["test_file"], options, owner)

    def _tell(self, run: EvaluationRun, as_json: bool) -> None:
        if as_json:
            told = {
                "id": run.pk,
                "status": run.status,
                "rows": run.total,
                "scores": run.scores,
                "error": run.error,
            }
            self.stdout.write(json.dumps(told, ensure_ascii=False))
        elif run.scores:
            for metric in in_order(list(run.scores)):
                score = run.scores[metric]
                ends = (
                    "" if score["low"] is None else f"   [{score['low']:.4f}, {score['high']:.4f}]"
                )
                self.stdout.write(f"{metric:14} {score['value']:8.4f}{ends}")
        else:
            self.stderr.write(run.error["message"] if run.error else run.get_status_display())


def _write_files(run: EvaluationRun, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = run.predictions.order_by("row").values_list("reference", "text")
    lines = "".join(upstream_files.prediction_lines(pairs))
    (folder / upstream_files.PREDICTIONS).write_text(lines, encoding="utf-8")
    results = upstream_files.results(run.scores, run.recipe["rows"], run.seconds or 0.0)
    (folder / upstream_files.RESULTS).write_text(results, encoding="utf-8")
