"""`manage.py check_dataset`: what a checkpoint makes of a dataset, before a run is paid for: near
duplicates, lengths in tokens, rows that would be cut, and one row as the trainer sees it.
"""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

from django.core.management.base import CommandError
from django.utils.translation import gettext as _

from chat.checkpoints.describe import CheckpointInvalid
from chat.models import Checkpoint
from portal.terminal import row_named
from tuning.datasets import lint, store
from tuning.datasets.examples import messages_of
from tuning.models import Dataset
from tuning.plan import recipe_for
from tuning.terminal import ForegroundCommand

_BLOCK = 2000  # rows of one piece of work
_UNCUT = 1 << 30


@lru_cache(maxsize=1)
def _prompter(folder: str):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one of the cores
    from chat.engine.loading import load_prompter

    return load_prompter(folder)


def _encoded(folder: str, row: dict, most_source: int, most_target: int) -> tuple[list, list]:
    messages = messages_of(row["prompt"], row["history"])
    return _prompter(folder).training_ids(messages, row["response"], most_source, most_target)


def measure(folder: str, sha256: str, start: int) -> list[tuple[bytes, int, int]]:
    """(sketch, tokens of the prompt, tokens of the response) of the rows from `start` on: uncut,
    with all that the template and the end of the answer add.
    """
    from chat.engine.prompts import IGNORED

    with store.Split(sha256) as split:
        rows = [split[row] for row in range(start, min(start + _BLOCK, len(split)))]
    found = lint.sketches([f"{row['prompt']}\n{row['response']}" for row in rows])
    lengths = []
    for row in rows:
        ids, labels = _encoded(folder, row, _UNCUT, _UNCUT)
        prompt = labels.count(IGNORED)
        lengths.append((prompt, len(ids) - prompt))
    return [(sketch, *pair) for sketch, pair in zip(found, lengths, strict=True)]


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
        owner = self.owner(options["user"])
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
            _prompter(folder)
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
        from chat.engine.prompts import IGNORED

        if not 1 <= number <= entry["rows"]:
            raise CommandError(_("The split has %(rows)s rows.") % {"rows": entry["rows"]})
        with store.Split(entry["sha256"]) as split:
            ids, labels = _encoded(folder, split[number - 1], *most)
        text = _prompter(folder).token_text
        tokens = [
            {"id": token, "text": text(token), "trained": label != IGNORED}
            for token, label in zip(ids, labels, strict=True)
        ]
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
        starts = range(0, rows, _BLOCK)
        found = []
        # fork: the tokenizer is loaded, and not a second time in each process
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            work = [pool.submit(measure, folder, entry["sha256"], start) for start in starts]
            for piece in work:
                found += piece.result()
                print(f"{len(found)}/{rows}", file=sys.stderr, flush=True)
        twins = lint.near_duplicates([sketch for sketch, _prompt, _response in found])
        report = {"rows": rows, "near_duplicates": [[row + 1, first + 1] for row, first in twins]}
        told = [
            _("%(count)s of %(rows)s rows are nearly equal to an earlier one.")
            % {"count": len(twins), "rows": rows}
        ]
        parts = (("prompt", 1), ("response", 2))
        for (part, column), limit in zip(parts, most, strict=True):
            lengths = [int(measured[column]) for measured in found]
            cut = [row + 1 for row, length in enumerate(lengths) if length > limit]
            bars = list(lint.histogram(lengths))
            report[part] = {"limit": limit, "cut": len(cut), "lines": cut[:1000], "bars": bars}
            words = {"cut": len(cut), "rows": rows, "limit": limit}
            told.append(
                _("%(cut)s of %(rows)s prompts are longer than %(limit)s tokens and are shortened.")
                % words
                if part == "prompt"
                else _(
                    "%(cut)s of %(rows)s responses are longer than %(limit)s tokens and are cut in "
                    "mid-sentence."
                )
                % words
            )
            highest = max(count for _low, _high, count in bars)
            told += [
                f"{low:6}-{high:<6} {count:8} {'#' * round(40 * count / highest)}"
                for low, high, count in bars
            ]
        return {**report, "told": told}
