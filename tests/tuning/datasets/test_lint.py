"""What is told of well-written rows before anything is spent on them."""

import io
import json

import pytest
from django.core.management import CommandError, call_command

from chat.engine.prompts import Prompter
from tests.support import tiny_models
from tests.support.uploads import lines, upload
from tuning.datasets import lint
from tuning.datasets.examples import messages_of
from tuning.datasets.store import ingest

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


def row(prompt, response, **beside):
    return {"prompt": prompt, "response": response, **beside}


def notes(member, train, validation=None) -> list[tuple]:
    file = upload(lines(*train))
    dev = validation and upload(lines(*validation), "dev.json")
    dataset = ingest(file, name="x", owner=member, validation=dev)
    assert all(found["level"] == "warning" for found in dataset.problems)
    return [(found["code"], found["lines"]) for found in dataset.problems]


def test_rows_that_repeat_or_contradict_each_other_are_told(member):
    train = [row("裙", "好"), row("裤", "长"), row("裙", "好"), row("裙", "短"), row("帽", "红")]
    assert notes(member, train) == [("duplicate_row", [3]), ("conflicting_response", [4])]
    # the same question after another conversation is another prompt
    after = [row("裙", "短", history=[["你好", "请讲"]]), row("裙", "好")]
    assert notes(member, after) == []


def test_validation_rows_that_were_trained_on_are_told(member):
    train, dev = (
        [row("裙", "好"), row("裤", "长")],
        [row("帽", "红"), row("裤", "短"), row("裙", "好")],
    )
    assert notes(member, train, dev) == [("seen_in_training", [2, 3])]


def test_text_that_an_encoding_damaged_is_told_and_sound_text_is_not(member):
    text = "这条裙子很好看，是今年的新款。"
    damaged = [
        "好看\ufffd",
        text.encode().decode("gbk", "replace"),
        text.encode().decode("gbk", "ignore"),
        text.encode().decode("cp1252", "ignore"),
        "café".encode().decode("cp1252"),
        "锟斤拷锟斤拷",
    ]
    sound = [text, "café, naïve, Übergröße", "烫伤", "日本語です", "🙂 emoji", "Ça va ? Très bien."]
    found = notes(member, [row(f"问{n}", value) for n, value in enumerate(damaged + sound)])
    assert found == [("damaged_text", list(range(1, len(damaged) + 1)))]


def test_near_duplicates_are_found_and_only_they():
    base = (
        "这条裙子采用了柔软的面料，穿着舒适，版型修身显瘦，"
        "搭配一双高跟鞋就能轻松出街，非常百搭实用。"
    )
    other = (
        "裤子的腰部设计了松紧带，方便穿脱，裤脚收口的处理显得干练利落，"
        "适合春秋季节日常通勤穿着搭配。"
    )
    texts = [
        base,
        other,
        base + "好",
        base.replace("高跟鞋", "小白鞋"),
        other[:20] + base[:20],
        "",
        "",
    ]
    assert [found for found in lint.near_duplicates(lint.sketches(texts)) if texts[found[0]]] == [
        (2, 0)
    ]


def checked(*arguments) -> dict:
    out = io.StringIO()
    call_command("check_dataset", *arguments, "--json", stdout=out)
    return json.loads(out.getvalue())


def test_lengths_of_many_rows_are_those_of_the_trainer_row_by_row():
    """Whatever the texts spell: control tokens, blanks, nothing of the tokenizer's alphabet."""
    texts = ["a", " a ", "<|end|>", "x<|user|>y\n", "裙子\u3000", "\ue0a1", "🙂", "a" * 300]
    examples = [
        (messages_of(prompt, [["q", other]] * turns), response)
        for turns in range(3)
        for prompt, other in zip(texts, texts[::-1], strict=True)
        for response in texts
    ]
    for name in tiny_models.ARCHITECTURES:
        prompter = tiny_models.loaded_model(name).prompter
        one_by_one = Prompter.training_lengths(prompter, examples)
        assert prompter.training_lengths(examples) == one_by_one, name


def test_rows_that_would_be_cut_are_counted_as_the_trainer_cuts_them(
    admin_user, tiny_checkpoint, capfd
):
    from chat.engine.loading import load_prompter
    from chat.engine.prompts import IGNORED
    from tuning.ptuning.encoded import Encoded

    made = [row("a" * (3 * n + 1), "b" * (5 * n + 1)) for n in range(12)]
    dataset = ingest(upload(lines(*made)), name="x", owner=admin_user)
    name = str(dataset.pk)
    report = checked(name, "--max-source-length", "20", "--max-target-length", "16")
    prompter = load_prompter(tiny_checkpoint.path)
    whole = Encoded(made, prompter, 10_000, 10_000)
    cut = Encoded(made, prompter, 20, 16)
    shorter = [
        [sum((label == IGNORED) == given for label in part[at][1]) for part in (whole, cut)]
        for given in (True, False)
        for at in range(12)
    ]
    changed = [before != after for before, after in shorter]
    assert report["prompt"]["cut"] == sum(changed[:12]) > 0
    assert report["response"]["cut"] == sum(changed[12:]) > 0
    assert sum(bar[2] for bar in report["response"]["bars"]) == 12
    assert "12/12" in capfd.readouterr().err
    # what is trained: the very tokens and labels
    shown = checked(name, "--row", "12", "--max-source-length", "20", "--max-target-length", "16")
    ids, labels = cut[11]
    assert [token["id"] for token in shown["tokens"]] == ids
    assert [token["trained"] for token in shown["tokens"]] == [label != IGNORED for label in labels]
    with pytest.raises(CommandError):
        checked(name, "--row", "13")
