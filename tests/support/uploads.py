"""Uploads as people make them, in memory."""

import gzip
import io
import json
import tarfile
import zipfile


def upload(content: bytes | str, name: str = "rows.json") -> io.BytesIO:
    """A binary file with a name, like Django's uploaded file."""
    file = io.BytesIO(content if isinstance(content, bytes) else content.encode())
    file.name = name
    return file


def lines(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"content": f"类型#裙*编号#{number}", "summary": f"这条裙子的编号是{number}，很好看。"}
        for number in range(start, start + count)
    ]


def zipped(members: dict[str, bytes], name: str = "rows.zip") -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return upload(file.getvalue(), name)


def encrypted(archive: io.BytesIO) -> io.BytesIO:
    """A zip whose only member says of itself that it needs a password."""
    content = bytearray(archive.getvalue())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1
    return upload(bytes(content), archive.name)


def tarred(
    members: dict[str, bytes | tarfile.TarInfo], name: str = "AdvertiseGen.tar.gz"
) -> io.BytesIO:
    """A gzipped tar; a TarInfo instead of bytes is added as it is (links, devices)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for member, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return upload(file.getvalue(), name)


def gzipped(content: bytes, name: str = "rows.json.gz") -> io.BytesIO:
    return upload(gzip.compress(content), name)
