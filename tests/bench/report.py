"""What every benchmark has besides its figures: the two common arguments, the table and the line of
JSON.
"""

import argparse
import json
import os
import platform
import re
import statistics
from importlib.metadata import version
from pathlib import Path


def arguments(description: str, quick: str) -> argparse.ArgumentParser:
    """A parser with --quick (`quick` says what that leaves out) and --json; a benchmark adds its
    own.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def peak_mib() -> float:
    """The most memory that this process has held. Not getrusage's figure: a child's begins with its
    parent's.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """Every key's median over the rounds."""
    return {key: statistics.median(values) for key, values in samples.items()}


def tell(
    bench: str,
    results: dict[str, float],
    *,
    rounds: int,
    packages: tuple[str, ...],
    as_json: bool,
    samples: dict[str, list[float]] | None = None,
    **machine,
) -> None:
    """Prints `results`, with the lowest and highest of the `samples` that they are medians of, and
    at last the line of JSON.

    `packages`: whose versions matter; `machine`: what else there is to say of it, such as the
    number of threads.
    """
    print(f"{'':36}{'value':>12}{'lowest':>12}{'highest':>12}")
    for key, value in results.items():
        values = (samples or {}).get(key, ())
        spread = (min(values), max(values)) if len(values) > 1 else ()
        print(f"{key:36}" + "".join(f"{_rounded(number, 4):>12,g}" for number in (value, *spread)))
    if as_json:
        found = {
            "bench": bench,
            "machine": {
                "cpus": os.cpu_count(),
                "machine": platform.machine(),
                "load": os.getloadavg()[0],
                **machine,
            },
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in packages},
            },
            "rounds": rounds,
            "results": {key: _rounded(value, 6) for key, value in results.items()},
        }
        print(json.dumps(found))


def _rounded(value: float, digits: int) -> float:
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")
