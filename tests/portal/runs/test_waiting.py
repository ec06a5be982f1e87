"""Who is next in a queue, and how many may wait."""

import pytest

from portal.models import Run
from portal.runs import lifecycle
from portal.runs.waiting import waiting_order

pytestmark = pytest.mark.django_db


def queued(owner, count=1) -> list[Run]:
    return [Run.objects.create(owner=owner, kind="tuning", name="r") for _ in range(count)]


def ended(run) -> None:
    lifecycle.succeed(run.pk, Run.objects.get(pk=run.pk).token)


def next_run() -> Run:
    run_id, _token = lifecycle.claim_next("gpu")
    return Run.objects.get(pk=run_id)


def test_twenty_runs_of_one_member_do_not_keep_another_waiting(member, other_member):
    many = queued(member, 20)
    (one,) = queued(other_member)
    assert one.queue_position() == 1
    first = next_run()
    assert first == many[0] and one.queue_position() == 1
    ended(first)
    assert next_run() == one
    ended(one)
    assert [next_run() for _ in range(19)] == many[1:], "a member's own in their order"
    assert lifecycle.claim_next("gpu") is None


def test_owners_take_turns_and_positions_say_so(member, other_member):
    mine, theirs = queued(member, 3), queued(other_member, 3)
    order = [run.pk for pair in zip(mine, theirs, strict=True) for run in pair]
    assert waiting_order("gpu") == order
    assert [Run.objects.get(pk=pk).queue_position() for pk in order] == list(range(6))
    for pk in order:
        run = next_run()
        assert run.pk == pk
        ended(run)


def test_an_interrupted_run_goes_on_first(member, other_member):
    queued(other_member, 2)
    (long,) = queued(member)
    for interrupt in (lifecycle.step_aside, lambda *run: lifecycle.lost(*run, "exit code -9")):
        interrupt(long.pk, lifecycle.claim(long.pk))
        assert Run.objects.get(pk=long.pk).queue_position() == 0 and next_run() == long
        Run.objects.filter(pk=long.pk).update(status="queued", interrupted_at=None)
    # resumed by hand it waits like a new one
    Run.objects.filter(pk=long.pk).update(status="failed")
    lifecycle.resume(long)
    assert next_run() != long


def test_queues_do_not_wait_for_each_other(member):
    (run,) = queued(member)
    Run.objects.filter(pk=run.pk).update(queue="default")
    (other,) = queued(member)
    assert (Run.objects.get(pk=run.pk).queue_position(), other.queue_position()) == (0, 0)


def test_a_member_has_so_many_waiting_and_no_more(member, other_member, settings):
    settings.QUEUED_RUNS = 2
    waiting = queued(member, 2)
    with pytest.raises(lifecycle.TooManyQueued):
        lifecycle.enqueue(Run(owner=member, kind="tuning", name="third"))
    lifecycle.enqueue(Run(owner=other_member, kind="tuning", name="another's"))
    lifecycle.claim(waiting[0].pk)  # it runs, and waits no longer
    lifecycle.enqueue(Run(owner=member, kind="tuning", name="third"))
    Run.objects.filter(pk=waiting[0].pk).update(status="failed")
    with pytest.raises(lifecycle.TooManyQueued):
        lifecycle.resume(waiting[0])


def test_ids_that_come_again_do_not_bring_an_old_folder_back(member, data_dir):
    """As after a restored backup: the database is older than runs/."""
    (run,) = queued(member)
    run.state_folder.mkdir(parents=True)
    number, folder = run.pk, run.folder
    run.delete()
    again = Run.objects.create(pk=number, owner=member, kind="tuning", name="another")
    assert again.folder != folder and not again.state_folder.exists()
    assert folder.parent == data_dir / "runs" and folder.name.startswith(f"{number}-")
