"""Who may import whom, run by the tests; each rule is proved by planting a violation in a copy of
the tree.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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
        ("evaluation/metrics.py", "import torch", "Scores need no torch"),
        (
            "chat/conversations/live.py",
            "import chat.engine.engine",
            "only through chat.worker.router",
        ),
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


def test_modules_are_named_after_ideas():
    assert not [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name in BANNED_NAMES
    ]
