"""Branches of a conversation: what is shown, what the model is told, what stays."""

import pytest

from chat.conversations import turns
from chat.conversations.messages import request_for
from chat.conversations.tree import Tree, show
from chat.models import Checkpoint, Comparison, Message
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import text_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]


def end(answer, text="…", **fields):
    Message.objects.filter(pk=answer.pk).update(status="complete", content=text, **fields)
    answer.refresh_from_db()
    return answer


def say(conversation, member, text, answer, **options):
    question, pending = turns.create_turn(conversation, member, text, **options)
    return question, end(pending, answer)


def told(answer) -> list[str]:
    return [turn["content"] for turn in request_for(answer.pk)[0].messages]


def test_rows_that_name_no_parent_are_one_branch(conversation):
    ids = list(conversation.messages.values_list("pk", flat=True))
    tree = Tree(conversation)
    assert tree.path() == ids and tree.leaf == ids[-1]
    assert [tree.siblings(pk) for pk in ids] == [[pk] for pk in ids]


def test_an_edited_question_is_a_branch_and_the_model_is_told_that_branch_alone(
    client, member, conversation
):
    """Also of the first question, which follows nothing."""
    first = conversation.messages.first()
    second, _answer = say(conversation, member, "二", "答二")
    _edited, other = say(conversation, member, "贰", "答贰", edited=second)
    assert told(other) == ["<i>ask</i>", "**bold** <script>alert(1)</script>", "贰"]
    _again, fresh = say(conversation, member, "从头", "新", edited=first)
    assert told(fresh) == ["从头"]
    client.force_login(member)
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert "从头" in page and "答贰" not in page and ">2/2<" in page
    # walking back shows the whole branch, the one written last of its own branches
    client.post(f"/chat/{conversation.pk}/branch/", {"message": first.pk})
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert "答贰" in page and "答二" not in page and "从头" not in page
    _next, following = say(conversation, member, "三", "答三")
    conversation.refresh_from_db()
    assert told(following)[-3:] == ["贰", "答贰", "三"]


def test_the_edit_form_asks_in_another_way(client, member, conversation):
    question, answer = conversation.messages.all()
    client.force_login(member)
    for named in (question.pk, answer.pk):  # a page that has not been loaded anew knows the answer
        page = text_of(client.get(f"/chat/{conversation.pk}/?edit={named}"))
        assert 'id="edited"' in page and f'value="{question.pk}"' in page
    fields = {"question": question.pk, "edited": "另一种问法", "text": "未发送的"}
    client.post(f"/chat/{conversation.pk}/edit/", fields)
    contents = list(conversation.messages.values_list("content", flat=True))
    assert contents[2:] == ["另一种问法", ""] and len(contents) == 4
    assert client.post(f"/chat/{conversation.pk}/edit/", {"question": answer.pk}).status_code == 404
    fields["edited"] = " "
    refused = client.post(f"/chat/{conversation.pk}/edit/", fields, follow=True)
    assert 'role="alert"' in text_of(refused) and conversation.messages.count() == 4


def test_branches_of_others_do_not_exist(client, other_member, member, conversation):
    client.force_login(other_member)
    answer = conversation.messages.last()
    mine = other_member.conversations.create()
    for path in ("branch", "retry", "edit", "continue"):
        fields = {"message": answer.pk, "answer": answer.pk, "question": answer.pk}
        assert client.post(f"/chat/{conversation.pk}/{path}/", fields).status_code == 404
        assert client.post(f"/chat/{mine.pk}/{path}/", fields).status_code == 404
    client.force_login(member)
    _question, answers = turns.create_comparison(
        conversation, member, "x", [(None, None), (other(), None)]
    )
    address = f"/comparisons/{answers[0].comparison_id}/"
    assert client.post(address, {"better": answer.pk}).status_code == 404  # not one of the two
    client.force_login(other_member)
    assert client.post(address, {"verdict": "same"}).status_code == 404


def other() -> Checkpoint:
    return Checkpoint.objects.create(name="other", path="/elsewhere", fingerprint="e" * 64)


