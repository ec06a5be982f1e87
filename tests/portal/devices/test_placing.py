"""The arbiter's decision, and what always holds of it."""

import random

import pytest

from portal.devices.placing import ANY, PAUSE, QUEUE, SHRINK, Granted, Held, Place, Wish, choose

GB = 10**9
CHAT20 = Held("worker:a", "chat", 20 * GB)


def run(number=1, needs=6, least=None, **more):
    least = needs if least is None else least
    return Wish(f"run:{number}", "tuning", int(needs * GB), int(least * GB), **more)


def card(number=0, size=24, *held, **more):
    return Place(f"cuda:{number}", size * GB, held=held, **more)


def test_the_emptiest_device_is_chosen():
    assert choose(run(), [card(0, 24, CHAT20), card(1)]) == Granted({"cuda:1": 6 * GB})
    assert choose(run(), [card(0), card(1)]) == Granted({"cuda:0": 6 * GB})


def test_beside_chat_where_it_fits_and_else_the_reason():
    assert choose(run(needs=4), [card(0, 24, CHAT20)]) == Granted({"cuda:0": 4 * GB})
    refused = choose(run(), [card(0, 24, CHAT20)])
    assert (refused.code, refused.device, refused.free) == ("memory", "cuda:0", 4 * GB)
    assert refused.holders == refused.pausable == ("worker:a",)


def test_pausing_chat_must_help():
    assert choose(run(needs=30), [card(0, 24, CHAT20)], policy=PAUSE).code == "too_large"
    both = card(0, 24, Held("run:9", "tuning", 1 * GB), CHAT20)
    assert choose(run(), [both], policy=PAUSE).pausable == ()


def test_a_smaller_batch_where_the_policy_says_so():
    place = [card(0, 24, CHAT20)]
    assert choose(run(least=3), place, policy=QUEUE).code == "memory"
    assert choose(run(least=3), place, policy=SHRINK) == Granted({"cuda:0": 4 * GB})
    assert choose(run(least=5), place, policy=SHRINK).code == "memory"
    # all that it wants where there is room for it
    assert choose(run(least=3), [card()], policy=SHRINK) == Granted({"cuda:0": 6 * GB})


def test_one_run_a_device():
    busy = card(0, 24, Held("run:9", "evaluation", 1 * GB))
    for policy in (ANY, QUEUE, SHRINK, PAUSE):
        assert choose(run(), [busy], policy=policy).code == "busy"
    chat = Wish("worker:a", "chat", 20 * GB, 20 * GB)
    assert choose(chat, [busy]) == Granted({"cuda:0": 20 * GB})


def test_memory_is_not_counted_without_a_policy():
    assert choose(run(needs=99), [card(0, 24, CHAT20)], policy=ANY) == Granted({"cuda:0": 99 * GB})


def test_a_large_run_is_not_passed_by_small_ones():
    ahead = [run(2, needs=20)]
    assert choose(run(needs=1), [card(0)], ahead).holders == ("run:2",)
    # it could never lie there, so nobody waits for it there
    assert choose(run(needs=1), [card(0, 16)], ahead) == Granted({"cuda:0": 1 * GB})


def test_what_no_card_has_alone_is_spread_over_all():
    granted = choose(run(needs=30), [card(0), card(1, 12)])
    assert granted.shares == {"cuda:0": 20 * GB, "cuda:1": 10 * GB}
    assert choose(run(needs=30), [card(0), card(1, 12, Held("run:9", "tuning", 1))]).code == "busy"
    assert choose(run(needs=40), [card(0), card(1, 12)]).code == "too_large"


@pytest.mark.parametrize("places", [[], [card(0)]])
def test_without_a_device_that_it_may_use(places):
    assert choose(run(names=("cpu",)), places).code == "no_device"


def test_a_device_that_is_gone_is_not_given():
    assert choose(run(), [card(0, 24, usable=False)]).code == "gone"
    assert choose(run(), [card(0, 24, usable=False), card(1)]) == Granted({"cuda:1": 6 * GB})


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_claims_gives_more_than_there_is(seed):
    """Random wishes and ends: memory is never given twice, runs share no device, shares add up."""
    draw = random.Random(seed)
    sizes = {f"cuda:{n}": draw.randint(8, 80) * GB for n in range(draw.randint(1, 4))}
    held: dict[str, tuple[Wish, Granted]] = {}
    for number in range(120):
        if held and draw.random() < 0.4:
            held.pop(draw.choice(sorted(held)))
        places = [
            Place(
                name,
                size,
                held=tuple(
                    Held(wish.holder, wish.use, granted.shares[name])
                    for wish, granted in held.values()
                    if name in granted.shares
                ),
            )
            for name, size in sizes.items()
        ]
        use = draw.choice(["chat", "tuning", "evaluation"])
        needs = draw.randint(1, 60) * GB
        wish = Wish(f"run:{number}", use, needs, draw.randint(1, needs // GB) * GB)
        outcome = choose(wish, places, policy=draw.choice([QUEUE, SHRINK, PAUSE]))
        if isinstance(outcome, Granted):
            assert wish.least <= outcome.bytes <= wish.bytes
            held[wish.holder] = (wish, outcome)
        for name, size in sizes.items():
            here = [(wish, g.shares[name]) for wish, g in held.values() if name in g.shares]
            assert sum(count for _wish, count in here) <= size
            assert sum(wish.use != "chat" for wish, _count in here) <= 1
