"""Tokens of pages and programs: counted alike, limited alike, paid alike."""

from datetime import timedelta

import pytest
from django.utils import timezone
from rest_framework.test import APIClient

from chat.conversations.frames import LiveAnswer
from chat.conversations.messages import save_end
from portal.budget import ledger, tokens
from portal.budget.holds import OverBudget
from portal.budget.pricing import MICRO
from portal.models import ApiKey, Team, TokenUsage
from tests.portal.budget import books
from tests.support.page_fixtures import *  # noqa: F403  a member's rows

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]


def give(holder, units):
    expires_at = timezone.now() + timedelta(days=9)
    return ledger.grant(None, holder, units * MICRO, expires_at)


def end(conversation, key=None, prompt=900, completion=100):
    row = conversation.messages.create(
        role="assistant", status="streaming", api_key=key, model_label="base:tuned"
    )
    answer = LiveAnswer.of_row(row)
    answer.status = "complete"
    answer.usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    save_end(answer)
    save_end(answer)  # an end that is told twice is paid once


def test_pages_and_programs_cost_the_same(settings, member, conversation):
    settings.TOKEN_RATE = MICRO // 2  # half a unit for 1,000
    give(member, 10)
    end(conversation)
    assert ledger.left(member) == 9_500_000
    end(conversation, ApiKey.create_for(member)[0])
    assert ledger.left(member) == 9_000_000
    doors = TokenUsage.objects.values_list("door", "model", "prompt_tokens", "completion_tokens")
    expected = [("api", "base:tuned", 900, 100), ("chat", "base:tuned", 900, 100)]
    assert sorted(doors) == expected
    end(conversation, prompt=0, completion=1)
    assert ledger.left(member) == 8_999_500
    books.check()


def test_a_team_pays_for_whom_has_nothing_and_the_pool_for_what_is_over(
    settings, member, conversation
):
    settings.TOKEN_RATE = MICRO
    give(member, 1)
    team = Team.objects.create(name="team")
    team.members.add(member)
    give(team, 1)
    end(conversation, prompt=1200, completion=300)
    assert (ledger.left(member), ledger.left(team)) == (0, MICRO // 2)
    tokens.check(member.pk)
    end(conversation, prompt=900, completion=100)
    assert (ledger.left(team), books.total("pool")) == (0, -2_500_000)
    with pytest.raises(OverBudget):
        tokens.check(member.pk)
    books.check()


@pytest.mark.parametrize("limit", ["day", "units"])
def test_every_door_refuses_alike_when_nothing_is_left(
    settings, client, member, conversation, limit
):
    if limit == "day":
        settings.TOKENS_PER_DAY = 1000
        end(conversation, prompt=500, completion=499)
        tokens.check(member.pk)
        end(conversation, ApiKey.create_for(member)[0], prompt=0, completion=1)
    else:
        settings.TOKEN_RATE = 1
    secret = ApiKey.create_for(member)[1]
    key = {"authorization": f"Bearer {secret}"}
    ask = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    answers = [
        client.post(path, body, content_type="application/json", headers=key)
        for path, body in (
            ("/v1/chat/completions", ask),
            ("/v1/chat/completions", {**ask, "stream": True}),
            ("/v1/completions", {"model": "base", "prompt": "hi"}),
            ("/v1/responses", {"model": "base", "input": "hi"}),
            ("/", {"prompt": "hi", "history": []}),
        )
    ]
    api = APIClient()
    api.force_authenticate(member)
    path = f"/api/v1/conversations/{conversation.pk}/messages/"
    answers.append(api.post(path, {"content": "hi"}, format="json"))
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (429, "insufficient_quota"), error
        assert error["type"] == "rate_limit_error" and int(answer["Retry-After"]) > 0
    client.force_login(member)
    said = client.post(f"/chat/{conversation.pk}/say/", {"text": "hi"}, follow=True)
    assert ("用完" in said.content.decode()) and conversation.messages.filter(
        role="user", content="hi"
    ).count() == 0
    # what there is can still be read
    assert client.get(f"/chat/{conversation.pk}/").status_code == 200
    assert client.get("/v1/models", headers=key).status_code == 200


def test_yesterdays_tokens_are_not_todays(settings, member):
    settings.TOKENS_PER_DAY = 10
    TokenUsage.objects.create(
        user=member, day=timezone.localdate() - timedelta(days=1), door="chat", prompt_tokens=50
    )
    tokens.check(member.pk)


def test_without_settings_no_query_is_made(django_assert_num_queries, member):
    with django_assert_num_queries(0):
        tokens.check(member.pk)
