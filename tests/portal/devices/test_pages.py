"""The page and /api/v1/devices/: who holds how much, why the next one waits; what an admin does."""

import pytest
from django.contrib.admin.models import LogEntry
from rest_framework.test import APIClient

from portal.devices import arbiter, inventory
from portal.devices.declared import Declared
from portal.devices.models import Device
from portal.devices.placing import CHAT, Wish
from portal.models import Run
from portal.runs import lifecycle
from tests.support.page_rows import text_of

pytestmark = pytest.mark.django_db
GB = 10**9


@pytest.fixture
def busy(settings, member, other_member):
    """Chat and member's run on the one card; other_member's run waits."""
    settings.DEVICES, settings.BESIDE_CHAT = (Declared("cuda:0", 24 * GB),), "queue"
    inventory.register()
    arbiter.ask(Wish("worker:a", CHAT, 14 * GB, 14 * GB), label="glm")
    runs = []
    for owner, needs in ((member, 5), (other_member, 6.1)):
        run = Run.objects.create(owner=owner, kind="tuning", name=f"of {owner}")
        token = lifecycle.claim(run.pk)
        count = int(needs * GB)
        wish = Wish(arbiter.holder_of(run), "tuning", count, count)
        arbiter.ask(wish, run=run, token=token, label="glm")
        runs.append(run)
    return runs


def api(user):
    client = APIClient()
    client.force_authenticate(user)
    return client


def test_who_holds_how_much_and_why_the_next_waits(client, busy, member):
    holds, waits = busy
    client.force_login(member)
    client.cookies["django_language"] = "en"
    page = text_of(client.get("/devices/"))
    assert "19.0 GB of 24.0 GB" in page and "14.0 GB" in page and "of member" in page
    assert f"Needs 6.1 GB on cuda:0, held by #{holds.pk}." in page
    assert "of other" not in page and f"#{waits.pk} Tuning" in page  # others' names stay theirs
    assert "Take out of service" not in page
    tasks = text_of(client.get("/tasks/"))
    assert f"Needs 6.1 GB on cuda:0, held by #{holds.pk}." in tasks

    told = api(member).get("/api/v1/devices/", HTTP_ACCEPT_LANGUAGE="en").json()
    (device,) = told["devices"]
    assert (device["name"], device["bytes"], device["held_bytes"]) == ("cuda:0", 24 * GB, 19 * GB)
    assert [(h["use"], h["run"], h["name"]) for h in device["holders"]] == [
        ("chat", None, "glm"),
        ("tuning", holds.pk, "of member"),
    ]
    (waiting,) = told["waiting"]
    assert (waiting["run"], waiting["name"], waiting["bytes"]) == (waits.pk, None, 6_100_000_000)
    assert waiting["reason"] == f"Needs 6.1 GB on cuda:0, held by #{holds.pk}."


def test_an_admin_takes_a_device_out_and_puts_it_back(client, busy, staff, member):
    device = Device.objects.get()
    client.force_login(staff)
    wish = {"device": device.pk, "action": "out", "reason": "ECC errors"}
    assert client.post("/devices/decide/", wish).status_code == 302
    assert "ECC errors" in text_of(client.get("/devices/"))
    assert not arbiter.usable(["cuda:0"])
    told = api(staff).get("/api/v1/devices/").json()["devices"][0]
    assert (told["state"], told["reason"]) == ("out", "ECC errors")
    answer = api(staff).post(f"/api/v1/devices/{device.pk}/back/").json()
    assert answer["devices"][0]["state"] == "ready" and arbiter.usable(["cuda:0"])
    notes = list(LogEntry.objects.values_list("user__username", "change_message"))
    assert ("chief", "out of service: ECC errors") in notes and len(notes) == 2


def test_members_and_wrong_ids_change_nothing(client, busy, staff, member):
    device = Device.objects.get()
    client.force_login(member)
    assert (
        client.post("/devices/decide/", {"device": device.pk, "action": "out"}).status_code == 403
    )
    assert api(member).post(f"/api/v1/devices/{device.pk}/out/").status_code == 403
    assert api(staff).post("/api/v1/devices/999/out/").status_code == 404
    client.force_login(staff)
    for wrong in ({"device": "x", "action": "out"}, {"device": device.pk, "action": "melt"}):
        assert client.post("/devices/decide/", wrong).status_code == 404
    assert arbiter.usable(["cuda:0"])
