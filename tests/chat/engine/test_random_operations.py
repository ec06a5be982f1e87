"""Whatever comes in whatever order, nothing of it is left behind."""

import random

import pytest

from chat.engine.engine import Engine, EngineConfig
from chat.engine.request import AdapterRef, RequestRefused
from tests.support.tiny_models import VOCABULARY, adapter, greedy, loaded_model, random_prompt


def random_operations(count, seed, folder):
    """Submit, abort and step at random; in the end every request has had exactly one terminal event
    and nothing is kept.
    """
    draw = random.Random(seed)
    engine = Engine(
        loaded_model("qwen2"), EngineConfig(max_rows=4, queue_limit=12, prefill_tokens=64)
    )
    refs = [
        None,
        adapter("qwen2", folder, 9, 2),
        adapter("qwen2", folder, 3, 1),
        AdapterRef("none", str(folder / "none")),
    ]
    terminal, submitted = {}, []
    for number in range(count):
        action = draw.random()
        if action < 0.45:
            prompt = random_prompt("qwen2", draw) if draw.random() > 0.05 else (VOCABULARY,)
            request = greedy(
                str(number),
                prompt,
                draw.randint(1, 20),
                draw.choice(refs),
                user=str(draw.randrange(3)),
            )
            try:
                engine.submit(
                    request,
                    lambda event: (
                        terminal.setdefault(event.id, []).append(event) if event.terminal else None
                    ),
                )
                submitted.append(request.id)
            except RequestRefused:
                pass
        elif action < 0.6 and submitted:
            engine.abort(draw.choice(submitted))
        else:
            engine.step()
    while engine.step():
        pass
    assert sorted(terminal) == sorted(submitted)
    assert all(len(events) == 1 for events in terminal.values())
    assert engine.idle
    assert engine.status()["active_rows"] == 0
    assert len(submitted) > count // 10


def test_random_operations_leak_nothing(tmp_path):
    random_operations(150, 1, tmp_path)


@pytest.mark.slow
def test_a_thousand_random_operations_leak_nothing(tmp_path):
    random_operations(1000, 2, tmp_path)
