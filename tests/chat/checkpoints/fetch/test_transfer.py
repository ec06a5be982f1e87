"""One file over HTTP: cuts, kills, damage and refusals."""

import errno
import hashlib
import random
import shutil

import pytest

from chat.checkpoints.fetch import client, transfer
from chat.checkpoints.fetch.client import open_client
from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.progress import Watch
from chat.checkpoints.fetch.transfer import Address, RemoteFile, fetch_file
from tests.support.file_server import Answer, Fault, git_blob

CONTENT = random.Random(7).randbytes(600_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Stopped(Exception):
    pass


@pytest.fixture
def wanted(server):
    server.answers["/file"] = Answer(CONTENT)
    return RemoteFile("file", len(CONTENT), f"sha256:{DIGEST}", (Address(f"{server.url}/file"),))


def get(file, path, watch=None):
    with open_client() as client:
        return fetch_file(client, file, path, watch or Watch())


def ranges(server):
    return [headers.get("Range") for headers in server.asked("/file")]


def test_a_file_arrives_whole_and_nothing_else_is_left(server, wanted, tmp_path):
    assert get(wanted, tmp_path / "file") == DIGEST
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cut_connection_goes_on_at_the_byte_where_it_broke(server, wanted, tmp_path):
    server.fault("/file", Fault(cut=100_000), Fault(cut=50_000), Fault(status=503), Fault(cut=1))
    assert get(wanted, tmp_path / "file") == DIGEST
    assert ranges(server) == [
        None,
        *[f"bytes={at}-" for at in (100_000, 150_000, 150_000, 150_001)],
    ]


def test_a_stopped_fetch_keeps_its_bytes_for_the_next(server, wanted, tmp_path):
    def stop():
        part = tmp_path / "file.part"
        if part.exists() and part.stat().st_size >= 100_000:
            raise Stopped

    with pytest.raises(Stopped):
        get(wanted, tmp_path / "file", Watch(check=stop))
    kept = (tmp_path / "file.part").stat().st_size
    assert 100_000 <= kept < len(CONTENT)
    assert get(wanted, tmp_path / "file") == DIGEST
    assert ranges(server)[-1] == f"bytes={kept}-"


def test_bytes_of_another_file_are_not_gone_on_with(server, wanted, tmp_path):
    server.fault("/file", Fault(cut=100_000), *[Fault(status=503)] * 5)
    with pytest.raises(FetchFailed):
        get(wanted, tmp_path / "file")
    other = CONTENT[::-1]
    server.answers["/file"] = Answer(other)
    digest = hashlib.sha256(other).hexdigest()
    changed = RemoteFile("file", len(other), f"sha256:{digest}", wanted.addresses)
    assert get(changed, tmp_path / "file") == digest
    assert ranges(server)[-1] is None


@pytest.mark.parametrize("changed", [False, True])
def test_without_a_digest_the_server_is_asked_whether_the_file_is_still_the_same(
    server, tmp_path, changed
):
    server.answers["/file"] = Answer(CONTENT)
    file = RemoteFile("file", len(CONTENT), "", (Address(f"{server.url}/file"),))
    server.fault("/file", Fault(cut=100_000), *[Fault(status=503)] * 5)
    with pytest.raises(FetchFailed):
        get(file, tmp_path / "file")
    now = CONTENT[::-1] if changed else CONTENT
    server.answers["/file"] = Answer(now)
    get(file, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == now
    assert "If-Range" in server.asked("/file")[-1]


@pytest.mark.parametrize("fault", [Fault(no_range=True), Fault(wrong_range=True)])
def test_a_server_that_knows_no_ranges_gives_the_file_anew(server, wanted, tmp_path, fault):
    server.fault("/file", Fault(cut=100_000), fault)
    assert get(wanted, tmp_path / "file") == DIGEST


def test_a_file_that_is_complete_already_is_checked_and_not_fetched(server, wanted, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert get(wanted, tmp_path / "file") == DIGEST
    assert server.requests == []
    (tmp_path / "file").write_bytes(CONTENT[:-1] + b"x")
    assert get(wanted, tmp_path / "file") == DIGEST
    assert len(server.requests) == 1


def test_damage_on_the_way_is_found_and_mended_once(server, wanted, tmp_path):
    server.fault("/file", Fault(damage=True))
    assert get(wanted, tmp_path / "file") == DIGEST
    (tmp_path / "file").unlink()
    server.fault("/file", Fault(damage=True), Fault(damage=True))
    with pytest.raises(FetchFailed) as caught:
        get(wanted, tmp_path / "file")
    assert caught.value.code == "checksum_mismatch" and not (tmp_path / "file").exists()


def test_a_git_blobs_name_is_checked_as_well(server, tmp_path):
    server.answers["/file"] = Answer(CONTENT)
    addresses = (Address(f"{server.url}/file"),)
    right = RemoteFile("file", len(CONTENT), f"git-sha1:{git_blob(CONTENT)}", addresses)
    assert get(right, tmp_path / "right") == DIGEST
    wrong = RemoteFile("file", len(CONTENT), f"git-sha1:{git_blob(b'other')}", addresses)
    with pytest.raises(FetchFailed, match="checksum"):
        get(wrong, tmp_path / "wrong")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "access_denied"),
        (403, "access_denied"),
        (404, "not_found"),
        (418, "unexpected_answer"),
    ],
)
def test_a_refusal_is_told_at_once(server, wanted, tmp_path, status, code):
    server.fault("/file", Fault(status=status))
    with pytest.raises(FetchFailed) as caught:
        get(wanted, tmp_path / "file")
    assert caught.value.code == code and len(server.requests) == 1


