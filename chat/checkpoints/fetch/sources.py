"""What may be fetched, as people write it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from chat.checkpoints.fetch.catalogue import CATALOGUE, CatalogueModel
from chat.checkpoints.fetch.failures import FetchFailed

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(
    rf"({_PART}/{_PART})(?:/([A-Za-z0-9._-]+\.gguf))?(?:@([A-Za-z0-9._/-]{{1,100}}))?"
)


@dataclass(frozen=True)
class PackagedModel:
    """A model of the catalogue."""

    model: CatalogueModel

    @property
    def key(self) -> str:
        return self.model.name

    @property
    def name(self) -> str:
        return self.model.name


@dataclass(frozen=True)
class HubRepository:
    """hub: "hf" or "modelscope". `file`: the one GGUF file that is wanted, or "". `revision`:
    branch, tag, commit, or "".
    """

    hub: str
    repository: str  # ORGANISATION/NAME
    file: str = ""
    revision: str = ""

    @property
    def key(self) -> str:
        path = self.repository + (f"/{self.file}" if self.file else "")
        return f"{self.hub}:{path}" + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        return (self.file.removesuffix(".gguf") or self.repository.partition("/")[2]).lower()


@dataclass(frozen=True)
class LocalPath:
    """kind: "folder", "archive" or "gguf"."""

    kind: str
    path: Path

    @property
    def key(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        name = self.path.name
        for suffix in (".gguf", *sorted(ARCHIVES, key=len, reverse=True)):
            if self.kind != "folder" and name.lower().endswith(suffix):
                return name[: -len(suffix)]
        return name


Source = PackagedModel | HubRepository | LocalPath


def work_folder(parent: Path, source: Source) -> Path:
    """Where a source is worked on, the same in every attempt."""
    return parent / hashlib.sha256(source.key.encode()).hexdigest()[:24]


def parse_source(text: str) -> Source:
    """FetchFailed: source_missing | unknown_model | bad_repository | path_missing | unknown_file"""
    text = text.strip()
    if not text:
        raise FetchFailed("source_missing", "no source is named")
    if text.lower() in CATALOGUE:
        return PackagedModel(CATALOGUE[text.lower()])
    hub, colon, rest = text.partition(":")
    if colon and hub in ("hf", "modelscope"):
        found = _REPOSITORY.fullmatch(rest)
        if found is None or ".." in rest or "--" in found[1]:
            raise FetchFailed(
                "bad_repository",
                f"{text!r} is not {hub}:ORGANISATION/NAME or …@REVISION",
                source=text,
                hub=hub,
            )
        return HubRepository(hub, found[1], found[2] or "", found[3] or "")
    if "\0" in text or len(text) > 4096:
        raise FetchFailed("path_missing", "this is no path", path=text[:100].replace("\0", ""))
    looks_like_a_path = (
        text.startswith(("/", "~", "."))
        or "/" in text
        or text.lower().endswith((".gguf", *ARCHIVES))
    )
    if not looks_like_a_path:
        known = ", ".join(CATALOGUE)
        raise FetchFailed(
            "unknown_model",
            f"{text!r} is not in the catalogue ({known}); a hub's model is "
            "hf:ORGANISATION/NAME or modelscope:ORGANISATION/NAME",
            source=text,
            known=known,
        )
    return _local(text)


def _local(text: str) -> LocalPath:
    try:
        path = Path(text).expanduser().resolve()
        if path.is_dir():
            return LocalPath("folder", path)
        if not path.is_file():  # also a pipe or a device: reading one might never end
            raise FetchFailed(
                "path_missing", f"{path} is neither a folder nor a file", path=str(path)
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise FetchFailed("path_missing", f"{text} cannot be read: {error}", path=text) from error
    name = path.name.lower()
    if name.endswith(".gguf"):
        return LocalPath("gguf", path)
    if name.endswith(ARCHIVES):
        return LocalPath("archive", path)
    raise FetchFailed(
        "unknown_file", f"{path.name} is neither a .gguf file nor a known archive", file=path.name
    )
