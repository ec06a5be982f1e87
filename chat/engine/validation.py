"""From a request to a sequence that can run, or a refusal that names the parameter. Nothing is
computed here.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from secrets import randbits
from typing import Any

from chat.engine.adapters import AdapterPool
from chat.engine.grammars import Grammars
from chat.engine.loading import Loaded
from chat.engine.positions import Positions
from chat.engine.prompts import Messages
from chat.engine.request import Request, RequestRefused, Sink
from chat.engine.sampler import SamplerState
from chat.engine.sequence import OnEnd, Sequence


class RequestValidator:
    """Runs on the caller's thread; may read an adapter from the disk.

    max_length: prompt and answer tokens of one request. columns: of a slot, which holds its prefix
    too; None: rows read prefixes where they lie.
    """

    def __init__(
        self,
        loaded: Loaded,
        positions: Positions,
        adapters: AdapterPool,
        max_length: int,
        columns: int | None,
    ):
        self._loaded, self._positions, self._adapters = loaded, positions, adapters
        self._max_length, self._columns = max_length, columns
        self._grammars = Grammars(loaded)
        self._most_bytes = loaded.context_length * _longest_token(loaded.prompter.tokenizer)

    def prepare(self, request: Request, sink: Sink, on_end: OnEnd | None) -> Sequence:
        """Raises RequestRefused."""
        request.sampling.check(self._loaded.vocabulary)
        prompt = self._prompt(request)
        prefix = self._adapters.fetch(request.adapter) if request.adapter else None
        strength = request.sampling.prefix_strength
        if prefix is None or strength == 0:
            request, prefix, strength = replace(request, adapter=None), None, 1.0
        pre_seq_len = prefix.shape[3] if prefix is not None else 0
        plan = replace(self._positions.plan(prompt, pre_seq_len), prefix_bias=math.log(strength))
        room = self._room(pre_seq_len, plan.offset)
        seed = request.sampling.seed
        sampling = replace(request.sampling, seed=randbits(63) if seed is None else seed)
        sampler_state = SamplerState.of(sampling, prompt)
        schema = self._loaded.prompter.answer_schema(
            request.tools, request.must_call, sampling.json_schema
        )
        if schema is not None:
            told = "tools" if sampling.json_schema is None else "response_format"
            sampler_state.grammar = self._grammars.compile(schema, told)
        return Sequence(
            request=request,
            prompt=prompt,
            sink=sink,
            prompter=self._loaded.prompter,
            sampler_state=sampler_state,
            positions=plan,
            new_tokens_limit=sampling.new_tokens_limit(len(prompt), room, pre_seq_len),
            prefix=prefix,
            on_end=on_end,
        )

    def _room(self, pre_seq_len: int, offset: int) -> int:
        """Tokens that prompt and answer may have together."""
        context, columns = self._loaded.context_length, self._columns
        if offset >= context - 1:
            raise RequestRefused(
                "invalid_adapter",
                f"the adapter's prefix has {pre_seq_len} tokens; the checkpoint's context holds "
                f"{context} in all",
                param="adapter",
            )
        room = min(self._max_length, context - offset)
        if columns is None:
            return room
        if pre_seq_len >= columns - 1:
            raise RequestRefused(
                "invalid_adapter",
                f"the adapter's prefix has {pre_seq_len} tokens; a row of this engine holds "
                f"{columns} in all",
                param="adapter",
            )
        return min(room, columns - pre_seq_len)

    def _prompt(self, request: Request) -> list[int]:
        given = (bool(request.messages), request.text is not None, request.prompt_ids is not None)
        if sum(given) > 1:
            raise RequestRefused(
                "invalid_value",
                "a request has one of messages, text and prompt_ids",
                param="prompt_ids",
            )
        if request.text is not None:
            self._check_size([{"role": "user", "content": request.text}])
            prompt = self._loaded.prompter.plain_ids(request.text)
        elif request.prompt_ids is None:
            begun = {"role": "assistant", "content": request.begun}
            offered = [{"role": "tool", "content": json.dumps(tool)} for tool in request.tools]
            self._check_size([*request.messages, begun, *offered])
            prompt = self._loaded.prompter.prompt_ids(
                request.messages,
                begun=request.begun,
                thinking=request.sampling.thinking,
                tools=request.tools,
                must_call=request.must_call,
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

    def _check_size(self, messages: Messages) -> None:
        """Refuses what cannot fit however it is cut into tokens: cutting takes a second for every
        megabyte.
        """
        texts = [message.get("content") for message in messages if isinstance(message, dict)]
        size = sum(len(text.encode("utf-8", "replace")) for text in texts if isinstance(text, str))
        if size > self._most_bytes:
            raise RequestRefused(
                "context_length_exceeded",
                f"the context holds {self._loaded.context_length} tokens, which is less than the "
                f"{size} bytes of the prompt could be",
                param="messages",
            )


def _longest_token(tokenizer: Any) -> int:
    """Bytes of text that one token may stand for, at most. ChatGLM has one for 80 blanks."""
    sizes = (len(t if isinstance(t, bytes) else t.encode()) for t in tokenizer.get_vocab())
    return max(128, *sizes)
