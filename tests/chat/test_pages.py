"""Conversations, models and what the composer sends."""

import re

import pytest
from django.core.exceptions import ValidationError

from chat.conversations.messages import request_for
from chat.engine.request import LIMITS
from chat.forms import PANEL
from chat.models import Adapter, Checkpoint, Conversation, Message
from chat.worker import router
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import text_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]


def test_model_output_is_rendered_safely_and_the_question_is_text(client, member, conversation):
    client.force_login(member)
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert "<strong>bold</strong>" in page and "<script>alert" not in page
    assert "&lt;i&gt;ask&lt;/i&gt;" in page


def test_a_first_message_makes_a_conversation_with_the_chosen_model(
    client, member, adapter, no_worker
):
    client.force_login(member)
    response = client.post(
        "/chat/start/", {"text": "你好", "model": f"adapter-{adapter.pk}", "temperature": "0.5"}
    )
    found = Conversation.objects.get()
    assert response["Location"] == f"/chat/{found.pk}/"
    assert (found.title, found.adapter) == ("你好", adapter)
    answer = found.messages.last()
    assert answer.sampling == {"temperature": 0.5}
    assert [message.pk for message in no_worker] == [answer.pk]
    page = text_of(client.get(response["Location"]))
    assert "The inference worker is not up." in page and 'data-status="failed"' in page


def test_a_refused_message_leaves_nothing_behind(client, member, adapter, other_member):
    client.force_login(other_member)
    for fields in [
        {"text": " "},
        {"text": "x", "model": f"adapter-{adapter.pk}"},
        {"text": "x", "model": "base-x"},
        {"text": "x", "temperature": "9"},
    ]:
        response = client.post("/chat/start/", fields, follow=True)
        assert 'role="alert"' in text_of(response)
    assert not Conversation.objects.exists()


def test_the_form_takes_as_long_a_message_as_every_other_door(client, member, checkpoint):
    client.force_login(member)
    client.post("/chat/start/", {"text": "字" * 200_000})
    assert len(Message.objects.get(role="user").content) == 200_000
    client.cookies["django_language"] = "en"
    page = client.post("/chat/start/", {"text": "字" * 200_001}, follow=True)
    assert "200,001 characters; at most 200,000" in text_of(page)
    assert Conversation.objects.count() == 1


@pytest.mark.parametrize("name", PANEL)
def test_the_form_takes_what_the_one_table_allows_and_nothing_else(
    client, member, checkpoint, name
):
    client.force_login(member)
    limits = LIMITS[name]
    step = 1 if limits.kind is int else 0.001
    lowest = limits.low + step if limits.above else limits.low
    for value in (lowest, limits.high):
        client.post("/chat/start/", {"text": "x", name: str(value)})
        assert Message.objects.last().sampling == {name: value}
    count = Message.objects.count()
    for value in (lowest - step, limits.high + step):
        page = client.post("/chat/start/", {"text": "x", name: str(value)}, follow=True)
        assert 'role="alert"' in text_of(page)
    assert Message.objects.count() == count


def test_answering_again_keeps_the_earlier_answer_as_a_branch(
    client, member, conversation, adapter
):
    client.force_login(member)
    before = conversation.messages.last().pk
    client.post(f"/chat/{conversation.pk}/retry/", {"model": f"adapter-{adapter.pk}", "text": ""})
    question, earlier, answer = conversation.messages.all()
    assert (earlier.pk, earlier.content[:8]) == (before, "**bold**")
    assert (answer.role, answer.adapter, answer.parent) == ("assistant", adapter, question)
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert f'data-message="{answer.pk}"' in page and f'data-message="{before}"' not in page
    assert f'name="message" value="{before}"' in page and ">2/2<" in page
    client.post(f"/chat/{conversation.pk}/branch/", {"message": before})
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert f'data-message="{before}"' in page and ">1/2<" in page


def test_a_turn_that_is_refused_late_changes_nothing(client, member, conversation, monkeypatch):
    def refuse(*args, **options):
        raise ValidationError("too late")

    for name in ("create_turn", "answer_again"):
        monkeypatch.setattr(f"chat.views.{name}", refuse)
    client.force_login(member)
    before = list(conversation.messages.values_list("pk", flat=True))
    for path in (f"/chat/{conversation.pk}/retry/", "/chat/start/"):
        assert "too late" in text_of(client.post(path, {"text": "x"}, follow=True))
    assert list(conversation.messages.values_list("pk", flat=True)) == before
    assert Conversation.objects.count() == 1


def test_an_answer_in_flight_is_neither_replaced_nor_joined_by_a_second(
    client, member, conversation
):
    conversation.messages.filter(role="assistant").update(status=Message.Status.STREAMING)
    client.force_login(member)
    for path in ("retry", "say"):
        response = client.post(f"/chat/{conversation.pk}/{path}/", {"text": "more"}, follow=True)
        assert 'role="alert"' in text_of(response)
    assert conversation.messages.count() == 2


