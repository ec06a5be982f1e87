"""Further kinds of files as people have them, each tried once: read as the field reads it, or one
finding a kind that says what to write.
"""

import datetime
import io
import json

import pytest
from openpyxl import Workbook

from tests.support.uploads import gzipped, lines, tarred, upload, zipped
from tests.tuning.datasets.test_files_as_they_come import PAIRS, TABLE, noted, taken, told
from tuning.datasets import store
from tuning.datasets.store import ingest

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]
TEXT = lines(*TABLE).decode()
CSV = "content,summary\n裙子,好看\n裤子,百搭\n"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (TEXT.encode("utf-32-le"), "x.jsonl"),
        (TEXT.encode("utf-32-be"), "x.jsonl"),
        (b"\x84\x31\x95\x33" + TEXT.encode("gb18030"), "x.jsonl"),
        (TEXT.replace("\n", "\r\n").encode("utf-16"), "x.json"),
        (("\ufeff" + TEXT.replace("\n", "\n\ufeff", 1)).encode(), "x.json"),
        (TEXT.replace("\n", "\r").encode(), "x.json"),
        (TEXT.encode(), "x.txt"),
        (TEXT.encode(), "x.csv"),
        (json.dumps(TABLE, indent=1).encode(), "x.txt"),
        (CSV.encode(), "x.txt"),
        (CSV.encode(), "x.json"),
        (CSV.replace(",", "\t").encode(), "x.txt"),
        (CSV.replace(",", ";").encode("gb18030"), "x.csv"),
        (CSV.replace(",", "|").encode(), "x.csv"),
        (("sep=;\n" + CSV.replace(",", ";")).encode("utf-8-sig"), "x.csv"),
        (CSV.replace("\n", "\r").encode(), "x.csv"),
        (CSV.replace("content", " Content ").replace("summary", "SUMMARY").encode(), "x.csv"),
    ],
    ids=[
        "UTF-32-LE", "UTF-32-BE", "GB18030 with mark", "UTF-16 CRLF", "marks between",
        "old Mac's lines", "lines in .txt", "lines in .csv", "array in .txt", "CSV in .txt",
        "CSV in .json", "TSV in .txt", "semicolons", "bars", "sep=", "old Mac's CSV", "case",
    ],
)  # fmt: skip
def test_the_same_rows_however_they_were_saved(member, content, name):
    assert taken(member, upload(content, name)) == PAIRS
    found = store.detect_columns(upload(content, name))
    assert found["prompt_column"].strip().lower() == "content"


@pytest.mark.parametrize(
    ("text", "name", "findings"),
    [
        ("", "x.json", [(None, "no_rows", 1)]),
        ("\ufeff \n\n", "x.csv", [(None, "no_rows", 1)]),
        ("content,summary\n", "x.csv", [(None, "no_rows", 1)]),
        ("[]", "x.json", [(None, "no_rows", 1)]),
        ('{"data": []}', "x.json", [(1, "unknown_columns", 1)]),
        ('// rows\n{"content": "a"}\n', "x.json", [(1, "json_comment", 1)]),
        ('[\n {"content": "a", # first\n "summary": "b"}]', "x.json", [(2, "json_comment", 1)]),
        ('{"content": "a", "summary": None}\n' * 2, "x.json", [(1, "python_words", 2)]),
        ("[{'content': 'a', 'summary': 'b'}]", "x.json", [(1, "wrong_quotes", 1)]),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n",
            "x.json",
            [(None, "lfs_pointer", 1)],
        ),
        ("\n<!DOCTYPE html>\n<html>" + "<p>\n" * 50, "x.json", [(None, "web_page", 1)]),
        ("<html><body>Log in", "x.csv", [(None, "web_page", 1)]),
        ("裙子很好看\n裤子很百搭\n", "x.txt", [(1, "not_json", 2)]),
    ],
    ids=[
        "empty", "mark and blanks", "header alone", "empty array", "empty wrapper", "//", "#",
        "None", "Python's array", "LFS", "HTML", "HTML as CSV", "prose",
    ],
)  # fmt: skip
def test_what_holds_no_rows_says_what_it_is(member, text, name, findings):
    found = told(member, upload(text, name))
    assert [one for one in found if one[1] != "no_rows" or findings[0][1] == "no_rows"] == findings


def test_a_line_of_fifty_megabytes_is_read_if_it_is_an_array_and_named_if_it_is_a_row(member):
    row = {"content": "裙" * 500, "summary": "看" * 500}
    many = json.dumps([{**row, "n": n} for n in range(17_500)], ensure_ascii=False)
    assert len(many.encode()) > 50 << 20
    assert ingest(upload(many), name="x", owner=member).current.rows == 17_500
    text = json.dumps({"content": "裙" * (17 << 20), "summary": "b"}, ensure_ascii=False)
    columns = {"prompt_column": "content", "response_column": "summary"}
    assert told(member, upload(text), **columns)[0][:2] == (1, "line_too_long")


