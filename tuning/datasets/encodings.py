"""Which encoding a file of text has, by its first bytes or by decoding it. No Django."""

from __future__ import annotations

import codecs
from typing import IO

CHUNK = 1 << 18  # bytes that are read at a time
UTF_8, UTF_8_BOM, GB18030 = "utf-8", "utf-8-sig", "gb18030"
GB18030_BOM = b"\x84\x31\x95\x33"
_BOMS = {  # UTF-32's first: it begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def recognise_encoding(file: IO[bytes], whole: bool = True) -> str:
    """utf-8, utf-8-sig, gb18030, utf-16 or utf-32 (-le, -be), by its first bytes or by decoding the
    whole file piece by piece; leaves the file at its start.

    UTF-8 with some broken bytes stays utf-8, so that each broken line is named: text whose first
    Chinese characters were valid UTF-8 is not GB18030.
    """
    file.seek(0)
    first = file.read(CHUNK)
    if first.startswith(codecs.BOM_UTF8):
        file.seek(0)
        return UTF_8_BOM
    wide = next((name for bom, name in _BOMS.items() if first.startswith(bom)), "")
    if wide or (wide := _without_bom(first)):
        file.seek(0)
        return wide
    if first.startswith(GB18030_BOM):
        file.seek(0)
        return GB18030
    decoder = codecs.getincrementaldecoder(UTF_8)()
    chinese = 0
    data = first
    try:
        while data:
            try:
                text = decoder.decode(data)
            except UnicodeDecodeError as fault:
                chinese += _chinese(fault.object[: fault.start].decode(UTF_8, errors="ignore"))
                raise
            if chinese < 4 and not text.isascii():
                chinese += _chinese(text)
            data = file.read(CHUNK)
        decoder.decode(b"", final=whole)
        return UTF_8
    except UnicodeDecodeError:
        return UTF_8 if chinese >= 4 or not _decodes(file, GB18030, whole) else GB18030
    finally:
        file.seek(0)


def _without_bom(first: bytes) -> str:
    """UTF-16 and UTF-32 without a mark show by the zeros of their ASCII: brackets, quotation marks,
    names.
    """
    first = first[:64]
    if len(first) < 8:
        return ""
    zeros = [first[at::4].count(0) for at in range(4)]
    quarter = len(first) // 4
    if min(zeros[2:]) >= quarter - 1 and zeros[0] * 3 < quarter:
        return "utf-32-le"
    if min(zeros[:2]) >= quarter - 1 and zeros[3] * 3 < quarter:
        return "utf-32-be"
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    most = max(even, odd)  # the other half has few: 一 (U+4E00) is a common character
    if most * 5 < len(first) // 2 or min(even, odd) * 3 > most:
        return ""
    return "utf-16-le" if odd == most else "utf-16-be"


def _chinese(text: str) -> int:
    return sum("\u4e00" <= character <= "\u9fff" for character in text)


def _decodes(file: IO[bytes], encoding: str, whole: bool) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    file.seek(0)
    try:
        while data := file.read(CHUNK):
            decoder.decode(data)
        decoder.decode(b"", final=whole)
        return True
    except UnicodeDecodeError:
        return False
