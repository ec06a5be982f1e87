"""`manage.py evaluate` as evaluate.sh is pasted into it; the run itself is test_process.py's."""

import json

import pytest
import torch
from django.core.management import CommandError, call_command

from chat import registry
from chat.models import Adapter
from evaluation.models import EvaluationRun
from tests.support.folders import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    PRE_SEQ_LEN,
    checkpoint_folder,
)

pytestmark = pytest.mark.django_db


@pytest.fixture
def base(tmp_path, data_dir, staff):
    return registry.register_checkpoint(checkpoint_folder(tmp_path / "base"))


@pytest.fixture
def pasted(base, tmp_path, monkeypatch):
    """evaluate.sh's lines with a file and a prefix of its own; runs are planned, not carried
    out.
    """
    from evaluation.management.commands import evaluate

    monkeypatch.setattr(evaluate, "carry_out", lambda run_id, token, say: "succeeded")
    rows = tmp_path / "dev.json"
    rows.write_text(json.dumps({"content": "a", "summary": "b"}))
    folder = tmp_path / "output" / "checkpoint-3000"
    folder.mkdir(parents=True)
    prefix = torch.zeros(PRE_SEQ_LEN, LAYERS * 2 * KV_HEADS * HEAD_DIM)
    name = "transformer.prefix_encoder.embedding.weight"
    torch.save({name: prefix}, folder / "pytorch_model.bin")
    return {
        "--validation-file": str(rows),
        "--test-file": str(rows),
        "--prompt-column": "content",
        "--response-column": "summary",
        "--model-name-or-path": "THUDM/base",
        "--ptuning-checkpoint": str(folder),
        "--output-dir": str(tmp_path / "out"),
        "--max-source-length": "64",
        "--max-target-length": "64",
        "--per-device-eval-batch-size": "1",
        "--pre-seq-len": str(PRE_SEQ_LEN),
    }


def run(flags: dict) -> None:
    with pytest.raises(SystemExit):  # nothing was carried out, so it did not succeed
        call_command(
            "evaluate",
            "--do-predict",
            "--overwrite-cache",
            "--predict-with-generate",
            *(word for pair in flags.items() for word in pair),
        )


def test_evaluate_sh_as_it_is_imports_its_prefix_once(pasted, capsys):
    run(pasted)
    first = Adapter.objects.get()
    assert (first.name, first.step) == ("checkpoint-3000", 3000)
    assert EvaluationRun.objects.get().adapter == first
    assert first.name in capsys.readouterr().err
    del pasted["--test-file"]
    run(pasted)
    assert Adapter.objects.get() == first and EvaluationRun.objects.count() == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--pre-seq-len": "128"}, str(PRE_SEQ_LEN)),
        ({"--quantization-bit": "4"}, "--quantization-bit: "),
        ({"--ptuning-checkpoint": "/nowhere"}, "--ptuning-checkpoint: /nowhere"),
        ({"--model-name-or-path": "THUDM/other"}, "base"),
        ({"--train-file": "train.json"}, "--test-file"),
        ({"--num-beams": "4"}, "--decoding"),
    ],
)
def test_what_does_not_fit_is_told_by_name(pasted, change, said):
    with pytest.raises(CommandError) as refused:
        call_command("evaluate", *(word for pair in (pasted | change).items() for word in pair))
    assert said in str(refused.value)
    assert not EvaluationRun.objects.exists()


def test_without_a_file_it_says_how_to_name_one(base):
    with pytest.raises(CommandError, match="--test-file"):
        call_command("evaluate")
