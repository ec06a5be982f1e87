"""`manage.py check_dataset`: what a checkpoint makes of a dataset, before a run is paid for: near
duplicates, lengths in tokens, rows that would be cut, and one row as the trainer sees it.
"""

import json
import sys

from django.core.management.base import CommandError
from django.utils.translation import gettext as _

from chat.checkpoints.describe import CheckpointInvalid
from chat.models import Checkpoint
from portal.terminal import row_named, user_named
from tuning.datasets import checks, measuring, store
from tuning.models import Dataset
from tuning.plan import recipe_for
from tuning.terminal import ForegroundCommand


class Command(ForegroundCommand):
    help = "Check a dataset with a checkpoint's tokenizer before tuning on it."

    def add_arguments(self, parser):
        parser.add_argument("dataset", help="name or number in the portal")
        parser.add_argument("--checkpoint", help="default: the portal's default")
        parser.add_argument("--split", default=store.TRAIN)
        parser.add_argument("--max-source-length", type=int, help="default: the preset's")
        parser.add_argument("--max-target-length", type=int, help="default: the preset's")
        parser.add_argument("--row", type=int, help="show this row (from 1) as the trainer sees it")
        parser.add_argument("--user", help="whose dataset it is; default: the first administrator")
        parser.add_argument("--json", action="store_true")

    def handle(self, **options):
        owner = user_named(options["user"])
        dataset = row_named(Dataset.objects.visible_to(owner), options["dataset"])
        checkpoint = Checkpoint.default()
        if options["checkpoint"]:
            checkpoint = row_named(Checkpoint.objects.visible_to(owner), options["checkpoint"])
        if checkpoint is None:
            raise CommandError(_("There is no checkpoint yet; add one with add_checkpoint."))
        version = dataset.current
        entry = version.splits.get(options["split"]) if version else None
        if entry is None:
            raise CommandError(_("The dataset has no such split."))
        names = ("max_source_length", "max_target_length")
        chosen = {name: options[name] for name in names if options[name] is not None}
        recipe = recipe_for(checkpoint, None, **chosen)
        most = recipe.max_source_length, recipe.max_target_length
        folder = str(checkpoint.path)
        try:
            if options["row"] is not None:
                report = self._one_row(folder, entry, options["row"], most)
            else:
                report = self._all_rows(folder, entry, most)
        except CheckpointInvalid as fault:
            raise CommandError(str(fault)) from fault
        except FileNotFoundError as missing:
            raise CommandError(_("The dataset's files are gone.")) from missing
        if options["json"]:
            self.stdout.write(json.dumps(report, ensure_ascii=False))
        else:
            self.stdout.write("\n".join(report.pop("told")))

    def _one_row(self, folder: str, entry: dict, number: int, most: tuple[int, int]) -> dict:
        """Every token of the row with its label: what the loss counts."""
        if not 1 <= number <= entry["rows"]:
            raise CommandError(_("The split has %(rows)s rows.") % {"rows": entry["rows"]})
        tokens = measuring.row_as_trained(folder, entry["sha256"], number, *most)
        told = [
            f"{place:5} {token['id']:7} {'*' if token['trained'] else ' '} {token['text']!r}"
            for place, token in enumerate(tokens)
        ]
        trained = sum(token["trained"] for token in tokens)
        told.append(_("%(trained)s tokens are learnt (*), %(given)s are given.") % {
            "trained": trained, "given": len(tokens) - trained
        })  # fmt: skip
        return {"tokens": tokens, "told": told}

    def _all_rows(self, folder: str, entry: dict, most: tuple[int, int]) -> dict:
        rows = entry["rows"]

        def report(done: int) -> None:
            print(f"{done}/{rows}", file=sys.stderr, flush=True)

        found = measuring.measure(folder, entry["sha256"], rows, report)
        twins = found["near_duplicates"]
        answer = {"rows": rows, "near_duplicates": twins["pairs"]}
        told = [
            _("%(count)s of %(rows)s rows are nearly equal to an earlier one.")
            % {"count": twins["count"], "rows": rows}
        ]
        told += checks.told_of_cuts(found, *most) or [_("Every row fits into the lengths.")]
        for part, limit in zip(measuring.PARTS, most, strict=True):
            bars = list(measuring.bars(found, part))
            answer[part] = {
                "limit": limit,
                "cut": measuring.longer(found, part, limit),
                "lines": sorted(line for line, tokens in found[part]["longest"] if tokens > limit),
                "bars": bars,
            }
            highest = max((count for _low, _high, count in bars), default=1)
            heading = _("%(part)s: tokens, rows")
            told.append(heading % {"part": part})
            told += [
                f"{low:6}-{high:<6} {count:8} {'#' * round(40 * count / highest)}"
                for low, high, count in bars
            ]
        return {**answer, "told": told}
