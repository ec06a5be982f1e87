"""`manage.py judge`: a model decides which of two evaluations' answers are better."""

import contextlib
import json
from pathlib import Path

from django.core.exceptions import ValidationError
from django.core.management.base import CommandError
from django.utils.translation import gettext as _

from evaluation import blind
from evaluation.judging import Judge, JudgeFailed, judged
from evaluation.models import EvaluationRun
from portal.terminal import user_named
from tuning.terminal import ForegroundCommand


class Command(ForegroundCommand):
    help = (
        "Ask a model behind an OpenAI-compatible endpoint about the rows on which two evaluations "
        "differ. Example: python manage.py judge 12 13 --url http://127.0.0.1:8000/v1 --model qwen"
    )

    def add_arguments(self, parser):
        parser.add_argument("run", type=int, help="number of an evaluation")
        parser.add_argument("other", type=int, help="another one of the same rows")
        parser.add_argument("--url", required=True, help="the endpoint, up to and with /v1")
        parser.add_argument("--model", required=True, help="what it is called there")
        parser.add_argument("--key-file", type=Path, help="a file with its key alone")
        parser.add_argument("--rows", type=int, help="at most so many; default: all that differ")
        parser.add_argument("--user", help="in whose name; default: the first administrator")
        parser.add_argument("--json", action="store_true")

    def handle(self, **options):
        owner = user_named(options["user"])
        found = EvaluationRun.objects.visible_to(owner)
        sides = [found.filter(pk=options[name]).first() for name in ("run", "other")]
        if None in sides:
            raise CommandError(_("There is no such evaluation."))
        try:
            run, other = blind.pair(*sides)
            key = options["key_file"].read_text().strip() if options["key_file"] else ""
        except ValidationError as problem:
            raise CommandError(" ".join(problem.messages)) from problem
        except OSError as problem:
            raise CommandError(str(problem)) from problem
        with contextlib.closing(Judge(options["url"], options["model"], key)) as judge:
            try:
                for row, choice in judged(judge, owner, run, other, options["rows"]):
                    self.stderr.write(f"row {row}: {choice}")
            except JudgeFailed as problem:
                message = _("The judge did not answer: %(reason)s")
                raise CommandError(message % {"reason": problem}) from problem
        told = blind.result(run, other, judges=True)
        if options["json"]:
            self.stdout.write(json.dumps({"run_id": run.pk, "other_id": other.pk, **told}))
            return
        self.stdout.write(
            f"#{run.pk} {told['run']}   = {told['tie']}   #{other.pk} {told['other']}"
        )
        if told["rate"] is not None:
            self.stdout.write(f"{told['rate']:.0f} % [{told['low']:.0f}, {told['high']:.0f}]")
