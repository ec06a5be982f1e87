"""Tuning runs: the form, the live page, stop and go on."""

import pytest
from django.utils import translation

from chat.models import Checkpoint
from portal.models import Run
from tests.support.folders import adapter_folder
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import text_of
from tuning.models import Dataset, TuningMetric, TuningRun

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]


def filled(client, path="/tuning/new/", **changes) -> dict:
    """What a browser would send: the form's own values with `changes`."""
    form = client.get(path).context["form"]
    values = {name: form[name].value() for name in form.fields}
    values["dataset"], values["checkpoint"] = (
        Dataset.objects.first().pk,
        Checkpoint.objects.first().pk,
    )
    return {
        name: value
        for name, value in {**values, **changes}.items()
        if value is not None and value is not False
    }


def test_the_preset_of_the_checkpoint_starts_a_run_as_it_stands(
    client, member, dataset, checkpoint
):
    client.force_login(member)
    response = client.post("/tuning/new/", filled(client, name="first"))
    run = TuningRun.objects.get()
    assert response["Location"] == f"/tuning/{run.pk}/"
    assert (run.name, run.owner, run.status) == ("first", member, Run.Status.QUEUED)
    assert run.recipe["preset"] == "starter" and run.recipe["max_steps"] == run.total


def test_every_wrong_value_is_said_at_its_field_and_nothing_starts(
    client, member, dataset, checkpoint
):
    client.force_login(member)
    wrong = filled(client, pre_seq_len="0", learning_rate="fast", max_steps="-3", dataset="999")
    form = client.post("/tuning/new/", wrong).context["form"]
    assert {"learning_rate", "dataset"} <= set(form.errors)
    wrong = filled(client, pre_seq_len="0", max_steps="-3")
    response = client.post("/tuning/new/", wrong)
    assert {"pre_seq_len", "max_steps"} <= set(response.context["form"].errors)
    assert 'value="-3"' in text_of(response)  # what was typed is kept
    assert not TuningRun.objects.exists()


def test_a_new_run_like_an_earlier_one_has_its_recipe(client, member, tuning_run):
    client.force_login(member)
    form = client.get(f"/tuning/new/?like={tuning_run.pk}").context["form"]
    assert (form["pre_seq_len"].value(), form["max_steps"].value()) == (8, 100)


def test_a_running_run_shows_its_curve_and_refreshes_an_ended_one_does_not(
    client, member, tuning_run
):
    client.force_login(member)
    path = f"/tuning/{tuning_run.pk}/"
    response = client.get(path)
    assert response.context["chart"]["points"][-1] == (20, 3.0, None)
    assert "data-live-every" in text_of(response)
    assert "<dd>auto</dd>" not in text_of(response)  # the form calls it automatic
    Run.objects.update(
        status=Run.Status.FAILED, error={"code": "nan_loss", "message": "The loss is not a number."}
    )
    page = text_of(client.get(path))
    assert "The loss is not a number." in page and "data-live-every" not in page


def test_a_long_run_is_thinned_to_what_a_chart_can_show(client, member, tuning_run):
    points = [
        TuningMetric(run=tuning_run, step=step, loss=1.0, learning_rate=0.1)
        for step in range(21, 3001)
    ]
    TuningMetric.objects.bulk_create(points)
    client.force_login(member)
    shown = client.get(f"/tuning/{tuning_run.pk}/").context["chart"]["points"]
    assert len(shown) <= 601 and shown[0][0] == 1 and shown[-1][0] == 3000


def test_the_log_is_shown_from_a_lines_beginning(client, member, tuning_run, data_dir):
    folder = tuning_run.folder
    folder.mkdir(parents=True)
    (folder / "run.log").write_text("".join(f"line {number} <x>\n" for number in range(3000)))
    client.force_login(member)
    log = client.get(f"/tuning/{tuning_run.pk}/").context["log"]
    assert log.startswith("line ") and log.endswith("line 2999 <x>\n") and len(log) <= 16_000


def test_stop_asks_the_run_and_go_on_queues_a_failed_one(client, member, tuning_run):
    client.force_login(member)
    client.post(f"/tuning/{tuning_run.pk}/cancel/")
    assert Run.objects.get().cancel_requested
    Run.objects.update(status=Run.Status.FAILED)
    client.post(f"/tuning/{tuning_run.pk}/resume/")
    assert Run.objects.get().status == Run.Status.QUEUED


@pytest.mark.parametrize("phase", Run.Phase.values)
def test_every_phase_is_told_in_the_readers_language(client, member, tuning_run, phase):
    """`tuning/work.py`, `evaluation/work.py` and the queue write these, and no others."""
    Run.objects.update(status=Run.Status.RUNNING, phase=phase)
    client.force_login(member)
    with translation.override("zh-hans"):
        told = str(Run.Phase(phase).label)
    assert told.isascii() is False
    page = text_of(client.get(f"/tuning/{tuning_run.pk}/", headers={"Accept-Language": "zh-Hans"}))
    assert told in page


