"""Claims in the database: granted, refused with a reason, and freed whatever happens to the
holder.
"""

from datetime import timedelta

import pytest
from django.utils import timezone
from django.utils.translation import override

from portal.devices import arbiter, inventory, reasons
from portal.devices.declared import Declared
from portal.devices.models import Device, DeviceClaim
from portal.devices.placing import CHAT, Granted, Refused, Wish
from portal.models import Run
from portal.runs import lifecycle

pytestmark = pytest.mark.django_db
GB = 10**9


@pytest.fixture
def declare(settings):
    def devices(policy="queue", **sizes):
        settings.BESIDE_CHAT = policy
        settings.DEVICES = tuple(
            Declared(name.replace("_", ":"), size * GB) for name, size in sizes.items()
        )
        return inventory.register()

    return devices


@pytest.fixture
def begin(member):
    def started(name="r"):
        run = Run.objects.create(owner=member, kind="tuning", name=name)
        run.token = lifecycle.claim(run.pk)
        return run

    return started


def ask(run, needs, least=None):
    wish = Wish(arbiter.holder_of(run), run.kind, needs * GB, (least or needs) * GB)
    return arbiter.ask(wish, run=run, token=run.token)


def chat(needs, address="a", label="glm"):
    return arbiter.ask(Wish(f"worker:{address}", CHAT, needs * GB, needs * GB), label=label)


def reason_of(run) -> str:
    return reasons.in_words(DeviceClaim.objects.get(run=run, device=None).reason)


def test_a_run_waits_with_the_reason_and_gets_it_in_turn(declare, begin):
    declare(cuda_0=24)
    first, second, third = begin(), begin(), begin()
    assert ask(first, 6) == Granted({"cuda:0": 6 * GB})
    assert isinstance(ask(second, 6), Refused) and isinstance(ask(third, 1), Refused)
    with override("en"):
        assert reason_of(second) == f"Needs 6.0 GB on cuda:0, held by #{first.pk}."
        assert reason_of(third) == f"Waits for cuda:0 behind #{second.pk}."
    with override("zh-hans"):
        assert "6.0 GB" in reason_of(second) and "cuda:0" in reason_of(second)
    arbiter.release(arbiter.holder_of(first), first.token)
    assert isinstance(ask(third, 1), Refused)
    assert isinstance(ask(second, 6), Granted)


def test_no_device_one_and_several(declare, begin):
    run, other = begin(), begin()
    assert ask(run, 1).code == "no_device"
    declare(cpu=8)
    assert isinstance(ask(run, 1), Granted) and isinstance(ask(other, 1), Refused)
    declare(cpu=8, cpu_1=8)
    assert ask(other, 1) == Granted({"cpu:1": 1 * GB})


def test_what_a_lost_run_held_is_free_at_once(declare, begin):
    declare(cpu=8)
    run, other = begin(), begin()
    ask(run, 1)
    lifecycle.lost(run.pk, run.token, "killed")
    assert isinstance(ask(other, 1), Granted)
    with pytest.raises(lifecycle.FencedOff):  # a process that does not know yet takes nothing
        ask(run, 1)
    arbiter.Sweeper().sweep()
    assert set(DeviceClaim.objects.values_list("run", flat=True)) == {other.pk}


def test_the_end_of_an_earlier_process_frees_nothing_of_the_next(declare, begin):
    declare(cpu=8)
    run = begin()
    old = run.token
    lifecycle.lost(run.pk, old, "killed")
    run.token = lifecycle.claim(run.pk)
    ask(run, 1)
    arbiter.release(arbiter.holder_of(run), old)
    assert DeviceClaim.objects.get().run_id == run.pk