def test_what_pandas_writes_for_a_missing_cell_is_an_empty_one(member):
    text = '{"content": "a", "summary": NaN}\n{"content": "裙子", "summary": "好看"}\n'
    assert noted(member, upload(text)) == [(1, "empty_response", "warning")]
    assert taken(member, upload(text)) == PAIRS[:1]


def test_a_workbook_of_dates_formulas_and_merged_cells(member):
    book = Workbook()
    sheet = book.active
    sheet.append(["内容汇总"])
    sheet.merge_cells("A1:C1")
    sheet.append(["问题", "回答", "日期"])
    sheet.append(["几号？", datetime.datetime(2024, 3, 5), 1])
    sheet.append(["几点？", datetime.time(8, 30), 2])
    sheet.append(["和？", "=1+2", 3])  # never computed: it has no value
    sheet.append(["多少？", 0.5, 4])
    book.create_sheet("说明").append(["别读我"])
    out = io.BytesIO()
    book.save(out)
    file = upload(out.getvalue(), "x.xlsx")
    assert taken(member, file, prompt_column="问题", response_column="回答") == [
        ("几号？", "2024-03-05"),
        ("几点？", "08:30:00"),
        ("多少？", "0.5"),
    ]
    assert (5, "empty_response", "warning") in noted(
        member, upload(out.getvalue(), "x.xlsx"), prompt_column="问题", response_column="回答"
    )


def test_files_in_folders_are_split_by_what_their_folders_are_called(member):
    one, two = lines(TABLE[0]), lines(TABLE[1])
    for members in (
        {"data/train.json": one, "data/dev.json": two, "__MACOSX/data/._train.json": b"\0\5"},
        {"set/train/part.jsonl": one, "set/validation/part.jsonl": two, "set/README.md": b"#"},
        {"x/train.txt": one, "x/valid.txt": two},
    ):
        for file in (zipped(members), tarred(members)):
            dataset = ingest(file, name="x", owner=member)
            assert {name: entry["rows"] for name, entry in dataset.current.splits.items()} == {
                "train": 1,
                "validation": 1,
            }
    assert taken(member, gzipped(one, "rows.txt.gz")) == PAIRS[:1]


def test_conversations_as_other_tools_write_them(member):
    def shared(*turns):
        return {"conversations": [{"from": who, "value": text} for who, text in turns]}

    rows = [
        shared(("Human ", "问0"), ("GPT", "答")),
        {"conversations": [{"role": "user", "text": "问1"}, {"role": "model", "text": "答"}]},
        {"conversation": [{"role": "USER", "content": "问2"}, {"role": "Bot", "content": "答"}]},
        {"Messages": [{"role": "developer", "content": "短"}, {"role": "user", "content": "问3"},
                      {"role": "assistant", "content": [{"type": "text", "text": "答"}]}]},
        {"dialogue": [{"speaker": "user", "text": "问4"}, {"speaker": "assistant", "text": "答"}]},
    ]  # fmt: skip
    for number, row in enumerate(rows):
        ((prompt, response),) = taken(member, upload(lines(row)))
        assert (prompt.endswith(f"问{number}"), response) == (True, "答")
    picture = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "看"}]
    turns = [{"role": "user", "content": picture}, {"role": "assistant", "content": "裙"}]
    calls = [
        {"role": "user", "content": "查"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "assistant", "content": "好"},
    ]
    good = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    file = lines({"messages": good}, {"messages": turns}, {"messages": calls})
    assert noted(member, upload(file)) == [
        (2, "picture_turn", "warning"), (3, "tool_turn", "warning"),
    ]  # fmt: skip
    odd = shared(("narrator", "从前"), ("human", "问"), ("gpt", "答"))
    assert told(member, upload(lines(odd)))[0][:2] == (1, "bad_conversation")


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("问题", "回答"), (" 问题 ", "回答"), ("提问", "回复"), ("指令", "输出"), ("用户", "助手"),
        ("Prompt", "Completion"), ("User Input", "Model Output"), ("QUESTION", "Answer"),
        ("src", "tgt"), ("source", "target"), ("user", "assistant"), ("instruction", "response"),
    ],
)  # fmt: skip
def test_columns_are_recognised_however_they_are_called(member, prompt, response):
    assert taken(member, upload(lines({prompt: "裙子", response: "好看", "id": 1}))) == PAIRS[:1]
    table = f"id,{prompt},{response}\n1,裙子,好看\n"
    assert taken(member, upload(table, "x.csv")) == PAIRS[:1]


def test_alpaca_with_history_and_input(member):
    row = {"instruction": "再问", "input": "裙子", "output": "答", "history": [["问", "答0"]]}
    dataset = ingest(upload(lines(row)), name="x", owner=member)
    found = store.examples(dataset.current, "train", 0, 1)[0]
    assert (found["prompt"], found["history"]) == ("再问\n裙子", [["问", "答0"]])