def test_a_server_that_never_gives_a_byte_is_given_up(server, wanted, tmp_path):
    server.fault("/file", *[Fault(cut=0)] * 50)
    with pytest.raises(FetchFailed) as caught:
        get(wanted, tmp_path / "file")
    assert caught.value.code == "connection_lost" and len(server.requests) == transfer.TRIES


def test_a_host_that_is_not_there_is_named(server, tmp_path):
    file = RemoteFile("file", 5, "", (Address("http://127.0.0.1:9/file"),))
    with pytest.raises(FetchFailed) as caught:
        get(file, tmp_path / "file")
    assert caught.value.code == "connection_lost" and "127.0.0.1" in str(caught.value)


def test_silence_counts_as_a_cut(server, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "SILENCE", 0.2)
    server.fault("/file", Fault(hold=100_000))
    assert get(wanted, tmp_path / "file") == DIGEST
    assert ranges(server) == [None, "bytes=100000-"]


def test_more_bytes_than_announced_end_the_transfer(server, wanted, tmp_path):
    for size in (len(CONTENT) - 1, len(CONTENT) + 1):
        file = RemoteFile("file", size, "", wanted.addresses)
        with pytest.raises(FetchFailed) as caught:
            get(file, tmp_path / str(size))
        assert caught.value.code == "size_mismatch"


def test_the_next_address_takes_over_in_the_middle(server, wanted, tmp_path):
    server.answers["/file-again"] = Answer(CONTENT)
    server.fault("/file", Fault(cut=100_000), *[Fault(status=502)] * 5)
    both = (*wanted.addresses, Address(f"{server.url}/file-again"))
    assert get(RemoteFile("file", len(CONTENT), wanted.digest, both), tmp_path / "file") == DIGEST
    assert server.asked("/file-again")[0]["Range"] == "bytes=100000-"


def test_a_refusal_tells_more_than_a_mirror_that_is_not_there(server, wanted, tmp_path):
    gone = Address("http://127.0.0.1:9/file")
    refused = Address(f"{server.url}/nothing")
    for addresses in ((gone, refused), (refused, gone)):
        with pytest.raises(FetchFailed) as caught:
            get(RemoteFile("f", 5, "", addresses), tmp_path / "f")
        assert caught.value.code == "not_found"


def test_a_key_is_not_carried_to_another_host(server, wanted, tmp_path):
    server.answers["/moved"] = Answer(redirect=f"{server.url_of_another_host}/file")
    key = {"Authorization": "Bearer secret"}
    file = RemoteFile("f", len(CONTENT), wanted.digest, (Address(f"{server.url}/moved", key),))
    assert get(file, tmp_path / "f") == DIGEST
    (first,), (second,) = server.asked("/moved"), server.asked("/file")
    assert first["Authorization"] == "Bearer secret" and "Authorization" not in second


def test_redirects_in_a_circle_are_given_up(server, tmp_path):
    server.answers["/circle"] = Answer(redirect=f"{server.url}/circle")
    with pytest.raises(FetchFailed) as caught:
        get(RemoteFile("f", 5, "", (Address(f"{server.url}/circle"),)), tmp_path / "f")
    assert caught.value.code == "unexpected_answer"


def test_a_full_disk_is_told_before_and_in_the_middle(server, wanted, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(FetchFailed) as caught:
        transfer.require_space(tmp_path / "not" / "yet", free)
    assert caught.value.code == "disk_full"

    def check():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FetchFailed) as caught:
        get(wanted, tmp_path / "file", Watch(check=check))
    assert caught.value.code == "disk_full"


def test_a_link_in_the_target_folder_is_not_written_through(server, wanted, tmp_path):
    (tmp_path / "precious").write_bytes(b"keep")
    (tmp_path / "file.part").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        get(wanted, tmp_path / "file")
    assert (tmp_path / "precious").read_bytes() == b"keep"


def test_progress_tells_bytes_speed_and_time_left():
    now = 0.0
    news = []
    watch = Watch(news.append, clock=lambda: now)
    watch.plan([("a", 100), ("b", 300)])
    watch.phase("downloading")
    watch.at("a", 50)  # kept from an earlier attempt: makes no speed
    for second in range(1, 6):
        now = float(second)
        watch.at("a", 50 + 10 * second, 10)
    last = news[-1]
    assert (last["done"], last["total"], last["phase"]) == (100, 400, "downloading")
    assert last["files"][0] == {"name": "a", "size": 100, "done": 100}
    assert last["bytes_per_second"] == 10 and last["seconds_left"] == 30
