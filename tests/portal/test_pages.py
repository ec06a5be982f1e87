"""What holds for every page: who sees it, in which language, and the pages that look at all
apps.
"""

import re
from datetime import timedelta

import pytest
from django.utils import timezone
from django.utils.translation import override

from chat.models import Conversation
from portal.models import ApiKey, Run, User
from portal.templatetags.portal import duration, model_name, person, thousands, when
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import text_of
from tuning.models import Dataset

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]

PAGES = [
    "/",
    "/chat/",
    "/datasets/",
    "/datasets/upload/",
    "/tuning/",
    "/tuning/new/",
    "/evaluations/",
    "/evaluations/new/",
    "/evaluations/leaderboard/",
    "/tasks/",
    "/devices/",
    "/notices/",
    "/account/",
    "/usage/",
    "/checkpoints/new/",
    "/adapters/",
]


# ---- who sees what


@pytest.mark.parametrize("path", PAGES)
def test_without_a_login_every_page_is_the_login_page(client, path):
    response = client.get(path)
    assert response.status_code == 302
    assert response["Location"].startswith("/login/?next=")


@pytest.mark.parametrize("language", ["zh-hans", "en"])
def test_every_page_answers_in_both_languages_before_anything_exists(
    client, member, language, data_dir
):
    client.force_login(member)
    client.cookies["django_language"] = language
    for path in PAGES:
        response = client.get(path)
        assert response.status_code == 200, path
        assert f'lang="{"zh-Hans" if language == "zh-hans" else "en"}"' in text_of(response)


def test_no_page_has_inline_script_style_or_handlers(
    client, staff, member, conversation, dataset, tuning_run, evaluated
):
    client.force_login(member)
    objects = [
        f"/chat/{conversation.pk}/",
        f"/datasets/{dataset.pk}/",
        f"/tuning/{tuning_run.pk}/",
        f"/evaluations/{evaluated.pk}/",
    ]
    for path in [*PAGES, *objects]:
        response = client.get(path)
        assert response.status_code == 200, path
        page = text_of(response)
        assert not re.search(r'<[^>]+\s(style|on\w+)="', page), path
        for tag in re.findall(r"<script[^>]*>", page):
            assert " src=" in tag or 'type="application/json"' in tag, path
        assert "<style" not in page
        policy = response["Content-Security-Policy"]
        assert "unsafe-inline" not in policy and "unsafe-eval" not in policy


def test_other_peoples_objects_do_not_exist(
    client, other_member, conversation, dataset, tuning_run, evaluated
):
    client.force_login(other_member)
    for path in [
        f"/chat/{conversation.pk}/",
        f"/datasets/{dataset.pk}/",
        f"/tuning/{tuning_run.pk}/",
        f"/evaluations/{evaluated.pk}/",
    ]:
        assert client.get(path).status_code == 404, path
    for path in [
        f"/chat/{conversation.pk}/say/",
        f"/chat/{conversation.pk}/retry/",
        f"/chat/{conversation.pk}/rename/",
        f"/chat/{conversation.pk}/delete/",
        f"/datasets/{dataset.pk}/split/",
        f"/datasets/{dataset.pk}/rename/",
        f"/datasets/{dataset.pk}/delete/",
        f"/tuning/{tuning_run.pk}/cancel/",
        f"/tuning/{tuning_run.pk}/resume/",
        f"/evaluations/{evaluated.pk}/cancel/",
        f"/evaluations/{evaluated.pk}/resume/",
    ]:
        assert (
            client.post(path, {"text": "x", "title": "x", "name": "x", "validation": 1}).status_code
            == 404
        ), path
    assert Conversation.objects.count() == Dataset.objects.count() == 1
    assert not Run.objects.get(pk=tuning_run.pk).cancel_requested


def test_the_tasks_page_shows_others_runs_only_as_busy(
    client, member, other_member, staff, tuning_run
):
    for user, sees in [(member, True), (other_member, False), (staff, True)]:
        client.force_login(user)
        page = text_of(client.get("/tasks/"))
        assert ("my run" in page) is sees
        assert f"#{tuning_run.pk}" in page and "20 / 100" in page


def test_the_rail_tells_how_far_the_running_work_is(client, other_member, tuning_run):
    client.force_login(other_member)
    assert 'stroke-dasharray="20 100"' in text_of(client.get("/chat/"))


# ---- account


def test_a_key_is_shown_once_works_and_can_be_revoked(client, member):
    client.force_login(member)
    page = text_of(client.post("/account/", {"action": "create_key", "name": "my script"}))
    secret = re.search(r"sk-[\w-]{40,}", page)[0]
    assert ApiKey.user_of(secret) == member
    again = text_of(client.get("/account/"))
    assert secret not in again and "my script" in again
    client.post("/account/", {"action": "revoke_key", "key": ApiKey.objects.get().pk})
    assert ApiKey.user_of(secret) is None


def test_nobody_revokes_anothers_key_not_even_staff(client, member, staff):
    key, secret = ApiKey.create_for(member)
    client.force_login(staff)
    assert client.post("/account/", {"action": "revoke_key", "key": key.pk}).status_code == 404
    assert ApiKey.user_of(secret) == member


def test_the_password_changes_only_with_the_old_one_and_the_login_stays(client, member):
    client.force_login(member)
    fields = {
        "action": "change_password",
        "new_password1": "staple battery 9",
        "new_password2": "staple battery 9",
    }
    client.post("/account/", {**fields, "old_password": "wrong"})
    assert not User.objects.get().check_password("staple battery 9")
    client.post("/account/", {**fields, "old_password": "correct horse battery"})
    assert User.objects.get().check_password("staple battery 9")
    assert client.get("/account/").status_code == 200


def test_the_theme_cookie_is_written_into_the_first_paint_and_nothing_else_is(client, member):
    client.force_login(member)
    client.cookies["theme"] = "dark"
    assert 'data-theme="dark"' in text_of(client.get("/"))
    client.cookies["theme"] = 'x" onload="alert(1)'
    assert "alert(1)" not in text_of(client.get("/"))


# ---- home


def test_first_steps_tick_off_what_is_done(client, member, conversation, tuning_run, adapter):
    client.force_login(member)
    steps = {step["name"]: step for step in client.get("/").context["steps"]}
    assert [name for name, step in steps.items() if step["done"]] == ["chat", "data", "tune"]
    assert steps["evaluate"]["next"] and "next" not in steps["tuned"]


# ---- words


def test_durations_times_and_names_as_people_say_them():
    with override("en"):
        assert [duration(seconds) for seconds in (7.6, 125, 3780, None)] == [
            "8 s",
            "2 min 05 s",
            "1 h 03 min",
            "",
        ]
        now = timezone.localtime()
        assert when(now) == f"today {now:%H:%M}" and when(None) == ""
        assert str((now - timedelta(days=800)).year) in when(now - timedelta(days=800))
        assert model_name("base:tuned") == "tuned" and model_name("base") == "base · prefix off"
    assert thousands(1234567) == "1,234,567" and thousands("") == ""
    assert person(User(username="u", first_name="予安", last_name="周")) == "周予安"
    assert person(User(username="u", first_name="Ann", last_name="Lee")) == "Ann Lee"
    assert person(User(username="u")) == "u"
