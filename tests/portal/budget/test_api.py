"""Budget and usage by script: own balance, grants and their limits, who used what."""

from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.utils import timezone
from django.utils.translation import override
from rest_framework.test import APIClient

from portal.budget import ledger
from portal.budget.models import DeviceUse, Grant, Transaction
from portal.budget.pricing import MICRO
from portal.models import Team, TokenUsage
from tests.portal.budget import books

pytestmark = pytest.mark.django_db
BUDGET, GRANTS = "/api/v1/budget/", "/api/v1/budget/grants/"


def api_of(user):
    client = APIClient()
    client.force_authenticate(user)
    return client


def until(days=90):
    return (timezone.now() + timedelta(days=days)).isoformat()


def test_an_admin_gives_units_and_the_member_sees_them(settings, member, staff):
    settings.TOKEN_RATE = MICRO // 10
    settings.TOKENS_PER_DAY = 5000
    wish = {"user": "member", "units": 5000, "expires_at": until(), "note": "the trial"}
    answer = api_of(staff).post(GRANTS, wish, format="json")
    assert answer.status_code == 201, answer.content
    assert (answer.json()["units"], answer.json()["by"]) == ("5000.000000", "chief")
    ledger.charge([member], 1_250_000, about="12,500 tokens")
    said = api_of(member).get(BUDGET).json()
    told = ("enabled", "user", "granted", "left", "held", "used", "percent", "token_rate")
    assert [said[name] for name in told] == [
        True, "member", "5000.000000", "4998.750000", "0.000000", "1.250000", 0, "0.100000",
    ]  # fmt: skip
    assert (said["tokens_per_day"], said["tokens_today"], said["holds"]) == (5000, 0, [])
    assert [each["note"] for each in said["grants"]] == ["the trial"]
    newest, given = said["entries"]
    assert (newest["kind"], newest["balance"], newest["used"]) == (
        "charge", "-1.250000", "1.250000",
    )  # fmt: skip
    assert (given["kind"], given["by"]) == ("grant", "chief")
    entry = LogEntry.objects.get()
    assert entry.user == staff and entry.change_message.startswith("budget: 5000 units to member")
    assert api_of(staff).get(BUDGET, {"user": "member"}).json()["left"] == "4998.750000"


@pytest.mark.parametrize("language", ["zh-hans", "en"])
@pytest.mark.parametrize(
    ("wrong", "field", "code", "words"),
    [
        ({"units": -5}, "units", "out_of_range", "1,000,000,000"),
        ({"units": 0}, "units", "out_of_range", "1,000,000,000"),
        ({"units": 10**9 + 1}, "units", "out_of_range", "1,000,000,000"),
        ({"units": 10**400}, "units", "out_of_range", "1,000,000,000"),
        ({"units": 2.5}, "units", "not_whole", ("整数", "whole")),
        ({"units": 5.0}, "units", "not_whole", ("整数", "whole")),
        ({"units": True}, "units", "not_whole", ("整数", "whole")),
        ({"units": "5"}, "units", "not_whole", ("整数", "whole")),
        ({"units": None}, "units", "null", ""),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at", "in_the_past", ("过", "expired")),
        ({"expires_at": "9999-01-01T00:00:00Z"}, "expires_at", "too_far", ("十年", "ten years")),
        ({"expires_at": "soon"}, "expires_at", "invalid", ""),
        ({"user": "nobody"}, "user", "does_not_exist", ("没有这个用户", "nobody of this name")),
        ({"team": "team"}, "user", "required", ("用户或", "user or a team")),
        ({"note": "x" * 201}, "note", "max_length", ""),
    ],
)
def test_what_cannot_be_given_is_refused_in_both_languages(
    member, staff, language, wrong, field, code, words
):
    wish = {"user": "member", "units": 5, "expires_at": until(), **wrong}
    with override(language):
        answer = api_of(staff).post(
            GRANTS, wish, format="json", headers={"accept-language": language}
        )
    assert answer.status_code == 400
    problem = answer.json()["error"]["problems"][0]
    assert problem["param"] == field and problem["message"]
    assert code is None or problem["code"] == code
    if words:
        wanted = words if isinstance(words, str) else words[language == "en"]
        assert wanted in problem["message"]
    assert not Grant.objects.exists() and not LogEntry.objects.exists()


