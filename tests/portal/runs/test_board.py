"""The queue board, at the page and by script: order, reasons, estimates, decisions, their log."""

from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.utils import timezone
from rest_framework.test import APIClient

from portal.models import Run
from portal.runs import board, lifecycle
from portal.runs.waiting import waiting_order
from portal.runs.work import queues

pytestmark = pytest.mark.django_db
PLAN = {
    "checkpoint": {"name": "base"},
    "max_steps": 10,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


def queued(owner, count=1, **fields) -> list[Run]:
    plan = {"kind": "tuning", "name": "r", "recipe": PLAN, **fields}
    return [Run.objects.create(owner=owner, **plan) for _ in range(count)]


@pytest.fixture
def admin_api(staff):
    client = APIClient()
    client.force_authenticate(staff)
    return client


@pytest.fixture
def member_api(member):
    client = APIClient()
    client.force_authenticate(member)
    return client


def places(client) -> list[tuple[int, str]]:
    queue = client.get("/api/v1/queue/").json()[0]
    return [(run["id"], run["reason"]) for run in queue["waiting"]]


def test_low_priority_waits_until_nobody_else_does(member, other_member, member_api):
    (first, second), (theirs,) = queued(member, 2), queued(other_member)
    answer = member_api.post(
        f"/api/v1/queue/runs/{first.pk}/priority/", {"priority": "low"}, format="json"
    )
    assert answer.status_code == 200
    assert waiting_order("gpu") == [second.pk, theirs.pk, first.pk]
    low = answer.json()[0]["waiting"][-1]
    assert (low["id"], low["priority"]) == (first.pk, "low") and low["reason"]
    lifecycle.claim(first.pk)
    again = member_api.post(
        f"/api/v1/queue/runs/{first.pk}/priority/", {"priority": "normal"}, format="json"
    )
    assert again.status_code == 409


def test_an_admin_orders_what_waits_and_the_log_says_so(member, other_member, staff, admin_api):
    (a, b), (c,) = queued(member, 2), queued(other_member)
    assert [pk for pk, _why in places(admin_api)] == [a.pk, c.pk, b.pk]
    answer = admin_api.post("/api/v1/queue/gpu/order/", {"runs": [b.pk, a.pk]}, format="json")
    assert answer.status_code == 200
    assert [run["id"] for run in answer.json()[0]["waiting"]] == [b.pk, a.pk, c.pk]
    entry = LogEntry.objects.get()
    assert entry.user == staff and str([b.pk, a.pk]) in entry.change_message
    # a run that begins loses its place in front: queued again it waits like others
    lifecycle.claim(b.pk)
    assert Run.objects.get(pk=b.pk).rank is None


def test_two_admins_at_once_the_second_is_told(member, admin_api):
    a, b, c = queued(member, 3)
    version = admin_api.get("/api/v1/queue/").json()[0]["version"]
    first = {"runs": [c.pk], "version": version}
    assert admin_api.post("/api/v1/queue/gpu/order/", first, format="json").status_code == 200
    second = admin_api.post(
        "/api/v1/queue/gpu/order/", {"runs": [b.pk], "version": version}, format="json"
    )
    assert second.status_code == 409
    assert second.json()["error"]["code"] == "order_changed"
    assert waiting_order("gpu") == [c.pk, a.pk, b.pk]


@pytest.mark.parametrize("ids", [[10**9], "twice", ["x"], [-1], [1.5]])
def test_an_order_of_what_does_not_wait_is_refused(member, admin_api, ids):
    (run,) = queued(member)
    ids = [run.pk, run.pk] if ids == "twice" else ids
    answer = admin_api.post("/api/v1/queue/gpu/order/", {"runs": ids}, format="json")
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert not LogEntry.objects.exists()


def test_a_held_queue_begins_nothing_and_is_not_taken_for_deaf(member, staff, admin_api):
    queued(member, 2)
    held = admin_api.post("/api/v1/queue/gpu/hold/", {"reason": "new card"}, format="json").json()
    assert held[0]["held"] and "new card" in held[0]["waiting"][0]["reason"]
    assert held[0]["waiting"][0]["starts_in"] is None
    assert lifecycle.claim_next("gpu") is None
    Run.objects.update(rung_at=timezone.now() - timedelta(hours=1))
    assert lifecycle.Reaper().reap() == set()
    assert not admin_api.post("/api/v1/queue/gpu/release/").json()[0]["held"]
    assert lifecycle.claim_next("gpu") is not None
    assert [entry.user.username for entry in LogEntry.objects.all()] == [staff.username] * 2


def test_members_decide_on_their_own_alone(member, other_member, member_api, client):
    (mine,), (theirs,) = queued(member), queued(other_member)
    for path, body in (
        ("gpu/order/", {"runs": [mine.pk]}),
        ("gpu/hold/", {}),
        ("gpu/release/", {}),
    ):
        assert member_api.post(f"/api/v1/queue/{path}", body, format="json").status_code == 403
    hidden = member_api.post(
        f"/api/v1/queue/runs/{theirs.pk}/priority/", {"priority": "low"}, format="json"
    )
    assert hidden.status_code == 404
    names = {
        run["id"]: run["name"] for run in member_api.get("/api/v1/queue/").json()[0]["waiting"]
    }
    assert names == {mine.pk: "r", theirs.pk: None}
    client.force_login(member)
    assert client.post("/tasks/decide/", {"action": "cancel", "run": theirs.pk}).status_code == 404
    assert client.post("/tasks/decide/", {"action": "up", "run": mine.pk}).status_code == 403
    assert client.post("/tasks/decide/", {"action": "hold", "queue": "gpu"}).status_code == 403
    assert client.post("/tasks/decide/", {"action": "cancel", "run": mine.pk}).status_code == 302
    statuses = dict(Run.objects.values_list("pk", "status"))
    assert statuses == {mine.pk: "cancelled", theirs.pk: "queued"}


def test_the_page_shows_the_order_and_moves_it(member, other_member, staff, client):
    (a, b), (c,) = queued(member, 2), queued(other_member)
    client.force_login(staff)
    page = client.get("/tasks/").content.decode()
    at = [page.index(f"#{run.pk} r") for run in (a, c, b)]
    assert at == sorted(at), "as the queue takes them, not by number"
    version = board.board()[0].version
    client.post("/tasks/decide/", {"action": "first", "run": b.pk, "version": version})
    assert waiting_order("gpu") == [b.pk, a.pk, c.pk]
    client.post("/tasks/decide/", {"action": "up", "run": c.pk, "version": version})
    assert waiting_order("gpu") == [b.pk, a.pk, c.pk], "somebody else's order was looked at"
    assert client.post("/tasks/decide/", {"action": "dance", "run": a.pk}).status_code == 404
    assert client.post("/tasks/decide/", {"action": "hold", "queue": "../x"}).status_code == 404


def test_estimates_come_from_the_speed_so_far_and_of_earlier_runs(member):
    now = timezone.now()
    ended, running = queued(member, 2)
    Run.objects.filter(pk=ended.pk).update(
        status="succeeded", started_at=now - timedelta(seconds=100), finished_at=now
    )
    next_one, last = queued(member, 2)
    token = lifecycle.claim(running.pk)
    Run.objects.filter(pk=running.pk).update(started_at=now - timedelta(seconds=30))
    lifecycle.heartbeat(running.pk, token, progress=5, total=10)
    first, second = board.board()[0].waiting
    assert (first.run, second.run) == (next_one, last)
    assert first.starts_in.total_seconds() == pytest.approx(30, abs=2)
    assert second.starts_in.total_seconds() == pytest.approx(130, abs=2)
    Run.objects.filter(pk=running.pk).update(progress=0)
    assert [entry.starts_in for entry in board.board()[0].waiting] == [None, None]


# ---- drain for maintenance


def test_a_drain_holds_everything_and_is_taken_back(admin_api, member_api, member, staff, client):
    (run,) = queued(member)
    assert member_api.post("/api/v1/queue/drain/", {}, format="json").status_code == 403
    drained = admin_api.post("/api/v1/queue/drain/", {"reason": "new driver"}, format="json")
    assert drained.status_code == 200 and board.drained()
    assert {queue["held_reason"] for queue in drained.json()} == {"new driver"}
    assert all(lifecycle.claim_next(queue) is None for queue in ("gpu", "default"))
    assert "new driver" in places(admin_api)[0][1]
    client.force_login(staff)
    client.post("/tasks/decide/", {"action": "undrain"})
    assert not board.drained() and lifecycle.claim_next("gpu")[0] == run.pk
    said = list(LogEntry.objects.values_list("change_message", flat=True))
    count = len(queues())
    assert said.count("held: new driver") == said.count("released") == count


def test_a_drain_may_send_back_what_runs(member, staff, client):
    run, other = queued(member, 2)
    token = lifecycle.claim(run.pk)
    assert lifecycle.heartbeat(run.pk, token) is lifecycle.Signal.CONTINUE
    client.force_login(staff)
    client.post("/tasks/decide/", {"action": "drain", "reason": "x"})
    assert lifecycle.heartbeat(run.pk, token) is lifecycle.Signal.CONTINUE  # it may end
    client.post("/tasks/decide/", {"action": "drain", "reason": "x", "checkpoint": "on"})
    assert lifecycle.heartbeat(run.pk, token) is lifecycle.Signal.STEP_ASIDE
    lifecycle.step_aside(run.pk, token)
    client.post("/tasks/decide/", {"action": "undrain"})
    assert waiting_order("gpu") == [run.pk, other.pk]  # it goes on first


def test_members_drain_nothing(member, client):
    client.force_login(member)
    for action in ("drain", "undrain"):
        assert client.post("/tasks/decide/", {"action": action}).status_code == 403
    assert not board.drained()
