"""Makes tests/data/chatglm/vocabulary.model: a small vocabulary with the published one's layout,
from project-written text.

Layout: 0-4 <unk> <s> </s> <pad> <n>, then 995 ordinary pieces, 1000-1007 control pieces,
1008 <|tab|>, 1009-1087 blanks of 2 to 80 spaces, 1088-1343 bytes. Run from the repository root:

    python -m tests.support.make_vocabulary

"""

import io
import struct

import sentencepiece

from chat.starter.corpus import conversations
from tests.support import DATA, ROOT

TARGET = DATA / "chatglm" / "vocabulary.model"
CONTROLS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
ORDINARY = 995


def texts() -> list[str]:
    spoken = [message["content"] for talk in conversations(3000, seed=1) for message in talk]
    sources = [
        line
        for path in sorted((ROOT / "chat" / "chatglm").glob("*.py"))
        for line in path.open(encoding="utf-8")
    ]
    return [*spoken, *sources]


def fields(message: bytes) -> list[tuple[int, int, bytes]]:
    """A protobuf message's fields, in order: (number, wire type, raw value)."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            start = at
            varint()
        else:
            length = {1: 8, 5: 4}.get(wire) or varint()
            start = at
            at += length
        found.append((number, wire, message[start:at]))
    return found


def varint(value: int) -> bytes:
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def field(number: int, wire: int, value: bytes) -> bytes:
    return varint(number * 8 + wire) + (varint(len(value)) if wire == 2 else b"") + value


def piece(text: str, score: float, kind: int) -> bytes:
    body = (
        field(1, 2, text.encode())
        + field(2, 5, struct.pack("<f", score))
        + field(3, 0, varint(kind))
    )
    return field(1, 2, body)


def main() -> None:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_writer=trained,
        model_type="unigram",
        vocab_size=5 + 256 + ORDINARY,
        character_coverage=0.985,  # rare characters go to byte pieces
        normalization_rule_name="nmt_nfkc",
        split_digits=True,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["<n>"],
        num_threads=1,
        minloglevel=2,
    )
    ordinary, rest = [], b""
    for number, wire, value in fields(trained.getvalue()):
        if number != 1:
            rest += field(number, wire, value)
            continue
        own = {inner: raw for inner, _, raw in fields(value)}
        if own.get(3, bytes([NORMAL])) == bytes([NORMAL]):
            ordinary.append((own[1].decode(), struct.unpack("<f", own[2])[0]))
    pieces = [
        piece("<unk>", 0, UNKNOWN),
        *[piece(text, 0, CONTROL) for text in ("<s>", "</s>", "<pad>")],
        piece("<n>", 0, USER_DEFINED),
        *[piece(text, score, NORMAL) for text, score in ordinary[:ORDINARY]],
        *[piece(text, 0, CONTROL) for text in CONTROLS],
        piece("<|tab|>", 0, USER_DEFINED),
        *[piece(f"<|blank_{length}|>", 0, USER_DEFINED) for length in range(2, 81)],
        *[piece(f"<0x{value:02X}>", 0, BYTE) for value in range(256)],
    ]
    if len(pieces) != 1344:
        raise RuntimeError(f"{len(pieces)} pieces: the corpus is too small")
    TARGET.write_bytes(b"".join(pieces) + rest)


if __name__ == "__main__":
    main()
