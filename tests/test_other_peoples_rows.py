"""Everybody against everybody else's rows, at every URL of the site with every method. The list
comes from the URL conf: a new route is tried by itself, a new kind of row fails until it is made.
"""

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from chat.models import Adapter, Comparison, Conversation, FetchRun, Message
from evaluation import reviewing
from evaluation.models import EvaluationRun
from portal.budget import ledger
from portal.budget.models import Grant
from portal.models import ApiKey, Team
from tests.support.page_fixtures import *  # noqa: F403 - a member's rows
from tests.support.urls import routes
from tuning.models import CheckRun, CollectedExample, Dataset, TuningRun

pytestmark = pytest.mark.django_db
METHODS = ["get", "post", "put", "patch", "delete"]
MARK = "only-for-its-owner"
PUBLIC = {
    "/login/", "/logout/", "/language/", "/healthz", "/api/schema/", "/api/docs/", "/favicon.ico",
    "/admin/login/", "/admin/jsi18n/", "/admin/logout/",
}  # fmt: skip
TEAM_WIDE = (
    "/api/v1/checkpoints/",
    "/checkpoints/",
    "/api/v1/serving-switches/",
    "/api/v1/devices/",
)  # seen by every member
# rows that are only acted on
NO_PAGE = (
    "/comparisons/",
    "/adapters/",
    "/api/v1/queue/runs/",
    "/api/v1/budget/grants/",
    "/api/v1/budget/entries/",
)


@pytest.fixture
def theirs(conversation, dataset, tuning_run, evaluated, adapter, member):
    """{beginning of a path: id of member's row}."""
    for row in (dataset, tuning_run, evaluated, adapter):
        row.name = MARK
        row.save()
    conversation.title = MARK
    conversation.save()
    Adapter.objects.update(shared=False)
    answer = conversation.messages.create(role="assistant", content=MARK)
    fetch = FetchRun.objects.create(
        owner=member, kind="fetch", name=MARK, source="hf:a/b", recipe={}
    )
    collected = CollectedExample.objects.create(
        dataset=dataset, by=member, prompt="q", response=MARK, message=answer
    )
    check = CheckRun.objects.create(
        owner=member,
        kind="check",
        name=MARK,
        dataset_version=dataset.current,
        checkpoint=adapter.checkpoint,
        recipe={"dataset": {"split": "train"}},
    )
    grant = ledger.grant(None, member, 10, timezone.now() + timedelta(days=1), MARK)
    return {
        "/api/v1/budget/grants/": grant.pk,
        "/api/v1/budget/entries/": ledger.charge([member], 5).pk,
        "/checks/": check.pk,
        "/api/v1/check-runs/": check.pk,
        "/downloads/": fetch.pk,
        "/api/v1/fetch-runs/": fetch.pk,
        "/api/v1/queue/runs/": tuning_run.pk,
        "/chat/": conversation.pk,
        "/comparisons/": Comparison.objects.create(conversation=conversation).pk,
        "/adapters/": adapter.pk,
        "/datasets/": dataset.pk,
        "/tuning/": tuning_run.pk,
        "/evaluations/": evaluated.pk,
        "/api/v1/conversations/": conversation.pk,
        "/api/v1/messages/": answer.pk,
        "/api/v1/adapters/": adapter.pk,
        "/api/v1/datasets/": dataset.pk,
        "/api/v1/collected-examples/": collected.pk,
        "/api/v1/tuning-runs/": tuning_run.pk,
        "/api/v1/evaluation-runs/": evaluated.pk,
    }


def site():
    return [route for route in routes() if "(?" not in route.path]


def own_routes():
    return [route for route in site() if not route.path.startswith("/admin/")]


@pytest.mark.parametrize("way", ["session", "key"])
def test_other_peoples_rows_do_not_exist(theirs, other_member, no_worker, way):
    if way == "session":
        client = Client(raise_request_exception=False)
        client.force_login(other_member)
    else:
        key = ApiKey.create_for(other_member)[1]
        client = Client(False, headers={"Authorization": f"Bearer {key}"})
        client.raise_request_exception = False
    tried = 0
    for route in own_routes():
        if "{pk}" not in route.path or route.path.startswith(TEAM_WIDE):
            continue
        begin = route.path[: route.path.index("{pk}")]
        assert begin in theirs, f"{route.path}: make a row of member's in this file"
        for method in METHODS:
            answer = client.generic(
                method.upper(), route.of(theirs[begin]), "{}", "application/json"
            )
            allowed = (404, 405) if way == "session" or "/api/" in begin else (302, 403, 404, 405)
            assert answer.status_code in allowed, (method, route.path, answer.status_code)
            tried += 1
    assert tried > 100


PRIVATE = ("/chat/", "/comparisons/", "/api/v1/conversations/", "/api/v1/messages/")


def rows_of_all_kinds() -> list:
    kinds = (Conversation, Message, Dataset, TuningRun, EvaluationRun, Adapter, FetchRun, Grant)
    return [list(kind.objects.order_by("pk").values()) for kind in kinds]


