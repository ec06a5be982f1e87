"""A dataset and a checkpoint to plan runs with."""

import io
import json

import pytest

from chat.models import Checkpoint
from tests.support import tiny_training as tiny
from tuning.datasets import store


@pytest.fixture
def checkpoint(db):
    return Checkpoint.objects.create(
        name="base",
        path="/nowhere",
        fingerprint="f" * 64,
        description={"architecture": "Qwen2ForCausalLM", "context_length": 512},
        is_default=True,
    )


@pytest.fixture
def make_dataset(db, data_dir):
    """make_dataset(owner, rows=5): a ready dataset."""

    def make(owner, rows: int = 5, name: str = "ads"):
        lines = [json.dumps({"content": f"q{row}", "summary": f"a{row}"}) for row in range(rows)]
        file = io.BytesIO("\n".join(lines).encode())
        file.name = "train.json"
        return store.ingest(
            file, name=name, owner=owner, prompt_column="content", response_column="summary"
        )

    return make


@pytest.fixture
def tiny_checkpoint(db, tmp_path):
    """A checkpoint whose tokenizer is there: byte by byte."""
    folder = tiny.write(tmp_path / "tiny")
    return Checkpoint.objects.create(name="tiny", path=str(folder), fingerprint="x")