def test_an_answer_in_flight_carries_what_the_script_needs_to_go_on(client, member, conversation):
    conversation.messages.filter(role="assistant").update(status=Message.Status.STREAMING, seq=1017)
    client.force_login(member)
    page = text_of(client.get(f"/chat/{conversation.pk}/"))
    assert f'data-socket="/ws/conversations/{conversation.pk}/"' in page
    assert 'data-status="streaming" data-seq="1017"' in page
    assert "&lt;script&gt;alert(1)" in page  # still text


def test_a_long_conversation_opens_with_its_newest_turns(client, member, conversation):
    Message.objects.bulk_create(
        Message(
            conversation=conversation,
            role="assistant" if number % 2 else "user",
            content=f"turn {number}.",
        )
        for number in range(1000)
    )
    client.force_login(member)
    path, seen, links = f"/chat/{conversation.pk}/", [], 0
    while path:
        page = text_of(client.get(path))
        assert page.count("<article") <= 60 + 2 and len(page) < 250_000  # two are templates
        assert ("data-socket" in page) == (links == 0)
        seen = re.findall(r"turn (\d+)\.", page) + seen
        link = re.search(r'data-earlier href="(\?before=\d+)"', page)
        path, links = link and f"/chat/{conversation.pk}/{link[1]}", links + 1
    assert seen == [str(number) for number in range(1000)] and links == 17
    assert client.get(f"/chat/{conversation.pk}/?before=x").status_code == 200


def test_a_conversation_is_saved_as_markdown_and_as_json(
    client, member, other_member, conversation
):
    conversation.title = "说/明"
    conversation.save()
    client.force_login(member)
    response = client.get(f"/chat/{conversation.pk}/export.md")
    assert "filename*=utf-8''%E8%AF%B4%E6%98%8E.md" in response["Content-Disposition"]
    text = response.content.decode()
    assert text.startswith("# 说/明\n") and "**base** · " in text
    assert "\n\n**bold** <script>alert(1)</script>\n" in text
    told = client.get(f"/chat/{conversation.pk}/export.json").json()
    assert [message["role"] for message in told["messages"]] == ["user", "assistant"]
    assert told["messages"][1]["model"] == "base" and told["messages"][0]["content"] == "<i>ask</i>"
    assert client.get(f"/chat/{conversation.pk}/export.exe").status_code == 404
    client.force_login(other_member)
    assert client.get(f"/chat/{conversation.pk}/export.md").status_code == 404


def test_conversations_are_renamed_and_deleted_by_their_owner(client, member, conversation):
    client.force_login(member)
    client.post(f"/chat/{conversation.pk}/rename/", {"title": "new"})
    assert Conversation.objects.get().title == "new"
    client.post(f"/chat/{conversation.pk}/delete/")
    assert not Conversation.objects.visible_to(member).exists()


def test_many_models_are_a_list_by_base_with_the_chosen_one_beside_its_base(
    client, member, adapter, checkpoint, monkeypatch
):
    other = Checkpoint.objects.create(name="other", path="/x", fingerprint="e" * 64)
    loaded = {"state": "ready", "fingerprint": checkpoint.fingerprint}
    monkeypatch.setattr(router, "status_sync", lambda timeout=1: loaded)
    for number in range(9):
        Adapter.objects.create(
            name=f"a{number}",
            checkpoint=checkpoint,
            folder="x",
            sha256=str(number) * 64,
            pre_seq_len=8,
        )
    client.force_login(member)
    picker = client.get(f"/chat/?adapter={adapter.pk}").context["picker"]
    assert picker["chosen"]["adapter"] == adapter
    assert [chip["label"] for chip in picker["chips"]] == ["base · 关闭前缀", "tuned", "a8"]
    assert [(base, absent, len(of)) for base, absent, of in picker["groups"]] == [
        (checkpoint, False, 8),
        (other, True, 1),
    ]
    page = text_of(client.get("/chat/"))
    assert page.count('name="model"') == 12 and "未加载" in page


def test_only_staff_add_models(client, member, staff, tmp_path):
    client.force_login(member)
    assert client.post("/checkpoints/new/", {"path": str(tmp_path)}).status_code == 403
    client.force_login(staff)
    page = text_of(client.post("/checkpoints/new/", {"path": str(tmp_path / "nothing")}))
    assert 'aria-invalid="true"' in page and not Checkpoint.objects.exists()


def test_what_the_panel_leaves_alone_is_not_sent(client, member, checkpoint, no_worker):
    client.force_login(member)
    fields = {
        "temperature": "0.95",
        "top_p": "0.7",
        "max_new_tokens": "512",
        "seed": "",
        "text": "x",
    }
    client.post("/chat/start/", fields)
    client.post("/chat/start/", {**fields, "max_new_tokens": "64", "seed": "0"})
    checkpoint.description = {"sampling": {"temperature": 0.2}}  # what its folder wishes
    checkpoint.save()
    client.post("/chat/start/", {**fields, "temperature": "0.2"})
    client.post("/chat/start/", fields)
    plain, changed, wished, against = Message.objects.filter(role="assistant").order_by("id")
    assert plain.sampling == {} and changed.sampling == {"max_new_tokens": 64, "seed": 0}
    assert wished.sampling == {"temperature": 0.2} and against.sampling == {"temperature": 0.95}
    panel = client.get("/chat/").context["sampling"]["temperature"]
    assert panel == {"default": 0.2, "value": 0.2}
    panel = client.get(f"/chat/{against.conversation_id}/").context["sampling"]["temperature"]
    assert panel["value"] == 0.95  # as the last answer was written


