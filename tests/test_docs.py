"""What docs and comments point at exists: files, modules, headings."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
from django.conf import settings

from portal import __version__
from portal.checks import VARIABLES
from tests.support import ROOT

PACKAGES = ("portal", "chat", "tuning", "evaluation", "tests")
FOLDERS = (*PACKAGES, "docs", "templates", "locale", ".github", ".ci")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for package in PACKAGES
    for ending in ("*.py", "*.html", "*.css", "*.js")
    for path in sorted((ROOT / package).rglob(ending))
    if "migrations" not in path.parts
]
# `[gMASK]`, `{name}`, `NAME`, `*` and `...` stand for something else
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*\w")
MODULE = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[a-z_]\w*)+")
# ChatGLM-6B's own programs, and names that merely look like a module
NOT_OURS = {"manage.py", "cli_demo.py", "web_demo.py", "api.py", "portal.sqlite3", "portal.example"}
CITED = re.compile(r"\b(docs/[\w/-]+\.md)#([\w-]+)((?:, #[\w-]+)*)")
LINK = re.compile(r"\]\(([^)\s:]+)\)")


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(path: Path) -> set[str]:
    return {slug(found) for found in re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)}


def missing_anchors(text: str) -> list[str]:
    return [
        f"{file}#{anchor}"
        for file, first, more in CITED.findall(text)
        for anchor in [first, *re.findall(r"#([\w-]+)", more)]
        if not (ROOT / file).is_file() or anchor not in anchors(ROOT / file)
    ]


def missing_modules(text: str) -> list[str]:
    """Dotted names of which neither the whole nor all but its last part (a class, a function) is a
    module.
    """
    return [
        name for name in set(MODULE.findall(text)) if name not in NOT_OURS and not _is_module(name)
    ]


@cache
def _is_module(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), max(1, len(parts) - 2), -1):
        path = ROOT.joinpath(*parts[:end])
        if path.is_dir() or path.with_suffix(".py").is_file():
            return True
    return len(parts) == 2 and hasattr(importlib.import_module(parts[0]), parts[1])


def missing_files(text: str) -> list[str]:
    return [name for name in set(FILE.findall(text)) if not (ROOT / name).exists()]


def test_what_code_and_comments_cite_exists():
    assert len(SOURCES) > 200
    found = {}
    for path in SOURCES:
        text = path.read_text("utf-8")
        # only these two endings: URLs and template names look like paths, too
        files = [name for name in missing_files(text) if name.endswith((".py", ".md"))]
        found[str(path.relative_to(ROOT))] = missing_anchors(text) + files
    assert {path: missing for path, missing in found.items() if missing} == {}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_docs_mention_exists(path):
    text = path.read_text("utf-8")
    assert missing_anchors(text) == []
    assert missing_files(text) == []
    code = " ".join(re.findall(r"`([^`\n]+)`", text) + re.findall(r"python -m (\S+)", text))
    assert missing_modules(code) == []
    for target in LINK.findall(text):
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target
    names = {file.name for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    alone = set(re.findall(r"`(\w+\.py)`|^\| (\w+\.py)\b", text, re.M))
    assert {one or other for one, other in alone} - names - NOT_OURS == set()


def test_every_variable_is_read_checked_and_documented():
    read = set(re.findall(r'"(PORTAL_[A-Z_]+)"', (ROOT / "portal/settings.py").read_text()))
    table = (ROOT / "docs/operations.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `(PORTAL_[A-Z_]+)`", table, re.M))
    assert read == VARIABLES == documented


def test_the_version_is_that_of_the_newest_release():
    releases = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert releases[0] == __version__ == settings.SPECTACULAR_SETTINGS["VERSION"]


@pytest.mark.parametrize("path", [*DOCS, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"], ids=str)
def test_lines_are_at_most_100_wide(path):
    """They are read in diffs. Tables, code and what cannot be broken are let be."""
    code, wide = False, []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        code ^= line.lstrip().startswith("```")
        breakable = " " in line.strip()[:100] and not line.lstrip().startswith(("|", "#"))
        if len(line) > 100 and breakable and not code:
            wide.append(number)
    assert not wide
