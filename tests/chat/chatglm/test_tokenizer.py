"""The tokenizer on our own small vocabulary, and on the recorded strings where the reference files
are at hand.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from chat.chatglm.pieces import WRITTEN
from chat.engine.families import family_of
from chat.engine.prompts import IGNORED
from tests.support.tiny_chatglm import golden_folder, vocabulary_folder

TEXTS = (
    "你好",
    "Hello, world!",
    "hello  world",
    "a\tb\t\tc",
    "line1\nline2\n\nline4",
    "   three leading",
    "1234567890",
    "x" + " " * 80 + "y",
    "x" + " " * 81 + "y",
    "x" + " " * 199 + "y",
    "😀👍🏽",
    "龘靐齉",
    "",
    "\n",
    " ",
    "\t",
    "e\x00f",
    "[Round 0]\n问：你好\n答：",
    "def f(x):\n    return x\t# tab\n",
    "café",
    "한국어 русский",
)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_layout(tokenizer):
    assert type(tokenizer).__name__ == "ChatGLMTokenizer"
    assert (len(tokenizer), tokenizer.vocab_size) == (1344, 1344)
    ids = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    )
    assert ids == (1004, 1005, 3, 0)
    assert (tokenizer.mask_token_id, tokenizer.gmask_token_id, tokenizer.end_token_id) == (
        1000,
        1001,
        2,
    )
    assert tokenizer.all_special_tokens == ["<sop>", "<eop>", "<unk>", "<pad>", "[MASK]"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    """Up to what the vocabulary's own normalisation does: compatibility forms folded, ends
    trimmed.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    folded = {"[Round 0]\n问：你好\n答：": "[Round 0]\n问:你好\n答:", " ": ""}.get(text, text)
    assert tokenizer.decode(ids) == folded
    assert tokenizer.decode(ids, skip_special_tokens=True) == folded


def test_runs_of_spaces_become_blanks_of_at_most_80(tokenizer):
    blanks = {
        length: tokenizer.convert_tokens_to_ids(f"<|blank_{length}|>") for length in (2, 39, 80)
    }
    inner = tokenizer.encode("x" + " " * 199 + "y", add_special_tokens=False)
    assert [token for token in inner if token in blanks.values()] == [
        blanks[80],
        blanks[80],
        blanks[39],
    ]
    assert tokenizer.encode("x  y", add_special_tokens=False).count(blanks[2]) == 1


@pytest.mark.parametrize(
    "text", ["<sop>", "[MASK] 你好 <eop>", "<pad><unk></s>", "[gMASK]<sop>", "<|tab|"]
)
def test_user_text_never_becomes_special_ids(tokenizer, text):
    special = {0, 1, 2, 3, *range(1000, 1008)}
    assert not special & set(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_upstreams_reading_of_special_text_is_there_for_the_asking(folder):
    upstream = AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
    assert upstream.encode("<sop><eop>", add_special_tokens=False) == [1004, 1005]
    assert 1001 not in upstream.encode("[gMASK]", add_special_tokens=False)


def test_rows_and_pairs_end_as_upstreams(tokenizer):
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("你好", "世界"))
    assert tokenizer.encode("你好") == [*first, 1001, 1004]
    assert tokenizer("你好", "世界")["input_ids"] == [*first, 1001, 1004, *second, 1005]
    assert list(tokenizer("你好")) == ["input_ids"]  # masks and positions only with padding
    cut = tokenizer("你好，欢迎来到我们的商店", truncation=True, max_length=6)["input_ids"]
    assert len(cut) == 6 and cut[-2:] == [1001, 1004]


def test_padding_carries_masks_and_positions_of_the_row_alone(tokenizer):
    texts = ["你好", "类型#裙*颜色#红色*风格#简约"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    rows, longest = batch["input_ids"].shape
    assert batch["attention_mask"].shape == (rows, 1, longest, longest)
    assert batch["position_ids"].shape == (rows, 2, longest)
    alone = tokenizer(texts[:1], padding=True, return_tensors="pt")
    length = alone["input_ids"].shape[1]
    padding = longest - length
    assert batch["input_ids"][0, :padding].tolist() == [3] * padding
    assert (batch["attention_mask"][0, :, padding:, padding:] == alone["attention_mask"][0]).all()
    assert (
        batch["attention_mask"][0, :, :padding].all()
        and batch["attention_mask"][0, :, :, :padding].all()
    )
    assert (batch["position_ids"][0, :, padding:] == alone["position_ids"][0]).all()
    assert (batch["position_ids"][0, :, :padding] == 0).all()
    with pytest.raises(ValueError, match="left"):
        tokenizer(texts, padding=True, padding_side="right")


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer):
    inside = tokenizer.encode("你好", add_special_tokens=False)
    assert tokenizer.decode([*inside, 1344, 1407, 99999, -1]) == "你好"


