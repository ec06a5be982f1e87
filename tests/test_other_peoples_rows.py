"""Everybody against everybody else's rows, at every URL of the site with every method. The list
comes from the URL conf: a new route is tried by itself, a new kind of row fails until it is made.
"""

import pytest
from django.test import Client

from chat.models import Adapter, FetchRun
from portal.models import ApiKey
from tests.support.page_fixtures import *  # noqa: F403 - a member's rows
from tests.support.urls import routes
from tuning.models import CheckRun, CollectedExample

pytestmark = pytest.mark.django_db
METHODS = ["get", "post", "put", "patch", "delete"]
MARK = "only-for-its-owner"
PUBLIC = {
    "/login/", "/logout/", "/language/", "/healthz", "/api/schema/", "/api/docs/", "/favicon.ico",
    "/admin/login/", "/admin/jsi18n/", "/admin/logout/",
}  # fmt: skip
TEAM_WIDE = ("/api/v1/checkpoints/", "/checkpoints/")  # seen by every member
NO_PAGE = ("/adapters/", "/api/v1/queue/runs/")  # rows that are only acted on


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
    return {
        "/checks/": check.pk,
        "/api/v1/check-runs/": check.pk,
        "/downloads/": fetch.pk,
        "/api/v1/fetch-runs/": fetch.pk,
        "/api/v1/queue/runs/": tuning_run.pk,
        "/chat/": conversation.pk,
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
