"""The scheduler alone: no model, no torch."""

import subprocess
import sys
import threading

import pytest

from chat.engine.positions import PositionPlan
from chat.engine.prompts import Prompter
from chat.engine.request import Request, RequestRefused
from chat.engine.scheduler import Scheduler
from chat.engine.sequence import Sequence


class NoPrompter(Prompter):
    """Of sequences that get no token."""

    end_ids = frozenset()

    def _render(self, messages):
        raise NotImplementedError

    def _plain(self, text):
        raise NotImplementedError

    def response_ids(self, text):
        raise NotImplementedError

    def training_ids(self, *arguments):
        raise NotImplementedError


def sequence(name, length, user="", events=None):
    return Sequence(
        request=Request(id=name, prompt_ids=tuple(range(length)), user=user),
        prompt=list(range(length)),
        sink=(lambda event: None) if events is None else events.append,
        prompter=NoPrompter(None),
        sampler_state=None,
        positions=PositionPlan(prefix=0),
        new_tokens_limit=8,
    )


def scheduler(**changes):
    limits = {"max_rows": 4, "queue_limit": 8, "prefill_tokens": 100, "whole_prompts": False}
    return Scheduler(**{**limits, **changes})


def named(schedule):
    return [(each.id, size) for each, size in schedule.admitted]


def test_it_is_imported_without_torch():
    code = "import sys, chat.engine.scheduler; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_a_step_computes_as_many_prompt_tokens_as_its_budget_and_cuts_the_last_prompt():
    here = scheduler()
    for name, length in (("a", 70), ("b", 20), ("c", 30)):
        here.submit(sequence(name, length))
    first = here.schedule([], 0)
    assert first.counts == [] and named(first) == [("b", 20), ("a", 70), ("c", 10)]
    assert here.counts() == (0, 3)
    cut = first.admitted[-1][0]
    cut.num_computed_tokens = 10
    here.submit(sequence("d", 95))
    second = here.schedule([cut], 2)
    assert second.counts == [20] and named(second) == [("d", 80)]


@pytest.mark.parametrize(("decoding", "begin"), [(0, ["a", "b", "c"]), (2, ["a"]), (3, [])])
def test_no_more_begin_than_there_are_rows(decoding, begin):
    here = scheduler(max_rows=3)
    for name in "abcd":
        here.submit(sequence(name, 5))
    assert [name for name, _ in named(here.schedule([], decoding))] == begin


def test_a_prompt_that_sees_itself_whole_is_never_cut():
    here = scheduler(whole_prompts=True)
    for name, length in (("a", 60), ("b", 60), ("c", 300)):
        here.submit(sequence(name, length))
    assert named(here.schedule([], 0)) == [("a", 60)]
    assert named(here.schedule([], 1)) == [("b", 60)]
    assert named(here.schedule([], 2)) == [("c", 300)]  # alone, however long


def test_users_take_turns():
    here = scheduler(max_rows=2)
    for name, user in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        here.submit(sequence(name, 5, user))
    assert sorted(name for name, _ in named(here.schedule([], 0))) == ["a1", "b1"]


def test_a_full_queue_a_known_id_and_a_closed_scheduler_refuse():
    here = scheduler(queue_limit=2)
    here.submit(sequence("a", 5))
    with pytest.raises(RequestRefused) as refusal:
        here.submit(sequence("a", 5))
    assert refusal.value.param == "id"
    here.submit(sequence("b", 5))
    with pytest.raises(RequestRefused) as refusal:
        here.check_room("c")
    assert refusal.value.code == "queue_full" and refusal.value.retry_after
    here.close()
    with pytest.raises(RequestRefused) as refusal:
        here.check_room("c")
    assert "shutting down" in refusal.value.message
    assert {each.id for each in here.take_aborted()} == {"a", "b"}


def test_an_aborted_sequence_leaves_the_queue():
    here = scheduler(max_rows=1)
    waiting, running = sequence("waits", 5), sequence("runs", 5)
    here.submit(running)
    here.schedule([], 0)
    here.submit(waiting)
    for name in ("waits", "runs", "nobody"):
        here.abort(name)
    here.wait(threading.Event(), timeout=60)  # something is to be done: returns at once
    assert {each.id for each in here.take_aborted()} == {"waits", "runs"}
    assert here.counts() == (0, 2)
    for each in (waiting, running):
        here.forget(each)
    assert here.counts() == (0, 0)


def test_those_that_wait_are_told_how_many_are_before_them():
    here, events = scheduler(), []
    for name in "ab":
        here.submit(sequence(name, 5, events=events))
    here.report_queue_positions()
    here.report_queue_positions()  # nothing new, so nothing is said
    assert [(event.id, event.data["position"]) for event in events] == [("a", 0), ("b", 1)]


def test_one_user_never_fills_the_line_for_others():
    here = scheduler(queue_limit=8)

    def taken(user) -> int:
        for number in range(20):
            try:
                here.submit(sequence(f"{user}{number}", 5, user))
            except RequestRefused as refusal:
                assert refusal.code == "queue_full" and refusal.retry_after
                return number
        return 20

    assert [taken(user) for user in ("bob", "carol", "dave")] == [5, 2, 1]
