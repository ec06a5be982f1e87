"""A request that is sent twice makes one run."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connection
from rest_framework.test import APIClient

from portal.models import IdempotencyKey, Run
from portal.runs.once import once
from tests.support.page_fixtures import *  # noqa: F403  a member's rows

JSON = "application/json"


@pytest.fixture
def api(member):
    client = APIClient()
    client.force_authenticate(member)
    return client


@pytest.mark.django_db
def test_a_repeated_post_is_answered_with_the_run_it_made(api, dataset, checkpoint):
    body = {"dataset": dataset.pk, "checkpoint": checkpoint.pk, "max_steps": 3}

    def post(key, **changes):
        return api.post(
            "/api/v1/tuning-runs/",
            {**body, **changes},
            format="json",
            headers={"Idempotency-Key": key},
        )

    first, again = post("k1"), post("k1")
    assert first.status_code == again.status_code == 201, first.content
    assert first.json()["id"] == again.json()["id"]
    assert post("k2").json()["id"] != first.json()["id"]
    other = post("k1", max_steps=4)
    assert other.status_code == 400
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert post("x" * 300).status_code == 400
    assert Run.objects.count() == 2


@pytest.mark.django_db
def test_what_was_refused_may_be_sent_again(api, dataset, checkpoint):
    body = {"dataset": dataset.pk, "checkpoint": checkpoint.pk, "max_steps": 0}
    refused = api.post(
        "/api/v1/tuning-runs/", body, format="json", headers={"Idempotency-Key": "k"}
    )
    assert refused.status_code == 400 and not IdempotencyKey.objects.exists()


@pytest.mark.django_db
def test_a_double_click_on_a_form_makes_one_run(client, member, dataset, checkpoint):
    client.force_login(member)
    page = client.get("/evaluations/new/").content.decode()
    token = page.partition('name="once" value="')[2].partition('"')[0]
    assert len(token) == 32
    form = {
        "dataset": dataset.pk,
        "model": f"base-{checkpoint.pk}",
        "split": "train",
        "decoding": "greedy",
        "once": token,
    }
    first, again = client.post("/evaluations/new/", form), client.post("/evaluations/new/", form)
    assert first.status_code == again.status_code == 302, first.content.decode()[-2000:]
    assert first["Location"] == again["Location"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(
    "PORTAL_DATABASE_URL" not in os.environ, reason="SQLite in memory lets one thread write"
)
def test_eight_at_once_make_one(member):
    def make():
        return Run.objects.create(owner=member, kind="tuning", name="r")

    def send(_number):
        try:
            return once(member, "k", {}, make).pk
        finally:
            connection.close()

    from unittest import mock

    with mock.patch("portal.runs.once.work_of") as found:
        found.return_value.model = Run
        with ThreadPoolExecutor(8) as pool:
            made = set(pool.map(send, range(8)))
    assert len(made) == 1 and Run.objects.count() == 1
