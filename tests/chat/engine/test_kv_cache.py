"""The cache and its size."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from chat.engine import capacity, kv_cache
from chat.engine.engine import Engine, EngineConfig
from chat.engine.kv_cache import KVCache
from chat.engine.waiting_queue import WaitingQueue
from tests.support.tiny_models import CONTEXT, loaded_model

from .test_exact import check, mixed_requests


@pytest.mark.parametrize("architecture", ["qwen2", "chatglm"])
def test_a_cache_that_grows_while_rows_run_changes_nothing(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(kv_cache, "FIRST_COLUMNS", 16)
    requests, expected = mixed_requests(architecture, tmp_path, 7, seed=11)
    requests.sort(key=lambda request: expected[request.id][1] + len(request.prompt_ids))
    engine = Engine(loaded_model(architecture), EngineConfig(max_rows=4, prefill_tokens=32))
    check(architecture, engine.generate(requests), expected)
    assert engine.cache.columns > 32


def small_cache(**kwargs):
    shape = {"kv_heads": 2, "head_dim": 4, "rows": 3, "columns": 20, "dtype": torch.float32}
    return KVCache(devices=[torch.device("cpu")] * 2, **{**shape, **kwargs})


def test_rows_are_written_where_they_belong_and_survive_moves():
    cache = small_cache()
    states = torch.randn(2, 2, 5, 4)  # [rows, kv_heads, queries, head_dim]
    assert cache.set_prefill_target(1, [3, 0], [2, 5]) == 5
    keys, values = cache.update(states, -states, 0)
    assert keys.shape == (2, 2, 5, 4)
    # right-aligned queries: padding is not stored
    assert torch.equal(keys[0, :, 3:5], states[0, :, 3:])
    assert torch.equal(values[1], -states[1])
    cache.move(2, 0, 5)
    assert torch.equal(cache.take(0, 0, 5)[0, 0], states[1])
    cache.set_decode_target(torch.arange(2), torch.tensor([5, 7]), 8)
    keys, _ = cache.update(states[:, :, :1], states[:, :, :1], 0)
    assert torch.equal(keys[0, :, 5], states[0, :, 0]) and torch.equal(
        keys[1, :, 7], states[1, :, 0]
    )
    cache.wipe(0)
    assert not cache.take(0, 0, 20).any()


def test_a_request_beyond_the_largest_row_is_an_error():
    with pytest.raises(ValueError, match="columns"):
        small_cache().reserve(40, 0)


def test_rows_follow_from_free_memory(monkeypatch):
    loaded = loaded_model("chatglm")  # a prefix stands beside its context, not within
    one = KVCache.bytes_per_row(
        layers=3, kv_heads=4, head_dim=8, columns=CONTEXT + 64, dtype=torch.float32
    )
    monkeypatch.setattr(capacity, "free_memory", lambda device: int(one * 5.5 / 0.4))
    assert capacity.capacity_for(loaded, None, None, 64).rows == 5
    assert capacity.capacity_for(loaded, 2, None, 64).rows == 2
    monkeypatch.setattr(capacity, "free_memory", lambda device: int(one * 1.3))
    # beyond the share, rather than none
    assert capacity.capacity_for(loaded, None, None, 64).rows == 1
    monkeypatch.setattr(capacity, "free_memory", lambda device: one)
    with pytest.raises(ValueError, match="one request of 256 tokens"):
        capacity.capacity_for(loaded, None, None, 64)


def test_slots_have_room_for_the_longest_prefix_where_that_leaves_enough_rows(monkeypatch):
    loaded = replace(loaded_model("chatglm"), device=torch.device("cuda"))

    def capacity_with(rows, **changes):
        """Memory for so many rows with the longest prefix."""
        one = KVCache.bytes_per_row(
            layers=3, kv_heads=4, head_dim=8, columns=CONTEXT + 2048, dtype=torch.float32
        )
        monkeypatch.setattr(capacity, "free_memory", lambda device: int(one * rows / 0.4))
        return capacity.capacity_for(replace(loaded, **changes), None, None, None)

    assert capacity_with(16.5).columns == CONTEXT + 2048
    few = capacity_with(15.5)
    assert few.columns == CONTEXT + 256 and few.rows > 64
    # a CPU takes memory for what is written, so there it costs nothing to allow for
    few = capacity_with(15.5, device=torch.device("cpu"))
    assert few.columns == CONTEXT + 2048 and few.rows == 32
    # a prefix that shifts positions lies within the context
    monkeypatch.setattr(capacity, "free_memory", lambda device: 1 << 40)
    assert capacity.capacity_for(loaded_model("qwen2"), None, None, None).columns == CONTEXT


def test_the_line_serves_users_in_turn():
    queue = WaitingQueue()
    items = [SimpleNamespace(id=str(number), user=user) for number, user in enumerate("aaabbc")]
    for item in items:
        queue.push(item)
    expected = ["0", "3", "5", "1", "4", "2"]
    assert [item.id for item in queue] == expected
    queue.remove(items[3])
    assert [queue.pop().id for _ in range(len(queue))] == ["0", "4", "5", "1", "2"]
    assert queue.peek() is None
