"""What a model thinks before it answers: the text between <think> and </think> at the answer's
beginning. Answers travel and are kept as they were written; whoever shows them takes them apart
here. No torch, no Django.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def apart(text: str) -> tuple[str, str]:
    """(thoughts, answer) of an answer, or of as much of it as there is."""
    thoughts = Thoughts()
    parts = [thoughts.feed(text), thoughts.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


class Thoughts:
    """`apart` on a stream: feed(piece) and flush() give what is certain of (thoughts, answer)."""

    def __init__(self) -> None:
        self._held = ""  # given out by nobody yet
        self._state = "start"  # then "thinking", then "between" or "answering"

    def feed(self, piece: str) -> tuple[str, str]:
        self._held += piece
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(OPEN):
                self._state, self._held = "opened", begun[len(OPEN) :]
            elif not OPEN.startswith(begun):
                self._state = "answering"
        thought = self._thought() if self._state in ("opened", "thinking") else ""
        return thought, self._answer()

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        if self._state in ("opened", "thinking"):
            return held.rstrip(), ""
        return "", held

    def _thought(self) -> str:
        if self._state == "opened":
            self._held = self._held.lstrip()
            if not self._held:
                return ""
            self._state = "thinking"
        at = self._held.find(CLOSE)
        if at >= 0:
            told, self._held = self._held[:at].rstrip(), self._held[at + len(CLOSE) :]
            self._state = "between"
            return told
        # its end, or blanks in front of it, may be on their way
        sure = len(self._held)
        for size in range(min(len(CLOSE) - 1, sure), 0, -1):
            if self._held.endswith(CLOSE[:size]):
                sure -= size
                break
        told = self._held[:sure].rstrip()
        self._held = self._held[len(told) :]
        return told

    def _answer(self) -> str:
        if self._state == "between":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answering"
        if self._state != "answering":
            return ""
        told, self._held = self._held, ""
        return told
