"""Entries of PORTAL_WORKERS and PORTAL_UPSTREAMS, parsed once for whoever needs them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_URL = re.compile(r"unix:/\S+|(vllm\+)?https?://\S+")


@dataclass(frozen=True)
class WorkerAddress:
    """`URL` or `NAME=URL`: unix:/folder/worker.sock, http://host:port, or vllm+http://host:port for
    a vLLM server (`vllm`; `url` is then without that).
    """

    name: str
    url: str
    vllm: bool = False

    @classmethod
    def parse(cls, entry: str) -> WorkerAddress:
        """ValueError for anything else."""
        name, equals, url = entry.partition("=")
        if not equals or _URL.fullmatch(entry):
            name, url = "", entry
        if not _URL.fullmatch(url) or (name and not re.fullmatch(r"[\w.-]+", name)):
            raise ValueError(f"{entry!r} is not an address")
        return cls(name, url.removeprefix("vllm+"), url.startswith("vllm+"))


@dataclass(frozen=True)
class RemoteAddress:
    """`CHECKPOINT=URL|MODEL`: an OpenAI-compatible server. `url` is what goes before
    /chat/completions; without a path, /v1 is meant. `model`: what that server calls the checkpoint.
    """

    checkpoint: str
    url: str
    model: str

    @classmethod
    def parse(cls, entry: str) -> RemoteAddress:
        """ValueError for anything else."""
        checkpoint, _equals, rest = entry.partition("=")
        url, _bar, model = rest.partition("|")
        parts = urlsplit(url)
        if (
            not checkpoint.strip()
            or parts.scheme not in ("http", "https")
            or not parts.hostname
            or not model.strip()
        ):
            raise ValueError(f"{entry!r} is not CHECKPOINT_NAME=URL|MODEL")
        url = url.rstrip("/")
        return cls(checkpoint.strip(), url if parts.path.strip("/") else f"{url}/v1", model.strip())
