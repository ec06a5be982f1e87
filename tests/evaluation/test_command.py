"""`manage.py evaluate` as evaluate.sh is pasted into it; the run itself is test_process.py's."""

import json
import subprocess
import sys

import pytest
import torch
from django.core.management import CommandError, call_command
from django.core.management import base as management

from chat import registry
from chat.models import Adapter
from evaluation.models import EvaluationRun
from tests.support import tiny_chatglm
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


EVALUATE = """--do_predict --validation_file AdvertiseGen/dev.json
    --test_file AdvertiseGen/dev.json --overwrite_cache --prompt_column content
    --response_column summary --output_dir ./output/$CHECKPOINT --overwrite_output_dir
    --per_device_eval_batch_size 1 --predict_with_generate"""
# the flags of ChatGLM-6B's evaluate.sh and evaluate_finetune.sh
OF_A_PREFIX = f"""{EVALUATE} --model_name_or_path THUDM/chatglm-6b
    --ptuning_checkpoint ./output/$CHECKPOINT/checkpoint-$STEP
    --max_source_length 64 --max_target_length 64 --pre_seq_len $LENGTH --quantization_bit 4"""
OF_A_MODEL = f"""{EVALUATE} --model_name_or_path ./output/$CHECKPOINT/checkpoint-$STEP
    --max_source_length 256 --max_target_length 256 --fp16_full_eval"""


def through_a_shell(flags: str, folder) -> list[str]:
    """What a program is given that is called by a script: a flag a line, variables filled in."""
    (folder / "main.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    words = " \\\n    ".join(flags.split())
    script = (
        f"LENGTH=128\nCHECKPOINT=adgen\nSTEP=3000\n\n{sys.executable} main.py \\\n    {words}\n"
    )
    done = subprocess.run(
        ["sh", "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("flags", [OF_A_PREFIX, OF_A_MODEL])
def test_the_published_scripts_are_taken_line_by_line(
    flags, tmp_path, data_dir, staff, monkeypatch, capsys
):
    """With the real folders' names and a tiny model of the real kind in them."""
    from evaluation.management.commands import evaluate

    ran = []
    monkeypatch.setattr(evaluate, "carry_out", lambda run_id, token, say: ran.append(run_id))
    tuned = flags is OF_A_MODEL
    model = tmp_path / "output/adgen/checkpoint-3000"
    model = model if tuned else tmp_path / "chatglm-6b"
    model.parent.mkdir(parents=True, exist_ok=True)
    tiny_chatglm.tiny_folder(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_sequence_length": 2048}))
    base = registry.register_checkpoint(model, name="the-original")
    (tmp_path / "AdvertiseGen").mkdir()
    rows = json.dumps({"content": "类型#裙", "summary": "这条裙子"}, ensure_ascii=False)
    (tmp_path / "AdvertiseGen" / "dev.json").write_text(rows, encoding="utf-8")
    if not tuned:
        prefix = tmp_path / "output/adgen/checkpoint-3000"
        prefix.mkdir(parents=True)
        width = base.description["layers"] * 2 * base.description["hidden_size"]
        name = "transformer.prefix_encoder.embedding.weight"
        torch.save({name: torch.zeros(128, width)}, prefix / "pytorch_model.bin")

    words = through_a_shell(flags, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(management.connections, "close_all", lambda: None)  # of the test
    with pytest.raises(SystemExit):  # nothing was carried out, so it did not succeed
        evaluate.Command().run_from_argv(["manage.py", "evaluate", *words])
    run = EvaluationRun.objects.get()
    assert ran == [run.pk] and run.checkpoint == base
    if tuned:
        lengths, bits, adapter = (256, 256), None, None
    else:
        lengths, bits, adapter = (64, 64), 4, Adapter.objects.get()
        assert (adapter.step, adapter.pre_seq_len) == (3000, 128)
    assert run.adapter == adapter and run.recipe["quantization_bit"] == bits
    assert (run.recipe["max_source_length"], run.recipe["max_target_length"]) == lengths
