"""Repositories at a model hub: what they hold at a commit, and where each file can be had.

Listings go through huggingface_hub (ModelScope's through its own API), the bytes through transfer.py: huggingface_hub's own download
neither goes on at another endpoint nor checks digests, and tells its progress to a terminal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.sources import HubRepository
from chat.checkpoints.fetch.transfer import Address, RemoteFile, open_client
from chat.checkpoints.fetch.wanted import needed_files

HUGGING_FACE, MODELSCOPE = (
    ("https://huggingface.co", "https://hf-mirror.com"),
    ("https://modelscope.cn",),
)
LISTING_SECONDS = 20.0
_ANSWER_BYTES = 32 << 20


@dataclass(frozen=True)
class Listing:
    """A repository at one commit. `licence`: its name as the hub tells it, or ""."""

    commit: str
    files: tuple[RemoteFile, ...]
    licence: str = ""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def endpoints_from_environment() -> dict[str, tuple[str, ...]]:
    """{"hf": (...), "modelscope": (...)}: HF_ENDPOINT goes first where it is set, as huggingface_hub reads it."""
    own = tuple(filter(None, [os.environ.get("HF_ENDPOINT", "").rstrip("/")]))
    return {"hf": tuple(dict.fromkeys((*own, *HUGGING_FACE))), "modelscope": MODELSCOPE}


def list_repository(
    source: HubRepository, endpoints: Sequence[str], token: str | None = None
) -> Listing:
    """Asks the endpoints in order; the first that knows the repository decides which commit is fetched.

    FetchFailed: repository_not_found | revision_not_found | gated | hub_unreachable | no_weights ... The most telling one is raised.
    """
    ask = _ask_hugging_face if source.hub == "hf" else _ask_modelscope
    failures: list[FetchFailed] = []
    for endpoint in endpoints:
        try:
            commit, entries, licence = ask(source, endpoint.rstrip("/"), token)
        except FetchFailed as failed:
            failures.append(failed)
            continue
        sizes = {name: size for name, (size, _digest) in entries.items() if "/" not in name}
        if source.file and source.file not in sizes:
            raise FetchFailed(
                "not_found",
                f"{source.repository} has no {source.file}",
                file=source.file,
                host=endpoint,
            )
        names = [source.file] if source.file else needed_files(sizes)
        addresses = _hf_addresses if source.hub == "hf" else _modelscope_addresses
        ordered = [
            endpoint,
            *(other for other in endpoints if other != endpoint),
        ]  # who gave the listing gives the bytes
        files = tuple(
            RemoteFile(
                name,
                *entries[name],
                addresses=addresses(source.repository, commit, name, ordered, token),
            )
            for name in names
        )
        return Listing(commit, files, licence)
    order = ("gated", "revision_not_found", "repository_not_found", "hub_unreachable")
    raise min(
        failures,
        key=lambda failed: order.index(failed.code) if failed.code in order else len(order),
    )


Entries = dict[str, tuple[int, str]]  # name -> size, digest


def _ask_hugging_face(
    source: HubRepository, endpoint: str, token: str | None
) -> tuple[str, Entries, str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if endpoint.startswith("http://") is False and endpoint.startswith("https://") is False:
        raise _unreachable(endpoint, "not an http address")
    try:
        info = HfApi(endpoint=endpoint, token=_token_for(endpoint, token) or False).model_info(
            source.repository,
            revision=source.revision or None,
            files_metadata=True,
            timeout=LISTING_SECONDS,
        )
    except GatedRepoError as error:
        raise _gated(source, endpoint) from error
    except RevisionNotFoundError as error:
        raise FetchFailed(
            "revision_not_found",
            f"{source.repository} has no revision {source.revision}",
            repository=source.repository,
            revision=source.revision,
        ) from error
    except RepositoryNotFoundError as error:
        raise FetchFailed(
            "repository_not_found",
            f"{_host(endpoint)} knows no {source.repository} (or does not show it without a token)",
            repository=source.repository,
            host=_host(endpoint),
        ) from error
    except (
        HfHubHTTPError,
        httpx2.HTTPError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise _unreachable(
            endpoint, str(error).splitlines()[0] if str(error) else type(error).__name__
        ) from error
    entries: Entries = {}
    for file in info.siblings or []:
        if file.size is None:
            continue
        digest = (
            f"sha256:{file.lfs.sha256}"
            if file.lfs
            else f"git-sha1:{file.blob_id}"
            if file.blob_id
            else ""
        )
        entries[file.rfilename] = (file.size, digest)
    if info.gated and not _token_for(endpoint, token):
        raise _gated(source, endpoint)
    card = info.card_data.get("license") if info.card_data else None
    licence = card or next(
        (tag.partition(":")[2] for tag in info.tags or [] if tag.startswith("license:")), ""
    )
    return str(info.sha), entries, ", ".join(licence) if isinstance(licence, list) else str(licence)


def _gated(source: HubRepository, endpoint: str) -> FetchFailed:
    return FetchFailed(
        "gated",
        f"{source.repository} is given only to people who accepted its terms at {_host(endpoint)}: accept them there and set HF_TOKEN",
        repository=source.repository,
        host=_host(endpoint),
    )


def _token_for(endpoint: str, token: str | None) -> str | None:
    """A token is the user's key to one hub: only that hub and the endpoint that the environment names get it, no mirror of a list."""
    trusted = {HUGGING_FACE[0], os.environ.get("HF_ENDPOINT", "").rstrip("/")}
    return token if endpoint in trusted else None


