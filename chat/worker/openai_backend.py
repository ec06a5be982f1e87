"""An OpenAI-compatible server (vLLM, SGLang, `transformers serve`) as the server of a plain base
checkpoint: messages in, text out. No torch, no Django.
"""

from __future__ import annotations

import time
from typing import Any

from chat.engine.request import CheckpointRef, Request, RequestRefused
from chat.worker.addresses import RemoteAddress
from chat.worker.sse_backend import UNREACHABLE, SSEBackend

# beyond OpenAI's fields; vLLM and SGLang know them, `transformers serve` refuses
EXTRAS = (
    "top_k",
    "repetition_penalty",
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

    async def submit(self, request: Request) -> None:
        if request.prompt_ids is not None:
            raise RequestRefused(
                "invalid_value", f"{self.name} takes messages, not token ids", "prompt_ids"
            )
        started = time.monotonic()
        response = await self._post("chat/completions", self._body(request))
        if response.status != 200:
            async with response:
                status, text = response.status, await response.text(errors="replace")
            if not (status in (400, 422) and self._extras and any(name in text for name in EXTRAS)):
                self._refuse(status, text)
            self._extras = False  # a strict server: OpenAI's own fields only, from now on
            return await self.submit(request)
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
        body = {
            "model": self.model,
            "messages": list(request.messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
        }
        if self._extras:
            penalty = sampling.repetition_penalty
            body |= {
                "top_k": sampling.top_k or None,
                "repetition_penalty": penalty if penalty != 1.0 else None,
            }
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        return {name: value for name, value in body.items() if value is not None}

    def _delta(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        text = (choice.get("delta") or {}).get("content")
        if not text:
            return None
        logprobs = (choice.get("logprobs") or {}).get("content")
        return {"text": text, "tokens": 1} | ({"logprobs": logprobs} if logprobs else {})
