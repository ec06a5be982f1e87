"""What a run will do is decided, checked and frozen when it is created."""

from dataclasses import replace

import pytest
from django.core.exceptions import ValidationError
from django_q.models import OrmQ

from chat import registry
from chat.models import Adapter, Checkpoint
from portal.models import Run
from portal.runs import lifecycle
from tests.support import chat_families
from tuning.apps import _going_on_from
from tuning.datasets import store
from tuning.models import TuningRun
from tuning.plan import PRESETS, create_run, recipe_for, recommended_preset
from tuning.ptuning.recipe import Recipe


@pytest.fixture
def chatglm(db):
    return Checkpoint.objects.create(
        name="chatglm-6b",
        path="/nowhere",
        fingerprint="c" * 64,
        description={"family": "chatglm", "architecture": "ChatGLMModel", "context_length": 2048},
    )


def problems_of(call, *arguments, **named) -> dict[str, list[str]]:
    with pytest.raises(ValidationError) as refused:
        call(*arguments, **named)
    return {
        field: [error.code for error in errors]
        for field, errors in refused.value.error_dict.items()
    }


def test_a_plan_is_frozen_with_what_it_names(
    member, checkpoint, make_dataset, django_capture_on_commit_callbacks
):
    dataset = make_dataset(member)
    with django_capture_on_commit_callbacks(execute=True):
        run = create_run(
            member, dataset=dataset, checkpoint=checkpoint, name=" ads-v1 ", max_steps=40, seed=3
        )
    assert (run.status, run.queue, run.kind, run.total, run.name) == (
        "queued",
        "gpu",
        "tuning",
        40,
        "ads-v1",
    )
    assert OrmQ.objects.filter(key="gpu").count() == 1
    recipe = TuningRun.objects.get(pk=run.pk).recipe
    assert Recipe.from_dict(recipe) == Recipe(
        prefix_dropout=0.1, max_steps=40, seed=3, save_steps=40
    )
    assert recipe["method"] == "ptuning_v2" and recipe["preset"] == "chatglm-6b-train.sh"
    assert recipe["checkpoint"]["fingerprint"] == checkpoint.fingerprint
    version = dataset.current
    store.add_split(dataset, 2)
    run.refresh_from_db()
    assert (
        run.dataset_version == version
        and run.recipe["dataset"]["sha256"] == version.splits["train"]["sha256"]
    )
    assert run.recipe["dataset"] == {
        "id": dataset.pk,
        "name": "ads",
        "version": 1,
        "split": "train",
        "rows": 5,
        "sha256": version.splits["train"]["sha256"],
    }


def test_presets_are_the_scripts_of_upstream_and_the_starters(chatglm, checkpoint):
    train_sh = recipe_for(chatglm)
    assert train_sh == PRESETS["chatglm-6b-train.sh"] and train_sh.quantization_bit == 4
    chat = recipe_for(chatglm, "chatglm-6b-train_chat.sh")
    assert (chat.learning_rate, chat.max_source_length, chat.max_target_length) == (1e-2, 256, 256)
    assert recipe_for(checkpoint).quantization_bit is None, "only ChatGLM is quantised on loading"
    checkpoint.is_starter = True
    assert recipe_for(checkpoint) == PRESETS["starter"]
    # the task's text comes with a dataset
    assert all(replace(one, init_text="a task").problems() == [] for one in PRESETS.values())


def test_every_problem_is_told_at_once(member, checkpoint, make_dataset):
    dataset = make_dataset(member)
    dataset.versions.all().delete()  # no rows, then
    problems = problems_of(
        create_run,
        member,
        dataset=dataset,
        checkpoint=checkpoint,
        name="n" * 121,
        pre_seq_len=0,
        learning_rate=5,
        max_steps="many",
        precision="float8",
    )
    assert problems == {
        "dataset": ["not_ready"],
        "name": ["too_long"],
        "pre_seq_len": ["out_of_range"],
        "learning_rate": ["out_of_range"],
        "max_steps": ["not_a_number"],
        "precision": ["not_a_choice"],
    }
    assert not Run.objects.exists()


