"""Uploads of the size of ADGEN and beyond: rows per second, time of a page, memory.

    python -m tests.bench.datasets [--quick] [--json]

Rows are made up, as long as ADGEN's (about 470 bytes); the portal's own ingest reads, validates,
hashes and indexes them. The bare json.loads of the same lines alternates with it, as a yardstick
that moves with the machine. Memory is the highest resident size of a process that takes in one
large file, above what it had before.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import report

ROWS = 115_000
CHILD = "--measure-memory"


def write_rows(path: Path, *, count: int = 0, size: int = 0, encoding: str = "utf-8") -> int:
    """Writes `count` rows, or rows up to `size` bytes; returns how many."""
    from chat.starter import sample

    known = sample.load(sample.TRAIN)
    draw = random.Random(1)
    written = rows = 0
    with open(path, "wb") as file:
        while rows < count or written < size:
            block = []
            for _ in range(min(10_000, count - rows) if count else 10_000):
                first, second = draw.choice(known), draw.choice(known)
                row = {
                    "content": f"{first['content']}*编号#{rows}",
                    "summary": first["summary"] + second["summary"],
                }
                block.append(json.dumps(row, ensure_ascii=False))
                rows += 1
            written += file.write(("\n".join(block) + "\n").encode(encoding))
    return rows


def set_up(folder: Path) -> None:
    os.environ["PORTAL_DATA_DIR"] = str(folder)
    os.environ["PORTAL_DATASET_MAX_MB"] = "4096"
    os.environ["DJANGO_SETTINGS_MODULE"] = "portal.settings"
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0, skip_checks=True)


def take_in(path: Path):
    from tuning.datasets.store import ingest

    with open(path, "rb") as file:
        return ingest(
            file, name="bench", owner=None, prompt_column="content", response_column="summary"
        )


def parse_only(path: Path) -> None:
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)


def cpu_seconds(work, *arguments) -> float:
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def page_milliseconds(version, pages: int = 400) -> list[float]:
    from tuning.datasets.store import examples

    draw = random.Random(2)
    took = []
    for _ in range(pages):
        start = draw.randrange(version.rows - 50)
        began = time.perf_counter()
        examples(version, "train", start, 50)
        took.append(1000 * (time.perf_counter() - began))
    return took


def peak_mib(folder: Path, path: Path) -> float:
    """In a process of its own, because a peak never goes down again."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.datasets", CHILD, str(folder), str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def measure_memory(folder: str, path: str) -> None:
    set_up(Path(folder))
    import tuning.datasets.store  # noqa: F401  imported before the first reading

    before = _status("VmRSS")
    take_in(Path(path))
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """KiB. Not getrusage's peak, which a child inherits from its parent."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1])


def main() -> None:
    options = report.arguments(__doc__, "fewer rounds and a quarter of the large file").parse_args()
    rounds = 3 if options.quick else 7
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        set_up(folder / "data")
        path, chinese, large = (
            folder / name for name in ("rows.json", "gb18030.json", "large.json")
        )
        write_rows(path, count=ROWS)
        write_rows(chinese, count=ROWS, encoding="gb18030")
        speeds, shares, speeds_gb18030 = [], [], []
        for _ in range(rounds):
            ours, bare = cpu_seconds(take_in, path), cpu_seconds(parse_only, path)
            speeds.append(ROWS / ours)
            shares.append(bare / ours)
            speeds_gb18030.append(ROWS / cpu_seconds(take_in, chinese))
        pages = sorted(page_milliseconds(take_in(path).current))
        size = 256 << 20 if options.quick else 1 << 30
        large_rows = write_rows(large, size=size)
        peak = peak_mib(folder / "memory", large)
    results = {
        "rows_per_second_115k": statistics.median(speeds),
        "rows_per_second_115k_lowest": min(speeds),
        "rows_per_second_115k_highest": max(speeds),
        "rows_per_second_gb18030": statistics.median(speeds_gb18030),
        "json_loads_share": statistics.median(shares),
        "page_ms_p50": pages[len(pages) // 2],
        "page_ms_p95": pages[int(0.95 * len(pages))],
        ("peak_mib_256mb" if options.quick else "peak_mib_1gb"): peak,
        "large_rows": large_rows,
    }
    report.tell("datasets", results, rounds=rounds, packages=("django",), as_json=options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        measure_memory(*sys.argv[2:4])
    else:
        main()
