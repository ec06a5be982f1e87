"""Whether a checkpoint's prompt has a place for a system prompt. No Django."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from chat.checkpoints.safe_files import UnsafeFile, read_inside

LARGEST = 16 << 20  # bytes of one file
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
REFUSES = "System role not supported"  # Gemma's template raises with these words
ANY_ROLE = "message['role'] +"  # the template writes whatever role a message has


def takes_system(folder: str, fingerprint: str, description: Mapping[str, Any]) -> bool:
    """`fingerprint`: of the folder's files, read once for each."""
    if description.get("upstream") or description.get("family") == "chatglm":
        return True
    return bool(description.get("chat_template")) and _template_takes_it(folder, fingerprint)


@lru_cache(maxsize=64)
def _template_takes_it(folder: str, fingerprint: str) -> bool:
    told = ""
    for name in TEMPLATES:
        try:
            told += read_inside(Path(folder), name, LARGEST).decode(errors="replace")
        except (OSError, ValueError, UnsafeFile):
            continue
    return REFUSES not in told and ("system" in told or ANY_ROLE in told)
