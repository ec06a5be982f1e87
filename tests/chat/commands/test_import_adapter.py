"""`import_adapter` and `export_adapter`: prefixes of other programs in and out, number for
number.
"""

import json
import zipfile

import numpy as np
import pytest
import torch
from django.core.management import CommandError, call_command
from safetensors.numpy import load_file, save_file

from chat import registry
from chat.api.adapter_export import archive
from chat.models import Adapter
from tests.support.folders import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    PRE_SEQ_LEN,
    adapter_folder,
    checkpoint_folder,
)

pytestmark = pytest.mark.django_db
WIDTH = LAYERS * 2 * KV_HEADS * HEAD_DIM


@pytest.fixture
def base(tmp_path, data_dir):
    return registry.register_checkpoint(checkpoint_folder(tmp_path / "base"))


def upstream_folder(folder, width=WIDTH):
    """What ChatGLM-6B's train.sh leaves behind, for a prefix without projection."""
    folder.mkdir(parents=True)
    rows = torch.arange(PRE_SEQ_LEN * width, dtype=torch.float32).view(PRE_SEQ_LEN, width)
    torch.save({"transformer.prefix_encoder.embedding.weight": rows}, folder / "pytorch_model.bin")
    return folder, rows.numpy()


def test_an_upstream_checkpoint_becomes_an_adapter_with_its_step(base, tmp_path, member):
    folder, rows = upstream_folder(tmp_path / "out" / "checkpoint-3000")
    call_command(
        "import_adapter",
        str(folder),
        "--checkpoint",
        "base",
        "--name",
        "adgen",
        "--owner",
        "member",
    )
    adapter = Adapter.objects.get()
    assert (adapter.name, adapter.step, adapter.pre_seq_len, adapter.owner) == (
        "adgen",
        3000,
        PRE_SEQ_LEN,
        member,
    )
    prefix = load_file(adapter.path / "adapter.safetensors")["prefix"]
    # row p: layer after layer, key then value, head after head
    assert np.array_equal(
        prefix[1, 0, 1, 2], rows[2].reshape(LAYERS, 2, KV_HEADS, HEAD_DIM)[1, 0, 1]
    )
    assert folder.exists()


def test_exported_and_imported_again_it_is_the_same(base, tmp_path):
    call_command(
        "import_adapter",
        str(adapter_folder(tmp_path / "one", base.fingerprint)),
        "--checkpoint",
        "base",
    )
    first = Adapter.objects.get()
    for form in ("peft", "upstream"):
        call_command("export_adapter", "one", "--format", form, "--output", str(tmp_path / form))
        call_command("import_adapter", str(tmp_path / form), "--checkpoint", "base", "--name", form)
    with pytest.raises(CommandError, match="file"):
        (tmp_path / "file").touch()
        call_command("export_adapter", "one", "--output", str(tmp_path / "file"))
    hashes = set(Adapter.objects.values_list("sha256", flat=True))
    assert hashes == {first.sha256} and Adapter.objects.count() == 3


def test_a_download_unpacked_is_importable_in_both_its_formats(base, tmp_path):
    call_command(
        "import_adapter",
        str(adapter_folder(tmp_path / "one", base.fingerprint)),
        "--checkpoint",
        "base",
    )
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(archive(Adapter.objects.get())).extractall(unpacked)
    for folder in (unpacked, unpacked / "peft"):
        call_command("import_adapter", str(folder), "--checkpoint", "base")
    assert (
        len(set(Adapter.objects.values_list("sha256", flat=True))) == 1
        and Adapter.objects.count() == 3
    )


def test_an_adapter_that_does_not_fit_is_refused_naming_both_sides(base, tmp_path):
    folder, _rows = upstream_folder(tmp_path / "checkpoint-1", width=WIDTH * 2)
    with pytest.raises(CommandError, match=rf"\[{PRE_SEQ_LEN}, {WIDTH * 2}\].*{WIDTH}\]"):
        call_command("import_adapter", str(folder), "--checkpoint", "base")
    with pytest.raises(CommandError, match="000000000000"):
        call_command(
            "import_adapter", str(adapter_folder(tmp_path / "x", "0" * 64)), "--checkpoint", "base"
        )
    assert not Adapter.objects.exists() and not list((tmp_path / "adapters").glob("*"))


@pytest.mark.parametrize("length", [2048, 2049])
def test_no_longer_prefix_is_imported_than_is_served(base, tmp_path, length):
    folder = tmp_path / "long"
    folder.mkdir()
    rows = torch.ones(length, WIDTH)
    torch.save({"transformer.prefix_encoder.embedding.weight": rows}, folder / "pytorch_model.bin")
    if length > 2048:
        with pytest.raises(CommandError, match="2049 tokens; those of at most 2048 are served"):
            call_command("import_adapter", str(folder), "--checkpoint", "base")
    else:  # of a family whose prompts begin at 0 behind any prefix, or in a context that holds it
        base.description["context_length"] = 4096
        base.save()
        call_command("import_adapter", str(folder), "--checkpoint", "base")
        assert Adapter.objects.get().pre_seq_len == 2048


