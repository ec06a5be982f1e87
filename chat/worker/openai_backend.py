"""An OpenAI-compatible server (vLLM, SGLang, `transformers serve`) as the server of a plain base
checkpoint: messages in, text out. No torch, no Django.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from chat.engine.request import CheckpointRef, Request, RequestRefused
from chat.worker.addresses import RemoteAddress
from chat.worker.openai_stream import response_format
from chat.worker.sse_backend import UNREACHABLE, SSEBackend

# beyond OpenAI's fields; vLLM and SGLang know them, `transformers serve` refuses
EXTRAS = (
    "top_k",
    "repetition_penalty",
    "continue_final_message",
    "add_generation_prompt",
    "chat_template_kwargs",
)


class OpenAIBackend(SSEBackend):
    """`model` is what that server calls the checkpoint."""

    def __init__(self, checkpoint: str, url: str, model: str, key: str = ""):
        super().__init__(f"{checkpoint} at {url.rstrip('/')}", url, key)
        self.checkpoint, self.model = checkpoint, model
        self._extras = True

    @classmethod
    def parse(cls, entry: str, key: str = "") -> OpenAIBackend:
        """An entry of PORTAL_UPSTREAMS; ValueError when it is none."""
        remote = RemoteAddress.parse(entry)
        return cls(remote.checkpoint, remote.url, remote.model, key)

    async def serves(self, checkpoint: CheckpointRef, *, with_adapter: bool) -> bool:
        return checkpoint.name == self.checkpoint and not with_adapter

    async def submit(self, request: Request, checkpoint: CheckpointRef | None = None) -> None:
        """Returns when the server has begun to answer; RequestRefused, WorkerUnavailable."""
        if not request.messages:
            raise RequestRefused("invalid_value", f"{self.name} takes messages only", "prompt")
        started = time.monotonic()
        response = await self._post("chat/completions", self._body(request))
        if response.status != 200:
            async with response:
                status, text = response.status, await response.text(errors="replace")
            if status in (400, 422) and self._extras and any(name in text for name in EXTRAS):
                self._extras = False  # a strict server: OpenAI's own fields only, from now on
                return await self.submit(request)
            if status in (400, 422) and request.sampling.max_new_tokens and _too_many(text):
                # as the engine: what the prompt leaves of the context
                sampling = replace(request.sampling, max_new_tokens=None)
                return await self.submit(replace(request, sampling=sampling))
            self._refuse(status, text)
        self._follow(request.id, response, started)

    async def status(self) -> dict[str, Any]:
        try:
            async with self._client().get(f"{self.url}/models") as response:
                state = "ready" if response.status == 200 else "unavailable"
                reason = "" if response.status == 200 else f"answered {response.status}"
        except UNREACHABLE as error:
            state, reason = "unavailable", repr(error)
        return {
            "name": self.name,
            "state": state,
            "reason": reason,
            "checkpoint": self.checkpoint,
            "queue": 0,
            "active_rows": self.load(),
        }

    def _body(self, request: Request) -> dict[str, Any]:
        """OpenAI's fields, and the EXTRAS where the server takes them."""
        sampling = request.sampling
        greedy = not sampling.do_sample or sampling.temperature == 0
        messages = list(request.messages)
        if request.begun:  # servers that do not know the extras still see what there is
            messages.append({"role": "assistant", "content": request.begun})
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
            "presence_penalty": sampling.presence_penalty or None,
            "frequency_penalty": sampling.frequency_penalty or None,
            "logit_bias": {str(token): bias for token, bias in sampling.logit_bias} or None,
            "response_format": response_format(sampling.json_schema),
            "tools": list(request.tools) or None,
            "tool_choice": _choice(request.must_call, len(request.tools)),
        }
        if self._extras:
            penalty = sampling.repetition_penalty
            body |= {
                "top_k": sampling.top_k or None,
                "repetition_penalty": penalty if penalty != 1.0 else None,
                "chat_template_kwargs": None
                if sampling.thinking is None
                else {"enable_thinking": sampling.thinking},
                "continue_final_message": True if request.begun else None,
                "add_generation_prompt": False if request.begun else None,
            }
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        return {name: value for name, value in body.items() if value is not None}


def _choice(must_call: tuple[str, ...], offered: int) -> Any:
    """`tool_choice` in OpenAI's words; None: as the model likes."""
    if len(must_call) == 1 < offered:
        return {"type": "function", "function": {"name": must_call[0]}}
    return "required" if must_call else None


def _too_many(text: str) -> bool:
    """Does an error body say that the prompt would fit, had fewer tokens been asked for?"""
    words = text.lower()
    return "max_tokens" in words or "max_completion_tokens" in words or "in the completion" in words