PROOF = {"prompts": 8, "tokens": 90, "same": 8, "gap": 0.0, "tolerance": 0.001, "holds": True}


def test_validation_and_the_proof_are_shown(client, member, tuning_run):
    TuningMetric.objects.filter(step=10).update(validation_loss=2.25)
    TuningRun.objects.update(validation_loss=2.25, proof=PROOF)
    client.force_login(member)
    response = client.get(f"/tuning/{tuning_run.pk}/")
    assert response.context["chart"]["points"][9] == (10, 4.0, 2.25)
    assert "8 条验证提示中有 8 条" in text_of(response)
    TuningRun.objects.update(proof={**PROOF, "holds": False})
    assert "不提供" in text_of(client.get(f"/tuning/{tuning_run.pk}/"))


def test_two_runs_are_compared_with_their_differences_marked(
    client, member, other_member, tuning_run
):
    other = TuningRun.objects.get(pk=tuning_run.pk)
    other.pk = other.id = other.run_ptr_id = None
    other.recipe = {**tuning_run.recipe, "pre_seq_len": 16}
    other.name = "longer"
    other._state.adding = True
    other.save()
    TuningMetric.objects.create(run=other, step=3, loss=1.5, learning_rate=0.1)
    client.force_login(member)
    response = client.get(f"/tuning/{tuning_run.pk}/?with={other.pk}")
    label = f"#{other.pk} longer"
    assert response.context["chart"]["others"] == [{"label": label, "points": [(3, 1.5, None)]}]
    assert text_of(response).count("<mark") == 1 and f"#{other.pk}: 16</mark>" in text_of(response)
    TuningRun.objects.filter(pk=other.pk).update(owner=other_member)
    response = client.get(f"/tuning/{tuning_run.pk}/?with={other.pk}")
    assert response.context["others"] == []  # other people's runs are not there


def test_a_saved_step_becomes_a_tuned_model_once(client, member, other_member, tuning_run):
    saved = tuning_run.steps_folder / "step-20"
    adapter_folder(saved, tuning_run.checkpoint.fingerprint)
    client.force_login(member)
    assert "与第 20 步对话" in text_of(client.get(f"/tuning/{tuning_run.pk}/"))
    path = f"/tuning/{tuning_run.pk}/steps/20/"
    first = client.post(path)
    (adapter,) = tuning_run.adapters.all()
    assert first["Location"] == f"/chat/?adapter={adapter.pk}"
    assert (adapter.step, adapter.owner, adapter.name) == (20, member, "my run-20")
    assert client.post(path)["Location"] == first["Location"] and saved.is_dir()
    response = client.post(f"/tuning/{tuning_run.pk}/steps/21/", follow=True)
    assert "没有保留第 21 步" in text_of(response)
    api = f"/api/v1/tuning-runs/{tuning_run.pk}/steps/"
    answer = client.post(f"{api}20/")
    assert (answer.status_code, answer.json()["id"]) == (201, adapter.pk)
    assert client.post(f"{api}21/").json()["error"]["code"] == "no_such_step"
    client.force_login(other_member)
    assert client.post(path).status_code == client.post(f"{api}20/").status_code == 404


def test_the_recipe_is_a_file_to_keep(client, member, tuning_run):
    client.force_login(member)
    response = client.get(f"/tuning/{tuning_run.pk}/recipe.json")
    assert response.json() == tuning_run.recipe
    assert "attachment" in response["Content-Disposition"]


def test_the_form_knows_what_the_newest_run_on_a_base_took(
    client, member, other_member, tuning_run
):
    TuningRun.objects.filter(pk=tuning_run.pk).update(
        samples_per_second=8.0,
        peak_memory=1 << 30,
        recipe={**tuning_run.recipe, "kl_weight": 0.5, "kl_share": 0.25, "sweep": [{}, {}]},
    )
    client.force_login(member)
    told = client.get("/tuning/new/").context["page_data"]["measured"]
    (found,) = told.values()
    assert list(told) == [tuning_run.checkpoint_id] and found["rows_per_second"] == 20
    assert (found["run"], found["memory"]) == (tuning_run.pk, 1 << 30)
    client.force_login(other_member)
    assert client.get("/tuning/new/").context["page_data"]["measured"] == {}


def test_a_recipe_shows_lora_s_settings_to_lora_alone(client, member, tuning_run):
    client.force_login(member)
    for method, count in (("ptuning_v2", 0), ("lora", 1)):
        tuning_run.recipe |= {"method": method, "lora_r": 8}
        tuning_run.save()
        page = client.get(f"/tuning/{tuning_run.pk}/").content.decode()
        assert page.count('title="lora_r"') == count, method
