"""A dataset of ADGEN's size measured with a tokenizer before a run: seconds of all processes, and
of the clock.

    python -m tests.bench.checks [--quick] [--json]

Rows as in tests/bench/datasets.py, with the starter model's tokenizer. Encoding row by row, as the
trainer does when it reads, alternates with it on a twentieth of the rows, as a yardstick.
"""

import resource
import statistics
import tempfile
import time
from pathlib import Path

from tests.bench import report
from tests.bench.datasets import ROWS, set_up, take_in, write_rows


def processor_seconds() -> float:
    """Of this process and its ended children."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> None:
    options = report.arguments(__doc__, "a quarter of the rows, one round").parse_args()
    count, rounds = (ROWS // 4, 1) if options.quick else (ROWS, 3)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        set_up(folder / "data")
        path = folder / "rows.json"
        write_rows(path, count=count)
        entry = take_in(path).current.splits["train"]

        from django.conf import settings

        from chat.engine.prompts import Prompter
        from chat.prompters import prompter_of
        from tuning.datasets.examples import messages_of
        from tuning.datasets.files import Split
        from tuning.datasets.measuring import measure

        base = str(settings.BASE_DIR / "chat" / "starter" / "model")
        prompter = prompter_of(base)
        used, took, single = [], [], []
        for _round in range(rounds):
            before, began = processor_seconds(), time.perf_counter()
            measure(base, entry["sha256"], entry["rows"])
            used.append(processor_seconds() - before)
            took.append(time.perf_counter() - began)
            with Split(entry["sha256"]) as split:
                some = [split[row] for row in range(0, count, 20)]
            before = processor_seconds()
            Prompter.training_lengths(
                prompter, [(messages_of(row["prompt"]), row["response"]) for row in some]
            )
            single.append(20 * (processor_seconds() - before))
    results = {
        "rows": count,
        "cpu_seconds": statistics.median(used),
        "seconds": statistics.median(took),
        "cpu_seconds_row_by_row_lengths_alone": statistics.median(single),
    }
    report.tell(
        "checks", results, rounds=rounds, packages=("tokenizers", "rensa"), as_json=options.json
    )


if __name__ == "__main__":
    main()