def test_a_cut_answer_is_gone_on_with_where_it_ended(client, member, conversation, no_worker):
    _question, cut = turns.create_turn(conversation, member, "写长", sampling={"temperature": 0})
    end(cut, "从前有座", finish_reason="length")
    client.force_login(member)
    client.post(f"/chat/{conversation.pk}/continue/", {"answer": cut.pk})
    answer = no_worker[-1]
    assert (answer.parent_id, answer.sampling, answer.begun) == (cut.parent_id, cut.sampling, 4)
    request = request_for(answer.pk)[0]
    assert request.begun == "从前有座" and request.messages[-1]["content"] == "写长"
    assert not Message.objects.filter(begun__gt=0).exclude(pk=answer.pk).exists()
    assert Message.objects.get(pk=cut.pk).content == "从前有座"  # it stays


def test_several_models_answer_side_by_side_and_the_better_one_goes_on(
    client, member, conversation, adapter, no_worker
):
    client.force_login(member)
    base = adapter.checkpoint
    models = [f"base-{base.pk}", f"adapter-{adapter.pk}", f"base-{other().pk}"]
    client.post(f"/chat/{conversation.pk}/say/", {"text": "比一比", "models": models})
    answers = list(Message.objects.filter(parent__content="比一比"))
    assert [answer.model_label for answer in answers] == ["base", "base:tuned", "other"]
    assert sorted(answer.pk for answer in no_worker) == [answer.pk for answer in answers]
    for answer, text in zip(answers, "甲乙丙", strict=True):
        end(answer, text)
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert all(f'name="better" value="{answer.pk}"' in " ".join(page.split()) for answer in answers)
    found = Comparison.objects.get()
    client.post(f"/comparisons/{found.pk}/", {"better": answers[1].pk})
    found.refresh_from_db()
    assert (found.verdict, found.chosen, found.judged_at is not None) == (
        "better",
        answers[1],
        True,
    )
    _next, following = say(conversation, member, "然后", "好", adapter=adapter)
    assert told(following)[-3:] == ["比一比", "乙", "然后"]
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert ">2/3<" in page and "丙" not in page  # the others are branches now
    client.post(f"/comparisons/{found.pk}/", {"verdict": "none"})
    found.refresh_from_db()
    assert (found.verdict, found.chosen) == ("none", None)


def test_too_many_models_are_refused(client, member, checkpoint, adapter):
    client.force_login(member)
    values = [f"adapter-{adapter.pk}", *[f"base-{checkpoint.pk}"] * 4]
    page = client.post("/chat/start/", {"text": "x", "models": values}, follow=True)
    assert 'role="alert"' in text_of(page) and not Message.objects.exists()


def test_each_model_is_compared_once(client, member, checkpoint):
    client.force_login(member)
    values = [f"base-{checkpoint.pk}"] * 2
    page = client.post("/chat/start/", {"text": "x", "models": values}, follow=True)
    assert 'role="alert"' in text_of(page) and not Message.objects.exists()


def test_the_branch_shown_is_the_one_gone_on_with(member, conversation):
    old = conversation.messages.last()
    fresh = end(turns.answer_again(conversation, member, old), "新")
    assert Tree(conversation).path()[-1] == fresh.pk
    show(conversation, old.pk)
    _question, answer = say(conversation, member, "然后", "好")
    assert told(answer)[1] == old.content
    assert answer.is_in_flight is False and Tree(conversation).newest_below(old.pk) == answer.pk


def test_the_system_prompt_comes_first_and_is_kept_for_the_next_turn(member, conversation):
    _question, answer = say(conversation, member, "你好", "您好", system="你是店员")
    assert request_for(answer.pk)[0].messages[0] == {"role": "system", "content": "你是店员"}
    _question, following = say(conversation, member, "谢谢", "不客气")
    assert (following.system, told(following)[0]) == ("你是店员", "你是店员")
    _question, last = say(conversation, member, "再见", "再见", system="")
    assert last.system == "" and "你是店员" not in told(last)


def test_an_export_has_the_branch_shown_and_json_the_others_too(client, member, conversation):
    old = conversation.messages.last()
    end(turns.answer_again(conversation, member, old), "新的回答")
    client.force_login(member)
    text = client.get(f"/chat/{conversation.pk}/export.md").text
    assert "新的回答" in text and "bold" not in text
    told = client.get(f"/chat/{conversation.pk}/export.json").json()
    assert [row["content"] for row in told["messages"]] == ["<i>ask</i>", "新的回答"]
    assert [row["content"] for row in told["other_branches"]] == [old.content]
