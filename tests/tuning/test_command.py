"""`manage.py train`: one run in the foreground."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from django.core.management import CommandError, call_command

from chat.engine import adapters
from chat.models import Checkpoint
from tests.support import ROOT
from tests.support import tiny_training as tiny
from tuning.models import Dataset, TuningRun

PREPARE = """
from django.core.management import call_command
from chat.registry import register_checkpoint
from portal.models import User
call_command("migrate", verbosity=0)
User.objects.create_superuser("admin")
register_checkpoint({folder!r}, "tiny")
"""


def write_rows(path, count):
    rows = [{"content": row["prompt"], "summary": row["response"]} for row in tiny.examples(count)]
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    return path


def test_a_run_in_the_foreground_makes_an_adapter(tmp_path):
    """As train.sh has it, in a process of its own: upload of two splits, training, log, published
    adapter, clean ends.
    """
    data = tmp_path / "data"
    environment = {**os.environ, "PORTAL_DATA_DIR": str(data), "PORTAL_DEVICE": "cpu"}

    def manage(*arguments, **options):
        argv = [sys.executable, "manage.py", *arguments]
        return subprocess.run(
            argv, cwd=ROOT, env=environment, capture_output=True, text=True, **options
        )

    manage("shell", "-c", PREPARE.format(folder=str(tiny.write(tmp_path / "tiny"))), check=True)
    files = (
        "--train_file",
        write_rows(tmp_path / "rows_12.json", 12),
        "--validation_file",
        write_rows(tmp_path / "dev.json", 3),
    )
    done = manage(
        "train",
        "--do_train",
        *map(str, files),
        "--prompt_column",
        "content",
        "--response_column",
        "summary",
        "--overwrite_cache",
        "--model_name_or_path",
        "tiny",
        "--output_dir",
        "output/ads",
        "--overwrite_output_dir",
        "--max_source_length",
        "40",
        "--max_target_length",
        "24",
        "--per_device_train_batch_size",
        "4",
        "--per_device_eval_batch_size",
        "1",
        "--gradient_accumulation_steps",
        "1",
        "--predict_with_generate",
        "--max_steps=6",
        "--logging_steps",
        "2",
        "--save_steps",
        "4",
        "--eval_steps",
        "4",
        "--learning_rate",
        "5e-2",
        "--pre_seq_len",
        "4",
        "--name",
        "ads_1",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["step"], result["max_steps"], result["error"]) == (
        "succeeded",
        6,
        6,
        None,
    )
    assert result["adapter"]["name"] == "ads_1"
    prefix = adapters.load(result["adapter"]["folder"])
    assert (
        prefix.pre_seq_len == 4
        and prefix.metadata["step"] == 6
        and prefix.metadata["recipe"]["learning_rate"] == 0.05
    )
    log = next((data / "runs").glob(f"{result['run']}-*/run.log")).read_text(encoding="utf-8")
    assert [line.split("  ")[1] for line in log.splitlines() if "loss" in line] == [
        "step 2/6",
        "step 4/6",
        "step 6/6",
    ]
    assert [line for line in log.splitlines() if "validation" in line and "step 4/6" in line]
    # the engine that proves the prefix says its own line in between
    assert set(log.splitlines()) <= set(done.stderr.splitlines())
    assert "Loading weights" not in done.stderr
    assert not list((data / "runs").glob("*/state")), "nothing left that is not needed"
    with contextlib.closing(sqlite3.connect(data / "portal.sqlite3")) as database:
        rows = database.execute(
            "SELECT step, loss FROM tuning_tuningmetric ORDER BY step"
        ).fetchall()
        splits = json.loads(
            database.execute("SELECT splits FROM tuning_datasetversion").fetchone()[0]
        )
        assert database.execute("SELECT attempt, status FROM portal_run").fetchall() == [
            (1, "succeeded")
        ]
        validated = database.execute(
            "SELECT step FROM tuning_tuningmetric WHERE validation_loss IS NOT NULL ORDER BY step"
        ).fetchall()
        last, proof = database.execute("SELECT result_step, proof FROM tuning_tuningrun").fetchone()
    assert [step for (step,) in validated] == [4, 6] and last == 6
    assert json.loads(proof)["holds"] and json.loads(proof)["prompts"] == 3
    steps = sorted(path.name for path in (data / "runs").glob("*/steps/*"))
    assert steps == ["step-4", "step-6"]
    assert [step for step, _ in rows] == [2, 4, 6] and rows[-1][1] == result["loss"] < rows[0][1]
    assert {name: split["rows"] for name, split in splits.items()} == {"train": 12, "validation": 3}


@pytest.fixture
def base(staff, data_dir):
    return Checkpoint.objects.create(
        name="base", path="/nowhere", fingerprint="f", description={"context_length": 512}
    )


def test_bad_input_is_named_and_nothing_is_started(base, tmp_path):
    good = write_rows(tmp_path / "rows.json", 3)
    bad = tmp_path / "bad.json"
    bad.write_text('{"content": "a"}\nnot json\n')
    for arguments, said in [
        (["--train-file", "/nowhere.json"], "/nowhere.json"),
        (
            [
                "--train-file",
                str(bad),
                "--prompt-column",
                "content",
                "--response-column",
                "summary",
            ],
            ":2 ",
        ),
        (
            [
                "--train-file",
                str(good),
                "--prompt-column",
                "question",
                "--response-column",
                "summary",
            ],
            "question",
        ),
        (["--train-file", str(good), "--checkpoint", "other"], "base"),
        (["--train-file", str(good), "--user", "nobody"], "nobody"),
        (
            ["--train-file", str(good), "--pre-seq-len", "0", "--learning-rate", "7"],
            "--pre-seq-len: ",
        ),
        (
            ["--train-file", str(good), "--pre-seq-len", "0", "--learning-rate", "7"],
            "--learning-rate: ",
        ),
        (["--train-file", str(good), "--max-source-length", "450"], "512"),
        (["--dataset", "unknown"], "unknown"),
        ([], "--train-file"),
    ]:
        with pytest.raises(CommandError) as refused:
            call_command("train", *arguments)
        assert said in str(refused.value), arguments
    assert not TuningRun.objects.exists() and not Dataset.objects.exists()


def test_a_dataset_of_the_portal_may_be_named(base, staff, make_dataset, monkeypatch):
    from tuning.management.commands import train

    dataset = make_dataset(staff)
    monkeypatch.setattr(train, "carry_out", lambda run_id, token, say: "succeeded")
    for wish in ("ads", str(dataset.pk)):
        call_command("train", "--dataset", wish, "--preset", "starter", "--quantization-bit", "0")
    assert [run.recipe["dataset"]["id"] for run in TuningRun.objects.all()] == [dataset.pk] * 2
    assert Dataset.objects.count() == 1 and TuningRun.objects.first().status == "running"


@pytest.fixture
def planned(monkeypatch):
    """Runs are planned and claimed, not carried out."""
    from tuning.management.commands import train

    monkeypatch.setattr(train, "carry_out", lambda run_id, token, say: "succeeded")


def test_epochs_and_a_warm_up_ratio_become_steps(base, tmp_path, planned, capsys):
    """As pasted from other scripts: 3 epochs of 10 examples, 4 a step, are 7.5 steps."""
    call_command(
        "train",
        "--train-file",
        str(write_rows(tmp_path / "rows.json", 10)),
        "--num-train-epochs",
        "3",
        "--warmup-ratio",
        "0.1",
        "--per-device-train-batch-size",
        "2",
        "--gradient-accumulation-steps",
        "2",
        "--quantization-bit",
        "0",
        "--bf16",
        "--test-file",
        "test.json",
        "--report-to",
        "none",
    )
    recipe = TuningRun.objects.get().recipe
    assert (recipe["max_steps"], recipe["warmup_steps"], recipe["precision"]) == (8, 1, "bfloat16")
    said = capsys.readouterr().err.splitlines()
    assert [("8" in line, "1" in line) for line in said[1:3]] == [(True, True), (False, True)]
    assert "evaluate" in said[0]


@pytest.mark.parametrize(
    "wish", ["THUDM/chatglm-6b", "thudm/ChatGLM-6B", "glm", "{folder}", "{folder}/", "7"]
)
def test_a_checkpoint_is_named_as_people_have_it_in_their_scripts(
    staff, data_dir, tmp_path, planned, wish
):
    folder = tmp_path / "chatglm-6b"
    folder.mkdir()
    base = Checkpoint.objects.create(pk=7, name="glm", path=str(folder), fingerprint="f")
    rows = str(write_rows(tmp_path / "rows.json", 3))
    wish = wish.format(folder=folder)
    call_command("train", "--train-file", rows, "--model-name-or-path", wish, "--preset", "starter")
    assert TuningRun.objects.get().checkpoint == base


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model-name-or-path", "THUDM/chatglm-6b"],
            "fetch_checkpoint hf:THUDM/chatglm-6b --name chatglm-6b",
        ),
        (["--model-name-or-path", "{folder}"], "add_checkpoint {folder}"),
        (["--ptuning-checkpoint", "output/x"], "--ptuning-checkpoint: "),
        (["--lora-rank=8"], "--method lora"),
        (["--num-beams", "4", "--deepspeed", "x.json"], "--devices"),
        (["--learning-rat", "1", "--nonsense"], "--nonsense: "),
        (["--leraning-rate", "1e-2"], "--learning-rate"),
        (["--num-train-epochs", "0"], "--num-train-epochs: "),
        (["--num-train-epochs", "nan"], "--num-train-epochs: "),
        (["--warmup-ratio", "1.5"], "--warmup-ratio: "),
    ],
)
def test_a_pasted_flag_that_is_not_taken_is_refused_with_what_to_use_instead(
    base, tmp_path, planned, arguments, said
):
    rows = str(write_rows(tmp_path / "rows.json", 3))
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(CommandError) as refused:
        call_command("train", "--train-file", rows, *arguments)
    assert said.format(folder=tmp_path) in str(refused.value)
    assert not TuningRun.objects.exists() and not Dataset.objects.exists()
