"""Runs that end as a checkpoint: from the plan to the row, through the door a user holds."""

import json
from pathlib import Path

import pytest
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command

from chat import inventory
from chat.checkpoints import memory
from chat.models import Adapter, Checkpoint
from chat.registry import register_checkpoint
from portal.runs.heartbeat import ProcessLost
from tests.support import tiny_training as tiny
from tuning import made_checkpoints
from tuning.models import TuningRun
from tuning.plan import create_run
from tuning.processes import launch

SMALL = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "max_source_length": 40,
    "max_target_length": 24,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_steps": 0,
    "warmup_steps": 0,
}


@pytest.fixture
def base(admin_user, data_dir, tmp_path, settings):
    settings.DEVICE = "cpu"
    return register_checkpoint(tiny.write(tmp_path / "base"), "base")


def rows_file(folder: Path) -> Path:
    rows = [{"content": row["prompt"], "summary": row["response"]} for row in tiny.examples(8)]
    path = folder / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def train(folder, method, capsys, **options):
    call_command(
        "train",
        train_file=rows_file(folder),
        prompt_column="content",
        response_column="summary",
        checkpoint="base",
        name="house style",
        method=method,
        json=True,
        **{**SMALL, **options},
    )
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_makes_a_checkpoint_like_any_other(method, base, tmp_path, capsys, admin_client):
    told = train(tmp_path, method, capsys)
    run, made = TuningRun.objects.get(), Checkpoint.objects.get(pk=told["checkpoint"]["id"])
    assert told["status"] == "succeeded" and told["adapter"] is None
    assert not Adapter.objects.exists()
    assert made.name == "house style" and made.run_id == run.pk == told["run"]
    assert Path(made.path).parent == inventory.home() and not made.is_default
    assert made.fingerprint != base.fingerprint
    assert made.description["parameters"] == base.description["parameters"]
    assert made.description["source"]["source"] == f"run {run.pk} ({method}) on base"
    assert run.proof["holds"] and run.proof["prompts"] == 8
    assert (Path(made.path) / "lora" / "adapter_config.json").exists() is (method == "lora")
    assert not run.state_folder.exists()
    # every door tells it
    api = admin_client.get(f"/api/v1/tuning-runs/{run.pk}/").json()
    assert api["made_checkpoint"] == made.pk and api["method"] == method
    assert admin_client.get(f"/api/v1/checkpoints/{made.pk}/").json()["tuning_run"] == run.pk
    page = admin_client.get(f"/tuning/{run.pk}/").content.decode()
    assert f"/checkpoints/{made.pk}/" in page and f"?checkpoint={made.pk}" in page
    assert f"/tuning/{run.pk}/" in admin_client.get(f"/checkpoints/{made.pk}/").content.decode()
    # and it goes as one that was fetched, the base not while the run names it
    with pytest.raises(inventory.Conflict):
        inventory.remove(Checkpoint.objects.create(name="x", is_starter=True))
    inventory.remove(made)
    assert not Path(made.path).exists()
    assert admin_client.get(f"/api/v1/tuning-runs/{run.pk}/").json()["made_checkpoint"] is None


def test_publishing_again_is_the_same_checkpoint(base, tmp_path, capsys):
    """A run that was killed between the move and the row comes back with its files made again."""
    train(tmp_path, "lora", capsys)
    run, made = TuningRun.objects.get(), Checkpoint.objects.get(run__isnull=False)
    place = Path(made.path)
    made.delete()
    again = run.folder / "checkpoint"
    again.mkdir()
    back = made_checkpoints.publish(run, again)
    assert Path(back.path) == place and not again.exists()
    assert made_checkpoints.publish(run, again) == back


def test_what_cannot_be_is_said_before_anything_runs(
    base, admin_user, member, make_dataset, monkeypatch
):
    def problems(owner=admin_user, **hyper):
        with pytest.raises(ValidationError) as refused:
            create_run(owner, dataset=make_dataset(owner), checkpoint=base, **hyper)
        return {
            name: [problem.code for problem in found]
            for name, found in refused.value.error_dict.items()
        }

    assert problems(member, method="lora") == {"method": ["administrators_only"]}
    assert problems(method="full", quantization_bit=4)["quantization_bit"]
    assert problems(method="lora", init="zero", freeze_first=True) == {
        "init": ["not_with_method"],
        "freeze_first": ["not_with_method"],
    }
    assert problems(method="full", devices=17) == {"devices": ["too_many_devices"]}
    assert problems(method="magic") == {"method": ["not_a_choice"]}
    monkeypatch.setattr(memory, "machine", lambda: memory.Machine("cpu", 1 << 20))
    assert problems(method="full") == {"method": ["too_little_memory"]}
    assert not TuningRun.objects.exists()


def test_the_command_says_what_lora_is_called_here(base, tmp_path):
    with pytest.raises(CommandError, match="--method lora"):
        call_command("train", "--train-file", str(rows_file(tmp_path)), "--lora-rank", "8")


@pytest.mark.slow
def test_two_devices_make_a_checkpoint_too(base, tmp_path, capsys):
    told = train(tmp_path, "full", capsys, devices=2)
    run, made = TuningRun.objects.get(), Checkpoint.objects.get(run__isnull=False)
    assert told["checkpoint"]["id"] == made.pk and run.proof is None
    assert run.loss and run.trainable_parameters == base.description["parameters"]
    assert f"{run.pk}" in made.description["source"]["source"]


def test_a_lost_process_lets_the_run_go_on_as_a_lost_run_does(base, tmp_path, capsys, monkeypatch):
    job = {}

    def dies(given, folder, begins, report):
        job.update(given)
        begins(step=0, learning=7, dropped=0)
        raise ProcessLost("one of 2 training processes died")

    monkeypatch.setattr(launch, "train_apart", dies)
    with pytest.raises(SystemExit):
        train(tmp_path, "lora", capsys, devices=2)
    run = TuningRun.objects.get()
    assert (run.status, run.attempt, run.trainable_parameters) == ("queued", 1, 7)
    assert "training processes died" in run.log_tail()
    version = run.dataset_version
    assert job["rows"] == version.splits["train"]["sha256"] and job["processes"] == 2
    assert job["checkpoint"] == base.path and len(job["prompts"]) == 8


def test_the_page_offers_weights_to_administrators_alone(base, admin_client, member, client):
    client.force_login(member)
    for browser, offered in ((admin_client, True), (client, False)):
        page = browser.get("/tuning/new/")
        assert ("full" in dict(page.context["form"].fields["method"].choices)) is offered
        assert ('value="lora"' in page.content.decode()) is offered
