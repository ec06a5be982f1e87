"""A vLLM server (`manage.py vllm_command` prints its command) as a worker: a checkpoint with every
adapter of it. No torch, no Django.

Prompts are rendered here, by the code that also renders them for training (chat/worker/
prompt_renderer.py), and go to /v1/completions as token ids. An adapter is so many placeholder ids
before them, for which vllm_prefix/, loaded into that server, puts the learned keys and values.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from chat.engine.request import AdapterRef, CheckpointRef, Request, RequestRefused
from chat.worker.client import WorkerUnavailable
from chat.worker.openai_stream import Reading, response_format
from chat.worker.prompt_renderer import Renderer
from chat.worker.sse_backend import UNREACHABLE, SSEBackend

FRESH = 2.0  # seconds for which what the server said of itself is believed
NOBODY = "0" * 64  # no file's sha256


class VllmReading(Reading):
    """Of /v1/completions with `return_token_ids`."""

    def delta(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        text, ids = choice.get("text") or "", choice.get("token_ids") or []
        if not text and not ids:
            return None
        logprobs = choice.get("logprobs")
        entries = {"logprobs": _logprobs(logprobs, ids)} if logprobs else {}
        return {"text": text, "tokens": len(ids), **entries}


class VllmBackend(SSEBackend):
    """`url`: http://host:port. It serves the checkpoint whose fingerprint is among the names of its
    model.
    """

    reading = VllmReading

    def __init__(self, url: str, key: str, renderer: Renderer, name: str = ""):
        super().__init__(name or url, f"{url.rstrip('/')}/v1", key)
        self._renderer = renderer
        self._checkpoint: CheckpointRef | None = None  # the one that it serves, once asked for
        self._models: dict[str, dict[str, Any]] = {}  # by name, as the server lists them
        self._asked = 0.0  # when
        self._takes_prefixes: bool | None = None  # None: not known
        self._pre_seq_lens: dict[str, int] = {}  # of adapters, by name

    async def serves(self, checkpoint: CheckpointRef, *, with_adapter: bool) -> bool:
        await self._ask()
        if checkpoint.fingerprint not in self._models:
            return False
        self._checkpoint = checkpoint
        if with_adapter and not await self._proves_prefixes():
            message = f"{self.name} was started without vllm_prefix, so it serves no adapters"
            raise WorkerUnavailable(message, "no_worker_for_checkpoint")
        return True

    async def submit(self, request: Request, checkpoint: CheckpointRef | None = None) -> None:
        checkpoint, sampling = checkpoint or self._checkpoint, request.sampling
        if checkpoint is None:
            raise WorkerUnavailable(f"{self.name} has not been asked what it serves")
        sampling.check()
        rendered = await self._renderer.render(checkpoint.folder, request)
        ids = rendered.ids if request.prompt_ids is None else list(request.prompt_ids)
        if not ids:
            raise RequestRefused("empty_prompt", "the prompt is empty", param="messages")
        placeholders = 0
        fields: dict[str, Any] = {}
        if request.adapter is not None and sampling.prefix_strength != 1:
            if sampling.prefix_strength:
                message = f"{self.name} knows prefixes as they were trained only, or none (0)"
                raise RequestRefused("invalid_value", message, param="prefix_strength")
            request = replace(request, adapter=None)
        if request.adapter is not None:
            placeholders = await self._pre_seq_len(request.adapter, checkpoint)
            name = request.adapter.name
            fields["kv_transfer_params"] = {"prefix": name, "length": placeholders}
            fields["cache_salt"] = name
        room = self._models[checkpoint.fingerprint]["max_model_len"] - placeholders
        greedy = not sampling.do_sample or sampling.temperature == 0
        fields |= {
            "model": checkpoint.fingerprint,
            # Any id would do as a placeholder. A repetition penalty counts the prompt's own anyway.
            "prompt": ids[:1] * placeholders + ids,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.new_tokens_limit(len(ids), room, placeholders),
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": {str(token): bias for token, bias in sampling.logit_bias} or None,
            "response_format": response_format(rendered.json_schema),
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": rendered.end_ids,
            "logprobs": sampling.logprobs,
        }
        started = time.monotonic()
        response = await self._post("completions", fields)
        if response.status != 200:
            async with response:
                self._refuse(response.status, await response.text(errors="replace"))
        self._follow(request.id, response, started, placeholders)

    async def status(self) -> dict[str, Any]:
        state, reason = "ready", ""
        try:
            await self._ask()
        except WorkerUnavailable as error:
            state, reason = "unavailable", error.message
        return status_of(self.name, self._models, state, reason) | {"active_rows": self.load()}

    async def _ask(self) -> None:
        """Which models it has. WorkerUnavailable."""
        if time.monotonic() - self._asked < FRESH:
            return
        try:
            async with (
                asyncio.timeout(5),
                self._client().get(f"{self.url}/models") as response,
            ):
                if response.status != 200:
                    raise WorkerUnavailable(f"{self.name} answered {response.status}")
                self._models = models_in(await response.json())
        except (*UNREACHABLE, ValueError) as error:
            # Whoever answers next may have been started otherwise.
            self._models, self._takes_prefixes = {}, None
            raise WorkerUnavailable(f"{self.name} does not answer: {error!r}") from error
        self._asked = time.monotonic()

    async def _proves_prefixes(self) -> bool:
        """Does it have the connector? One that answers for a prefix that cannot exist would answer
        for every adapter as if there were none.
        """
        if self._takes_prefixes is None:
            body = {
                "model": next(iter(self._models)),
                "prompt": [0, 0],
                "max_tokens": 1,
                "kv_transfer_params": {"prefix": NOBODY, "length": 1},
                "cache_salt": NOBODY,
            }
            response = await self._post("completions", body)
            async with response:
                self._takes_prefixes = response.status == 500
        return self._takes_prefixes

    async def _pre_seq_len(self, adapter: AdapterRef, checkpoint: CheckpointRef) -> int:
        """Tokens of the adapter. RequestRefused when it does not fit."""
        if adapter.name not in self._pre_seq_lens:
            path = Path(adapter.folder, "adapter.json")
            try:
                described = json.loads(await asyncio.to_thread(path.read_text, encoding="utf-8"))
                length, trained_on = described["pre_seq_len"], described["checkpoint_fingerprint"]
                if trained_on not in ("", checkpoint.fingerprint):
                    raise ValueError(f"it was trained on checkpoint {trained_on[:12]}")
                if not described["shifts_positions"]:
                    raise ValueError("its prompts begin at position 0")
            except (OSError, ValueError, KeyError, TypeError) as error:
                message = f"the adapter in {adapter.folder} cannot be used: {error}"
                raise RequestRefused("invalid_adapter", message, param="adapter") from error
            self._pre_seq_lens[adapter.name] = length
        return self._pre_seq_lens[adapter.name]


def models_in(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What /v1/models lists, by name. ValueError when it is not a vLLM's list."""
    try:
        return {
            str(model["id"]): {"max_model_len": int(model["max_model_len"])}
            for model in answer["data"]
        }
    except (KeyError, TypeError) as error:
        raise ValueError("this is no vLLM server") from error


def status_of(
    name: str, models: dict[str, Any], state: str = "ready", reason: str = ""
) -> dict[str, Any]:
    """As a worker tells its status; the model's first name is the checkpoint's."""
    return {
        "name": name,
        "state": state,
        "reason": reason,
        "checkpoint": next(iter(models), None),
        "queue": 0,
        "active_rows": 0,
    }


def _logprobs(logprobs: dict[str, Any], ids: list[int]) -> list[dict[str, Any]]:
    """Of /v1/completions' form into that of a delta event (chat.engine.request)."""

    def spelled(token: str, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token,
            "logprob": max(-9999.0 if logprob is None else logprob, -9999.0),
            "bytes": list(token.encode(errors="replace")),
        }

    entries = []
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    for token, logprob, id_, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], ids, tops, strict=False
    ):
        best = sorted((top or {}).items(), key=lambda entry: -entry[1])
        entries.append(
            {**spelled(token, logprob), "token_id": id_}
            | {"top_logprobs": [spelled(*other) for other in best]}
        )
    return entries
