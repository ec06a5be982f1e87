"""Files as people have them: read as the field reads them, or one finding a kind of problem that
says what to write instead. Nothing is lost in silence.
"""

import csv
import gzip
import io
import json
import tracemalloc
import zipfile

import pytest
from django.utils import translation
from openpyxl import Workbook

from tests.support.uploads import gzipped, lines, rows, tarred, upload, zipped
from tuning.datasets import store
from tuning.datasets.findings import Findings
from tuning.datasets.rows import Columns, examples_of
from tuning.datasets.sources import Limits, Source
from tuning.datasets.store import DatasetRejected, ingest

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


def taken(member, file, **fields) -> list[tuple[str, str]]:
    """The (prompt, response) of every training row."""
    dataset = ingest(file, name="x", owner=member, **fields)
    return [
        (row["prompt"], row["response"])
        for row in store.examples(dataset.current, "train", 0, 1000)
    ]


def told(member, file, **fields) -> list[tuple]:
    """(line, code, count) of each kind of problem of a refused upload."""
    with pytest.raises(DatasetRejected) as caught, translation.override("en"):
        ingest(file, name="x", owner=member, **fields)
    for found in caught.value.problems:
        assert found["message"] and "%(" not in found["message"]
    return [(found["line"], found["code"], found["count"]) for found in caught.value.problems]


def noted(member, file, **fields) -> list[tuple]:
    dataset = ingest(file, name="x", owner=member, **fields)
    return [(found["line"], found["code"], found["level"]) for found in dataset.problems]


PAIRS = [("裙子", "好看"), ("裤子", "百搭")]
TABLE = [{"content": prompt, "summary": response} for prompt, response in PAIRS]


def workbook(*sheets: tuple[str, list[list]]) -> bytes:
    book = Workbook()
    book.remove(book.active)
    for title, cells in sheets:
        sheet = book.create_sheet(title)
        for row in cells:
            sheet.append(row)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


# --- CSV


def test_a_csv_row_with_more_fields_than_the_header_is_named_and_never_cut(member):
    content = "content,summary\n裙子,白色, 很好看,百搭\n裤子,黑色\n帽子,红,的\n"
    assert told(member, upload(content, "x.csv")) == [(2, "too_many_fields", 2)]
    file = upload(content, "x.csv")
    assert taken(member, file, skip_bad_rows=True) == [("裤子", "黑色")]
    # a spreadsheet's empty cells on the right are no fields
    assert taken(member, upload("content,summary,,\n裙子,白色,,\n", "x.csv")) == [("裙子", "白色")]


def test_a_quotation_mark_that_is_never_closed_is_named_where_it_was_opened(member):
    many = ["content,summary\n", *(f"裙子{row},白色\n" for row in range(2, 102))]
    many[9] = '裙子,"白色\n'
    assert told(member, upload("".join(many), "x.csv")) == [(10, "unclosed_quote", 1)]
    # a later quotation mark closes it in the wrong place
    many[49] = '裙子,"黑色"\n'
    assert told(member, upload("".join(many), "x.csv")) == [(10, "stray_quote", 1)]
    assert told(member, upload('content,"summary\na,b\n', "x.csv")) == [(1, "unclosed_quote", 1)]


def test_a_header_that_names_a_column_twice_is_refused(member):
    content = "content,summary,summary\na,b,c\n"
    assert told(member, upload(content, "x.csv"))[0][:2] == (1, "column_twice")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_text_of_a_spreadsheet_is_read(member, encoding):
    out = io.StringIO()
    csv.writer(out, delimiter="\t").writerows([["content", "summary"], *PAIRS])
    content = out.getvalue().encode(encoding)
    assert taken(member, upload(content, "x.csv")) == PAIRS
    assert store.detect_columns(upload(content, "x.csv"))["prompt_column"] == "content"
    assert store.Dataset.objects.get().current.encoding == encoding


# --- workbooks