def test_what_the_checkpoint_cannot_do(member, checkpoint, chatglm, make_dataset):
    create = {"dataset": make_dataset(member), "checkpoint": checkpoint}
    assert problems_of(create_run, member, **create, quantization_bit=4, max_source_length=400) == {
        "quantization_bit": ["not_supported"],
        "max_source_length": ["does_not_fit"],
    }
    # the prefix takes positions of other architectures, not of ChatGLM
    assert problems_of(recipe_for, checkpoint, max_source_length=300, max_target_length=200) == {
        "max_source_length": ["does_not_fit"]
    }
    assert recipe_for(chatglm, max_source_length=1024, max_target_length=1024)
    elsewhere = Checkpoint(name="vllm", description={"upstream": "http://127.0.0.1:9"})
    assert problems_of(recipe_for, elsewhere) == {"checkpoint": ["no_weights"]}
    assert problems_of(recipe_for, checkpoint, num_virtual_tokens=8) == {
        "num_virtual_tokens": ["unknown_field"]
    }
    assert problems_of(recipe_for, checkpoint, "qlora") == {"preset": ["unknown_preset"]}


def test_a_deleted_dataset_takes_no_new_run_and_old_runs_keep_theirs(
    member, checkpoint, make_dataset
):
    dataset = make_dataset(member)
    run = create_run(member, dataset=dataset, checkpoint=checkpoint)
    lifecycle.cancel(run)
    store.delete(dataset)
    dataset.refresh_from_db()
    assert problems_of(create_run, member, dataset=dataset, checkpoint=checkpoint) == {
        "dataset": ["deleted"]
    }
    with store.open_split(TuningRun.objects.get(pk=run.pk).dataset_version, "train") as rows:
        assert len(rows) == 5


def test_problems_are_worded_in_the_reader_s_language(member, checkpoint):
    with pytest.raises(ValidationError) as refused:
        recipe_for(checkpoint, pre_seq_len=5000)
    assert "2048" in refused.value.message_dict["pre_seq_len"][0]


def test_a_prefix_that_begins_as_a_text_is_offered_one(member, make_dataset, checkpoint):
    dataset = make_dataset(member)
    run = create_run(member, dataset=dataset, checkpoint=checkpoint, init="prompt")
    assert "summary" in run.recipe["init_text"]
    mine = create_run(
        member, dataset=dataset, checkpoint=checkpoint, init="prompt", init_text="写广告"
    )
    assert mine.recipe["init_text"] == "写广告"
    random = create_run(member, dataset=dataset, checkpoint=checkpoint, init="random")
    assert random.recipe["init_text"] == ""


@pytest.mark.parametrize(
    ("hyper", "field", "code"),
    [
        ({"init": "prompt", "prefix_projection": True}, "init", "init_with_projection"),
        ({"init_text": "x" * 5000}, "init_text", "text_too_long"),
        ({"kl_weight": 1.0, "kl_share": 0.0}, "kl_share", "no_general_prompts"),
        ({"kl_weight": -1.0}, "kl_weight", "out_of_range"),
        ({"init": "ones"}, "init", "not_a_choice"),
    ],
)
def test_starts_and_holds_that_contradict_themselves_are_refused(
    member, make_dataset, checkpoint, hyper, field, code
):
    planned = {"dataset": make_dataset(member), "checkpoint": checkpoint, **hyper}
    assert problems_of(create_run, member, **planned) == {field: [code]}


def test_stopping_early_wants_rows_to_stop_by(member, checkpoint, make_dataset):
    with pytest.raises(ValidationError) as refused:
        create_run(
            member,
            dataset=make_dataset(member),
            checkpoint=checkpoint,
            eval_steps=10,
            early_stopping=2,
        )
    assert refused.value.error_dict["early_stopping"][0].code == "no_validation_rows"


def test_the_page_recommends_what_was_measured(checkpoint):
    assert recommended_preset(checkpoint) == "general"
    assert PRESETS["general"].kl_weight and PRESETS["general"].init == "prompt"


