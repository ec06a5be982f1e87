"""Where a checkpoint folder came from and under which licence, as far as its files say it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from chat.checkpoints.safe_files import UnsafeFile, read_inside, read_json_inside

SOURCE_FILE = "source.json"  # written by chat/checkpoints/fetch/fetch.py
_MOST = 4 << 20  # bytes of a text


def source(folder: Path) -> dict[str, Any]:
    try:
        told = read_json_inside(folder, SOURCE_FILE, _MOST)
    except (OSError, ValueError, UnsafeFile):
        return {}
    wanted = ("source", "revision", "licence", "fetched_at", "converted_to")
    return {name: told[name] for name in wanted if name in told} if isinstance(told, dict) else {}


def licence(folder: Path) -> str:
    """From the model card's head, or from what a licence's text begins with; "" when neither
    says it.
    """
    try:
        card = read_inside(folder, "README.md", _MOST).decode("utf-8", "replace")
    except (OSError, UnsafeFile):
        card = ""
    head = card[3:].partition("\n---")[0] if card.startswith("---") else ""
    said = re.search(r"^license:[ \t]*([\w.+-]{1,60})[ \t]*$", head, re.MULTILINE)
    if said:
        return said[1]
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        try:
            text = read_inside(folder, name, _MOST).decode("utf-8", "replace")
        except (OSError, UnsafeFile):
            continue
        begins = {"Apache License": "apache-2.0", "MIT License": "mit"}
        return next((id for words, id in begins.items() if words in text[:300]), "")
    return ""
