"""What is not a fault of a request and not one of the code: the database is away, the disk is full.

Whatever fails for such a reason is told so, with 503 or 507 and when to try again.
"""

import errno
import shutil
from dataclasses import dataclass

from django.conf import settings
from django.db import DatabaseError, InterfaceError, OperationalError
from django.utils.translation import gettext as _
from safetensors import SafetensorError

RETRY_AFTER = 5  # seconds
NEARLY_FULL = 64 << 20  # bytes of room below which writing is expected to fail
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Outage:
    status: int
    code: str
    message: str


def outage_of(fault: BaseException | None) -> Outage | None:
    """The outage behind an exception or what caused it; None when it is a fault."""
    while fault is not None:
        if isinstance(fault, OSError) and fault.errno in _FULL:
            return disk_full()
        if isinstance(fault, DatabaseError | SafetensorError) and _says_full(fault):
            return disk_full()
        if isinstance(fault, OperationalError | InterfaceError) and not _of_the_schema(fault):
            return Outage(
                503, "database_unavailable", _("The database does not answer; try again soon.")
            )
        fault = fault.__cause__ or fault.__context__
    return None


def disk_full() -> Outage:
    return Outage(507, "disk_full", _("The disk of the server is full; tell an administrator."))


def room() -> int:
    """Free bytes where the portal keeps its data."""
    return shutil.disk_usage(settings.DATA_DIR).free


def _says_full(fault: Exception) -> bool:
    said = str(fault).lower()
    if "disk i/o error" in said:  # SQLite, where its memory file does not grow
        return room() < NEARLY_FULL
    return "disk is full" in said or "no space left" in said


def _of_the_schema(fault: DatabaseError) -> bool:
    """SQLite raises OperationalError for these too."""
    return str(fault).startswith(("no such", "near "))