def test_a_run_may_go_on_from_a_tuned_model_of_the_same_base(
    member, other_member, checkpoint, make_dataset
):
    other = Checkpoint.objects.create(name="other", path="/nowhere", fingerprint="o" * 64)
    mine, foreign, hidden = (
        Adapter.objects.create(
            name=name, checkpoint=base, owner=owner, sha256=name * 8, pre_seq_len=24, folder="x"
        )
        for name, base, owner in (
            ("mine", checkpoint, member),
            ("foreign", other, member),
            ("hidden", checkpoint, other_member),
        )
    )
    dataset = make_dataset(member)

    def started(wish):
        return create_run(
            member, dataset=dataset, checkpoint=checkpoint, init="adapter", init_adapter=wish
        )

    for wish in (mine.name, mine.pk, mine.sha256):
        recipe = started(wish).recipe
        assert (recipe["init_adapter"], recipe["pre_seq_len"]) == (mine.sha256, 24)
    assert _going_on_from(mine) and _going_on_from(foreign) is None
    for wish, code in [
        (foreign.name, "invalid_adapter"),
        (hidden.name, "does_not_exist"),
        ("", "no_init_adapter"),
    ]:
        with pytest.raises(ValidationError) as refused:
            started(wish)
        assert refused.value.error_dict["init_adapter"][0].code == code


def test_a_prefix_may_learn_to_stand_behind_tuned_models_of_the_same_base(
    member, other_member, checkpoint, make_dataset, client
):
    style, voice, hidden, _long = (
        Adapter.objects.create(
            name=name,
            checkpoint=checkpoint,
            owner=owner,
            sha256=name[0] * 64,
            pre_seq_len=length,
            folder="x",
        )
        for name, owner, length in (
            ("style", member, 24),
            ("voice", member, 24),
            ("hidden", other_member, 24),
            ("long", member, 2000),
        )
    )
    named = {"dataset": make_dataset(member), "checkpoint": checkpoint, "preset": "starter"}
    run = create_run(member, beside=f"style, {voice.pk},style", **named)
    assert run.recipe["beside"] == f"{'s' * 64},{'v' * 64}" and _going_on_from(style)
    for wish, code in [("style,hidden", "does_not_exist"), ("long", "does_not_fit")]:
        with pytest.raises(ValidationError) as refused:
            create_run(member, beside=wish, **named)
        assert refused.value.error_dict["beside"][0].code == code
    assert problems_of(create_run, member, beside="style", beside_share=0.0, **named) == {
        "beside_share": ["no_beside_share"]
    }
    # the page offers both together once the run has made something, and says when they do not fit
    client.force_login(member)
    made = Adapter.objects.create(
        name="made", checkpoint=checkpoint, owner=member, run=run, sha256="m" * 64,
        pre_seq_len=64, folder="x",
    )  # fmt: skip
    path = f"/tuning/{run.pk}/beside/{style.pk}/"
    assert path in client.get(f"/tuning/{run.pk}/").content.decode()
    answer = client.post(path, follow=True)
    assert "made" in answer.content.decode() and "beside" in answer.content.decode()
    assert client.post(f"/tuning/{run.pk}/beside/{hidden.pk}/").status_code == 404
    made.delete()
    assert client.post(path).status_code == 404


def test_a_task_that_the_prefix_has_no_room_for_is_told_before_anything_runs(
    member, make_dataset, tmp_path
):
    real = registry.register_checkpoint(chat_families.write("Qwen2", tmp_path / "real"))
    wish = {"dataset": make_dataset(member), "checkpoint": real, "init": "prompt", "max_steps": 2}
    lengths = {"pre_seq_len": 64, "max_source_length": 32, "max_target_length": 32}
    with pytest.raises(ValidationError) as refused:
        create_run(member, **wish, **lengths, init_text="裙子" * 60)
    (error,) = refused.value.error_dict["init_text"]
    assert error.code == "init_text_too_long" and "64" in error.message
    assert create_run(member, **wish, **lengths, init_text="裙子").recipe["init_text"] == "裙子"