def test_a_workbook_is_read_whatever_it_is_called(member):
    content = workbook(("对话", [["content", "summary"], *PAIRS, [None, None], ["鞋", 7]]))
    for name in ("x.xlsx", "x.csv", "x.json"):
        assert taken(member, upload(content, name)) == [*PAIRS, ("鞋", "7")]
        assert store.detect_columns(upload(content, name))["columns"] == ["content", "summary"]
    assert taken(member, zipped({"train.xlsx": content})) == [*PAIRS, ("鞋", "7")]
    assert taken(member, gzipped(content, "x.xlsx.gz")) == [*PAIRS, ("鞋", "7")]


def test_a_workbook_names_its_rows_and_the_sheets_it_leaves_out(member):
    first = ("一", [[None], ["content", "summary"], ["裙子", "好看"], ["裤子", None]])
    second = ("二", [["prompt", "response"], ["问", "答"]])
    content = workbook(first, second)
    assert noted(member, upload(content, "x.xlsx")) == [
        (None, "other_sheets", "warning"),
        (4, "empty_response", "warning"),
    ]
    assert taken(member, upload(content, "x.xlsx"), sheet="二") == [("问", "答")]
    assert told(member, upload(content, "x.xlsx"), sheet="三") == [(None, "no_sheet", 1)]


