"""The forgetting card: questions that check themselves, prefix on and off, and the loss."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from chat.engine import adapters
from chat.engine.prompts import IGNORED
from evaluation import forgetting
from evaluation.general_questions import QUESTIONS, Question
from evaluation.likelihood import losses
from evaluation.predict import engine_for
from tests.support import tiny_training as tiny
from tuning.ptuning.general_prompts import GENERAL_PROMPTS
from tuning.ptuning.prefix import TrainingPrefixCache


def test_no_question_is_one_that_a_prefix_may_be_held_to():
    assert not {each.prompt for each in QUESTIONS} & set(GENERAL_PROMPTS)
    assert len({each.prompt for each in QUESTIONS}) == len(QUESTIONS)
    chinese = [each for each in QUESTIONS if not each.prompt.isascii()]
    assert len(chinese) >= 25 and len(QUESTIONS) - len(chinese) >= 25


def test_every_written_answer_is_right_and_no_empty_one():
    for each in QUESTIONS:
        assert each.is_answered_by(each.answer), each.prompt
        assert not each.is_answered_by("") and not each.is_answered_by("我不知道。 I am not sure.")


@pytest.mark.parametrize(
    ("accepts", "text", "right"),
    [
        ("8", "等于 8。", True),
        ("8", "等于 18。", False),
        ("8", "8.5 左右", False),
        ("rome", "It is Rome!", True),
        ("rome", "romeo", False),
        ("东京", "首都是东京。", True),
    ],
)
def test_a_number_or_an_english_word_counts_alone(accepts, text, right):
    assert Question("?", (accepts,), "").is_answered_by(text) is right


@pytest.fixture(scope="module")
def loaded():
    return tiny.loaded()


@pytest.fixture(scope="module")
def prefix(loaded):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 2, 4, 8, generator=generator)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_losses_are_those_of_single_rows_through_the_model(loaded, prefix, with_prefix):
    rows = [
        loaded.prompter.training_ids(
            [{"role": "user", "content": "问" * n}], "答" * (6 - n), 64, 64
        )
        for n in range(1, 6)
    ]
    given = prefix if with_prefix else None
    found = losses(loaded, rows, given)
    for (ids, labels), (nats, tokens) in zip(rows, found, strict=True):
        past = TrainingPrefixCache(prefix, 1) if with_prefix else None
        logits = loaded.model(
            input_ids=torch.tensor([ids]), past_key_values=past, use_cache=with_prefix
        ).logits[0, :-1]
        expected = cross_entropy(
            logits, torch.tensor(labels[1:]), ignore_index=IGNORED, reduction="sum"
        )
        assert nats == pytest.approx(float(expected), rel=1e-4)
        assert tokens == sum(label != IGNORED for label in labels[1:])


def test_the_card_counts_what_was_kept_and_asks_the_base_once(
    loaded, prefix, tmp_path, monkeypatch
):
    folder = tmp_path / "adapter"
    sha256 = adapters.save(adapters.KVPrefix(prefix, True, "", {}), folder)
    engine = engine_for(loaded, forgetting.SOURCE, forgetting.TARGET, pre_seq_len=4)
    asked = []

    def answers(engine, adapter, should_stop):
        asked.append(adapter)
        right = {2, 3, 4} if adapter is None else {3, 4, 5, 6}
        return [each.answer if n in right else "?" for n, each in enumerate(QUESTIONS)]

    kept_as, folder = "weights", tmp_path / "general"
    ref = forgetting.AdapterRef(sha256, str(tmp_path / "adapter"))
    with monkeypatch.context() as patch:
        patch.setattr(forgetting, "_answers", answers)
        card = forgetting.card(engine, ref, prefix, kept_as=kept_as, folder=folder)
        assert (card["base_right"], card["right"], card["kept"]) == (3, 4, 2)
        assert card["loss"]["base"] > 0 < card["loss"]["tuned"] != card["loss"]["base"]
        again = forgetting.card(engine, ref, prefix, kept_as=kept_as, folder=folder)
        assert again == card and asked == [None, ref, ref]
    real = forgetting.card(engine, ref, prefix, kept_as="others", folder=folder)
    assert real["questions"] == len(QUESTIONS)
    assert any(answer["base"] != answer["text"] for answer in real["answers"])
    stopped = forgetting.card(
        engine, ref, prefix, kept_as="x", folder=folder, should_stop=lambda: True
    )
    assert stopped is None
