"""Tokens of a person, by the way they were asked for."""

from datetime import timedelta

import pytest
from django.utils import timezone

from chat.conversations.frames import LiveAnswer
from chat.conversations.messages import save_end
from portal.models import ApiKey, TokenUsage
from portal.views import usage_of
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import text_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]


def end(conversation, key=None):
    row = conversation.messages.create(role="assistant", status="streaming", api_key=key)
    answer = LiveAnswer.of_row(row)
    answer.status = "complete"
    answer.usage = {"prompt_tokens": 1200, "completion_tokens": 34, "total_tokens": 1234}
    save_end(answer)
    save_end(answer)  # an end that is told twice counts once


def test_an_ended_answer_counts_towards_its_door(client, member, other_member, conversation):
    end(conversation)
    end(conversation)
    end(conversation, ApiKey.create_for(member)[0])
    TokenUsage.objects.create(
        user=member, door="chat", day=timezone.localdate() - timedelta(days=30), answers=9
    )
    chat, api, batch = usage_of(member)
    assert batch["count"] == 0
    assert (chat["count"], chat["prompt"], chat["completion"]) == (2, 2400, 68)
    assert (api["count"], api["prompt"], api["completion"]) == (1, 1200, 34)
    assert [row["count"] for row in usage_of(other_member)] == [0, 0, 0]
    client.force_login(member)
    assert "2,400" in text_of(client.get("/account/"))
