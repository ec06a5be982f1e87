"""Unpacking under limits, and encodings. A hostile archive costs a refusal and nothing else."""

import io
import tarfile
import time

import pytest

from tests.support.uploads import gzipped, lines, rows, tarred, upload, zipped
from tuning.datasets.findings import DatasetRejected
from tuning.datasets.sources import (
    CHUNK,
    GB18030,
    UTF_8,
    UTF_8_BOM,
    Limits,
    open_sources,
    recognise_encoding,
)

LIMITS = Limits()
GOOD = lines(*rows(3))


def opened(file, limits=LIMITS):
    return {source.name: source.file.read() for source in open_sources(file, file.name, limits)}


def refusal(file, limits=LIMITS) -> str:
    with pytest.raises(DatasetRejected) as caught:
        open_sources(file, file.name, limits)
    return caught.value.problems[0]["code"]


@pytest.mark.parametrize(
    "file",
    [
        upload(GOOD),
        gzipped(GOOD),
        zipped({"rows.json": GOOD}),
        zipped({"deep/rows.json": GOOD, "__MACOSX/._rows.json": b"x", "README.md": b"hello"}),
        tarred({"rows.json": GOOD}),
        tarred({"AdvertiseGen/rows.json": GOOD, "AdvertiseGen/.DS_Store": b"x"}),
    ],
    ids=["plain", "gz", "zip", "zip with clutter", "tar.gz", "tar.gz with folder"],
)
def test_the_same_rows_in_any_wrapping(file):
    assert opened(file) == {"rows.json": GOOD}


def test_what_is_passed_over_in_an_archive_is_noted():
    source = open_sources(zipped({"rows.json": GOOD, "README.md": b"hello"}), "rows.zip", Limits())[
        0
    ]
    assert [(note["code"], note["level"], note["member"]) for note in source.notes] == [
        ("archive_member", "warning", "README.md")
    ]


def test_members_never_choose_where_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outside = {"../../escaped.json": GOOD, "/etc/escaped2.json": lines(*rows(1))}
    for file in (zipped(outside), tarred(outside)):
        assert set(opened(file)) == {"escaped.json", "escaped2.json"}
    assert not list(tmp_path.rglob("*")) and not (tmp_path.parent.parent / "escaped.json").exists()