def test_chat_is_asked_to_leave_for_as_long_as_the_run_waits(declare, begin):
    declare("pause", cuda_0=24)
    assert isinstance(chat(20), Granted)
    assert arbiter.asked_to_leave("worker:a") is None
    run = begin()
    assert ask(run, 6).pausable == ("worker:a",)
    assert arbiter.asked_to_leave("worker:a").run_id == run.pk
    lifecycle.lost(run.pk, run.token, "killed")
    assert arbiter.asked_to_leave("worker:a") is None

    run.token = lifecycle.claim(run.pk)
    ask(run, 6)
    arbiter.settle("worker:a", 0)  # the worker has left
    assert chat(20).code == "behind"  # and wants to come back
    assert isinstance(ask(run, 6), Granted)
    later = begin()
    assert isinstance(ask(later, 6), Refused)
    lifecycle.succeed(run.pk, run.token)
    assert ask(later, 6).code == "behind"  # chat has its turn between two runs
    assert isinstance(chat(20), Granted)


def test_without_a_policy_chat_is_never_in_the_way(declare, begin):
    declare("any", cuda_0=24)
    chat(23)
    assert isinstance(ask(begin(), 60), Granted)
    assert isinstance(chat(90), Granted)


def test_a_dead_worker_loses_its_claim_and_a_living_one_does_not(declare, begin, monkeypatch):
    declare(cuda_0=24)
    chat(20, "dead")
    sweeper = arbiter.Sweeper(patience=0)
    sweeper.sweep()
    DeviceClaim.objects.update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    sweeper.sweep()
    assert DeviceClaim.objects.exists()  # once is no proof: the clock may have been set
    arbiter.renew("worker:dead")
    sweeper.sweep()
    assert DeviceClaim.objects.exists()
    DeviceClaim.objects.update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    for _look in range(2):
        sweeper.sweep()
    assert not DeviceClaim.objects.exists()


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_jumps_takes_nothing_from_a_living_worker(declare, begin, monkeypatch, hours):
    declare(cuda_0=24)
    chat(20)
    real, sweeper = timezone.now, arbiter.Sweeper(patience=0)
    monkeypatch.setattr(timezone, "now", lambda: real() + timedelta(hours=hours))
    sweeper.sweep()
    arbiter.renew("worker:a")  # as the worker does every few seconds
    sweeper.sweep()
    assert ask(begin(), 6).code == "memory"
    # and when it dies it is gone as fast as ever
    lease = DeviceClaim.objects.get(device__isnull=False).lease_expires_at
    assert lease - timezone.now() <= arbiter.LEASE
    monkeypatch.setattr(timezone, "now", lambda: real() + timedelta(hours=hours, minutes=1))
    for _look in range(2):
        sweeper.sweep()
    assert not DeviceClaim.objects.filter(use=CHAT).exists()


def test_a_device_that_vanishes_is_told_and_comes_back(declare, begin, settings, monkeypatch):
    declare(cuda_0=24, cuda_1=24)
    cards = [Declared("cuda:0", 24 * GB), Declared("cuda:1", 24 * GB)]
    monkeypatch.setattr(inventory, "_cards", lambda: cards)
    run = begin()
    assert ask(run, 6) == Granted({"cuda:0": 6 * GB})
    del cards[0]
    inventory.register()
    assert not arbiter.usable(["cuda:0"]) and arbiter.usable(["cuda:1"])
    arbiter.release(arbiter.holder_of(run), run.token)
    assert ask(run, 6) == Granted({"cuda:1": 6 * GB})
    del cards[0]
    inventory.register()
    waiting = begin()
    assert ask(waiting, 6).code == "gone"
    with override("en"):
        assert reason_of(waiting) == "cuda:0 is not there, or out of service."
    cards.append(Declared("cuda:0", 24 * GB))
    inventory.register()
    assert isinstance(ask(waiting, 6), Granted)


def test_a_driver_that_does_not_answer_changes_nothing(declare, monkeypatch):
    declare(cuda_0=24)

    def silent():
        raise inventory.NoAnswer

    monkeypatch.setattr(inventory, "_cards", silent)
    inventory.register()
    assert arbiter.usable(["cuda:0"])


def test_what_is_not_declared_any_more_and_not_held_is_forgotten(declare):
    declare(cuda_0=24, cuda_1=24)
    chat(20)
    declare(cpu=8)
    held, new = Device.objects.order_by("id")
    assert (held.name, held.usable) == ("cuda:0", False) and new.name == "cpu"