def _hf_addresses(
    repository: str, commit: str, name: str, endpoints: Sequence[str], token: str | None
) -> tuple[Address, ...]:
    found = []
    for endpoint in endpoints:
        own = _token_for(endpoint.rstrip("/"), token)
        headers = {"Authorization": f"Bearer {own}"} if own else {}
        found.append(
            Address(f"{endpoint.rstrip('/')}/{repository}/resolve/{commit}/{quote(name)}", headers)
        )
    return tuple(found)


# -- ModelScope: GET /api/v1/models/ORG/NAME/commits and /repo/files, bytes from /repo


def _ask_modelscope(
    source: HubRepository, endpoint: str, token: str | None
) -> tuple[str, Entries, str]:
    base = f"{endpoint}/api/v1/models/{source.repository}"
    with open_client() as client:
        commit = source.revision
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            commit = _modelscope_commit(client, base, source, endpoint)
        data = _modelscope(
            client, f"{base}/repo/files?Revision={commit}&Recursive=True", source, endpoint
        )
        about = _modelscope(client, base, source, endpoint)
    try:
        entries = {
            str(file["Path"]): (
                int(file["Size"]),
                f"sha256:{file['Sha256']}" if file.get("Sha256") else "",
            )
            for file in data["Files"]
            if file.get("Type") != "tree"
        }
        return commit, entries, str(about.get("License") or "")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreachable(endpoint, f"an answer in another form ({error})") from error


def _modelscope_commit(
    client: httpx2.Client, base: str, source: HubRepository, endpoint: str
) -> str:
    revision = source.revision or "master"
    data = _modelscope(
        client,
        f"{base}/commits?Ref={quote(revision, safe='')}&PageNumber=1&PageSize=1",
        source,
        endpoint,
    )
    try:
        commit = str(data["Commit"][0]["Id"])
    except (KeyError, IndexError, TypeError) as error:
        raise FetchFailed(
            "revision_not_found",
            f"{source.repository} has no revision {revision}",
            repository=source.repository,
            revision=revision,
        ) from error
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise _unreachable(endpoint, "an answer in another form")
    return commit


def _modelscope(
    client: httpx2.Client, url: str, source: HubRepository, endpoint: str
) -> dict[str, Any]:
    """The `Data` of an answer."""
    try:
        with client.stream("GET", url) as response:
            if response.status_code in (401, 403, 404):
                raise FetchFailed(
                    "repository_not_found",
                    f"{_host(endpoint)} knows no {source.repository}",
                    repository=source.repository,
                    host=_host(endpoint),
                )
            response.raise_for_status()
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _ANSWER_BYTES:
                    raise _unreachable(endpoint, "an answer without end")
        data = httpx2.Response(200, content=bytes(body)).json()["Data"]
    except (httpx2.HTTPError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreachable(endpoint, str(error) or type(error).__name__) from error
    if not isinstance(data, dict):
        raise _unreachable(endpoint, "an answer in another form")
    return data


def _modelscope_addresses(
    repository: str, commit: str, name: str, endpoints: Sequence[str], token: str | None
) -> tuple[Address, ...]:
    query = f"Revision={commit}&FilePath={quote(name, safe='')}"
    return tuple(
        Address(f"{endpoint.rstrip('/')}/api/v1/models/{repository}/repo?{query}")
        for endpoint in endpoints
    )


def _host(endpoint: str) -> str:
    return re.sub(r"^https?://([^/@]*@)?", "", endpoint).partition("/")[0]


def _unreachable(endpoint: str, reason: str) -> FetchFailed:
    host = _host(endpoint)
    return FetchFailed(
        "hub_unreachable", f"{host} cannot be reached: {reason}", host=host, reason=reason
    )