@pytest.mark.parametrize("way", ["session", "key"])
def test_a_team_sees_each_others_work_changes_none_of_it_and_reads_no_talk(
    theirs, member, other_member, no_worker, way
):
    team = Team.objects.create(name="team")
    team.members.add(member, other_member)
    Team.objects.create(name="another").members.add(member, other_member)
    if way == "session":
        client = Client(raise_request_exception=False)
        client.force_login(other_member)
    else:
        key = ApiKey.create_for(other_member)[1]
        client = Client(False, headers={"Authorization": f"Bearer {key}"})
        client.raise_request_exception = False
    before, seen = rows_of_all_kinds(), 0
    for route in own_routes():
        if "{pk}" not in route.path or route.path.startswith(TEAM_WIDE):
            continue
        begin = route.path[: route.path.index("{pk}")]
        for method in METHODS:
            path = route.of(theirs[begin])
            answer = client.generic(method.upper(), path, "{}", "application/json")
            allowed = [403, 404, 405] + [302] * (way == "key" and "/api/" not in begin)
            if method == "get" and begin not in PRIVATE:
                seen += answer.status_code == 200
                continue  # what it tells is its own tests' matter
            if "/api/" not in begin and begin not in PRIVATE:
                # a page that only reads, or tells on the next page that this is not for you;
                # what counts is that the rows stay as they are
                allowed += [200, 302]
            assert answer.status_code in allowed, (method, path, answer.status_code)
    assert seen > 5 and rows_of_all_kinds() == before
    if way == "session":
        for kind in ("datasets", "tuning-runs", "evaluation-runs", "adapters"):
            found = [row["id"] for row in client.get(f"/api/v1/{kind}/").json()["results"]]
            assert found.count(theirs[f"/api/v1/{kind}/"]) == 1, kind  # two teams, one row
        assert client.get("/api/v1/conversations/").json()["results"] == []


def test_who_leaves_the_team_sees_nothing_any_more(theirs, member, other_member):
    team = Team.objects.create(name="team")
    team.members.add(member, other_member)
    client = Client()
    client.force_login(other_member)
    path = f"/datasets/{theirs['/datasets/']}/"
    assert client.get(path).status_code == 200
    team.members.remove(member)
    assert client.get(path).status_code == 404


def test_a_reviewer_sees_evaluations_and_decides_and_sees_nothing_else(
    theirs, other_member, no_worker
):
    other_member.is_reviewer = True
    other_member.save()
    client = Client(raise_request_exception=False)
    client.force_login(other_member)
    for begin, pk in theirs.items():
        status = client.get(f"{begin}{pk}/").status_code
        assert (status == 200) == ("/evaluation" in begin), (begin, status)
    assert client.get("/admin/").status_code == 302
    run = EvaluationRun.objects.get(pk=theirs["/evaluations/"])
    reviewing.review(other_member, run, "approved")
    assert client.post(f"/evaluations/{run.pk}/cancel/").status_code == 404  # is the owner's


def test_staff_see_everything_with_teams_or_without(theirs, staff, member):
    Team.objects.create(name="team").members.add(staff)
    staff.is_reviewer = True
    staff.save()
    for kind in (Dataset, TuningRun, EvaluationRun, Adapter):
        assert kind.objects.visible_to(staff).count() == kind.objects.count() > 0


def test_lists_show_nothing_of_others(theirs, other_member, no_worker):
    client = Client()
    client.force_login(other_member)
    for route in own_routes():
        if "{pk}" in route.path:
            continue
        answer = client.get(route.path)
        body = b"".join(answer.streaming_content) if answer.streaming else answer.content
        assert MARK not in body.decode(errors="replace"), route.path


def test_the_owner_does_see_them(theirs, member, no_worker):
    """Or the tests above would find nothing for another reason."""
    client = Client()
    client.force_login(member)
    for begin, pk in theirs.items():
        assert MARK in client.get(f"{begin}{pk}/").content.decode() or begin in NO_PAGE, begin


def test_nobody_sees_anything_without_logging_in(theirs, no_worker):
    client = Client(raise_request_exception=False)
    for route in site():
        begin = route.path.partition("{pk}")[0]
        path = route.of(theirs.get(begin, 1))
        if path in PUBLIC:
            continue
        for method in METHODS:
            answer = getattr(client, method)(path)
            assert answer.status_code in (302, 401, 403, 404, 405), (method, path)
            if answer.status_code == 302:
                assert "/login/" in answer["Location"], (method, path)


def test_a_member_reaches_no_page_of_the_admin(theirs, member):
    client = Client()
    client.force_login(member)
    for route in site():
        if route.path.startswith("/admin/") and route.path not in PUBLIC:
            answer = client.get(route.of(1))
            assert answer.status_code in (302, 404), route.path
            assert answer.status_code == 404 or "/login/" in answer["Location"], route.path
