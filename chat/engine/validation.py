"""The door: from a request to a sequence that can run, or a refusal that names the parameter.
Nothing is computed here.
"""

from __future__ import annotations

from dataclasses import replace
from secrets import randbits
from typing import Any

from chat.engine.adapters import AdapterPool
from chat.engine.loading import Loaded
from chat.engine.request import DEFAULT_NEW_TOKENS, Request, RequestRefused, Sampling, Sink
from chat.engine.sampler import Choice
from chat.engine.sequence import Ended, Sequence


class Acceptance:
    """Runs on the caller's thread; may read an adapter from the disk.

    max_length: prompt and answer tokens of one request. prefix_room: the longest prefix that a slot
    has room for.
    """

    def __init__(
        self,
        loaded: Loaded,
        positions: Any,
        adapters: AdapterPool,
        max_length: int,
        prefix_room: int,
    ):
        self._loaded, self._positions, self._adapters = loaded, positions, adapters
        self._max_length, self._prefix_room = max_length, prefix_room

    def sequence(self, request: Request, sink: Sink, ended: Ended | None) -> Sequence:
        """Raises RequestRefused."""
        _check_sampling(request.sampling)
        prompt = self._prompt(request)
        prefix = self._adapters.fetch(request.adapter) if request.adapter else None
        pre_seq_len = prefix.shape[3] if prefix is not None else 0
        if pre_seq_len > self._prefix_room:
            raise RequestRefused(
                "invalid_adapter",
                f"the adapter's prefix is {pre_seq_len} long, this engine has room for "
                f"{self._prefix_room}",
                param="adapter",
            )
        places = self._positions.places(prompt, pre_seq_len)
        seed = request.sampling.seed
        sampling = replace(request.sampling, seed=randbits(63) if seed is None else seed)
        return Sequence(
            request=request,
            prompt=prompt,
            sink=sink,
            prompter=self._loaded.prompter,
            choice=Choice.of(sampling, prompt),
            places=places,
            new_tokens_limit=self._new_tokens(sampling, len(prompt), places.offset),
            prefix=prefix,
            ended=ended,
        )

    def _prompt(self, request: Request) -> list[int]:
        if request.prompt_ids is None:
            prompt = self._loaded.prompter.prompt_ids(request.messages)
        elif request.messages:
            raise RequestRefused(
                "invalid_value",
                "a request has messages or prompt_ids, not both",
                param="prompt_ids",
            )
        else:
            prompt = list(request.prompt_ids)
            vocabulary = self._loaded.vocabulary
            unknown = [token for token in prompt if not 0 <= token < vocabulary]
            if unknown:
                raise RequestRefused(
                    "invalid_value",
                    f"token id {unknown[0]} is not in the vocabulary (0 to {vocabulary - 1})",
                    param="prompt_ids",
                )
        if not prompt:
            raise RequestRefused("empty_prompt", "the prompt is empty", param="messages")
        return prompt

    def _new_tokens(self, sampling: Sampling, prompt: int, shift: int) -> int:
        """Tokens the answer may have. An explicit wish that does not fit is refused; the default
        takes what there is.
        """
        limit = min(self._max_length, self._loaded.context_length - shift)
        wanted = sampling.max_new_tokens
        if prompt + (wanted or 1) > limit:
            asked = f" and up to {wanted} tokens of answer were asked for" if wanted else ""
            raise RequestRefused(
                "context_length_exceeded",
                f"the context holds {limit} tokens; the prompt has {prompt}{asked}",
                param="messages" if prompt + 1 > limit else "max_new_tokens",
            )
        if wanted is None and sampling.max_length is not None:
            # one token at least, as upstream's generate
            return max(1, min(sampling.max_length, limit) - prompt)
        return wanted or min(DEFAULT_NEW_TOKENS, limit - prompt)


def _check_sampling(sampling: Sampling) -> None:
    """Raises RequestRefused("invalid_value") naming the parameter."""
    rules: list[tuple[str, bool, str]] = [
        ("temperature", 0 <= sampling.temperature <= 100, "0 to 100"),
        ("top_p", 0 < sampling.top_p <= 1, "more than 0, at most 1"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("repetition_penalty", 0 < sampling.repetition_penalty <= 100, "more than 0, at most 100"),
        (
            "max_new_tokens",
            sampling.max_new_tokens is None or sampling.max_new_tokens >= 1,
            "1 or more",
        ),
        ("max_length", sampling.max_length is None or sampling.max_length >= 1, "1 or more"),
        ("logprobs", sampling.logprobs is None or 0 <= sampling.logprobs <= 20, "0 to 20"),
        (
            "stop",
            len(sampling.stop) <= 16 and all(sampling.stop),
            "at most 16 strings, none of them empty",
        ),
    ]
    for name, good, range_ in rules:
        if not good:
            raise RequestRefused(
                "invalid_value",
                f"{name} must be {range_}, not {getattr(sampling, name)!r}",
                param=name,
            )
