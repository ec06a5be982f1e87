"""What a hostile client writes: values, JSON bodies, forms, files, headers. Everything is drawn
from the `random.Random` that is handed in, so that a seed says what was sent.
"""

import contextlib
import copy
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from random import Random

BOUNDARY = "attack"
TEXTS = [
    "", " ", "\0", "a\0b", "\ud800", "\u202etxt", "💩" * 1000, "x" * 100_000, "\r\nX-A: 1",
    "../../../etc/passwd", "/dev/zero", "file:///etc/passwd", "http://127.0.0.1:1/", "%s%n%x",
    "' OR 1=1 --", '"; DROP TABLE portal_user; --', "<script>alert(1)</script>", "{{7*7}}",
    "${jndi:ldap://x}", "=1+cmd|' /C calc'!A0", "null", "NaN", "-1", "1e999", "9" * 5000, "²",
    "2026-13-45T99:99", "0x7f", "true", "a@b", "[object Object]", "中文" * 5000, "\n" * 10_000,
    "| a |\n|---|" * 2000, "[" * 3000, "*" * 5000, "$" + "\\frac{" * 500, "<" * 5000,
]  # fmt: skip
OTHERS = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 1e-300,
    float("nan"), float("inf"), [], {}, [[]], [None], [{}], {"": ""}, {"id": 1}, [1] * 10_000,
]  # fmt: skip
BODIES: list[bytes] = [
    b"", b"[", b"{", b"null", b"1", b'"x"', b"[]", b"{}", b"[" * 100_000, b'{"a":' * 50_000,
    b'{"a": 1, "a": 2}', b'{"a": \xff}', b"\xff\xfe{\0}\0", '{"content": "你好"}'.encode("gbk"),
    b"\xef\xbb\xbf{}", b'{"title": "' + b"x" * 4_000_000 + b'"}', b"a=1&" * 100_000, b"\0" * 1000,
    b'{"title": 1' + b"0" * 6000 + b"}", b'{"messages": [' + b"{}," * 100_000 + b"{}]}",
]  # fmt: skip
TYPES = [
    "application/json", "application/json; charset=utf-16", "application/json; charset=nothing",
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
    f"multipart/form-data; boundary={BOUNDARY}", "multipart/form-data; boundary=" + "x" * 500,
    "multipart/form-data; boundary=\xe9", "application/xml", "a/b/c", ";;;", "",
]  # fmt: skip
HEADERS = [
    "Accept-Language: " + "zh," * 2000, "Accept-Language: \xff\xfe", "Accept: text/html;q=nan",
    "Accept: " + "a/b," * 5000, "Range: bytes=0-,0-,0-,0-", "Range: bytes=9-1",
    "If-Modified-Since: yesterday", "If-None-Match: " + "x" * 5000, "Accept-Encoding: gzip;q=x",
    "Cookie: sessionid=" + "x" * 5000, "Cookie: " + "a=b; " * 1500, "Cookie: sessionid=\xff\0",
    'Cookie: csrftoken="', "Authorization: Bearer", "Authorization: Bearer " + "s" * 8000,
    "Authorization: Basic ////", "Authorization: Digest a=b", "Authorization: \xc3\x28 x",
    "Host: evil.example", "Host: ", "Host: [::1", "Host: 127.0.0.1:99999", "Host: a b",
    "Origin: null", "Origin: http://[", "Referer: \xff", "X-Forwarded-For: " + "1.1.1.1," * 1000,
    "X-Forwarded-Proto: https", "Expect: 100-continue", "Connection: upgrade", "Upgrade: h2c",
    "Upgrade: websocket", "Content-Encoding: gzip", "Content-Encoding: br", "TE: trailers",
    "X-HTTP-Method-Override: DELETE", "X-CSRFToken: " + "x" * 3000, "Last-Event-ID: x",
    "X-Requested-With: XMLHttpRequest", "HX-Request: true", "Accept-Charset: *", ": x", "NoColon",
    " folded: 1", "X" * 20_000 + ": 1", "Date: 0", "Max-Forwards: -1", "Content-Length: -1",
    "Content-Length: 1e3", "Content-Length: 5\r\nContent-Length: 6", "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked, chunked", "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 3",
]  # fmt: skip
QUERIES = [
    "page=0", "page=-1", "page=99999999999999999999", "page=x", "page_size=0", "page_size=1e9",
    "cursor=x", "cursor=cD0x", "cursor=%00", "after=-1", "after=x", "after=9" + "9" * 30,
    "tail=-5", "tail=1e9", "status=x", "status=%00", "split=..%2f", "with=x", "with=99999999999",
    "like=0", "dataset=%F0%9F%92%A9", "adapter=-1", "checkpoint=²", "q=%", "q=" + "x" * 8000,
    "q=%00", "o=99.-99", "all=", "e=1", "_popup=1", "_to_field=password", "format=../x",
    "format=xml", "lang=x", "next=//evil.example", "next=javascript:1", "a[]=1&a[x]=2", "&&&=&",
    "%ff%fe=%", "owner__password__startswith=p", "owner=1&owner=2", "whose=%00", "p=x", "p=-1",
]  # fmt: skip


def value(chance: Random):
    return chance.choice(TEXTS if chance.random() < 0.6 else OTHERS)


