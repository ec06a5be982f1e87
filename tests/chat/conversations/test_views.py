"""Ratings, collecting, search, undo, links to read along, the system prompt's field."""

import json
from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from chat.checkpoints.system_prompts import takes_system
from chat.conversations import live, turns
from chat.models import Conversation, Message, ShareLink
from tests.support.folders import checkpoint_folder
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import text_of
from tuning.models import CollectedExample

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]
FOUND = '<ul class="rows">'  # of the page of a search


def test_a_thumb_is_stored_turned_and_taken_back(client, member, conversation):
    client.force_login(member)
    question, answer = conversation.messages.all()
    seen = []
    for field in ("up", "down", "down"):
        client.post(f"/chat/{conversation.pk}/rate/", {field: answer.pk})
        answer.refresh_from_db()
        seen.append(answer.thumb)
    assert seen == [1, -1, None]
    assert client.post(f"/chat/{conversation.pk}/rate/", {"up": question.pk}).status_code == 404


def test_a_corrected_answer_waits_in_a_dataset_for_review(client, member, conversation, data_dir):
    client.force_login(member)
    answer = conversation.messages.last()
    page = client.post(
        "/datasets/collect/", {"message": answer.pk, "response": "应该这样答"}, follow=True
    )
    found = CollectedExample.objects.get()
    assert (found.prompt, found.response, found.original) == (
        "<i>ask</i>",
        "应该这样答",
        answer.content,
    )
    assert (found.status, found.by) == ("waiting", member)
    assert found.dataset.name in text_of(page)
    refused = client.post("/datasets/collect/", {"message": answer.pk, "response": ""}, follow=True)
    assert 'role="alert"' in text_of(refused)


def test_nobody_rates_collects_shares_or_restores_what_is_not_theirs(
    client, other_member, conversation
):
    client.force_login(other_member)
    answer = conversation.messages.last()
    for path in ("rate", "share", "restore"):
        fields = {"up": answer.pk, "days": 7}
        assert client.post(f"/chat/{conversation.pk}/{path}/", fields).status_code == 404
    assert client.post("/datasets/collect/", {"message": answer.pk}).status_code == 404
    assert FOUND not in text_of(client.get("/chat/search/?q=ask"))


def test_a_search_finds_chinese_inside_words_and_shows_the_place(client, member, conversation):
    client.force_login(member)
    found = conversation.messages.create(role="user", content="前文" * 40 + "米白色的阔腿裤<b>很好")
    page = text_of(client.get("/chat/search/", {"q": "阔腿裤"}))
    assert ">阔腿裤</mark>&lt;b&gt;很好" in page
    assert f"/chat/{conversation.pk}/?at={found.pk}#turn-{found.pk}" in page
    assert ">ASK<" not in page and "<mark" not in text_of(client.get("/chat/search/?q=%25"))
    assert ">bold</mark>" in text_of(client.get("/chat/search/?q=BOLD"))
    assert client.get("/chat/search/", {"q": "a\0b"}).status_code == 200


def test_a_place_found_shows_its_branch_and_what_is_around_it(client, member, conversation):
    client.force_login(member)
    question, old = conversation.messages.all()
    fresh = turns.answer_again(conversation, member, old)
    Message.objects.filter(pk=fresh.pk).update(status="complete", content="新")
    page = text_of(client.get(f"/chat/{conversation.pk}/?at={old.pk}"))
    assert f'id="turn-{old.pk}"' in page and f'id="turn-{fresh.pk}"' not in page
    for number in range(80):
        conversation.messages.create(role="user", content=f"q{number}")
    Conversation.objects.filter(pk=conversation.pk).update(leaf=None)
    assert f'id="turn-{question.pk}"' not in text_of(client.get(f"/chat/{conversation.pk}/"))
    page = text_of(client.get(f"/chat/{conversation.pk}/?at={question.pk}"))
    assert f'id="turn-{question.pk}"' in page and "q79" not in page


def test_a_deleted_conversation_is_gone_and_comes_back(client, member, conversation):
    client.force_login(member)
    address = f"/chat/{conversation.pk}/"
    page = client.post(f"{address}delete/", follow=True)
    assert f'action="{address}restore/"' in text_of(page)
    assert client.get(address).status_code == 404
    assert client.get(f"/api/v1/conversations/{conversation.pk}/").status_code == 404
    answer = conversation.messages.last()
    assert client.get(f"/api/v1/messages/{answer.pk}/").status_code == 404
    assert FOUND not in text_of(client.get("/chat/search/?q=mine"))
    client.post(f"{address}restore/")
    assert FOUND in text_of(client.get("/chat/search/?q=mine"))
    assert client.get(address).status_code == 200
    assert client.post(f"{address}restore/").status_code == 404


