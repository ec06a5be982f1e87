"""What a model thinks before it answers: told apart on a stream, asked for or not, opened by the
prompt itself.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.checkpoints.describe import describe
from chat.engine.families.causal import TemplatePrompter
from chat.engine.thoughts import Thoughts, apart
from tests.support.chat_families import TEMPLATES, tokenizer, write

SAID = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("\n<think>hm</think>yes", "hm", "yes"),
        ("<think>\n\n</think>\n\nyes", "", "yes"),
        ("<think>\na < b", "a < b", ""),
        ("yes <think>hm</think>", "", "yes <think>hm</think>"),
        ("<thin", "", "<thin"),
        ("", "", ""),
    ],
)
def test_thoughts_stand_at_the_beginning(text, thoughts, answer):
    assert apart(text) == (thoughts, answer)


PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "think>", " ", "\n", "a", "好"]),
    max_size=14,
)


@given(PARTS, st.randoms(use_true_random=False))
def test_a_stream_is_told_apart_as_the_whole(parts, draw):
    text = "".join(parts)
    stream, told, at = Thoughts(), [], 0
    while at < len(text):
        size = draw.randint(1, 5)
        told.append(stream.feed(text[at : at + size]))
        at += size
    told.append(stream.flush())
    assert ("".join(t for t, _ in told), "".join(a for _, a in told)) == apart(text)


def test_a_template_with_a_switch_is_asked_as_the_request_says(tmp_path):
    made = tokenizer("Qwen3")
    prompter = TemplatePrompter(made, frozenset({made.eos_token_id}))
    texts = {
        wish: made.decode(prompter.prompt_ids(SAID, thinking=wish)) for wish in (None, True, False)
    }
    assert texts[None] == texts[True]
    assert texts[False] == texts[True] + "<think>\n\n</think>\n\n"
    assert describe(write("Qwen3", tmp_path / "qwen3"))["thinking"] == "switch"
    assert describe(write("Qwen2", tmp_path / "qwen2"))["thinking"] == ""


def test_a_thought_that_the_prompt_has_opened_is_in_the_answer():
    """Templates of models that always think end in <think>."""
    from dataclasses import replace

    from chat.engine.engine import Engine, EngineConfig
    from chat.engine.request import Request, SamplingParams
    from tests.support.tiny_models import loaded_model, random_prompt

    made = tokenizer("Qwen3")
    made.chat_template = (TEMPLATES / "qwen2.jinja").read_text() + "<think>\n"
    opened = TemplatePrompter(made, frozenset({made.eos_token_id}))
    assert opened.opening(opened.prompt_ids(SAID)) == "<think>\n"
    plain = loaded_model("qwen2").prompter
    assert plain.opening(plain.prompt_ids(SAID)) == ""

    class Opening(type(plain)):
        def opening(self, prompt):
            return "<think>\n"

    loaded = replace(
        loaded_model("qwen2"), prompter=Opening(plain.tokenizer, frozenset(plain.end_ids))
    )
    sampling = SamplingParams(do_sample=False, max_new_tokens=5)
    ids = random_prompt("qwen2", random.Random(1))
    thought, raw = Engine(loaded, EngineConfig(max_rows=2)).generate(
        [
            Request("messages", messages=tuple(SAID), sampling=sampling),
            Request("tokens", prompt_ids=ids, sampling=sampling),
        ]
    )
    assert thought.text == "<think>\n" + plain.decode(thought.token_ids)
    assert raw.text == plain.decode(raw.token_ids)
