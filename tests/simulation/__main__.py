"""`python -m tests.simulation`: a week of 200 members on 8 devices; the last line holds the
figures. `--picture FILE.svg` draws it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["DJANGO_SETTINGS_MODULE"] = "portal.settings"
os.environ["PORTAL_DATABASE_URL"] = "sqlite://:memory:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, number in {"members": 200, "devices": 8, "days": 7, "runs": 2800, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    os.environ["PORTAL_DATA_DIR"] = tempfile.mkdtemp(prefix="portal-simulation-")
    os.environ["PORTAL_DEVICES"] = ",".join(f"cuda:{n}=24GB" for n in range(options.devices))
    import django

    django.setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    from tests.simulation.picture import svg
    from tests.simulation.week import Week

    started = time.process_time()
    week = Week(options.members, options.devices, options.days, options.runs, options.seed)
    outcome = week.simulate()
    if options.picture:
        options.picture.write_text(svg(outcome), encoding="utf-8")
    persons = outcome.of_persons()
    minutes = {
        f"{name}_wait_minutes_of_{which}_person": round(pick(values) / 60, 1)
        for name, values in persons.items()
        for which, pick in {"median": statistics.median, "worst": max}.items()
    }
    figures = {
        "persons": len(outcome.waits),
        "finished": outcome.finished,
        "refused": outcome.refused,
        "utilisation": round(outcome.utilisation(), 3),
        **minutes,
        "worst_wait_minutes_of_low_runs": round(max(outcome.low_waits, default=0) / 60, 1),
        "longest_line": outcome.longest_line,
        "passed_by_one_other": outcome.passed,
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
