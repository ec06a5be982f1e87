"""The findings of an upload in people's words: what is wrong, and what to write instead."""

from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from portal.explanations import sentence
from tuning.datasets.findings import DatasetRejected

MESSAGES = {
    "not_json": gettext_lazy("This line is not JSON (at character %(position)s)."),
    "stray_comma": gettext_lazy(
        "A comma stands where JSON has none (at character %(position)s): behind the last value, or "
        "behind an object that stands alone on its line. Take it away."
    ),
    "wrong_quotes": gettext_lazy(
        "JSON has straight double quotation marks (another one stands at character %(position)s). "
        "Python writes such a row with json.dumps(row, ensure_ascii=False)."
    ),
    "json_comment": gettext_lazy(
        "JSON has no comments (one begins at character %(position)s). Take them out."
    ),
    "python_words": gettext_lazy(
        "None, True and False are Python's words (at character %(position)s); JSON has null, true "
        "and false. Python writes such a row with json.dumps(row, ensure_ascii=False)."
    ),
    "lfs_pointer": gettext_lazy(
        "This is not the data but a pointer of Git LFS to it. Fetch the file itself: git lfs pull."
    ),
    "web_page": gettext_lazy(
        "This is a web page, not data: perhaps the page about the file was saved, or a login page."
    ),
    "broken_json": gettext_lazy(
        "This is not JSON (at character %(position)s), and nothing behind it can be read."
    ),
    "unfinished": gettext_lazy(
        "The file ends before its last bracket is closed: it was cut off, or a bracket is missing."
    ),
    "two_lists": gettext_lazy(
        "Beside the rows in “%(first)s” the file holds “%(second)s”. Write the rows alone, one "
        "object per line; train and validation rows as two files."
    ),
    "no_names": gettext_lazy(
        "The row is a list or a text without column names. Write an object, for instance "
        '{"content": "…", "summary": "…"}.'
    ),
    "too_many_fields": gettext_lazy(
        "The row has %(fields)s fields, the header has %(names)s. A text with a comma in it stands "
        "in quotation marks."
    ),
    "unclosed_quote": gettext_lazy(
        "A quotation mark is opened in this row and never closed; all up to line %(until)s stands "
        "inside it. A quotation mark that belongs to the text is written twice."
    ),
    "stray_quote": gettext_lazy(
        "The quotation marks of this row do not match; it was read up to line %(until)s. One that "
        "belongs to the text is written twice, and the text stands in quotation marks."
    ),
    "column_twice": gettext_lazy("The header names “%(column)s” twice. Give each its own name."),
    "empty_turn": gettext_lazy(
        "Turn %(turn)s of the conversation has no text: the row is left out."
    ),
    "tool_turn": gettext_lazy(
        "The conversation calls tools (turn %(turn)s), which no model here is trained to do: the "
        "row is left out."
    ),
    "picture_turn": gettext_lazy(
        "Turn %(turn)s of the conversation holds something other than text, such as a picture: the "
        "row is left out."
    ),
    "leading_answer": gettext_lazy(
        "The conversation begins with an answer. It is left out, the rest is kept."
    ),
    "open_question": gettext_lazy(
        "The conversation ends with a question. It is left out, the rest is kept."
    ),
    "broken_encoding": gettext_lazy(
        "The file begins as %(encoding)s text but cannot be read as that. Save it as UTF-8."
    ),
    "columnar_file": gettext_lazy(
        "This is a %(form)s file. Write it as JSON lines, with pandas: "
        'pd.read_parquet("rows.parquet").to_json("rows.jsonl", orient="records", '
        "lines=True, force_ascii=False)"
    ),
    "foreign_workbook": gettext_lazy(
        "This is a workbook of the form %(form)s. Save it as Excel workbook (.xlsx) or CSV UTF-8."
    ),
    "foreign_archive": gettext_lazy(
        "This is an archive of the form %(form)s inside or around the data. Pack the files "
        "themselves as .zip, .gz or .tar.gz."
    ),
    "no_sheet": gettext_lazy("There is no sheet “%(sheet)s”. There are: %(sheets)s."),
    "other_sheets": gettext_lazy(
        "The sheet “%(sheet)s” is read. The workbook's others are left out: %(others)s."
    ),
    "title_row": gettext_lazy(
        "“%(title)s” is taken for the sheet's title; the names of the columns stand below it."
    ),
    "workbook_too_large": gettext_lazy(
        "The workbook is too large to be read safely (about %(rows)s rows). Save it as CSV UTF-8."
    ),
    "duplicate_row": gettext_lazy(
        "The row repeats another one (the first is line %(first)s). Repeated rows weigh more."
    ),
    "conflicting_response": gettext_lazy(
        "The prompt stands in another row too, with another response: the model learns a mixture."
    ),
    "seen_in_training": gettext_lazy(
        "The prompt stands in the training rows: scores on this row say nothing about new ones."
    ),
    "damaged_text": gettext_lazy(
        "The text looks damaged by a wrong encoding (for instance “�” or “锟斤拷”)."
    ),
    "not_compared": gettext_lazy("Only the first %(rows)s rows were compared with each other."),
    "not_csv": gettext_lazy(
        "This line is not CSV: a carriage return stands where no line end may be. Save the file "
        "with the usual line ends."
    ),
    "not_object": gettext_lazy("This row is not an object with columns."),
    "missing_column": gettext_lazy("There is no column “%(column)s”. The row has: %(columns)s."),
    "not_text": gettext_lazy("The column “%(column)s” is not text."),
    "half_character": gettext_lazy("The row holds half a character (a lone surrogate)."),
    "nul": gettext_lazy("The row holds a NUL character, which no text has."),
    "empty_prompt": gettext_lazy("The prompt is empty: the row is left out."),
    "empty_response": gettext_lazy("The response is empty: the row is left out."),
    "bad_history": gettext_lazy(
        "The column “%(column)s” is not a list of [question, answer] pairs."
    ),
    "bad_conversation": gettext_lazy(
        "Turn %(turn)s of “%(column)s” is out of place: a system text may come first, then user "
        "and assistant take turns."
    ),
    "line_too_long": gettext_lazy("The line is longer than %(limit)s MB."),
    "too_many_lines": gettext_lazy("The file has more than %(limit)s lines."),
    "encoding": gettext_lazy("The text is neither UTF-8 nor GB18030."),
    "no_rows": gettext_lazy("The file holds no row that can be used."),
    "too_large": gettext_lazy("The file, or what is packed in it, is larger than %(limit)s MB."),
    "archive_bomb": gettext_lazy(
        "The archive unpacks to more than %(ratio)s times its size and is refused."
    ),
    "archive_members": gettext_lazy("The archive holds more than %(limit)s files and is refused."),
    "archive_encrypted": gettext_lazy("The archive is encrypted. Pack it without a password."),
    "archive_damaged": gettext_lazy("The archive cannot be read: %(detail)s."),
    "archive_member": gettext_lazy(
        "This member of the archive is not a data file and is left out."
    ),
    "no_data_file": gettext_lazy("There is no data file in the archive (%(suffixes)s)."),
    "two_files_for_split": gettext_lazy(
        "Two files of the archive would be the split “%(split)s”: %(members)s."
    ),
    "no_training_file": gettext_lazy("None of the archive's files is named train: %(members)s."),
    "unknown_columns": gettext_lazy(
        "The columns for prompt and response could not be recognised. Name them. The row has: "
        "%(columns)s."
    ),
}


def worded(found: dict[str, Any]) -> dict[str, Any]:
    """A problem with its message in the active language: {"line", "code", "message", "level",
    "member"?}.
    """
    told = {key: value for key, value in found.items() if key != "params"}
    return {**told, "message": sentence(MESSAGES, found["code"], found["params"])}


def in_short(rejected: DatasetRejected) -> str:
    """The first of a rejection's worded problems, with its line."""
    first = rejected.problems[0]
    return (_("Line %(line)s: ") % {"line": first["line"]} if first["line"] else "") + first[
        "message"
    ]


def change_in_words(change: dict[str, Any]) -> str:
    """What made a version of the one before (DatasetVersion.change); "" for an upload."""
    told = {
        "split": _("%(rows)s rows set aside for validation"),
        "edit": _("%(changed)s changed, %(excluded)s left out, %(added)s added"),
        "collect": _("%(added)s answers from chat added"),
        "merge": _("%(added)s rows of “%(name)s” added, %(repeated)s were here already"),
    }.get(change.get("action", ""), "")
    return told % {**change, "name": change.get("other", {}).get("name", "")}
