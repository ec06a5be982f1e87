"""Every format people have becomes the same examples; every bad row is named with its line."""

import csv
import io
import json

import pytest

from tests.support.uploads import lines, upload
from tuning.datasets.columns import suggest
from tuning.datasets.findings import KEPT_LINES, DatasetRejected, Findings
from tuning.datasets.rows import Columns, examples_of, first_row
from tuning.datasets.sources import CHUNK, Limits, Source, as_text

LIMITS = Limits()
ADGEN = Columns("content", "summary")
EXPECTED = [
    {"prompt": "一加一？", "response": "二。"},
    {"prompt": "再加一？", "response": "三。", "history": [["一加一？", "二。"]]},
]


def read(content: bytes, columns: Columns, name: str = "rows.json", limits=LIMITS):
    source = as_text(name, upload(content))
    findings = Findings()
    found = [json.loads(line) for line in examples_of(source, columns, limits, findings)]
    return found, findings


def problems(findings) -> list[tuple]:
    """(line, code) of every row that has a problem, those of a kind together."""
    return [(line, found["code"]) for found in findings.problems for line in found["lines"]]


def as_csv(*rows: dict, delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


PLAIN = [
    {"prompt": "一加一？", "response": "二。", "history": []},
    {"prompt": "再加一？", "response": "三。", "history": [["一加一？", "二。"]]},
]
OPENAI = [
    {
        "messages": [
            {"role": "user", "content": "一加一？"},
            {"role": "assistant", "content": "二。"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "一加一？"},
            {"role": "assistant", "content": "二。"},
            {"role": "user", "content": "再加一？"},
            {"role": "assistant", "content": "三。"},
            {"role": "user", "content": "谢谢"},
        ]
    },
]
SHAREGPT = [
    {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
            for turn in row["messages"]
        ]
    }
    for row in OPENAI
]
ALPACA = [
    {"instruction": "一加一？", "input": "", "output": "二。", "history": None},
    {"instruction": "再加一？", "output": "三。", "history": [["一加一？", "二。"]]},
]
IN_CSV = [{**row, "history": json.dumps(row["history"], ensure_ascii=False)} for row in PLAIN]


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("prompt", "rows.jsonl", lines(*PLAIN)),
        ("prompt", "rows.json", json.dumps(PLAIN, ensure_ascii=False, indent=2).encode()),
        ("prompt", "rows.csv", as_csv(*IN_CSV)),
        ("prompt", "rows.tsv", as_csv(*IN_CSV, delimiter="\t")),
        ("alpaca", "rows.json", json.dumps(ALPACA).encode()),
        ("openai", "rows.jsonl", lines(*OPENAI)),
        ("sharegpt", "rows.json", json.dumps(SHAREGPT).encode()),
    ],
    ids=["jsonl", "array", "csv", "tsv", "alpaca", "openai", "sharegpt"],
)
def test_every_format_is_recognised_and_read(kind, name, content):
    suggested = suggest(list(first_row(Source(name, io.BytesIO(content)), Limits())[1]))
    assert suggested["format"] == kind
    columns = Columns(
        suggested["prompt_column"], suggested["response_column"], suggested["history_column"]
    )
    found, findings = read(content, columns, name)
    assert found == EXPECTED and not findings.errors


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_every_encoding(encoding, name):
    content = {
        "rows.jsonl": lines(*PLAIN),
        "rows.json": json.dumps(PLAIN, ensure_ascii=False).encode(),
        "rows.csv": as_csv(*IN_CSV),
    }[name]
    found, findings = read(
        content.decode().encode(encoding), Columns("prompt", "response", "history"), name
    )
    assert found == EXPECTED and not findings.problems


def test_alpaca_input_is_part_of_the_prompt():
    row = {"instruction": "翻译", "input": "你好", "output": "hello"}
    assert read(lines(row), Columns("instruction", "output"))[0] == [
        {"prompt": "翻译\n你好", "response": "hello"}
    ]


def test_a_system_text_stands_before_the_first_question():
    turns = [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
    ]
    assert read(lines({"messages": turns}), Columns("messages"))[0] == [
        {"prompt": "简短\n问", "response": "答"}
    ]