def test_links_in_a_tar_are_not_followed():
    link = tarfile.TarInfo("train.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    assert refusal(tarred({"train.json": link})) == "no_data_file"


def described(*entries: tuple[bytes, bytes], **more) -> bytes:
    """A tar whose member rows.json stands behind entries of (type, content)."""
    packed = b""
    for kind, content in entries:
        entry = tarfile.TarInfo("h")
        entry.type, entry.size = kind, len(content)
        packed += entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    member = tarfile.TarInfo("rows.json")
    member.size = len(GOOD)
    return packed + member.tobuf() + GOOD + bytes(-len(GOOD) % 512) + bytes(1024)


@pytest.mark.parametrize(
    "entries",
    [
        [(b"x", b"1" * 100_000)],  # tarfile would search this for 8 s
        [(b"g", b"1" * 100_000)],
        [(b"X", b"1" * 100_000)],
        [(b"x", b"1" * 8_000)] * 200,
        [(b"x", b"1 " * 4000 + b"=\n")],  # 4,000 records, each to the end
        [(b"x", b"9 a=bcde")],
        [(b"x", b"0 a=b\n")],
        [(b"g", b"5 a=\n" * 300)],
        [(b"L", b"n" * 100_000)],
        [(b"K", b"n" * 100_000)],
        [(b"S", b"")],
        [(b"x", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")],
        [(b"x", b"20 GNU.sparse.map=0\n")],
        [(b"x", b"20 GNU.sparse.size=1")],
        [(b"x", b"6 a=b\n")] * 2000,
        [(b"L", b"n")] * 2000,
    ],
)
def test_what_describes_a_member_is_read_quickly_or_refused(entries):
    file = gzipped(described(*entries), "t.tar.gz")
    begun = time.process_time()
    assert refusal(file) == "archive_damaged"
    assert time.process_time() - begun < 0.5


def test_a_tar_of_any_dialect_is_read():
    long = "很长的名字" * 30 + ".json"
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = long if dialect != tarfile.USTAR_FORMAT else "rows.json"
        packed = io.BytesIO()
        with tarfile.open(
            fileobj=packed, mode="w:gz", format=dialect, pax_headers={"comment": "x"}
        ) as archive:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(GOOD), 1700000000.25
            archive.addfile(member, io.BytesIO(GOOD))
        assert opened(upload(packed.getvalue(), "t.tar.gz")) == {name: GOOD}


def test_bombs_are_refused_while_they_are_read():
    flat = b"0" * (40 << 20)
    assert refusal(gzipped(flat)) == "archive_bomb"
    assert refusal(zipped({"rows.json": flat})) == "archive_bomb"
    assert refusal(tarred({"rows.json": flat})) == "archive_bomb"
    # also in a member that nobody wants, which a tar has to read through
    assert refusal(tarred({"padding.bin": flat, "rows.json": GOOD})) == "archive_bomb"


def test_the_size_limit_counts_what_comes_out():
    limits = Limits(max_bytes=1 << 20, max_ratio=10**6)
    assert refusal(upload(b" " * (2 << 20)), limits) == "too_large"
    assert refusal(gzipped(b" " * (2 << 20)), limits) == "too_large"
    assert (
        refusal(zipped({"a.json": b" " * (600 << 10), "b.json": b" " * (600 << 10)}), limits)
        == "too_large"
    )


def test_too_many_members_are_refused_before_they_are_listed():
    many = {f"{number}.json": b"{}" for number in range(50)}
    assert refusal(zipped(many), Limits(max_members=20)) == "archive_members"
    assert refusal(tarred(many), Limits(max_members=20)) == "archive_members"


@pytest.mark.parametrize("cut", [20, 200, -30])
def test_damaged_archives_are_refused(cut):
    for whole in (
        gzipped(GOOD * 200),
        zipped({"rows.json": GOOD * 200}),
        tarred({"rows.json": GOOD * 200}),
    ):
        damaged = upload(whole.getvalue()[:cut], whole.name)
        assert refusal(damaged) in ("archive_damaged", "no_data_file")


def test_an_archive_without_data_names_what_would_do():
    with pytest.raises(DatasetRejected) as caught:
        open_sources(zipped({"a.docx": b"x"}), "a.zip", Limits())
    assert caught.value.problems[0]["code"] == "no_data_file"
    assert caught.value.problems[1]["member"] == "a.docx"


def test_encodings():
    text = "这是一条裙子，很好看。" * 5
    assert recognise_encoding(upload(text.encode())) == UTF_8
    assert recognise_encoding(upload(b"plain ascii")) == UTF_8
    assert recognise_encoding(upload(text.encode("utf-8-sig"))) == UTF_8_BOM
    assert recognise_encoding(upload(text.encode("gb18030"))) == GB18030
    assert recognise_encoding(upload("生僻字㐀𠀀".encode("gb18030"))) == GB18030
    # "联通" in GBK happens to be valid UTF-8 up to its end
    assert recognise_encoding(upload("联通".encode("gbk") + text.encode("gbk"))) == GB18030


def test_a_character_across_a_chunk_border_is_whole():
    for shift in range(3):
        padded = b"a" * (CHUNK - 1 - shift) + "裙子好看".encode()
        assert recognise_encoding(upload(padded)) == UTF_8
        padded = b"a" * (CHUNK - 1 - shift) + "裙子好看".encode("gb18030")
        assert recognise_encoding(upload(padded)) == GB18030


def test_utf8_with_a_broken_line_stays_utf8():
    broken = "好看好看好看\n".encode() + "啊".encode("gbk") + b"\n"
    assert broken.decode("gb18030")  # it would pass for GB18030, with every character wrong
    assert recognise_encoding(upload(broken)) == UTF_8
