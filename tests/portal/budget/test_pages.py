"""The page of budget and usage, its CSV, and the admin."""

from datetime import timedelta

import pytest
from django.utils import timezone

from portal.budget import ledger
from portal.budget.models import DeviceUse, Grant, Transaction
from portal.budget.pricing import MICRO
from portal.models import Team, TokenUsage, User
from tests.portal.budget import books
from tests.support.page_rows import text_of

pytestmark = pytest.mark.django_db


@pytest.fixture
def priced(settings):
    settings.TOKEN_RATE, settings.DEVICE_RATES = MICRO, {"": 10 * MICRO}


@pytest.fixture
def used(member, other_member):
    today = timezone.localdate()
    TokenUsage.objects.create(
        user=member, day=today, door="chat", model="base:=1+1", prompt_tokens=1234, answers=2
    )
    evil = User.objects.create(username="@SUM(A1)")
    TokenUsage.objects.create(user=evil, day=today, door="api", model="base", prompt_tokens=7)
    DeviceUse.objects.create(
        user=other_member, day=today, kind="tuning", model="base:theirs", milliseconds=125_000
    )


def give(holder, units, days=90):
    return ledger.grant(None, holder, units * MICRO, timezone.now() + timedelta(days=days))


def test_members_see_their_own_usage_and_admins_everybodys(client, member, staff, used):
    client.cookies["django_language"] = "en"
    client.force_login(member)
    page = text_of(client.get("/usage/"))
    assert "1,234" in page and "base:theirs" not in page and "SUM(A1)" not in page
    assert "units" not in page  # no word of a budget where there is none
    client.force_login(staff)
    page = text_of(client.get("/usage/?days=7"))
    for told in ("1,234", "base:theirs", "2 min 05 s", "@SUM(A1)", "By person"):
        assert told in page
    assert client.get("/usage/?days=²").status_code == 200
    assert client.post("/usage/").status_code == 405


def test_the_csv_has_nothing_that_a_spreadsheet_computes(client, member, staff, used):
    client.force_login(staff)
    response = client.get("/usage/usage.csv")
    lines = response.getvalue().decode().removeprefix("\ufeff").splitlines()
    today = str(timezone.localdate())
    assert lines[0].startswith("day,person,through,model,")
    assert f"{today},'@SUM(A1),api,base,7,0,0," in lines
    assert f"{today},member,chat,base:=1+1,1234,0,2," in lines
    assert f"{today},other,tuning,base:theirs,,,,125.0" in lines
    client.force_login(member)
    mine = client.get("/usage/usage.csv").getvalue().decode().splitlines()
    assert len(mine) == 2


def test_the_page_tells_the_balance_and_warns_at_four_fifths(client, member, priced, settings):
    settings.TOKENS_PER_DAY = 5000
    client.cookies["django_language"] = "en"
    client.force_login(member)
    assert "An administrator gives them" in text_of(client.get("/usage/"))
    give(member, 100)
    ledger.charge([member], 79_500_000, about="<b>12 tokens</b>")
    page = text_of(client.get("/usage/"))
    assert "20.5" in page and "of 100 are free" in page and "79.5 used" in page
    assert "&lt;b&gt;12 tokens" in page and "0 of your 5,000 tokens" in page
    assert 'data-tone="warn"' not in page
    ledger.charge([member], 500_000)
    assert "80% are used" in text_of(client.get("/usage/"))
    warning = "Most of your units are used."
    assert warning in text_of(client.get("/account/"))
    settings.TOKEN_RATE, settings.DEVICE_RATES = 0, {}
    assert warning not in text_of(client.get("/account/"))
    settings.TOKEN_RATE = MICRO
    team = Team.objects.create(name="the team")
    team.members.add(member)
    give(team, 7)
    assert "Units of the team the team" in text_of(client.get("/usage/"))


# ------------------------------------------------------------------ admin


def form(**changes):
    until = timezone.localtime() + timedelta(days=90)
    return {
        "user": "",
        "team": "",
        "units": "5000",
        "expires_at_0": f"{until:%Y-%m-%d}",
        "expires_at_1": "12:00:00",
        "note": "trial",
        **changes,
    }


def test_an_admin_gives_in_the_admin_and_the_log_says_it_once(client, member, staff):
    client.force_login(staff)
    answer = client.post("/admin/budget/grant/add/", form(user=member.pk))
    assert answer.status_code == 302
    given = Grant.objects.get()
    assert (given.left, given.by, given.note) == (5000 * MICRO, staff, "trial")
    log = text_of(client.get("/admin/admin/logentry/"))
    assert log.count("budget: 5000 units to member") == 1
    listed = text_of(client.get("/admin/budget/grant/"))
    assert "5,000" in listed and "member" in listed
    for path in ("change/", "delete/"):
        assert client.post(f"/admin/budget/grant/{given.pk}/{path}", form()).status_code == 403
    books.check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"units": "-1"},
        {"units": "0"},
        {"units": "2.5"},
        {"units": "1" + 30 * "0"},
        {"units": ""},
        {"expires_at_0": "2020-01-01"},
        {"expires_at_0": "9999-12-31"},
        {"user": ""},
        {"team": "1"},
    ],
)
def test_the_admins_form_refuses_what_cannot_be_given(client, member, staff, wrong):
    Team.objects.create(pk=1, name="team")
    client.force_login(staff)
    answer = client.post("/admin/budget/grant/add/", form(**{"user": member.pk, **wrong}))
    assert answer.status_code == 200 and "errornote" in answer.content.decode()
    assert not Transaction.objects.exists()


def test_the_ledger_is_shown_refunded_and_never_edited(client, member, staff):
    given = give(member, 10)
    spent = ledger.charge([member], 4 * MICRO, about="4,000 tokens")
    client.force_login(staff)
    page = text_of(client.get("/admin/budget/transaction/"))
    assert "4,000 tokens" in page and "member" in page
    one = f"/admin/budget/transaction/{spent.pk}/change/"
    assert "-4.000000" in text_of(client.get(one))
    assert client.post(one, {"about": "x"}).status_code == 403
    chosen = {"action": "refund", "_selected_action": [spent.pk]}
    client.post("/admin/budget/transaction/", chosen)
    assert ledger.left(member) == 10 * MICRO
    client.post("/admin/budget/grant/", {"action": "withdraw", "_selected_action": [given.pk]})
    assert ledger.left(member) == 0
    for path in ("portal/tokenusage", "budget/deviceuse"):
        assert client.get(f"/admin/{path}/").status_code == 200
        assert client.get(f"/admin/{path}/add/").status_code == 403
    books.check()


def test_a_user_with_a_balance_is_deleted_in_the_admin(client, member, staff):
    given = give(member, 10)
    ledger.charge([member], 4 * MICRO)
    client.force_login(staff)
    path = f"/admin/portal/user/{member.pk}/delete/"
    assert client.get(path).status_code == 200
    assert client.post(path, {"post": "yes"}).status_code == 302
    assert not User.objects.filter(pk=member.pk).exists()
    given.refresh_from_db()
    assert given.left == 0 and books.total("pool") == -4 * MICRO
    assert "member" in text_of(client.get("/admin/budget/transaction/"))
    books.check()