def test_what_was_deleted_long_ago_goes_for_good(client, member, conversation):
    old = Conversation.objects.create(
        owner=member, deleted_at=timezone.now() - live.KEEP_DELETED - timedelta(minutes=1)
    )
    client.force_login(member)
    client.post(f"/chat/{conversation.pk}/delete/")
    assert not Conversation.objects.filter(pk=old.pk).exists()
    assert Conversation.objects.filter(pk=conversation.pk).exists()


def test_a_link_shows_what_was_shared_until_it_is_taken_back_or_ends(
    client, member, other_member, conversation
):
    client.force_login(member)
    answer = conversation.messages.last()
    client.post(f"/chat/{conversation.pk}/share/", {"days": 7})
    link = ShareLink.objects.get()
    conversation.messages.create(role="user", content="后来写的")
    address = f"/shared/{link.token}/"
    assert address in text_of(client.get(f"/chat/{conversation.pk}/"))
    client.logout()
    assert client.get(address).status_code == 302  # for members
    client.force_login(other_member)
    page = text_of(client.get(address))
    assert (
        "<strong>bold</strong>" in page and "后来写的" not in page and "<script>alert" not in page
    )
    assert "retry" not in page and "turn-form" not in page and 'id="composer"' not in page
    assert client.get(f"/api/v1/messages/{answer.pk}/").status_code == 404
    ShareLink.objects.update(expires_at=timezone.now())
    assert client.get(address).status_code == 404
    ShareLink.objects.update(expires_at=timezone.now() + timedelta(days=1))
    assert client.get(address).status_code == 200
    client.force_login(member)
    client.post(f"/chat/{conversation.pk}/share/", {"revoke": link.pk})
    assert client.get(address).status_code == 404
    for days in ("0", "3650", "x", ""):
        fields = {"days": days}
        assert client.post(f"/chat/{conversation.pk}/share/", fields).status_code == 404


def test_a_link_to_a_deleted_conversation_leads_nowhere(client, member, conversation):
    client.force_login(member)
    client.post(f"/chat/{conversation.pk}/share/", {"days": 1})
    client.post(f"/chat/{conversation.pk}/delete/")
    assert client.get(f"/shared/{ShareLink.objects.get().token}/").status_code == 404


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        ("{% if messages[0]['role'] == 'system' %}", True),
        ("{{ '<|' + message['role'] + '|>' }}", True),
        ("{% if m['role']=='system' %}{{ raise_exception('System role not supported') }}", False),
        ("{{ '[INST]' }}", False),
    ],
)
def test_the_template_says_whether_it_takes_a_system_prompt(tmp_path, template, takes):
    told = json.dumps({"chat_template": template})
    (tmp_path / "tokenizer_config.json").write_text(told)
    assert takes_system(str(tmp_path), template, {"chat_template": True}) is takes
    assert takes_system(str(tmp_path), template, {"chat_template": False}) is False
    assert takes_system("/nowhere", template, {"family": "chatglm"}) is True


def test_the_field_is_there_where_the_template_has_one(client, member, checkpoint, tmp_path):
    client.force_login(member)
    assert 'name="system"' not in text_of(client.get("/chat/"))
    checkpoint_folder(tmp_path / "x")
    (tmp_path / "x" / "chat_template.jinja").write_text("{{ system }}")
    checkpoint.path, checkpoint.fingerprint = str(tmp_path / "x"), "9" * 64
    checkpoint.description["chat_template"] = True
    checkpoint.save()
    assert 'name="system"' in text_of(client.get("/chat/"))
    client.post("/chat/start/", {"text": "你好", "system": "你是店员"})
    assert Message.objects.last().system == "你是店员"
    assert "你是店员</textarea>" in text_of(client.get(f"/chat/{Conversation.objects.get().pk}/"))


@pytest.mark.skipif(connection.vendor != "sqlite", reason="PostgreSQL sorts few rows without it")
def test_the_newest_of_many_conversations_are_found_without_sorting_all(member):
    plan = Conversation.objects.visible_to(member)[:200].explain()
    assert "newest_of_owner" in plan and "TEMP B-TREE" not in plan
