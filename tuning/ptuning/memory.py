"""How much of a step is computed at once: from free memory, and less when that runs out."""

from __future__ import annotations

import logging

import torch

from chat.engine.capacity import free_memory
from chat.engine.loading import Loaded
from tuning.ptuning.progress import TrainingFailed

logger = logging.getLogger(__name__)

# On a CPU larger micro-batches than this hardly gain speed, only memory (tests/bench/tuning.py).
_ENOUGH_BYTES = {"cpu": 256 << 20}


class MicroBatchSize:
    """tokens: padded tokens of one forward. replay: gradient checkpointing, when memory asks for
    it. overhead: what one more micro-batch costs, in tokens: a GPU is idle on small ones, a CPU
    hardly minds.
    """

    def __init__(self, loaded: Loaded, longest: int, pre_seq_len: int, tokens: int | None = None):
        """longest: tokens of the longest example. tokens: given, or from free memory."""
        self._device = loaded.device
        self.overhead = 96 if loaded.device.type == "cpu" else 2048
        self.replay = False
        self.tokens = tokens or self._that_fit(loaded, longest, pre_seq_len)

    def _that_fit(self, loaded: Loaded, longest: int, pre_seq_len: int) -> int:
        """Padded tokens of one forward whose activations take about half of the free memory; never
        less than one example.
        """
        config = loaded.model.config.get_text_config()
        free = free_memory(loaded.device)
        inner = getattr(config, "intermediate_size", None) or getattr(
            config, "inner_hidden_size", None
        )
        inner = inner or 4 * config.hidden_size
        # Kept for the backward pass, per token and layer: about 12 vectors of the hidden size and 4
        # of the inner one.
        per_token = loaded.layers * (12 * config.hidden_size + 4 * inner) * loaded.dtype.itemsize
        keys = 2 * loaded.layers * loaded.kv_heads * loaded.head_dim * loaded.dtype.itemsize
        per_example = longest * per_token + pre_seq_len * keys
        room = free // 2
        self.replay = room < per_example
        most = min(room, _ENOUGH_BYTES.get(loaded.device.type, room))
        return int(max(1, most / per_example) * longest)

    def use_less(self, longest: int, rows: int, reason: str) -> None:
        """After running out of memory on `rows` rows: smaller micro-batches, then gradient
        checkpointing, then TrainingFailed.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if self.tokens > longest:
            self.tokens = max(longest, min(self.tokens, longest * rows) // 2)
        elif not self.replay:
            self.replay = True
        else:
            raise TrainingFailed(
                "out_of_memory", f"one example of {longest} tokens does not fit: {reason}"
            )
        logger.warning(
            "out of memory: going on with micro-batches of %d tokens%s",
            self.tokens,
            " and gradient checkpointing" if self.replay else "",
        )
