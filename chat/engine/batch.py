"""The requests that hold a slot of the cache: who sits where, what they take over from others, what
they leave behind.
"""

from __future__ import annotations

from chat.engine.adapters import AdapterPool
from chat.engine.kv_cache import KVCache
from chat.engine.prompt_cache import PromptCache, common_length
from chat.engine.sequence import Sequence


class RunningBatch:
    """Sequences by slot, without gaps; the first `decoding` are past their prompt. Belongs to the
    engine's thread.

    prompts: keys and values of earlier prompts, None where the architecture cannot reuse any.
    shares_prefixes: the forward reads them where they lie, so slots hold none.
    """

    def __init__(
        self,
        cache: KVCache,
        adapters: AdapterPool,
        prompts: PromptCache | None,
        shares_prefixes: bool = False,
    ):
        self._shares_prefixes = shares_prefixes
        self.cache, self.adapters, self.prompts = cache, adapters, prompts
        self.decoding = 0
        self._rows: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def decoding_rows(self) -> list[Sequence]:
        return self._rows[: self.decoding]

    @property
    def prefilling_rows(self) -> list[Sequence]:
        return self._rows[self.decoding :]

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence the next slot and what needs no compute: its prefix, and what others have
        computed of its prompt.

        Raises what goes wrong (no memory); the sequence has no slot then.
        """
        slot = len(self._rows)
        first = 0 if self._shares_prefixes else sequence.positions.prefix
        self.cache.reserve(first + len(sequence.prompt) + sequence.new_tokens_limit, slot)
        if sequence.prefix is not None:
            tensor = self.adapters.on_device(sequence.adapter_name, sequence.prefix)
            if self._shares_prefixes:
                sequence.shared_prefix = tensor
            else:
                self.cache.put(slot, 0, tensor)
            sequence.prefix = None
        sequence.prefix_columns = first
        sequence.num_computed_tokens = self._reuse_prompt(sequence, slot)
        sequence.kv_length = first + sequence.num_computed_tokens
        sequence.slot = slot
        self._rows.append(sequence)

    def _reuse_prompt(self, sequence: Sequence, slot: int) -> int:
        """Copies the longest beginning of the prompt that is known, and returns its length: never
        all, the last token must be computed. Several answers to one prompt, or a system prompt that
        all share, are computed once.
        """
        if self.prompts is None:
            return 0
        adapter, wanted, first = (
            sequence.before_prompt,
            sequence.prompt[:-1],
            sequence.prefix_columns,
        )
        source, length = None, self.prompts.shortest - 1
        for row in self._rows:
            if (
                row.before_prompt == adapter
                and row.prompt[: self.prompts.shortest] == wanted[: self.prompts.shortest]
            ):
                shared = common_length(row.computed, wanted)
                if shared > length:
                    source, length = row, shared
        kept = self.prompts.find(adapter, wanted, longer_than=length)
        if kept is not None:
            self.cache.put(slot, first, kept)
            return kept.shape[3]
        if source is None:
            return 0
        self.prompts.count(length)
        self.cache.put(slot, first, self.cache.take(source.slot, first, first + length))
        return length

    def promote(self) -> None:
        """Counts those as answering whose prompt is done. They come in slot order: only the last of
        a step can be cut short.
        """
        while self.decoding < len(self._rows) and (
            self._rows[self.decoding].prefilled or self._rows[self.decoding].finished
        ):
            self.decoding += 1

    def release(self, sequence: Sequence) -> None:
        """Free a finished sequence's slot, if it has one; the last rows move up so that those in
        use stay together.
        """
        slot = sequence.slot
        if slot < 0:
            return
        if sequence.finish_reason == "error":
            self.cache.wipe(slot)
        elif self.prompts is not None:
            self._store_prompt(sequence)
        if slot < self.decoding:
            self.decoding -= 1
            self._move(self.decoding, slot)
            slot = self.decoding
        self._move(len(self._rows) - 1, slot)
        self._rows.pop()
        sequence.slot, sequence.shared_prefix = -1, None

    def clear(self) -> list[Sequence]:
        """Everybody out, after a fault that may have left anything in any slot; returns who was
        in.
        """
        for slot in range(len(self._rows)):
            self.cache.wipe(slot)
        gone, self._rows, self.decoding = self._rows, [], 0
        return gone

    def _move(self, source: int, target: int) -> None:
        if source != target:
            row = self._rows[source]
            self.cache.move(source, target, row.kv_length)
            self._rows[target], row.slot = row, target

    def _store_prompt(self, sequence: Sequence) -> None:
        assert self.prompts is not None
        ids, first = sequence.computed, sequence.prefix_columns
        if self.prompts.wants(sequence.before_prompt, ids):
            self.prompts.keep(
                sequence.before_prompt, ids, self.cache.take(sequence.slot, first, first + len(ids))
            )
