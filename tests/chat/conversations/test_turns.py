"""A turn: what is written, with which model, and what is refused."""

import pytest
from django.core.exceptions import ValidationError

from chat import registry
from chat.conversations import turns
from chat.models import Conversation, Message
from portal.rest.conventions import Conflict
from tests.support.folders import adapter_folder, checkpoint_folder

pytestmark = pytest.mark.django_db


@pytest.fixture
def base(tmp_path, data_dir):
    return registry.register_checkpoint(checkpoint_folder(tmp_path / "base"))


@pytest.fixture
def adapter(base, member, tmp_path):
    return registry.publish_adapter(
        adapter_folder(tmp_path / "tuned"), name="tuned", checkpoint=base, owner=member
    )


@pytest.fixture
def conversation(member):
    return Conversation.objects.create(owner=member)


def finish(answer):
    Message.objects.filter(pk=answer.pk).update(status=Message.Status.COMPLETE)


def test_a_turn_is_a_message_and_a_queued_answer(conversation, member, base):
    message, answer = turns.create_turn(
        conversation, member, "你好\n第二行", sampling={"top_p": 0.5, "seed": None}
    )
    assert (message.role, message.content, message.status) == ("user", "你好\n第二行", "complete")
    assert (answer.role, answer.status, answer.checkpoint, answer.adapter) == (
        "assistant",
        "queued",
        base,
        None,
    )
    assert (answer.sampling, answer.model_label) == ({"top_p": 0.5}, "base")
    conversation.refresh_from_db()
    assert (conversation.title, conversation.checkpoint) == ("你好", base)


def test_the_prefix_goes_on_and_off_within_one_conversation(conversation, member, adapter):
    labels = []
    for chosen in ("tuned", None, adapter, adapter.pk, turns.KEEP):
        _message, answer = turns.create_turn(conversation, member, "x", adapter=chosen)
        labels.append(answer.model_label)
        finish(answer)
    assert labels == ["base:tuned", "base", "base:tuned", "base:tuned", "base:tuned"]


def test_a_long_first_line_is_cut_for_the_title(conversation, member, base):
    turns.create_turn(conversation, member, "\n\n" + "长" * 100)
    assert conversation.title == "长" * 39 + "…"


def test_a_second_message_waits_for_the_answer(conversation, member, base):
    _message, answer = turns.create_turn(conversation, member, "one")
    with pytest.raises(Conflict):
        turns.create_turn(conversation, member, "two")
    assert conversation.messages.count() == 2
    finish(answer)
    turns.create_turn(conversation, member, "two")


@pytest.mark.parametrize("content", [None, 7, "", " \n", "a\0b", "\ud800", "x" * 200_001])
def test_content_that_is_no_message_is_refused(conversation, member, base, content):
    with pytest.raises(ValidationError) as caught:
        turns.create_turn(conversation, member, content)
    assert list(caught.value.error_dict) == ["content"]
    assert not conversation.messages.exists()


def test_every_problem_is_told_at_once(conversation, member, base):
    sampling = {
        "temperature": 3,
        "top_p": 0,
        "top_k": 1.5,
        "max_new_tokens": True,
        "seed": -1,
        "do_sample": 1,
        "x": 1,
    }
    sampling["repetition_penalty"] = float("nan")
    with pytest.raises(ValidationError) as caught:
        turns.create_turn(
            conversation, member, "", checkpoint="none", adapter=10**30, sampling=sampling
        )
    assert set(caught.value.error_dict) == {
        "content",
        "checkpoint",
        "adapter",
        *(f"sampling.{name}" for name in sampling),
    }


def test_somebody_elses_adapter_does_not_exist_for_me(conversation, member, other_member, adapter):
    adapter.owner = other_member
    adapter.save()
    with pytest.raises(ValidationError) as caught:
        turns.create_turn(conversation, member, "x", adapter="tuned")
    assert caught.value.error_dict["adapter"][0].code == "does_not_exist"


def test_an_adapter_of_another_checkpoint_is_refused(conversation, member, adapter, tmp_path):
    registry.register_checkpoint(checkpoint_folder(tmp_path / "other", seed=3))
    with pytest.raises(ValidationError, match="other"):
        turns.create_turn(conversation, member, "x", checkpoint="other", adapter="tuned")
    _message, answer = turns.create_turn(
        conversation, member, "x", checkpoint="other", adapter=turns.KEEP
    )
    assert answer.adapter is None


def test_without_any_checkpoint_the_message_says_what_to_do(conversation, member):
    with pytest.raises(ValidationError, match="add_checkpoint"):
        turns.create_turn(conversation, member, "x")
