"""Repositories at a model hub: what they hold at a commit, and where each file can be had.

Listings go through huggingface_hub (ModelScope's through its own API), the bytes through
transfer.py: huggingface_hub's own download neither goes on at another endpoint nor checks digests,
and tells its progress to a terminal.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2

from chat.checkpoints.fetch.client import open_client, read_answer
from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.sources import HubRepository
from chat.checkpoints.fetch.transfer import Address, RemoteFile
from chat.checkpoints.fetch.wanted import needed_files

HUGGING_FACE = ("https://huggingface.co", "https://hf-mirror.com")
MODELSCOPE = ("https://modelscope.cn",)
LISTING_SECONDS = 20.0
_ANSWER_BYTES = 32 << 20
# What an answer in another form than expected raises on the way into ours.
_ODD = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
_MOST_TELLING = ("gated", "revision_not_found", "repository_not_found", "hub_unreachable")

Entries = dict[str, tuple[int, str]]  # name -> bytes, digest


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
    """{"hf": (...), "modelscope": (...)}: HF_ENDPOINT goes first where it is set."""
    own = tuple(filter(None, [os.environ.get("HF_ENDPOINT", "").rstrip("/")]))
    return {"hf": tuple(dict.fromkeys((*own, *HUGGING_FACE))), "modelscope": MODELSCOPE}


def list_repository(
    source: HubRepository, endpoints: Sequence[str], token: str | None = None
) -> Listing:
    """Asks the endpoints in order; the first that knows the repository decides on the commit.

    FetchFailed: gated | revision_not_found | repository_not_found | hub_unreachable (the most
    telling of all endpoints' answers), not_found, or one of needed_files.
    """
    hub = _HuggingFace if source.hub == "hf" else _ModelScope
    failures: list[FetchFailed] = []
    for endpoint in endpoints:
        try:
            commit, entries, licence = hub.ask(source, endpoint.rstrip("/"), token)
        except FetchFailed as failed:
            failures.append(failed)
            continue
        sizes = {name: size for name, (size, _digest) in entries.items() if "/" not in name}
        if source.file and source.file not in sizes:
            raise FetchFailed(
                "not_found",
                f"{source.repository} has no {source.file}",
                file=source.file,
                host=_host(endpoint),
            )
        names = [source.file] if source.file else needed_files(sizes)
        # who gave the listing gives the bytes; the others help out
        ordered = [endpoint, *(other for other in endpoints if other != endpoint)]
        files = tuple(
            RemoteFile(
                name,
                *entries[name],
                addresses=tuple(
                    hub.address(source.repository, commit, name, one.rstrip("/"), token)
                    for one in ordered
                ),
            )
            for name in names
        )
        return Listing(commit, files, licence)
    if not failures:
        raise FetchFailed("no_endpoint", f"no endpoint is set for {source.hub}", hub=source.hub)
    raise min(failures, key=lambda failed: _MOST_TELLING.index(failed.code))


class _HuggingFace:
    @staticmethod
    def ask(source: HubRepository, endpoint: str, token: str | None) -> tuple[str, Entries, str]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

        own = _token_for(endpoint, token)
        try:
            info = HfApi(endpoint=endpoint, token=own or False).model_info(
                source.repository,
                revision=source.revision or None,
                files_metadata=True,
                timeout=LISTING_SECONDS,
            )
            entries = {
                file.rfilename: (file.size, _hf_digest(file))
                for file in info.siblings or []
                if file.size is not None
            }
            licence = _hf_licence(info)
        except GatedRepoError as error:
            raise _gated(source, endpoint) from error
        except RevisionNotFoundError as error:
            raise _no_revision(source, source.revision) from error
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403, 404):
                raise _no_repository(source, endpoint) from error
            raise _unreachable(endpoint, error) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, *_ODD) as error:
            raise _unreachable(endpoint, error) from error
        if info.gated and not own:
            raise _gated(source, endpoint)
        return str(info.sha), entries, licence

    @staticmethod
    def address(
        repository: str, commit: str, name: str, endpoint: str, token: str | None
    ) -> Address:
        own = _token_for(endpoint, token)
        headers = {"Authorization": f"Bearer {own}"} if own else {}
        return Address(f"{endpoint}/{repository}/resolve/{commit}/{quote(name)}", headers)


def _hf_digest(file: Any) -> str:
    if file.lfs:
        return f"sha256:{file.lfs.sha256}"
    return f"git-sha1:{file.blob_id}" if file.blob_id else ""


def _hf_licence(info: Any) -> str:
    card = info.card_data.get("license") if info.card_data else None
    tags = [tag.partition(":")[2] for tag in info.tags or [] if tag.startswith("license:")]
    said = card or tags[:1]
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said)


def _token_for(endpoint: str, token: str | None) -> str | None:
    """A token is the user's key to one hub: that hub gets it, and the endpoint that the environment
    names, but no mirror of a list.
    """
    trusted = {HUGGING_FACE[0], os.environ.get("HF_ENDPOINT", "").rstrip("/")}
    return token if endpoint in trusted else None


class _ModelScope:
    """GET /api/v1/models/ORG/NAME, /commits and /repo/files; bytes from /repo."""

    @staticmethod
    def ask(source: HubRepository, endpoint: str, token: str | None) -> tuple[str, Entries, str]:
        base = f"{endpoint}/api/v1/models/{source.repository}"
        try:
            with open_client() as client:
                commit = source.revision
                if not re.fullmatch(r"[0-9a-f]{40}", commit):
                    commit = _ModelScope._commit(client, base, source)
                query = f"Revision={commit}&Recursive=True"
                data = _ModelScope._data(client, f"{base}/repo/files?{query}", source)
                about = _ModelScope._data(client, base, source)
            entries = {
                str(file["Path"]): (
                    int(file["Size"]),
                    f"sha256:{file['Sha256']}" if file.get("Sha256") else "",
                )
                for file in data["Files"]
                if file.get("Type") != "tree"
            }
            return commit, entries, str(about.get("License") or "")
        except (httpx2.HTTPError, httpx2.InvalidURL, *_ODD) as error:
            raise _unreachable(endpoint, error) from error

    @staticmethod
    def _commit(client: httpx2.Client, base: str, source: HubRepository) -> str:
        revision = source.revision or "master"
        query = f"Ref={quote(revision, safe='')}&PageNumber=1&PageSize=1"
        commits = _ModelScope._data(client, f"{base}/commits?{query}", source)["Commit"]
        if not commits:
            raise _no_revision(source, revision)
        commit = str(commits[0]["Id"])
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError("an answer without a commit")
        return commit

    @staticmethod
    def _data(client: httpx2.Client, url: str, source: HubRepository) -> dict[str, Any]:
        status, body, _final = read_answer(client, url, most=_ANSWER_BYTES)
        if status in (401, 403, 404):
            raise _no_repository(source, url)
        data = json.loads(body)["Data"]
        if status != 200 or not isinstance(data, dict):
            raise ValueError(f"an answer in another form ({status})")
        return data

    @staticmethod
    def address(
        repository: str, commit: str, name: str, endpoint: str, token: str | None
    ) -> Address:
        query = f"Revision={commit}&FilePath={quote(name, safe='')}"
        return Address(f"{endpoint}/api/v1/models/{repository}/repo?{query}")


def _host(endpoint: str) -> str:
    return re.sub(r"^https?://([^/@]*@)?", "", endpoint).partition("/")[0]


def _gated(source: HubRepository, endpoint: str) -> FetchFailed:
    return FetchFailed(
        "gated",
        f"{source.repository} is given only to people who accepted its terms at "
        f"{_host(endpoint)}: accept them there and set HF_TOKEN",
        repository=source.repository,
        host=_host(endpoint),
    )


def _no_revision(source: HubRepository, revision: str) -> FetchFailed:
    return FetchFailed(
        "revision_not_found",
        f"{source.repository} has no revision {revision}",
        repository=source.repository,
        revision=revision,
    )


def _no_repository(source: HubRepository, endpoint: str) -> FetchFailed:
    return FetchFailed(
        "repository_not_found",
        f"{_host(endpoint)} knows no {source.repository}, or does not show it without a token",
        repository=source.repository,
        host=_host(endpoint),
    )


def _unreachable(endpoint: str, error: Exception) -> FetchFailed:
    host, reason = _host(endpoint), (str(error).splitlines() or [type(error).__name__])[0]
    return FetchFailed(
        "hub_unreachable", f"{host} cannot be reached: {reason}", host=host, reason=reason
    )
