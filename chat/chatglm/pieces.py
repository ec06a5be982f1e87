"""From token ids back to text, one id at a time: what streams and whole answers are decoded
with.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import sentencepiece

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# Literal text that the original writes into user-defined pieces: newline, tab and runs of 2 to 80
# spaces (docs/chatglm.md#6-tokenizer).
WRITTEN = {"<n>": "\n", "<|tab|>": "\t"} | {
    f"<|blank_{length}|>": " " * length for length in range(2, 81)
}

_UNKNOWN = " \N{DOUBLE QUESTION MARK} "  # sentencepiece's own surface of <unk>
_VERBATIM = frozenset([*WRITTEN.values(), _UNKNOWN])


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    # sentencepiece writes one replacement character per undecodable byte, Python's own handler one
    # per broken sequence.
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error("chatglm-replace-each-byte", _replace_each_byte)
_utf8 = codecs.getincrementaldecoder("utf-8")


class Pieces:
    """What each id of a sentencepiece vocabulary writes.

    An ordinary piece is a str; a byte piece is a bytes of length 1; control pieces write nothing,
    and so do the ids beyond the vocabulary, which exist only as rows of the embedding (130,344 to
    130,527).
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, offset: int = 0):
        """offset: added to every id (20,000 unused image ids stand first in the oldest
        checkpoints).
        """
        self.offset = offset
        self.texts: list[str | bytes] = []
        for index, piece in enumerate(processor.IdToPiece(list(range(processor.GetPieceSize())))):
            text: str | bytes
            if piece in WRITTEN:
                text = WRITTEN[piece]
            elif piece[0] == "<" and processor.IsByte(index):
                text = bytes([int(piece[1:-1], 16)])
            elif piece[0] in "<[" and (processor.IsControl(index) or processor.IsUnused(index)):
                text = ""
            elif processor.IsUnknown(index):
                text = _UNKNOWN
            else:
                text = piece.replace(_SPACE, " ")
            self.texts.append(text)

    def decode(self, token_ids: Iterable[int]) -> str:
        stream = PieceStream(self)
        text = "".join([stream.step(token_id) for token_id in token_ids])
        return text + stream.flush()


class PieceStream:
    """Decodes ids as they come: `step(id)` returns the text that has become certain, `flush()` the
    rest.

    The steps' texts and the flush, joined, are what `Pieces.decode` gives for all ids at once. An
    id costs a list look-up; only characters outside the vocabulary, which come as several byte
    pieces, are waited for.
    """

    __slots__ = ("_bytes", "_offset", "_started", "_texts")

    def __init__(self, pieces: Pieces):
        self._texts, self._offset = pieces.texts, pieces.offset
        # UTF-8 decoder, once a byte piece has been seen
        self._bytes: codecs.IncrementalDecoder | None = None
        self._started = False

    def step(self, token_id: int) -> str:
        index = token_id - self._offset
        piece = self._texts[index] if 0 <= index < len(self._texts) else ""
        if isinstance(piece, bytes):
            if self._bytes is None:
                self._bytes = _utf8("chatglm-replace-each-byte")
            text = self._bytes.decode(piece)
            self._started = True
        else:
            text = piece
            if not self._started and text:
                # sentencepiece sets a space before the first word and takes it away again here
                text = text if text in _VERBATIM else text.lstrip(" ")
                self._started = text != ""
            if self._bytes is not None:
                text, self._bytes = self._bytes.decode(b"", True) + text, None
        return text

    def flush(self) -> str:
        """What is left at the end: replacement characters for an unfinished character."""
        rest = "" if self._bytes is None else self._bytes.decode(b"", True)
        self._bytes = None
        return rest
