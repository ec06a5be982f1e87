"""Worker processes for tests: started for real, so that they can be killed for real."""

import os
import signal
import subprocess
import sys
import tempfile

from chat.worker.router import CheckpointRef
from tests.support import ROOT

TOKEN = "a worker's token"
CHECKPOINT = CheckpointRef("pretend", "f" * 64)


class PretendWorker:
    """`with PretendWorker(grace=1) as worker`: a PretendEngine behind the real server,
    on a unix socket.
    """

    module = "tests.support.pretend_engine"

    def __init__(self, url: str = "", **options):
        # short: a socket's path is limited
        self.folder = tempfile.TemporaryDirectory(prefix="worker-")
        self.url = url or f"unix:{self.folder.name}/worker.sock"
        self.options = [f"{name}={value}" for name, value in options.items()]
        self.process: subprocess.Popen | None = None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, self.url, TOKEN, *self.options],
            cwd=ROOT,
            env={**os.environ},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "listening\n"
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(10)
        self.process.stdout.close()
        return code

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.kill()
        self.folder.cleanup()


class EngineWorker(PretendWorker):
    """The same around the real engine on a checkpoint folder."""

    module = "tests.support.engine_worker"

    def __init__(self, checkpoint_folder):
        super().__init__()
        self.options = [str(checkpoint_folder)]

    def kill(self):
        """Leaves in `taken` the ids of the requests that it took."""
        self.process.kill()
        self.taken = self.process.stdout.read().split()
        super().kill()
