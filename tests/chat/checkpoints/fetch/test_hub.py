"""Model hubs: what is listed, where it is fetched, what is refused."""

import pytest

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.hub import endpoints_from_environment, list_repository
from chat.checkpoints.fetch.sources import HubRepository
from tests.support.file_server import COMMIT, Fault

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"w" * 2000,
    "pytorch_model.bin": b"p" * 2000,
    "modeling.py": b"raise",
    "LICENSE": b"free",
}
SOURCE = HubRepository("hf", "org/name")


def test_a_repository_is_listed_at_a_pinned_commit_with_digests(server):
    server.add_repository("org/name", FILES, cardData={"license": "apache-2.0"})
    listing = list_repository(SOURCE, [server.url])
    assert listing.commit == COMMIT and listing.licence == "apache-2.0"
    files = {file.name: file for file in listing.files}
    assert set(files) == {"config.json", "tokenizer.json", "model.safetensors", "LICENSE"}
    assert files["model.safetensors"].digest.startswith("sha256:")
    assert files["config.json"].digest.startswith("git-sha1:")
    assert f"/resolve/{COMMIT}/" in files["LICENSE"].addresses[0].url


def test_endpoints_are_tried_in_order_and_who_lists_gives_first(server):
    server.add_repository("org/name", FILES)
    listing = list_repository(SOURCE, ["http://127.0.0.1:9", server.url, "http://third.invalid"])
    hosts = [address.url.split("/")[2] for address in listing.files[0].addresses]
    assert hosts == [server.url.split("/")[2], "127.0.0.1:9", "third.invalid"]


def test_a_mirror_of_the_list_does_not_get_the_key(server, monkeypatch):
    server.add_repository("org/name", FILES)
    listing = list_repository(SOURCE, [server.url], token="hf_secret")
    assert "hf_secret" not in str(server.requests) + str(listing)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert endpoints_from_environment()["hf"][0] == server.url
    listing = list_repository(SOURCE, [server.url], token="hf_secret")
    assert listing.files[0].addresses[0].headers == {"Authorization": "Bearer hf_secret"}


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"X-Error-Code": "RepoNotFound"}, 404, "repository_not_found"),
        ({"X-Error-Code": "RevisionNotFound"}, 404, "revision_not_found"),
        ({"X-Error-Code": "GatedRepo"}, 403, "gated"),
        ({}, 401, "repository_not_found"),
        ({}, 500, "hub_unreachable"),
    ],
)
def test_refusals_are_told_apart(server, headers, status, code):
    path = "/api/models/org/name/revision/v1"
    server.fault(path, *[Fault(status=status, headers=headers)] * 10)
    with pytest.raises(FetchFailed) as caught:
        list_repository(HubRepository("hf", "org/name", "", "v1"), [server.url])
    assert caught.value.code == code


def test_gated_repositories_ask_for_a_key_before_anything_is_fetched(server):
    server.add_repository("org/name", FILES, gated="manual")
    with pytest.raises(FetchFailed) as caught:
        list_repository(SOURCE, ["http://127.0.0.1:9", server.url])
    assert caught.value.code == "gated"


def test_one_gguf_file_can_be_named(server):
    server.add_repository("org/name", {"a.gguf": b"a", "b.gguf": b"b"})
    with pytest.raises(FetchFailed, match=r"a\.gguf, b\.gguf"):
        list_repository(SOURCE, [server.url])
    listing = list_repository(HubRepository("hf", "org/name", "b.gguf"), [server.url])
    assert [file.name for file in listing.files] == ["b.gguf"]
    with pytest.raises(FetchFailed) as caught:
        list_repository(HubRepository("hf", "org/name", "c.gguf"), [server.url])
    assert caught.value.code == "not_found"


def test_modelscope_is_listed_at_a_commit(server):
    server.add_modelscope("org/name", FILES, licence="MIT")
    listing = list_repository(HubRepository("modelscope", "org/name"), [server.url])
    assert (listing.commit, listing.licence) == (COMMIT, "MIT")
    file = next(file for file in listing.files if file.name == "model.safetensors")
    assert file.digest.startswith("sha256:") and f"Revision={COMMIT}" in file.addresses[0].url
    with pytest.raises(FetchFailed) as caught:
        list_repository(HubRepository("modelscope", "org/other"), [server.url])
    assert caught.value.code == "repository_not_found"


def test_answers_in_another_form_are_no_crash(server):
    server.add_modelscope("org/name", FILES)
    for path in list(server.answers):
        for content in (b"[]", b"{", b'{"Data": []}', b'{"Data": {"Files": [1], "Commit": 3}}'):
            before = server.answers[path].content
            server.answers[path].content = content
            with pytest.raises(FetchFailed):
                list_repository(HubRepository("modelscope", "org/name"), [server.url])
                raise FetchFailed("", "")  # a file's own content does not matter here
            server.answers[path].content = before
