"""`manage.py score_again`: metrics that came later, for evaluations that have ended."""

from django.core.management.base import BaseCommand, CommandError
from django.utils.translation import gettext as _

from evaluation.models import EvaluationRun
from evaluation.rescoring import score_again


class Command(BaseCommand):
    help = (
        "Score the stored predictions of evaluations again, by every metric that there is now; no "
        "model is asked. Example: python manage.py score_again 12 13"
    )

    def add_arguments(self, parser):
        parser.add_argument("runs", nargs="*", type=int, help="numbers of evaluations")
        parser.add_argument("--all", action="store_true", help="every evaluation that has scores")

    def handle(self, **options):
        ended = EvaluationRun.objects.filter(scores__isnull=False)
        if not options["all"]:
            if not options["runs"]:
                raise CommandError(_("Name evaluations by number, or --all."))
            ended = ended.filter(pk__in=options["runs"])
            missing = set(options["runs"]) - set(ended.values_list("pk", flat=True))
            if missing:
                numbers = ", ".join(map(str, sorted(missing)))
                message = _("There is no evaluation with scores: %(numbers)s.")
                raise CommandError(message % {"numbers": numbers})
        for run in ended.order_by("pk"):
            scores = score_again(run)
            told = "  ".join(f"{name} {found['value']:.2f}" for name, found in scores.items())
            self.stdout.write(f"#{run.pk}  {told}")