def test_thinking_is_a_choice_where_the_models_template_has_one(client, member, checkpoint):
    client.force_login(member)
    switch = re.compile(r'<select[^>]*id="thinking"[^>]*>')
    assert "hidden" in switch.search(text_of(client.get("/chat/")))[0]
    checkpoint.description = {"thinking": "switch", "chat_template": True}
    checkpoint.save()
    assert "hidden" not in switch.search(text_of(client.get("/chat/")))[0]
    for wish in ("", "yes", "no"):
        client.post("/chat/start/", {"text": "x", "thinking": wish})
    answers = Message.objects.filter(role="assistant").order_by("id")
    assert [one.sampling for one in answers] == [{}, {"thinking": True}, {"thinking": False}]


def test_a_base_model_without_a_chat_form_is_called_that(client, member, checkpoint):
    client.force_login(member)
    note = re.compile(r'<p[^>]*id="plain-note"[^>]*>')
    assert "hidden" in note.search(text_of(client.get("/chat/")))[0]
    checkpoint.description = {"chat_template": False}
    checkpoint.save()
    page = text_of(client.get("/chat/"))
    assert "hidden" not in note.search(page)[0] and "data-plain" in page
    assert "会接着你的文字续写" in page


def test_earlier_thoughts_are_shown_to_no_model(member, conversation, checkpoint):
    conversation.messages.all().delete()
    said = "<think>\nhm\n</think>\n\nyes"
    conversation.messages.create(role="user", content="first")
    conversation.messages.create(role="assistant", content=said, checkpoint=checkpoint)
    conversation.messages.create(role="user", content="second")
    answer = conversation.messages.create(
        role="assistant", status="queued", checkpoint=checkpoint, sampling={"thinking": False}
    )
    request, _checkpoint = request_for(answer.pk)
    assert [turn["content"] for turn in request.messages] == ["first", "yes", "second"]
    assert request.sampling.thinking is False


def test_an_error_is_explained_in_the_readers_language(client, member, conversation):
    error = {"code": "context_length_exceeded", "message": "the prompt has 2000 tokens"}
    conversation.messages.filter(role="assistant").update(status=Message.Status.FAILED, error=error)
    client.force_login(member)
    for language, words in [
        ("zh-hans", "超出了模型的上下文"),
        ("en", "does not fit into the model&#x27;s context"),
    ]:
        client.cookies["django_language"] = language
        page = text_of(client.get(f"/chat/{conversation.pk}/"))
        assert words in page and 'title="the prompt has 2000 tokens"' in page


def test_an_adapter_is_shared_renamed_and_deleted_by_its_owner_alone(
    client, member, other_member, adapter, data_dir
):
    path = f"/adapters/{adapter.pk}/"
    client.force_login(other_member)
    assert "tuned</span>" not in text_of(client.get("/adapters/"))
    assert client.post(path, {"action": "share"}).status_code == 404
    client.force_login(member)
    client.post(path, {"action": "share"})
    client.post(path, {"action": "rename", "name": "mine: no"})  # a colon is OpenAI's separator
    client.force_login(other_member)
    assert "tuned</span>" in text_of(client.get("/adapters/"))
    assert client.post(path, {"action": "delete"}).status_code == 404  # seen, but not theirs
    client.force_login(member)
    client.post(path, {"action": "rename", "name": "better"})
    assert Adapter.objects.get().name == "better"
    client.post(path, {"action": "delete"})
    assert not Adapter.objects.exists()


@pytest.mark.parametrize("language", ["zh-hans", "en"])
def test_a_page_that_is_not_there_says_so_in_the_portals_look(client, member, language):
    client.force_login(member)
    client.cookies["django_language"] = language
    response = client.get("/chat/999999/")
    assert response.status_code == 404 and 'class="empty"' in text_of(response)


def test_what_no_longer_fits_into_the_context_is_marked(client, member, checkpoint):
    checkpoint.description = {**checkpoint.description, "context_length": 1024}
    checkpoint.save()
    talk = Conversation.objects.create(owner=member, checkpoint=checkpoint)
    for number in range(3):
        talk.messages.create(role="user", content=f"问{number}")
        answer = talk.messages.create(
            role="assistant", content=f"答{number}", checkpoint=checkpoint
        )
    client.force_login(member)
    page = client.get(f"/chat/{talk.pk}/")
    assert not any(turn.is_left_out for turn in page.context["turns"])
    assert 'id="context-fill" hidden' in page.content.decode()
    answer.left_out, answer.usage = 2, {"total_tokens": 900}
    answer.save()
    page = client.get(f"/chat/{talk.pk}/")
    marked = [turn.content for turn in page.context["turns"] if turn.is_left_out]
    assert marked == ["问0", "答0"]
    assert page.content.decode().count("已不在上下文中") == 2
    assert page.context["fill"] == {"size": 1024, "used": 900}