def test_an_offset_of_the_oldest_layout(folder):
    plain, offset = (
        AutoTokenizer.from_pretrained(folder, num_image_tokens=images) for images in (0, 20000)
    )
    ids = offset.encode("你好 world")
    assert ids == [token + 20000 for token in plain.encode("你好 world")]
    assert offset.decode(ids) == plain.decode(plain.encode("你好 world"))
    assert offset.decode([5, *ids]) == offset.decode(ids)  # an image id


def test_saved_and_loaded_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "[MASK] 你好\n<sop>"
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.gmask_token, again.end_token, again.num_image_tokens) == ("[gMASK]", "</s>", 0)
    assert again.all_special_tokens == tokenizer.all_special_tokens


def random_ids(tokenizer, chance, length):
    """Ids with many byte pieces, broken characters, control pieces and spaces among them."""
    size = tokenizer.vocab_size
    kinds = (range(size), range(size - 256, size), range(size - 128, size), range(5, 20))
    return [chance.choice(chance.choice(kinds)) for _ in range(length)]


def written_out(text):
    for piece, literal in WRITTEN.items():
        text = text.replace(piece, literal)
    return text


def check_against_sentencepiece(tokenizer, rounds):
    chance = random.Random(0)
    for _ in range(rounds):
        ids = random_ids(tokenizer, chance, chance.randrange(12))
        expected = written_out(tokenizer.processor.DecodeIds(ids))
        assert tokenizer.decode(ids) == expected, ids
        stream = tokenizer.stream()
        steps = [stream.step(token_id) for token_id in ids]
        assert "".join(steps) + stream.flush() == expected, ids


def test_decoding_and_streaming_equal_sentencepieces(tokenizer):
    check_against_sentencepiece(tokenizer, rounds=3000)


