"""Every text that is shown has its Chinese, and the compiled catalogue is up to date."""

import ast
import gettext
import io
import re

import pytest
from babel.messages.catalog import Catalog
from babel.messages.extract import extract
from babel.messages.pofile import read_po
from django.utils.translation.template import templatize

from tests.support import ROOT

FOLDER = ROOT / "locale" / "zh_Hans" / "LC_MESSAGES"
# where a call has the singular and the context: argument numbers
CALLS = {
    **dict.fromkeys(("_", "gettext", "gettext_lazy", "gettext_noop"), (0, None)),
    **dict.fromkeys(("ngettext", "ngettext_lazy"), (0, None)),
    **dict.fromkeys(("pgettext", "pgettext_lazy", "npgettext", "npgettext_lazy"), (1, 0)),
}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    with open(FOLDER / "django.po", "rb") as file:
        return read_po(file, locale="zh_Hans")


def texts(path):
    """(msgid, context) of every call in a Python file or a template."""
    source = path.read_text("utf-8")
    if path.suffix == ".html":
        return texts_of_template(source)
    found = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in CALLS:
            text, context = CALLS[call.func.id]
            arguments = [getattr(value, "value", None) for value in call.args]
            if isinstance(arguments[text], str):
                found.append((arguments[text], None if context is None else arguments[context]))
    return found


def texts_of_template(source: str):
    # Django's own step before xgettext; babel knows no u'...' and takes indentation for Python's
    source = re.sub(r"(?<!\w)u(?=['\"])", "", templatize(source))
    source = "\n".join(line.strip() for line in source.splitlines())
    keywords = {"gettext": None, "ngettext": (1, 2), "pgettext": ((1, "c"), 2)}
    for _line, ids, _comments, context in extract("python", io.BytesIO(source.encode()), keywords):
        yield (ids[0] if isinstance(ids, tuple) else ids), context


def test_every_text_of_the_code_is_in_the_catalogue(catalog):
    sources = [
        path
        for folder in ("portal", "chat", "tuning", "evaluation", "templates")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".html") and "migrations" not in path.parts
    ]
    found = {text: path for path in sources for text in texts(path)}
    assert len(found) > 300
    missing = {
        text: path.name for (text, context), path in found.items() if not catalog.get(text, context)
    }
    assert missing == {}


def test_every_entry_is_translated_and_certain(catalog):
    empty = [entry.id for entry in catalog if entry.id and not all(_forms(entry.string))]
    assert empty == []
    assert [entry.id for entry in catalog if entry.id and entry.fuzzy] == []
    wrong = [(entry.id, str(error)) for entry, errors in catalog.check() for error in errors]
    assert wrong == []  # a placeholder that the Chinese lacks, or one too many


def test_the_compiled_catalogue_is_up_to_date(catalog):
    with open(FOLDER / "django.mo", "rb") as file:
        compiled = gettext.GNUTranslations(file)._catalog
    stale = []
    for entry in catalog:
        if entry.id:
            key = entry.id[0] if isinstance(entry.id, tuple) else entry.id
            key = f"{entry.context}\x04{key}" if entry.context else key
            if compiled.get(key, compiled.get((key, 0))) != _forms(entry.string)[0]:
                stale.append(key)
    assert stale == []  # `make messages` compiles it


def _forms(string) -> list[str]:
    return list(string) if isinstance(string, (tuple, list)) else [string]