def rewritten(content: bytes, part: str, xml: bytes) -> bytes:
    """The workbook with one part replaced."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, xml if name == part else old.read(name))
    return out.getvalue()


def test_a_hostile_workbook_costs_a_refusal_and_nothing_else(member, monkeypatch):
    good, part = workbook(("s", [["content", "summary"], *PAIRS])), "xl/worksheets/sheet1.xml"
    head = (
        b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    )
    bomb = rewritten(good, part, head + b" " * (40 << 20))
    entities = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]>' + head
    rows_ = b'<row r="1"><c r="A1"><v>1</v></c></row>' * 900
    monkeypatch.setattr("tuning.datasets.workbooks._MOST_ELEMENTS", 5000)
    far = (
        head
        + b'<row r="999999999999"><c r="A999999999999"><v>1</v></c></row></sheetData></worksheet>'
    )
    wide = head + b'<row r="1"><c r="XFD1" t="str"><v>a</v></c></row></sheetData></worksheet>'
    for content, code in (
        (bomb, "archive_bomb"),
        (rewritten(good, part, entities), "archive_damaged"),
        (rewritten(good, part, far), "archive_damaged"),
        (rewritten(good, part, wide), "archive_damaged"),
        (rewritten(good, part, head + rows_), "workbook_too_large"),
        (rewritten(good, part, b"<oops"), "archive_damaged"),
        (rewritten(good, "xl/workbook.xml", b"\0"), "archive_damaged"),
    ):
        assert told(member, upload(content, "x.xlsx")) == [(None, code, 1)]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"PAR1" + bytes(40), "columnar_file"),
        (b"ARROW1" + bytes(40), "columnar_file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "foreign_workbook"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(40), "foreign_archive"),
        (zipped({"content.xml": b"<x/>", "mimetype": b"x"}).getvalue(), "foreign_workbook"),
        (zipped({"xl/workbook.bin": b"x"}).getvalue(), "foreign_workbook"),
    ],
    ids=["parquet", "arrow", "xls", "7z", "ods", "xlsb"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_other_forms_are_named_with_what_to_write_instead(member, content, code, packed):
    file = gzipped(content, "train.json.gz") if packed else upload(content, "rows.json")
    if packed and content.startswith(b"PK"):
        code = "foreign_archive"
    assert told(member, file) == [(None, code, 1)]


# --- JSON however it was written


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in TABLE),
        "".join(json.dumps(row, indent=1) for row in TABLE),
        json.dumps({"data": TABLE}),
        json.dumps({"data": TABLE}, indent=2),
        json.dumps({"version": "1.0", "n": 2, "rows": TABLE, "licence": "CC0"}),
        json.dumps({"data": TABLE[:1]}) + "\n",
        json.dumps({name: {str(n): row[name] for n, row in enumerate(TABLE)} for name in TABLE[0]}),
        json.dumps({name: [row[name] for row in TABLE] for name in TABLE[0]}, indent=4),
        json.dumps({str(at): row for at, row in enumerate(TABLE)}),
        json.dumps({"columns": ["content", "summary"], "index": [0, 1], "data": PAIRS}),
        json.dumps(TABLE[:1]) + "\n" + json.dumps(TABLE[1:]),
        json.dumps(TABLE[0]),
    ],
    ids=[
        "pretty objects", "pretty, joined", "data", "data, pretty", "with facts beside", "one row",
        "by column and index", "by column", "by index", "split", "two arrays", "one object",
    ],
)  # fmt: skip
def test_json_is_read_however_it_was_written(member, text):
    found = taken(member, upload(text))
    assert found in (PAIRS, PAIRS[:1]) and len(found) == text.count(json.dumps("好看")[1:-1]) + (
        text.count(json.dumps("百搭")[1:-1]) + text.count("好看") + text.count("百搭")
    )
    assert store.detect_columns(upload(text))["prompt_column"] == "content"


def test_pretty_printed_conversations_and_those_on_one_line_are_rows_not_tables(member):
    row = {
        "id": "1",
        "conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}],
    }
    for text in (json.dumps(row), json.dumps(row, indent=2), json.dumps({"data": [row]})):
        assert taken(member, upload(text)) == [("问", "答")]
    by_column = {
        "messages": [[{"role": "user", "content": "问"}, {"role": "bot", "content": "答"}]]
    }
    assert taken(member, upload(json.dumps(by_column))) == [("问", "答")]


def test_a_large_wrapper_is_read_a_row_at_a_time():
    many = [{"content": "裙" * 400, "summary": f"{row}"} for row in range(8000)]
    text = json.dumps({"data": many}, ensure_ascii=False)
    source = Source("x.json", upload(text))
    columns, findings = Columns("content", "summary"), Findings()
    tracemalloc.start()
    found = sum(1 for _ in examples_of(source, columns, Limits(), findings))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 8000 and not findings.total and peak < 4 << 20


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ('[{"content":"a","summary":"b"},]', [(1, "stray_comma", 1)]),
        ('{"content":"a","summary":"b",}\n' * 2, [(1, "stray_comma", 2), (None, "no_rows", 1)]),
        ('{"content":"a","summary":"b"},\n' * 3, [(1, "stray_comma", 3), (None, "no_rows", 1)]),
        ("{'content':'a'}\n" * 2, [(1, "wrong_quotes", 2), (None, "no_rows", 1)]),
        ("{“content”:“a”}\n" * 2, [(1, "wrong_quotes", 2), (None, "no_rows", 1)]),
        ('["问","答"]\n["问2","答2"]', [(1, "no_names", 2), (None, "no_rows", 1)]),
        ('[["问","答"],\n["问2","答2"]]', [(1, "no_names", 2), (None, "no_rows", 1)]),
        ("oops\n" * 900, [(1, "not_json", 900), (None, "no_rows", 1)]),
        ('{\n "content": "a",\n "summary": "b"\n}\n{\n "content" "c"\n}', [(6, "broken_json", 1)]),
        ('[\n{"content":"a","summary":"b"},\n{"content":"a","summ', [(3, "unfinished", 1)]),
        (
            json.dumps({"train": TABLE, "validation": TABLE}, indent=1),
            [(12, "two_lists", 1)],
        ),
    ],
)
def test_what_cannot_be_read_is_one_finding_a_kind(member, text, findings):
    columns = {"prompt_column": "content", "response_column": "summary"}
    assert told(member, upload(text), **columns) == findings
    assert told(member, upload(text))[0][:2] == findings[0][:2] or findings[0][0] > 1


def test_a_one_line_array_cut_inside_a_character_still_suggests_its_columns():
    text = json.dumps([{"content": "裙" * 90, "summary": "看"}] * 5000, ensure_ascii=False)
    for cut in range(4):
        head = text.encode("gb18030")[: (1 << 20) - cut]
        found = store.detect_columns(upload(head))
        assert (found["prompt_column"], found["encoding"]) == ("content", "gb18030")


# --- rows as the field writes them


def test_a_system_text_beside_the_row_stands_before_the_first_question(member):
    alpaca = {"instruction": "问", "input": "", "output": "答", "system": "你是店员"}
    assert taken(member, upload(lines(alpaca))) == [("你是店员\n问", "答")]
    turns = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    shared = {"system": "你是店员", "conversations": [*turns, *turns]}
    dataset = ingest(upload(lines(shared)), name="x", owner=member)
    row = store.examples(dataset.current, "train", 0, 1)[0]
    assert (row["history"], row["prompt"]) == ([["你是店员\n问", "答"]], "问")
    # a column that the user names is that column
    plain = {"system": "问", "response": "答"}
    columns = {"prompt_column": "system", "response_column": "response"}
    assert taken(member, upload(lines(plain)), **columns) == [("问", "答")]


def test_an_alpaca_row_without_instruction_has_its_input_as_prompt(member):
    row = {"instruction": "", "input": "裙子", "output": "好看"}
    assert taken(member, upload(lines(row))) == [("裙子", "好看")]
    dolly = {"instruction": "谁？", "context": "李白写诗。", "response": "李白"}
    assert taken(member, upload(lines(dolly))) == [("谁？\n李白写诗。", "李白")]


def test_sharegpt_as_found_in_the_wild(member):
    def conversation(*turns, **beside):
        told = [{"from": who, "value": text, "markdown": None} for who, text in turns]
        return {"id": "x", "conversations": told, **beside}

    good = [
        conversation(("Human", "问0"), ("chatgpt", "答")),
        conversation(("user", "问1"), ("bing", "答")),
        conversation(("gpt", "早前"), ("human", "问2"), ("gpt", "答")),
        conversation(("human", "问3"), ("gpt", "答"), ("human", "谢谢")),
    ]
    bad = [
        conversation(("human", "查"), ("function_call", "{}"), ("observation", "1"), ("gpt", "答")),
        conversation(("human", "问"), ("gpt", ""), ("human", "再问"), ("gpt", "答")),
        conversation(("human", "问"), ("gpt", "")),
    ]
    dataset = ingest(upload(lines(*good, *bad)), name="x", owner=member)
    found = store.examples(dataset.current, "train", 0, 9)
    assert [(row["prompt"], row["response"], row["history"]) for row in found] == [
        (f"问{number}", "答", []) for number in range(4)
    ]
    assert [(kind["line"], kind["code"], kind["level"]) for kind in dataset.problems] == [
        (3, "leading_answer", "warning"),
        (4, "open_question", "warning"),
        (5, "tool_turn", "warning"),
        (6, "empty_turn", "warning"),
        (7, "empty_response", "warning"),
    ]
    firefly = {"conversation": [{"human": "问", "assistant": "答"}]}
    assert taken(member, upload(lines(firefly))) == [("问", "答")]
    parts = {"role": "user", "content": [{"type": "text", "text": "问"}]}
    openai = {"messages": [parts, {"role": "assistant", "content": "答"}]}
    assert taken(member, upload(lines(openai))) == [("问", "答")]


# --- two files


def test_train_and_validation_files_may_each_be_packed(member):
    train, dev = lines(*rows(7)), lines(*rows(2, 100))
    for first, second in (
        (gzipped(train, "train.json.gz"), gzipped(dev, "dev.json.gz")),
        (zipped({"a.json": train}, "train.zip"), upload(dev, "dev.json")),
        (tarred({"a.json": train}, "train.tar.gz"), upload(gzip.compress(dev), "dev.json.gz")),
    ):
        dataset = ingest(first, name="x", owner=member, validation=second)
        splits = dataset.current.splits
        assert {name: entry["rows"] for name, entry in splits.items()} == {
            "train": 7,
            "validation": 2,
        }
    both = tarred({"train.json": train, "dev.json": dev})
    assert told(member, both, validation=upload(dev, "dev.json")) == [
        (None, "two_files_for_split", 1)
    ]
