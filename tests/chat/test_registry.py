"""Checkpoints and adapters become known, keep their names apart, and leave nothing behind."""

import os

import pytest
from django.core.exceptions import ValidationError

from chat import registry
from chat.models import Adapter, Checkpoint
from evaluation.models import EvaluationRun
from portal.models import Run
from portal.rest.conventions import Conflict
from tests.support.folders import PRE_SEQ_LEN, adapter_folder, checkpoint_folder

pytestmark = pytest.mark.django_db


@pytest.fixture
def base(tmp_path, data_dir):
    return registry.register_checkpoint(checkpoint_folder(tmp_path / "tiny-qwen"))


def code_of(caught, field):
    return caught.value.error_dict[field][0].code


def test_the_first_checkpoint_is_the_default_and_is_described(base, tmp_path):
    assert (base.name, base.is_default, base.description["layers"]) == ("tiny-qwen", True, 2)
    other = registry.register_checkpoint(
        checkpoint_folder(tmp_path / "other", seed=1), "other/model"
    )
    assert not other.is_default and other.fingerprint != base.fingerprint


def test_only_one_checkpoint_is_the_default(base, tmp_path):
    other = registry.register_checkpoint(
        checkpoint_folder(tmp_path / "other", seed=1), default=True
    )
    assert list(Checkpoint.objects.filter(is_default=True)) == [other]


def test_registering_again_reads_the_folder_again(base, tmp_path):
    checkpoint_folder(tmp_path / "tiny-qwen", seed=5)
    again = registry.register_checkpoint(tmp_path / "tiny-qwen")
    assert again.pk == base.pk and again.fingerprint != base.fingerprint


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("config.json", None, "config_missing"),
        ("model.safetensors", None, "weights_missing"),
        ("config.json", '{"model_type": "nonsense"}', "unknown_model_type"),
        (
            "config.json",
            '{"model_type": "x", "auto_map": {"AutoModel": "evil.py"}}',
            "remote_code_only",
        ),
        ("config.json", "not json", "config_invalid"),
        ("config.json", "[" * 100_000, "config_invalid"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_with_the_reason(
    tmp_path, db, file, content, code
):
    folder = checkpoint_folder(tmp_path / "broken")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(ValidationError) as caught:
        registry.register_checkpoint(folder)
    assert code_of(caught, "path") == code
    assert not Checkpoint.objects.exists()


def test_a_missing_folder_a_nul_and_a_second_name_are_refused(base, tmp_path):
    for path, code in ((tmp_path / "none", "not_a_folder"), ("a\0b", "unreadable")):
        with pytest.raises(ValidationError) as caught:
            registry.register_checkpoint(path)
        assert code_of(caught, "path") == code
    with pytest.raises(ValidationError) as caught:
        registry.register_checkpoint(base.path, "second name")
    assert code_of(caught, "path") == "already_registered"


def test_a_pipe_in_a_folder_holds_nobody_up(tmp_path, db):
    folder = checkpoint_folder(tmp_path / "broken")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ValidationError) as caught:
        registry.register_checkpoint(folder)
    assert code_of(caught, "path") == "unsafe_file"


@pytest.mark.parametrize("name", ["a:b", "a,b", " ", "x" * 101, "12", "../x", "a\nb", "a?b"])
def test_names_that_could_not_be_told_apart_are_refused(tmp_path, name):
    with pytest.raises(ValidationError) as caught:
        registry.register_checkpoint(checkpoint_folder(tmp_path / "tiny"), name)
    assert "name" in caught.value.error_dict


def test_a_published_adapter_lies_below_the_data_folder_under_its_hash(
    base, member, tmp_path, data_dir
):
    source = adapter_folder(tmp_path / "fresh", base.fingerprint)
    adapter = registry.publish_adapter(source, name="shop", checkpoint=base, owner=member, step=500)
    assert adapter.path == data_dir / "adapters" / adapter.sha256
    assert (adapter.path / "adapter.safetensors").exists() and not source.exists()
    assert (adapter.pre_seq_len, adapter.step, adapter.owner) == (PRE_SEQ_LEN, 500, member)


