"""One training per device."""

import multiprocessing
import threading

import pytest

from portal.runs import device_lock


def _hold_and_die(path):
    import fcntl
    import os

    fcntl.flock(os.open(path, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
    os._exit(9)  # as by kill -9: nothing is released by hand


def test_the_second_waits_until_the_first_is_done(data_dir, monkeypatch):
    monkeypatch.setattr(device_lock, "POLL", 0.01)
    order, waited = [], threading.Event()

    def second():
        with device_lock.hold("cpu", waited.set):
            order.append("second")

    with device_lock.hold("cpu", lambda: pytest.fail("nobody else holds it")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waited.wait(10)
        with device_lock.hold("cuda:0", lambda: pytest.fail("another device")):
            order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_waiting_can_be_given_up(data_dir):
    def give_up():
        raise InterruptedError

    with (
        device_lock.hold("cpu", give_up),
        pytest.raises(InterruptedError),
        device_lock.hold("cpu", give_up),
    ):
        pytest.fail("held twice")
    with device_lock.hold("cpu", give_up):
        pass


def test_a_killed_process_leaves_no_lock(data_dir):
    path = device_lock.lock_path("cpu")
    child = multiprocessing.get_context("spawn").Process(target=_hold_and_die, args=(path,))
    child.start()
    child.join(30)
    assert child.exitcode == 9
    with device_lock.hold("cpu", lambda: pytest.fail("still locked")):
        pass


def test_devices_are_told_apart_as_cuda_visible_devices_names_them(data_dir, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f/2")
    names = [device_lock.lock_path(device).name for device in ("cuda", "cuda:1", "cuda:7", "cpu")]
    assert [name.rpartition("-cuda-")[2] for name in names[:3]] == [
        "3.lock",
        "GPU-8f_2.lock",
        "7.lock",
    ]
    assert len(set(names)) == 4 and all(
        device_lock.lock_path("cuda").parent == data_dir / "locks" for _ in names
    )