def test_a_stream_gives_no_half_characters(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("龘好", add_special_tokens=False)
    steps = [stream.step(token_id) for token_id in ids]
    assert "".join(steps) == "龘好" and stream.flush() == ""
    assert steps[-1] == "好" and steps[-2] == "龘" and not any(steps[:-2])
    stream = tokenizer.stream()
    assert stream.step(ids[1]) == "" and stream.flush() == "\N{REPLACEMENT CHARACTER}"


# Recorded strings: not in this repository, since they hold text and vocabularies that are not ours.


def recorded(which):
    folder = Path(golden_folder())
    where = vocabulary_folder() if which == "official" else folder / "tiny"
    return (
        folder,
        AutoTokenizer.from_pretrained(where),
        AutoTokenizer.from_pretrained(where, split_special_tokens=False),
    )


@pytest.mark.parametrize("which", ["official", "small"])
def test_recorded_strings(which):
    folder, _, upstream = recorded(which)
    record = json.loads((folder / "tokenizer.json").read_text())
    for name, value in {
        "vocab_size": upstream.vocab_size,
        "len": len(upstream),
        "bos": upstream.bos_token_id,
        "eos": upstream.eos_token_id,
        "pad": upstream.pad_token_id,
        "unk": upstream.unk_token_id,
        "mask": upstream.mask_token_id,
        "gmask": upstream.gmask_token_id,
        "end": upstream.end_token_id,
        "all_special_tokens": upstream.all_special_tokens,
        "all_special_ids": upstream.all_special_ids,
        "padding_side": upstream.padding_side,
        "model_max_length": upstream.model_max_length,
        "model_input_names": upstream.model_input_names,
    }.items():
        assert value == record["info"][which][name], name
    for string in record["strings"]:
        expected, text = string[which], string["text"]
        assert upstream.encode(text, add_special_tokens=False) == expected["ids"]
        assert upstream.tokenize(text) == expected["tokens"]
        assert upstream.encode(text) == expected["with_special"]
        assert upstream.decode(expected["ids"]) == expected["decode"]
        assert upstream.decode(expected["ids"], skip_special_tokens=True) == expected["decode_skip"]
        assert upstream.decode(expected["with_special"]) == expected["decode_with_special"]
    batch = record["batch"]
    for key, options in (
        (which, {"padding": True}),
        (f"{which}_maxlen16", {"padding": "max_length", "max_length": 16, "truncation": True}),
    ):
        got = upstream(batch["texts"], **options)
        for name, expected in batch[key].items():
            assert np.array_equal(np.array(got[name]), np.array(expected)), (key, name)
    plain = upstream(batch["texts"])
    assert (list(plain), plain["input_ids"]) == (
        batch[f"{which}_nopad_keys"],
        batch[f"{which}_nopad_ids"],
    )
    cut = upstream(batch["texts"], padding=True, truncation=True, max_length=6)["input_ids"]
    assert cut == batch[f"{which}_trunc6"]


def test_recorded_decodes():
    folder, tokenizer, _ = recorded("official")
    for entry in json.loads((folder / "tokenizer_decode_extra.json").read_text()):
        assert tokenizer.decode(entry["ids"]) == entry["decode"]
        assert tokenizer.decode(entry["ids"], skip_special_tokens=True) == entry["decode_skip"]
    check_against_sentencepiece(tokenizer, rounds=3000)


@pytest.mark.parametrize("which", ["official", "small"])
def test_recorded_preprocessing(which, model):
    """Training and evaluation rows as upstream's main.py makes them; ours are not padded."""
    folder, tokenizer, _ = recorded(which)
    config = model.config
    if which == "official":
        config = type(config)()
    prompter = family_of(config.to_dict()).prompter(tokenizer, config)
    record = json.loads((folder / "preprocess.json").read_text())
    for key, lengths in (
        ("adgen_ignorepad1", (64, 64)),
        ("trunc_16_8_prefix", (16, 8)),
        ("chat_256", (256, 256)),
    ):
        part = record[f"{which}_{key}"]
        made = []
        for row in part["rows"]:
            prompt, response = (
                row.get("content", row.get("prompt")),
                row.get("summary", row.get("response")),
            )
            if prompt and response:
                turns = [{"role": "user", "content": part.get("source_prefix", "") + prompt}]
                for question, answer in reversed(row.get("history") or []):
                    turns[:0] = [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                made.append(
                    prompter.training_ids(turns, response, *lengths, always_rounds="history" in row)
                )
        assert len(made) == len(part["train"]["input_ids"])
        for (ids, labels), expected, targets in zip(
            made, part["train"]["input_ids"], part["train"]["labels"], strict=True
        ):
            padding = sum(lengths) - len(ids)
            assert ids + [3] * padding == expected
            assert labels + [IGNORED] * padding == targets


def test_recorded_prompts_and_answers(tokenizer, model):
    folder = Path(golden_folder())
    prompter = family_of(model.config.to_dict()).prompter(tokenizer, model.config)
    for entry in json.loads((folder / "chat_prompts.json").read_text()):
        turns = [
            turn
            for question, answer in entry["history"]
            for turn in (
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            )
        ]
        assert (
            prompter.text([*turns, {"role": "user", "content": entry["query"]}]) == entry["prompt"]
        )
    for entry in json.loads((folder / "process_response.json").read_text()):
        assert prompter.clean(entry["in"]) == entry["out"]


def test_recorded_conversations(model):
    """Greedy chat with the reference's tiny model and vocabulary, from the messages to the tidied
    answer.
    """
    folder, tokenizer, _ = recorded("small")
    prompter = family_of(model.config.to_dict()).prompter(tokenizer, model.config)
    for entry in json.loads((folder / "chat_e2e_tiny.json").read_text()):
        turns = [
            turn
            for question, answer in entry["history"]
            for turn in (
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            )
        ]
        ids = prompter.prompt_ids([*turns, {"role": "user", "content": entry["query"]}])
        answer = model.generate(
            torch.tensor([ids]), max_length=entry["max_length"], do_sample=False
        )[0, len(ids) :]
        assert prompter.clean(tokenizer.decode(answer.tolist())) == entry["response"]
