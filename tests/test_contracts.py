"""Who may import whom, run by the tests; each rule is proved by planting a violation in a copy of
the tree.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGES = ("portal", "chat", "tuning", "evaluation")
BANNED_NAMES = {"utils.py", "helpers.py", "common.py", "services.py", "misc.py"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            Path(sys.executable).parent / "lint-imports",
            "--config",
            folder / "pyproject.toml",
            "--no-cache",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_the_contracts_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("portal/runs/lifecycle.py", "import tuning.models", "Straight line"),
        ("chat/conversations/turns.py", "import evaluation.models", "Straight line"),
        ("tuning/plan.py", "import evaluation.plan", "Straight line"),
        ("chat/engine/engine.py", "import django", "pure cores"),
        ("chat/worker/router.py", "import portal.models", "pure cores"),
        ("evaluation/metrics/original.py", "import torch", "Scores need no torch"),
        ("chat/worker/server.py", "import chat.models", "pure cores"),
        ("chat/engine/scheduler.py", "import aiohttp", "nothing of the network"),
        ("chat/engine/loading.py", "import chat.chatglm", "independent"),
        ("chat/chatglm/modeling.py", "import chat.engine.prompts", "independent"),
        ("chat/ops/cpu_linear.py", "import chat.engine.capacity", "independent"),
        ("chat/worker/wire.py", "import torch", "need no torch"),
        ("chat/conversations/live.py", "import chat.engine.engine", "need no torch"),
        ("chat/views.py", "import chat.worker.client", "only through chat.worker.router"),
        ("tuning/plan.py", "import chat.worker.server", "only through chat.worker.router"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, module, line, contract):
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package,
            tmp_path / package,
            ignore=shutil.ignore_patterns("*.safetensors", "__pycache__", "static"),
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / module
    assert planted.exists()
    planted.write_text(planted.read_text() + f"\n\ndef planted():\n    {line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    broken = [row for row in result.stdout.splitlines() if " BROKEN" in row]
    assert any(contract in row for row in broken), result.stdout


def test_the_web_process_imports_neither_torch_nor_the_scores():
    """The kinds of work are registered in every process; what is heavy waits for its run."""
    script = (
        "import django, sys; django.setup(); import portal.urls, chat.api.routing;"
        "print([m for m in ('torch', 'transformers', 'jieba') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "portal.settings"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_modules_are_named_after_ideas():
    assert not [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name in BANNED_NAMES
    ]