def test_what_is_missing_is_named(base, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        ([str(tmp_path / "none"), "--checkpoint", "base"], "not a folder"),
        ([str(tmp_path / "empty"), "--checkpoint", "nobody"], "nobody.*base"),
        ([str(tmp_path / "empty"), "--checkpoint", "base"], "no weights"),
    ):
        with pytest.raises(CommandError, match=named):
            call_command("import_adapter", *arguments)


def test_a_peft_folder_of_another_kind_is_refused(base, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"x": np.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(CommandError, match="LORA"):
        call_command("import_adapter", str(folder), "--checkpoint", "base")


def test_a_pickle_does_not_run(base, tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "fired"), "w"))

    folder = tmp_path / "checkpoint-9"
    folder.mkdir()
    torch.save(
        {"transformer.prefix_encoder.embedding.weight": Canary()}, folder / "pytorch_model.bin"
    )
    with pytest.raises(CommandError):
        call_command("import_adapter", str(folder), "--checkpoint", "base")
    assert not (tmp_path / "fired").exists()


def test_what_people_name_instead_of_the_folder(base, tmp_path):
    output = tmp_path / "output"
    upstream_folder(output / "checkpoint-500")
    folder, _rows = upstream_folder(output / "checkpoint-1000")
    with pytest.raises(CommandError, match="checkpoint-500, checkpoint-1000: name one of them"):
        call_command("import_adapter", str(output), "--checkpoint", "base")
    call_command("import_adapter", str(folder / "pytorch_model.bin"), "--checkpoint", "base")
    assert (Adapter.objects.get().name, Adapter.objects.get().step) == ("checkpoint-1000", 1000)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(3, 4), r"bare tensor \[3, 4\].*transformer.prefix_encoder.embedding.weight"),
        ([torch.zeros(2)], "holds a list"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"not weights at all", "cannot be read"),
        ({"lora_A.weight": torch.zeros(2)}, "not a P-tuning checkpoint"),
    ],
)
def test_weights_that_are_none_are_told_in_one_sentence(base, tmp_path, content, said):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CommandError, match=said) as refused:
        call_command("import_adapter", str(folder), "--checkpoint", "base")
    assert "\n" not in str(refused.value)


NAME = "transformer.prefix_encoder.embedding.weight"


def _index(weight_map):
    def write(folder):
        index = json.dumps({"weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)

    return write


@pytest.mark.parametrize(
    "spoil",
    [
        _index({NAME: ["pytorch_model.bin"]}),
        _index({NAME: "../pytorch_model.bin"}),
        _index({NAME: "/dev/zero"}),
        _index([NAME]),
        _index(None),
        lambda folder: (folder / "pytorch_model.bin.index.json").write_text("[" * 100_000),
        lambda folder: torch.save([1, 2], folder / "pytorch_model.bin"),
        lambda folder: torch.save({NAME: "text"}, folder / "pytorch_model.bin"),
        lambda folder: torch.save({NAME: None, 5: 6}, folder / "pytorch_model.bin"),
        lambda folder: torch.save({NAME: torch.zeros(0, WIDTH)}, folder / "pytorch_model.bin"),
        lambda folder: torch.save({NAME: torch.zeros(())}, folder / "pytorch_model.bin"),
        lambda folder: torch.save(
            {NAME: torch.zeros(4, WIDTH, dtype=torch.int64)}, folder / "pytorch_model.bin"
        ),
        lambda folder: torch.save(
            {NAME: torch.full((4, WIDTH), float("nan"))}, folder / "pytorch_model.bin"
        ),
        lambda folder: torch.save({NAME: torch.zeros(5000, WIDTH)}, folder / "pytorch_model.bin"),
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + b"\0" * 100),
        lambda folder: (folder / "config.json").write_text('{"pre_seq_len": [1]}'),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "adapter_config.json").write_text("null"),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
    ],
)
def test_what_is_no_prefix_is_refused_in_one_sentence(base, tmp_path, spoil):
    base.description = {**base.description, "context_length": 1024}
    base.save()
    folder, _rows = upstream_folder(tmp_path / "checkpoint-1")
    spoil(folder)
    with pytest.raises(CommandError) as refused:
        call_command("import_adapter", str(folder), "--checkpoint", "base")
    assert len(str(refused.value).splitlines()) == 1 and not Adapter.objects.exists()
