"""Who is next at the thread that cuts prompts into tokens."""

import threading

import pytest

from chat.worker.submissions import Submissions


def test_users_take_turns_and_each_keeps_its_order():
    submissions, begun, goes_on, done = Submissions(), threading.Event(), threading.Event(), []

    def first():
        begun.set()
        goes_on.wait(10)

    submissions.submit("bob", first)
    begun.wait(10)
    futures = [submissions.submit("bob", done.append, f"bob {i}") for i in range(20)]
    futures.append(submissions.submit("alice", done.append, "alice"))
    goes_on.set()
    for future in futures:
        future.result(10)
    assert done.index("alice") <= 1
    assert [name for name in done if name != "alice"] == [f"bob {i}" for i in range(20)]


def test_a_call_that_fails_tells_and_the_next_one_runs():
    submissions = Submissions()
    failed = submissions.submit("bob", lambda: 1 / 0)
    assert submissions.submit("bob", lambda: 7).result(10) == 7
    with pytest.raises(ZeroDivisionError):
        failed.result(10)


def test_what_has_not_begun_is_cancelled_at_the_end():
    submissions, begun, goes_on = Submissions(), threading.Event(), threading.Event()

    def first():
        begun.set()
        goes_on.wait(10)

    submissions.submit("bob", first)
    begun.wait(10)
    waiting = submissions.submit("alice", print)
    submissions.shutdown()
    goes_on.set()
    assert waiting.cancelled()