def test_members_give_nothing_and_see_no_others(member, other_member, staff):
    team = Team.objects.create(name="team")
    team.members.add(member)
    wish = {"user": "member", "units": 5, "expires_at": until()}
    assert api_of(member).post(GRANTS, wish, format="json").status_code == 403
    assert api_of(member).get(BUDGET, {"user": "other"}).status_code == 404
    assert api_of(member).get(BUDGET, {"user": "chief"}).status_code == 404
    assert api_of(member).get(BUDGET, {"team": "team"}).status_code == 200
    assert api_of(other_member).get(BUDGET, {"team": "team"}).status_code == 404
    assert api_of(staff).get(BUDGET, {"team": "team"}).json()["team"] == "team"
    assert APIClient().get(BUDGET).status_code == 401
    ledger.grant(staff, member, MICRO, timezone.now() + timedelta(days=1))
    pk = Grant.objects.get().pk
    assert api_of(member).post(f"{GRANTS}{pk}/withdraw/").status_code == 404


def test_an_admin_withdraws_and_refunds_once(member, staff):
    admin = api_of(staff)
    wish = {"user": "member", "units": 10, "expires_at": until()}
    pk = admin.post(GRANTS, wish, format="json").json()["id"]
    spent = ledger.charge([member], 4 * MICRO)
    refund = f"{BUDGET}entries/{spent.pk}/refund/"
    assert admin.post(refund).status_code == 204
    assert admin.post(refund).status_code == 409
    assert ledger.left(member) == 10 * MICRO
    answer = admin.post(f"{GRANTS}{pk}/withdraw/")
    assert answer.status_code == 200 and answer.json()["left"] == "0.000000"
    assert admin.post(f"{GRANTS}{pk}/withdraw/").status_code == 409
    assert admin.post(f"{GRANTS}{10**17}/withdraw/").status_code == 404
    granted = Transaction.objects.get(kind="grant").pk
    assert admin.post(f"{BUDGET}entries/{granted}/refund/").status_code == 409
    said = [entry.change_message.split(",")[0] for entry in LogEntry.objects.order_by("id")]
    assert said[1:] == ["budget: 4 units refunded", "budget: withdrawn"]
    books.check()


def test_usage_by_person_team_adapter_door_and_day(member, other_member, staff):
    team = Team.objects.create(name="team")
    team.members.add(member, other_member)
    today = timezone.localdate()
    for user, door, model, count in (
        (member, "chat", "base:tuned", 100),
        (member, "api", "base", 10),
        (other_member, "api", "base", 1),
    ):
        TokenUsage.objects.create(
            user=user, day=today, door=door, model=model, prompt_tokens=count, answers=1
        )
    DeviceUse.objects.create(
        user=other_member, day=today, kind="tuning", model="base:tuned", milliseconds=1500
    )

    def said(user, by):
        rows = api_of(user).get("/api/v1/usage/", {"by": by, "days": 2}).json()
        return [(row["key"], row["prompt_tokens"], row["device_seconds"]) for row in rows]

    assert said(staff, "person") == [("other", 1, 1.5), ("member", 110, 0)]
    assert said(staff, "team") == [("team", 111, 1.5)]
    assert said(staff, "adapter") == [("base:tuned", 100, 1.5), ("base", 11, 0)]
    assert said(staff, "door") == [("tuning", 0, 1.5), ("chat", 100, 0), ("api", 11, 0)]
    assert [row[1:] for row in said(staff, "day")] == [(0, 0), (111, 1.5)]
    assert said(member, "person") == [("member", 110, 0)]
    assert said(member, "team") == [("team", 110, 0)]  # of their own
    for wrong in ({"by": "colour"}, {"days": 0}, {"days": "x"}, {"days": 10**6}):
        assert api_of(member).get("/api/v1/usage/", wrong).status_code == 400