def test_bad_rows_are_all_named_with_their_lines():
    content = b"\n".join(
        [
            lines({"content": "a", "summary": "b"}).strip(),
            b"{not json",
            b"[1, 2]",
            b"",
            lines({"content": "a"}).strip(),
            lines({"content": 7, "summary": "b"}).strip(),
            lines({"content": " ", "summary": "b"}).strip(),
            lines({"content": "a", "summary": None}).strip(),
            b'{"content": "\\ud800", "summary": "half"}',
            b"[" * 100_000,
            b'{"content": ' + b"9" * 5000 + b', "summary": "b"}',
            lines({"content": "a\0", "summary": "b"}).strip(),
            lines({"content": "c", "summary": "d"}).strip(),
        ]
    )
    found, findings = read(content, ADGEN)
    assert found == [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    assert problems(findings) == [
        (2, "not_json"),
        (10, "not_json"),
        (11, "not_json"),
        (3, "no_names"),
        (5, "missing_column"),
        (6, "not_text"),
        (9, "half_character"),
        (12, "nul"),
        (7, "empty_prompt"),
        (8, "empty_response"),
    ]
    assert (findings.errors, findings.warnings, findings.usable) == (8, 2, 2)
    missing = next(found for found in findings.problems if found["code"] == "missing_column")
    assert missing["params"] == {"column": "summary", "columns": "content"}


def test_bad_histories_and_conversations():
    history = Columns("prompt", "response", "history")
    for bad in ("not json", [["only one"]], [[1, 2]], {"a": 1}, 3):
        content = lines({"prompt": "a", "response": "b", "history": bad})
        assert problems(read(content, history)[1]) == [(1, "bad_history")], bad
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for turns in (
        [user, user, answer],
        [user, answer, answer],
        [{"role": "judge", "content": "x"}],
        ["a"],
        "a",
    ):
        assert problems(read(lines({"messages": turns}), Columns("messages"))[1]) == [
            (1, "bad_conversation")
        ], turns
    assert problems(read(lines({"messages": [user]}), Columns("messages"))[1]) == [
        (1, "empty_response")
    ]


def test_an_array_is_read_across_chunk_borders_and_stops_at_its_first_error():
    rows = [
        {"content": "裙" * (number % 977), "summary": f"答{number}"} for number in range(1, 3000)
    ]
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    assert len(text.encode()) > 3 * CHUNK
    found, findings = read(text.encode(), ADGEN)
    assert [row["response"] for row in found] == [row["summary"] for row in rows if row["content"]]
    cut = text[: text.rindex('"summary"')]
    found, findings = read(cut.encode(), ADGEN)
    assert findings.errors == 1 and findings.problems[0]["code"] == "unfinished"
    assert findings.problems[0]["line"] >= cut.count("\n") and len(found) == 2998 - 2999 // 977
    for bad, code in {
        '[{"content": "a", "summary": "b"},]': "stray_comma",
        '[{"content": "a", "summary": "b"}': "unfinished",
        "[": "unfinished",
        "[1 2]": "broken_json",
        "[] x": "broken_json",
    }.items():
        assert problems(read(bad.encode(), ADGEN)[1]) == [(1, code)], bad
    assert not read(b" [ ] ", ADGEN)[1].problems


def test_a_line_without_end_is_skipped_and_never_held():
    limits = Limits(max_line_bytes=1000)
    good = lines({"content": "a", "summary": "b"})
    found, findings = read(good + b'"' + b"x" * 600_000 + b'"\n' + good, ADGEN, limits=limits)
    assert len(found) == 2 and problems(findings) == [(2, "line_too_long")]
    assert problems(read(b"[" + b'"' + b"x" * 600_000, ADGEN, limits=limits)[1]) == [
        (1, "line_too_long")
    ]


def test_lines_columns_and_cells_without_end_are_refused_before_they_cost_much():
    limits, good = Limits(max_lines=1000), lines({"content": "a", "summary": "b"})
    for blank in (b"\n", b" \n", b"\r\n"):
        found, findings = read(good * 2 + blank * 2000, ADGEN, limits=limits)
        assert len(found) == 2 and problems(findings) == [(1001, "too_many_lines")]
    found, findings = read(b"content,summary\n" + b"a,b\n" * 2000, ADGEN, "x.csv", limits)
    assert len(found) == 999 and problems(findings) == [(1001, "too_many_lines")]
    # each compared with every other would take minutes
    header = b",".join(b"c%d" % number for number in range(300_000))
    assert problems(read(header + b"\n1\n", ADGEN, "x.csv")[1]) == [(2, "missing_column")]
    assert problems(read(b"[" + b"1," * 5000 + b"!", ADGEN)[1]) == [(1, "no_names")]


def test_csv_fields_may_hold_line_ends_and_lines_are_still_right():
    content = b'content,summary\n"a\nb",c\nonly one\n"d","e"\n'
    found, findings = read(content, ADGEN, "rows.csv")
    assert found == [{"prompt": "a\nb", "response": "c"}, {"prompt": "d", "response": "e"}]
    assert problems(findings) == [(4, "missing_column")]


def test_broken_bytes_are_named_line_by_line():
    good = lines({"content": "这是一条裙子", "summary": "好看"})
    found, findings = read(
        good + b'{"content": "\xff", "summary": "b"}\n' + good + b"\xfe\n", ADGEN
    )
    assert len(found) == 2 and problems(findings) == [(2, "encoding"), (4, "encoding")]
    found, findings = read(
        "content,summary\n这是一条裙子,好看\n".encode() + b"\xff,b\n" + "裙,看\n".encode(),
        ADGEN,
        "rows.csv",
    )
    assert len(found) == 2 and problems(findings) == [(3, "encoding")]


def test_problems_are_counted_and_the_first_thousand_kept():
    content = lines({"content": "a", "summary": "b"}) + b"x\n" * 1500
    found, findings = read(content, ADGEN)
    assert len(found) == 1 and findings.errors == 1500
    assert [len(kind["lines"]) for kind in findings.problems] == [KEPT_LINES]
    assert findings.problems[0]["count"] == 1500
    # nothing usable among a thousand problems: it reads no further
    with pytest.raises(DatasetRejected):
        read(b"x\n" * 1500, ADGEN)


def test_a_file_of_one_line_is_read_when_its_rows_are_not_too_long():
    limits = Limits(max_line_bytes=1000)
    row = '{"content": "类型#裙", "summary": "这条裙子"}'
    found, findings = read(f"[{', '.join([row] * 5000)}]".encode(), ADGEN, limits=limits)
    assert (len(found), findings.problems) == (5000, [])
