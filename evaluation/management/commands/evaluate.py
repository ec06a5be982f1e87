"""`manage.py evaluate`: one evaluation in the foreground, with ChatGLM-6B's result files; a run of the portal like any other."""

import json
import sys
from pathlib import Path

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.utils.translation import gettext as _

from chat.models import Adapter, Checkpoint
from evaluation import upstream_files
from evaluation.models import METRICS, EvaluationRun
from evaluation.plan import SEED, create_evaluation
from portal import runs
from portal.models import Run, User
from tuning import datasets
from tuning.models import Dataset

EXAMPLE = (
    "Example: python manage.py evaluate --test-file dev.json --prompt-column content --response-column summary "
    "--checkpoint starter --adapter my-adapter --output-dir output"
)


class Command(BaseCommand):
    help = f"Predict the rows of a file and score the predictions. Ctrl-C cancels; what was predicted stays. {EXAMPLE}"

    def add_arguments(self, parser):
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--test-file", type=Path, help="JSON lines, JSON or CSV; also packed, as in an upload")
        source.add_argument("--dataset", help="number or name of a dataset in the portal")
        parser.add_argument("--prompt-column", default="", help="default: recognised from the first row")
        parser.add_argument("--response-column", default="")
        parser.add_argument("--history-column", default="")
        parser.add_argument("--checkpoint", help="name or number; default: the adapter's, else the portal's default")
        parser.add_argument("--adapter", help="name or number; default: none, the bare checkpoint")
        parser.add_argument("--decoding", choices=EvaluationRun.Decoding.values, default="greedy")
        parser.add_argument("--max-examples", type=int)
        parser.add_argument("--max-source-length", type=int)
        parser.add_argument("--max-target-length", type=int)
        parser.add_argument("--seed", type=int, default=SEED)
        parser.add_argument("--user", help="whose run it is; default: the first administrator")
        parser.add_argument("--output-dir", type=Path, help="for generated_predictions.txt and predict_results.json")
        parser.add_argument("--json", action="store_true", help="the result as one JSON object on standard output")

    def handle(self, **options):
        owner = self._owner(options["user"])
        adapter = self._named(Adapter, options["adapter"], owner) if options["adapter"] else None
        if options["checkpoint"]:
            checkpoint = self._named(Checkpoint, options["checkpoint"], owner)
        else:
            checkpoint = adapter.checkpoint if adapter else Checkpoint.default()
        if checkpoint is None:
            raise CommandError(_("There is no checkpoint yet; add one with add_checkpoint."))
        chosen = ("decoding", "max_examples", "max_source_length", "max_target_length", "seed")
        try:
            dataset = self._dataset(options, owner)
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
                token = runs.claim(run.pk)
        except ValidationError as fault:
            raise CommandError("\n".join(_lines(fault))) from fault

        from evaluation.evaluate import evaluate  # brings torch, which --help does without

        evaluate(run.pk, token)
        run.refresh_from_db()
        if run.status == Run.Status.SUCCEEDED and options["output_dir"]:
            _write_files(run, options["output_dir"])
        self._tell(run, options["json"])
        if run.status != Run.Status.SUCCEEDED:
            sys.exit(1)

    def _owner(self, username: str | None) -> User:
        found = User.objects.filter(username=username) if username else User.objects.filter(is_superuser=True)
        user = found.filter(is_active=True).order_by("id").first()
        if user is None:
            raise CommandError(_("There is no such user. Name one with --user."))
        return user

    def _named(self, model, wish: str, owner):
        visible = model.objects.visible_to(owner)
        found = visible.filter(name=wish).order_by("-id").first()
        if found is None and wish.isdecimal():
            found = visible.filter(pk=wish).first()
        if found is None:
            known = ", ".join(visible.values_list("name", flat=True)[:20])
            raise CommandError(_("There is no “%(name)s”. There are: %(known)s") % {"name": wish, "known": known})
        return found

    def _dataset(self, options: dict, owner) -> Dataset:
        if options["dataset"]:
            return self._named(Dataset, options["dataset"], owner)
        columns = {name: options[name] for name in ("prompt_column", "response_column", "history_column")}
        path = options["test_file"]
        try:
            with open(path, "rb") as file:
                return datasets.ingest(file, name=path.stem, owner=owner, **columns)
        except OSError as fault:
            raise CommandError(f"{path}: {fault.strerror}") from fault
        except datasets.DatasetRejected as rejected:
            told = [f"{path}:{found['line'] or ''} {found['message']}" for found in rejected.problems[:20]]
            if rejected.total > len(told):
                told.append("…")
            raise CommandError("\n".join(told)) from rejected

    def _tell(self, run: EvaluationRun, as_json: bool) -> None:
        if as_json:
            told = {"id": run.pk, "status": run.status, "rows": run.total, "scores": run.scores, "error": run.error}
            self.stdout.write(json.dumps(told, ensure_ascii=False))
        elif run.scores:
            for metric in METRICS:
                score = run.scores[metric]
                self.stdout.write(f"{metric:8} {score['value']:8.4f}   [{score['low']:.4f}, {score['high']:.4f}]")
        else:
            self.stderr.write(run.error["message"] if run.error else run.get_status_display())


def _lines(fault: ValidationError) -> list[str]:
    if not hasattr(fault, "error_dict"):
        return fault.messages
    return [f"{field}: {message}" for field, found in fault.message_dict.items() for message in found]


def _write_files(run: EvaluationRun, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = run.predictions.order_by("row").values_list("reference", "text")
    lines = "".join(upstream_files.prediction_lines(pairs))
    (folder / upstream_files.PREDICTIONS).write_text(lines, encoding="utf-8")
    results = upstream_files.results(run.scores, run.recipe["rows"], run.seconds or 0.0)
    (folder / upstream_files.RESULTS).write_text(results, encoding="utf-8")
