"""A copy of everything that the portal knows, made while it runs, and the way back.

A backup is a folder: `database.sqlite3` or `database.dump` (pg_dump), datasets/, adapters/, runs/,
the two secrets, `environment.txt` (settings without secrets) and `manifest.json`, which is written
last: {"format", "version", "created_at", "engine", "migrations", "files": {path: sha256}}.

What makes it consistent: files of datasets and adapters are named by their content and never
change, so they are copied before and again after the database; then nothing that a row names is
missing. Runs are copied before: a state that is older than its row is gone on from, a newer one
would leave a hole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder

from portal import __version__

FORMAT = 1
IMMUTABLE, RUNS, SECRETS = ("datasets", "adapters", "files"), "runs", ("secret_key", "worker_token")
MANIFEST, ENVIRONMENT = "manifest.json", "environment.txt"
DUMPS = {"sqlite": "database.sqlite3", "postgresql": "database.dump"}
_SECRET_WORDS = ("KEY", "TOKEN", "PASSWORD", "SECRET", "URL", "UPSTREAMS", "WORKERS")


class BackupProblem(Exception):
    """The backup, or the restoring, is not possible; the message says why."""


def back_up(target: Path) -> dict[str, Any]:
    """Fills the new folder `target`; returns its manifest. Raises BackupProblem."""
    if target.exists() and any(target.iterdir()):
        raise BackupProblem(f"{target} is not empty")
    if settings.DATA_DIR in [target.resolve(), *target.resolve().parents]:
        raise BackupProblem(f"{target} lies in the data folder itself")
    old_mask = os.umask(0o077)
    try:
        target.mkdir(parents=True, exist_ok=True)
        files: dict[str, str] = {}
        for folder in (*IMMUTABLE, RUNS):
            _copy_new(folder, target, files)
        dump = DUMPS[_engine()]
        _dump_database(target / dump)
        files[dump] = _sha256(target / dump)
        for folder in IMMUTABLE:
            _copy_new(folder, target, files)
        for name in SECRETS:
            if (settings.DATA_DIR / name).exists():
                _copy(settings.DATA_DIR / name, target / name)
                files[name] = _sha256(target / name)
        (target / ENVIRONMENT).write_text(_environment(), encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "version": __version__,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "engine": _engine(),
            "migrations": sorted(map(".".join, MigrationRecorder(connection).applied_migrations())),
            "files": files,
        }
        partial = target / f"{MANIFEST}.part"
        partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(partial, target / MANIFEST)  # whatever has one is complete
    finally:
        os.umask(old_mask)
    return manifest


def restore(source: Path) -> dict[str, Any]:
    """Fills an empty portal from the backup `source`; returns its manifest. Raises BackupProblem
    before anything has been changed, when the backup is damaged or the portal is not empty.
    """
    manifest = _checked(source)
    if connection.introspection.table_names():
        raise BackupProblem("the database of this portal is not empty")
    for folder in (*IMMUTABLE, RUNS):
        path = settings.DATA_DIR / folder
        if path.exists() and any(entry for entry in path.iterdir() if entry.name[0] != "."):
            raise BackupProblem(f"{path} is not empty")

    old_mask = os.umask(0o077)
    try:
        dump = DUMPS[manifest["engine"]]
        for name in manifest["files"]:
            if name != dump:
                (settings.DATA_DIR / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(source / name, settings.DATA_DIR / name)
        connection.close()
        _load_database(source / dump)
    finally:
        os.umask(old_mask)
    return manifest


def _checked(source: Path) -> dict[str, Any]:
    """The manifest of a backup whose files are all there and unchanged."""
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise BackupProblem(f"{source} is not a complete backup: {fault}") from fault
    if manifest.get("format") != FORMAT:
        raise BackupProblem(f"{source} has a format that this version does not read")
    if manifest["engine"] != _engine():
        raise BackupProblem(
            f"the backup is of {manifest['engine']}, this portal uses {_engine()}: "
            "set PORTAL_DATABASE_URL accordingly"
        )
    for name, digest in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BackupProblem(f"the backup names a file outside of itself: {name}")
        try:
            damaged = _sha256(source / name) != digest
        except OSError as fault:
            raise BackupProblem(f"{name} cannot be read: {fault.strerror}") from fault
        if damaged:
            raise BackupProblem(f"{name} is damaged")
    return manifest


def _copy_new(folder: str, target: Path, files: dict[str, str]) -> None:
    """Copies what is there now and not in `files` yet; what vanishes meanwhile was not needed."""
    root = settings.DATA_DIR / folder
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(settings.DATA_DIR))
        unfinished = any(part.startswith(".") for part in path.relative_to(root).parts)
        if name in files or unfinished or path.is_symlink() or not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, target / name)
            files[name] = _sha256(target / name)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    os.chmod(target, 0o600)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _environment() -> str:
    """The PORTAL_ variables, for people who set the portal up again; secrets only by name."""
    return "".join(
        f"{name}={'(not kept)' if any(word in name for word in _SECRET_WORDS) else value}\n"
        for name, value in sorted(os.environ.items())
        if name.startswith("PORTAL_")
    )


def _engine() -> str:
    return connection.vendor


def _dump_database(target: Path) -> None:
    if _engine() == "sqlite":
        # SQLite's own online backup: a snapshot, whoever writes meanwhile.
        connection.ensure_connection()
        with contextlib.closing(sqlite3.connect(target)) as copy:
            connection.connection.backup(copy)
    else:
        _postgres("pg_dump", "--format=custom", "--no-owner", f"--file={target}")


def _load_database(dump: Path) -> None:
    if _engine() == "sqlite":
        target = Path(settings.DATABASES["default"]["NAME"])
        for rest in ("-wal", "-shm"):
            target.with_name(target.name + rest).unlink(missing_ok=True)
        _copy(dump, target)
    else:
        name = settings.DATABASES["default"]["NAME"]  # pg_restore wants it said
        _postgres("pg_restore", "--no-owner", "--exit-on-error", f"--dbname={name}", str(dump))


def _postgres(program: str, *arguments: str) -> None:
    """One of PostgreSQL's own programs on the portal's database; the password is on no command
    line.
    """
    database = settings.DATABASES["default"]
    environment = dict(os.environ)
    for variable, name in (
        ("PGHOST", "HOST"),
        ("PGPORT", "PORT"),
        ("PGUSER", "USER"),
        ("PGPASSWORD", "PASSWORD"),
        ("PGDATABASE", "NAME"),
    ):
        if database.get(name):
            environment[variable] = str(database[name])
    try:
        done = subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True
        )
    except FileNotFoundError as fault:
        raise BackupProblem(f"{program} is needed, and not installed") from fault
    if done.returncode:
        raise BackupProblem(f"{program}: {done.stderr.strip()[-2000:]}")