def mutated(chance: Random, good):
    """A copy of a body that would be good, with a few of its places spoilt."""
    spoilt = copy.deepcopy(good)
    for _place in range(chance.choice((1, 1, 1, 2, 5))):
        parent, key = None, None
        here = spoilt
        while isinstance(here, dict | list) and here and (parent is None or chance.random() < 0.7):
            parent = here
            key = chance.choice(list(here) if isinstance(here, dict) else range(len(here)))
            here = here[key]
        if parent is None:
            return value(chance)
        drop = chance.random()
        if drop < 0.1:
            del parent[key]
        elif drop < 0.2 and isinstance(parent, dict):
            parent[chance.choice(TEXTS)] = value(chance)
        else:
            parent[key] = value(chance)
    return spoilt


def as_json(body) -> bytes:
    return json.dumps(body).encode()


def form(fields: dict, file: tuple[str, bytes] | None = None) -> tuple[str, bytes]:
    """(content type, multipart body); `file`: name and content, sent as the field "file"."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{each}\r\n'.encode(
            "utf-8", "replace"
        )
        for name, each in fields.items()
    ]
    if file is not None:
        name = file[0].replace('"', "%22").encode("utf-8", "replace")
        parts.append(
            b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n'
            % (BOUNDARY.encode(), name)
            + file[1]
            + b"\r\n"
        )
    return f"multipart/form-data; boundary={BOUNDARY}", b"".join(
        [*parts, f"--{BOUNDARY}--\r\n".encode()]
    )


# ---- uploads

ROW = b'{"content": "a", "summary": "b"}\n'
NAMES = [
    "rows.json", "../../x.json", "x" * 300 + ".json", "\0.json", "a/b\\c.csv", ".", "", "CON.json",
    "rows.parquet", "rows.zip", "rows.tar.gz", "rows.gz", "rows.xlsx", "rows.csv", "\u202e.json",
]  # fmt: skip


def _tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _member(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def _digits_in_a_header(chance: Random) -> bytes:
    size = chance.choice((10_000, 100_000, 3_000_000))
    kind = chance.choice((b"x", b"g", b"L", b"K", b"X"))
    return _tar((_member("h", size, kind), b"1" * size), (_member("train.json", len(ROW)), ROW))


def _links(chance: Random) -> bytes:
    kind = chance.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE))
    return _tar((_member("train.json", 0, kind, "/etc/passwd"), b""))


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _bomb(chance: Random) -> bytes:
    zeros = b"0" * chance.choice((1 << 20, 64 << 20))
    packed = gzip.compress(zeros, 6)
    return chance.choice((packed, _zip({"train.json": zeros}), gzip.compress(packed)))


def _workbook(chance: Random) -> bytes:
    sheet = b"<worksheet><sheetData>" + chance.choice((b"<row>" * 100_000, b"&x;" * 1000, b""))
    entity = b'<!DOCTYPE x [<!ENTITY x "' + b"y" * 1000 + b'">]>'
    return _zip(
        {
            "[Content_Types].xml": b"<Types/>",
            "xl/workbook.xml": chance.choice((b"", entity)) + b"<workbook/>",
            "xl/worksheets/sheet1.xml": entity + sheet,
        }
    )


def _rows(chance: Random) -> bytes:
    deep = b'{"content": ' + b"[" * 50_000 + b"}"
    wide = b",".join(b"c%d" % number for number in range(20_000)) + b"\n" + b"1,\n" * 100
    long = b'{"content": "' + b"x" * 3_000_000 + b'", "summary": "y"}\n'
    odd = b'{"content": "\\ud800", "summary": "\\u0000"}\n{"content": NaN}\n'
    quotes = b'content,summary\n"' + b'a,"' * 100_000
    sizes = [{}, [], 1, None, {"content": 10**400}, {"content": [1, {}]}, {"content": "a"}]
    lines = b"".join(as_json(chance.choice(sizes)) + b"\n" for _row in range(2000))
    return chance.choice((deep, wide, long, odd, quotes, lines, ROW * 20_000, b"\n" * 1_000_000))


def _broken(chance: Random) -> bytes:
    """An archive that was good, with a few bytes changed or its end missing."""
    member = _member("train.json", len(ROW))
    good = chance.choice(
        (_zip({"train.json": ROW * 50}), _tar((member, ROW)), gzip.compress(ROW * 50))
    )
    spoilt = bytearray(good[: chance.choice((len(good), len(good), len(good) // 2))])
    for _byte in range(chance.choice((1, 3, 20))):
        spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
    return bytes(spoilt)


def _noise(chance: Random) -> bytes:
    begin = chance.choice((b"", b"PK\x03\x04", b"\x1f\x8b\x08", b"\xff\xfe", b"PAR1", b"\xd0\xcf"))
    return begin + chance.randbytes(chance.choice((0, 10, 5000)))


UPLOADS: list[Callable[[Random], bytes]] = [
    _digits_in_a_header, _links, _bomb, _workbook, _rows, _broken, _noise,
]  # fmt: skip


def upload(chance: Random) -> tuple[str, bytes]:
    """(name, content) of a file that somebody uploads."""
    return chance.choice(NAMES), chance.choice(UPLOADS)(chance)


# ---- websocket frames


def frame(chance: Random, messages: list[int]) -> str | bytes:
    kind = chance.choice(["message.send", "message.stop", "attach", "ack", value(chance)])
    good = {
        "type": kind, "content": "hi", "message": chance.choice(messages), "after": 0, "seq": 1,
        "sampling": {"temperature": 1, "max_new_tokens": 4}, "adapter": None, "render": True,
    }  # fmt: skip
    drawn = chance.random()
    if drawn < 0.1:
        return chance.randbytes(chance.choice((0, 100, 100_000)))
    if drawn < 0.25:
        return chance.choice(BODIES[:14]).decode("latin-1")[:200_000]
    with contextlib.suppress(ValueError):
        return json.dumps(mutated(chance, good))
    return "{}"