def test_a_taken_name_gets_a_number(base, member, tmp_path):
    names = [
        registry.publish_adapter(
            adapter_folder(tmp_path / str(seed), seed=seed),
            name="tiny-qwen",
            checkpoint=base,
            owner=member,
        ).name
        for seed in range(2)
    ]
    assert names == ["tiny-qwen-2", "tiny-qwen-3"]  # the checkpoint has the name itself


def test_publishing_the_same_result_of_a_run_twice_gives_one_adapter(base, member, tmp_path):
    run = Run.objects.create(owner=member, kind="tuning", name="r")
    for _attempt in range(2):
        source = adapter_folder(tmp_path / "result", base.fingerprint)
        registry.publish_adapter(source, name="r", checkpoint=base, owner=member, run=run)
    # moved already
    registry.publish_adapter(source, name="r", checkpoint=base, owner=member, run=run)
    assert Adapter.objects.count() == 1


def test_an_adapter_of_another_checkpoint_is_refused_and_stays_where_it_was(base, member, tmp_path):
    source = adapter_folder(tmp_path / "foreign", "f" * 64)
    with pytest.raises(ValidationError, match="ffffffffffff"):
        registry.publish_adapter(source, name="foreign", checkpoint=base, owner=member)
    assert source.exists() and not Adapter.objects.exists()


def test_removing_an_adapter_removes_its_files_when_no_other_has_the_same(base, member, tmp_path):
    first, second = (
        registry.publish_adapter(
            adapter_folder(tmp_path / n), name=n, checkpoint=base, owner=member
        )
        for n in "ab"
    )
    assert first.sha256 == second.sha256
    folder = first.path
    registry.remove_adapter(first)
    assert folder.exists()
    registry.remove_adapter(second)
    assert not folder.exists() and not Adapter.objects.exists()


def test_an_adapter_that_an_evaluation_uses_stays(base, member, tmp_path):
    from tuning.models import Dataset, DatasetVersion

    adapter = registry.publish_adapter(
        adapter_folder(tmp_path / "a"), name="a", checkpoint=base, owner=member
    )
    dataset = Dataset.objects.create(owner=member, name="d", prompt_column="p", response_column="r")
    version = DatasetVersion.objects.create(dataset=dataset, number=1, sha256="0", splits={})
    EvaluationRun.objects.create(
        owner=member,
        kind="evaluation",
        name="e",
        dataset_version=version,
        split="train",
        checkpoint=base,
        adapter=adapter,
    )
    with pytest.raises(Conflict):
        registry.remove_adapter(adapter)
    assert adapter.path.exists()


def test_a_model_is_found_by_checkpoint_adapter_or_both(base, member, other_member, tmp_path):
    adapter = registry.publish_adapter(
        adapter_folder(tmp_path / "a"), name="mine", checkpoint=base, owner=member
    )
    assert registry.find_model(member, "tiny-qwen") == (base, None)
    assert (
        registry.find_model(member, "mine")
        == registry.find_model(member, "tiny-qwen:mine")
        == (base, adapter)
    )
    for user, name in (
        (other_member, "mine"),
        (other_member, "tiny-qwen:mine"),
        (member, "x"),
        (member, "x:mine"),
    ):
        with pytest.raises(LookupError):
            registry.find_model(user, name)


def test_an_upstream_of_the_settings_is_a_checkpoint(settings, db):
    settings.UPSTREAMS = ["qwen=http://gpu:8000/v1|Qwen/Qwen2.5-7B-Instruct"]
    registry.ensure_upstreams()
    (checkpoint,) = registry.ensure_upstreams()
    assert (checkpoint.name, checkpoint.path) == ("qwen", "") and Checkpoint.objects.count() == 1


def test_the_starter_is_registered_once_and_refreshed(tmp_path, monkeypatch, db):
    monkeypatch.setattr(registry, "STARTER_FOLDER", checkpoint_folder(tmp_path / "starter"))
    first = registry.ensure_starter()
    checkpoint_folder(tmp_path / "starter", seed=2)
    second = registry.ensure_starter()
    assert (first.pk, first.name, first.is_default, first.is_starter) == (
        second.pk,
        "starter",
        True,
        True,
    )
    assert first.fingerprint != second.fingerprint
