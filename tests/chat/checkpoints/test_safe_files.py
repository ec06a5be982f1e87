"""Folders that somebody filled with traps: refused, without waiting and without reading them."""

import json
import os
import resource

import pytest

from chat.checkpoints import describe as describing
from chat.checkpoints.describe import CheckpointInvalid, describe, fingerprint
from tests.support.folders import checkpoint_folder

NAMES = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")


@pytest.fixture
def folder(tmp_path):
    return checkpoint_folder(tmp_path / "checkpoint")


def trap(folder, name, kind):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "outside":
        (folder.parent / "outside").write_text("{}")
        path.symlink_to(folder.parent / "outside")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 1 << 40)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pipe", "endless", "outside", "sparse"])
def test_traps_are_named_and_cost_nothing(folder, name, kind):
    trap(folder, name, kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointInvalid, match=name) as caught:
        describe(folder)
    assert caught.value.code == "unsafe_file"
    if name != "generation_config.json":  # which makes no difference to what was trained
        with pytest.raises(CheckpointInvalid, match=name):
            fingerprint(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("kind", ["pipe", "endless", "outside", "sparse"])
def test_traps_among_the_weights_are_refused(folder, kind):
    trap(folder, "model.safetensors", kind)
    with pytest.raises(CheckpointInvalid):
        describe(folder)


def test_huge_headers_and_files_that_do_not_add_up_are_no_weights(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for broken in (
        (1 << 40).to_bytes(8, "little") + content[8:],
        content + b"more",
        content[:-1],
        (2).to_bytes(8, "little") + b"{}" + bytes(2000),
        (4).to_bytes(8, "little") + b"[[]]" + bytes(2000),
    ):
        weights.write_bytes(broken)
        with pytest.raises(CheckpointInvalid) as caught:
            describe(folder)
        assert caught.value.code == "weights_invalid"
    with weights.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 34)
    with pytest.raises(CheckpointInvalid):
        describe(folder)


def test_a_snapshot_of_the_hubs_cache_is_no_trap(tmp_path, folder):
    """There every file is a link to a blob beside the snapshots."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        (blobs / f"blob-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert fingerprint(snapshot) == fingerprint(folder)
    assert describe(snapshot) == describe(folder)


def test_a_folder_with_too_many_entries_is_not_searched(folder, monkeypatch):
    monkeypatch.setattr("chat.checkpoints.safe_files.ENTRIES", 2)
    with pytest.raises(CheckpointInvalid) as caught:
        describe(folder)
    assert caught.value.code == "unsafe_file"


def test_a_configuration_that_is_nested_without_end_is_no_crash(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointInvalid):
        describe(folder)
    (folder / "config.json").write_text(json.dumps(["x"] * (describing.CONFIG_BYTES // 4)))
    with pytest.raises(CheckpointInvalid) as caught:
        describe(folder)
    assert caught.value.code == "unsafe_file"
