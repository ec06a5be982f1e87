"""The generator of the starter's corpus and of the sample dataset."""

import itertools
import json
import random

from chat.starter import sample
from chat.starter.corpus import conversations, digest
from chat.starter.small_talk import INTENTS
from chat.starter.wares import KINDS, VALUES, draw_ware


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another():
    first = list(conversations(50, 1))
    assert digest(first) == digest(list(conversations(50, 1)))
    assert digest(first) != digest(list(conversations(50, 2)))


def test_a_conversation_alternates_and_ends_with_an_answer():
    for messages in conversations(500, 3):
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            roles.pop(0)
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(message["content"].strip() for message in messages)
        assert not any("{" in message["content"] for message in messages)


def test_a_bare_attribute_string_is_answered_by_listing_every_value():
    seen = 0
    for messages in conversations(2000, 4):
        for asked, answered in itertools.pairwise(messages):
            if (
                asked["role"] == "user"
                and asked["content"].startswith("类型#")
                and answered["content"].startswith("这是")
            ):
                for pair in asked["content"].split("*")[1:]:
                    name, value = pair.split("#")
                    assert f"{name}是{value}" in answered["content"]
                seen += 1
    assert seen > 100


def test_an_example_of_a_strange_style_is_given_and_those_after_it_follow_it():
    given = [
        messages
        for messages in conversations(2000, 5)
        if any("given" in message for message in messages)
    ]
    assert 100 < len(given) < 220
    for messages in given:
        answers = [message for message in messages if message["role"] == "assistant"]
        assert ["given" in answer for answer in answers] == [True] + [False] * (len(answers) - 1)
        assert all(answer["content"][:2] == answers[0]["content"][:2] for answer in answers)


def test_every_attribute_of_a_kind_has_values():
    assert {name for kind in KINDS for name in kind.attributes} == set(VALUES)


def test_no_question_of_small_talk_has_two_answers():
    asked = [question for questions, _ in INTENTS for question in questions]
    assert len(asked) == len(set(asked))


def test_an_attribute_string_reads_back():
    ware = draw_ware(random.Random(5), 3, 3)
    kind, *attributes = (tuple(pair.split("#")) for pair in ware.attribute_string().split("*"))
    assert kind == ("类型", ware.kind.name)
    assert tuple(attributes) == ware.attributes


def test_the_committed_sample_is_what_its_generator_writes(tmp_path):
    sample.write(tmp_path)
    for path in (sample.TRAIN, sample.DEV):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_sample_has_a_thousand_and_a_hundred_rows_and_no_content_twice():
    train, dev = sample.load(sample.TRAIN), sample.load(sample.DEV)
    assert (len(train), len(dev)) == (1000, 100)
    contents = [row["content"] for row in train + dev]
    assert len(set(contents)) == 1100
    assert all(set(row) == {"content", "summary"} for row in train + dev)


def test_a_summary_of_the_sample_names_every_value():
    for line in sample.DEV.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for pair in row["content"].split("*")[1:]:
            assert pair.split("#")[1] in row["summary"]
