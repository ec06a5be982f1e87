"""A launcher as a cluster's: `python -m tests.support.launcher SECONDS COMMAND...` waits, starts
the command in a session of its own, as if elsewhere, and forwards SIGTERM and SIGINT to it.

While a file named by LAUNCHER_KILLS exists, it is removed and the command is killed: its machine
has died.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    seconds, *command = sys.argv[1:]
    time.sleep(float(seconds))  # a signal ends it here, as it ends a job that waits for a machine
    process = subprocess.Popen(command, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    kills = Path(os.environ.get("LAUNCHER_KILLS", os.devnull + "/never"))
    while process.poll() is None:
        if kills.exists():
            kills.unlink()
            process.kill()
        time.sleep(0.05)
    return process.returncode % 256


if __name__ == "__main__":
    sys.exit(main())
