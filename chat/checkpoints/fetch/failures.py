"""What can go wrong on the way, by name."""

from __future__ import annotations

from typing import Any


class FetchFailed(Exception):
    """The checkpoint cannot be fetched; trying again without a change would not help, or has been
    tried.

    `code` is stable and has a sentence in both languages (chat/fetching/explanations.py).
    """

    def __init__(self, code: str, message: str, **parameters: Any):
        super().__init__(message)
        self.code, self.message, self.parameters = code, message, parameters
