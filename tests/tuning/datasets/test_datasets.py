"""From upload to rows by number: nothing half-written, content named by its hash, runs keep what
they used.
"""

import json
import tracemalloc

import pytest
from django.core.exceptions import ValidationError
from django.utils import translation

from chat.models import Checkpoint
from portal.models import Run
from tests.support.uploads import encrypted, gzipped, lines, rows, tarred, upload, zipped
from tuning.datasets import store
from tuning.datasets.store import DatasetRejected, ingest
from tuning.models import Dataset, DatasetVersion, TuningRun

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


def files(data_dir) -> list[str]:
    folder = data_dir / "datasets"
    return (
        sorted(path.name for path in folder.iterdir() if path.name != ".lock")
        if folder.exists()
        else []
    )


def stored(owner, count=10, **fields) -> Dataset:
    return ingest(upload(lines(*rows(count))), name="house style", owner=owner, **fields)


def a_run(dataset, owner, status) -> TuningRun:
    checkpoint, _ = Checkpoint.objects.get_or_create(
        name="base", defaults={"path": "x", "fingerprint": "y"}
    )
    return TuningRun.objects.create(
        owner=owner,
        kind=Run.Kind.TUNING,
        name="r",
        status=status,
        dataset_version=dataset.current,
        checkpoint=checkpoint,
    )


def test_an_upload_becomes_a_dataset_that_is_read_by_row(member, data_dir):
    dataset = stored(member, 10)
    version = dataset.current
    assert (dataset.problems, version.number, version.rows) == ([], 1, 10)
    assert (dataset.prompt_column, dataset.response_column) == ("content", "summary")
    with store.open_split(version, "train") as split:
        assert len(split) == 10
        assert split[3] == {
            "prompt": rows(4)[3]["content"],
            "response": rows(4)[3]["summary"],
            "history": [],
            "line": 4,
        }
        with pytest.raises(IndexError):
            split[10]
    assert [row["line"] for row in store.examples(version, "train", 8, 5)] == [9, 10]
    sha256 = version.splits["train"]["sha256"]
    assert files(data_dir) == [f"{sha256}.idx", f"{sha256}.jsonl"]


def test_the_same_rows_have_the_same_content_whatever_wraps_or_encodes_them(member, data_dir):
    content = lines(*rows(5))
    first = ingest(upload(content), name="a", owner=member).current
    for file in (
        gzipped(content),
        zipped({"x.jsonl": content}),
        upload(content.decode().encode("gb18030")),
    ):
        assert ingest(file, name="b", owner=member).current.sha256 == first.sha256
    assert len(files(data_dir)) == 2


def test_gb18030_is_accepted_and_told(member):
    assert (
        ingest(
            upload(lines(*rows(3)).decode().encode("gb18030")), name="", owner=member
        ).current.encoding
        == "gb18030"
    )


def test_train_and_dev_of_an_archive_become_two_splits(member):
    made = tarred(
        {"AdvertiseGen/train.json": lines(*rows(7)), "AdvertiseGen/dev.json": lines(*rows(2, 100))}
    )
    dataset = ingest(made, name="", owner=member)
    assert dataset.name == "AdvertiseGen", "as the archive, not as one of its files"
    assert {name: entry["rows"] for name, entry in dataset.current.splits.items()} == {
        "train": 7,
        "validation": 2,
    }
    assert dataset.current.rows == 9 and dataset.current.split_for_evaluation() == "validation"


@pytest.mark.parametrize(
    ("file", "columns", "code", "line"),
    [
        (upload("hello\nworld\n"), ("content", "summary"), "not_json", 1),
        (upload(b""), ("content", "summary"), "no_rows", None),
        (upload(b"\n\n"), (), "no_rows", None),
        (upload(lines({"content": "", "summary": "x"})), ("content", "summary"), "empty_prompt", 1),
        (upload(lines(*rows(2)) + b"{oops\n"), (), "not_json", 3),
        (upload(b"oops\n" + lines(*rows(2))), (), "not_json", 1),
        (upload(b"oops\noops\n"), (), "not_json", 1),
        (upload(b"\xff\xfe" + b"a\x00\x00\xd8\x0a\x00"), (), "broken_encoding", None),
        (upload(lines(*rows(2))), ("prompt", "response"), "missing_column", 1),
        (upload(lines({"frage": "a", "antwort": "b"})), (), "unknown_columns", 1),
        (upload("hello\n" * 3), (), "not_json", 1),
        (
            upload('{"content": "a" "summary": "b"}\n' + '{"content": "a", "summary": "b"}\n'),
            (),
            "not_json",
            1,
        ),
        (upload('["a", "b"]\n'), (), "no_names", 1),
        (encrypted(zipped({"train.json": lines(*rows(1))})), (), "archive_encrypted", None),
        (upload(b"\x89PNG\r\n\x1a\n" + bytes(range(256))), ("content", "summary"), "encoding", 1),
        (upload(b'"' + b"x" * (5 << 20)), ("content", "summary"), "line_too_long", 1),
        (gzipped(b"0" * (40 << 20)), (), "archive_bomb", None),
        (
            zipped({"a.json": lines(*rows(1)), "b.json": lines(*rows(1))}),
            (),
            "two_files_for_split",
            None,
        ),
        (
            zipped({"dev.json": lines(*rows(1)), "test.json": lines(*rows(1))}),
            (),
            "no_training_file",
            None,
        ),
    ],
)
def test_a_refused_upload_leaves_nothing_behind(member, data_dir, file, columns, code, line):
    file.seek(0)
    names = dict(zip(("prompt_column", "response_column"), columns, strict=False))
    with pytest.raises(DatasetRejected) as caught:
        ingest(file, name="bad", owner=member, **names)
    first = caught.value.problems[0]
    assert (
        (first["code"], first["line"]) == (code, line)
        and first["message"]
        and "%(" not in first["message"]
    )
    assert (
        not Dataset.objects.exists() and not DatasetVersion.objects.exists() and not files(data_dir)
    )


def test_two_hundred_megabytes_on_one_line_take_no_memory(member, data_dir, tmp_path):
    path = tmp_path / "one-line.json"
    with open(path, "wb") as file:
        file.write(b'{"content": "')
        file.truncate(190 << 20)  # the rest are NULs, and no line end anywhere
    tracemalloc.start()
    with open(path, "rb") as file, pytest.raises(DatasetRejected) as caught:
        ingest(file, name="x", owner=member, prompt_column="content", response_column="summary")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(found["line"], found["code"]) for found in caught.value.problems] == [
        (1, "line_too_long"),
        (None, "no_rows"),
    ]
    assert peak < 40 << 20 and not files(data_dir)


def test_a_wrong_column_names_those_that_are_there(member):
    with translation.override("en"), pytest.raises(DatasetRejected) as caught:
        ingest(
            upload(lines(*rows(3))),
            name="x",
            owner=member,
            prompt_column="prompt",
            response_column="summary",
        )
    assert [found["lines"] for found in caught.value.problems] == [[1, 2, 3], []]
    assert (
        caught.value.problems[0]["message"]
        == "There is no column “prompt”. The row has: content, summary."
    )


def test_bad_rows_reject_the_file_unless_they_shall_be_skipped(member, data_dir):
    content = (
        lines(*rows(2))
        + b"{oops\n"
        + lines({"content": "a"}, *rows(1, 9))
        + lines({"content": "a", "summary": ""})
    )
    with pytest.raises(DatasetRejected) as caught:
        ingest(upload(content), name="x", owner=member)
    assert [found["line"] for found in caught.value.problems] == [3, 4, 6] and not files(data_dir)
    dataset = ingest(upload(content), name="x", owner=member, skip_bad_rows=True)
    assert dataset.current.rows == 3 and dataset.problem_count == 3
    assert [found["level"] for found in dataset.problems] == ["error", "error", "warning"]


def test_a_split_without_rows_is_refused_even_so(member, data_dir):
    made = zipped({"train.json": lines(*rows(3)), "dev.json": b"{oops\n"})
    with pytest.raises(DatasetRejected) as caught:
        ingest(made, name="x", owner=member, skip_bad_rows=True)
    told = [(found["line"], found["code"], found["member"]) for found in caught.value.problems]
    assert told == [(1, "not_json", "dev.json"), (None, "no_rows", "dev.json")] and not files(
        data_dir
    )


def test_what_a_file_says_of_itself_can_always_be_told(member):
    for columns in (
        '{"\\ud800": "a"}',
        '{"a\\u0000b": "c"}',
    ):  # half a character; a NUL, which PostgreSQL does not take
        with pytest.raises(DatasetRejected) as caught:
            ingest(upload(columns), name="x", owner=member, prompt_column="p", response_column="r")
        assert not set("\0\ud800") & set(caught.value.problems[0]["message"])
        assert json.dumps(store.detect_columns(upload(columns)), ensure_ascii=False).encode()
    odd = tarred({"tr\udcffain.json": lines(*rows(1)), "\udcff.txt": b""})
    dataset = ingest(odd, name="", owner=member)
    assert dataset.name == "tr?ain" and dataset.problems[0]["member"] == "?.txt"
    assert store.detect_columns(upload("prompt,response\na,b\n", "x.csv"))["columns"] == [
        "prompt",
        "response",
    ]


def test_rows_without_text_are_passed_over_with_a_warning(member):
    dataset = ingest(
        upload(lines(*rows(2), {"content": "a", "summary": " "})), name="x", owner=member
    )
    assert dataset.current.rows == 2
    assert [(found["line"], found["code"], found["level"]) for found in dataset.problems] == [
        (3, "empty_response", "warning")
    ]


def test_a_failure_behind_the_files_leaves_no_row(member, data_dir, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("database away")

    monkeypatch.setattr(store, "_add_version", broken)
    with pytest.raises(RuntimeError):
        stored(member)
    assert not Dataset.objects.exists() and not [
        name for name in files(data_dir) if name.startswith(".incoming")
    ]


def test_columns_are_suggested_before_anything_is_stored(member, data_dir):
    found = store.detect_columns(
        tarred({"train.json": lines(*rows(3)), "dev.json": lines(*rows(1))})
    )
    assert (found["format"], found["columns"], found["member"]) == (
        "adgen",
        ["content", "summary"],
        "train.json",
    )
    assert found["row"] == rows(1)[0] and not files(data_dir)
    found = store.detect_columns(upload(lines({"frage": "a", "antwort": "b"})))
    assert (found["format"], found["columns"]) == ("", ["frage", "antwort"])
    with pytest.raises(DatasetRejected) as caught:
        store.detect_columns(upload(b"\x00\x01"))
    assert [(found["line"], found["code"]) for found in caught.value.problems] == [
        (1, "not_json"),
    ]


def test_a_validation_split_is_a_new_version(member, data_dir):
    dataset = stored(member, 50)
    first = dataset.current
    version = store.add_split(dataset, 0.2, seed=7)
    assert (version.number, {name: entry["rows"] for name, entry in version.splits.items()}) == (
        2,
        {"train": 40, "validation": 10},
    )
    parts = [store.examples(version, name, 0, 100) for name in ("train", "validation")]
    together = {row["prompt"] for part in parts for row in part}
    assert together == {row["content"] for row in rows(50)}  # each row on one side
    assert first.splits["train"]["rows"] == 50 and store.examples(first, "train", 0, 100)
    again = store.add_split(stored(member, 50), 0.2, seed=7)
    assert again.sha256 == version.sha256  # the seed decides, nothing else
    with pytest.raises(ValidationError, match="already"), translation.override("en"):
        store.add_split(dataset, 5)
    for count in (0, 50, 1.5):
        with pytest.raises(ValidationError):
            store.add_split(stored(member, 50), count)


def test_a_dataset_without_runs_is_deleted_with_its_files(
    member, data_dir, django_capture_on_commit_callbacks
):
    keep, drop = stored(member, 3), stored(member, 4)
    with django_capture_on_commit_callbacks(execute=True):
        store.delete(drop)
    assert set(Dataset.objects.all()) == {keep}
    assert files(data_dir) == [
        f"{keep.current.splits['train']['sha256']}.{end}" for end in ("idx", "jsonl")
    ]


def test_content_that_another_dataset_shares_stays(
    member, data_dir, django_capture_on_commit_callbacks
):
    keep, drop = stored(member, 3), stored(member, 3)
    with django_capture_on_commit_callbacks(execute=True):
        store.delete(drop)
    assert store.examples(keep.current, "train", 0, 9)


def test_a_dataset_that_a_run_needs_is_kept_for_it(member, data_dir):
    dataset = stored(member)
    run = a_run(dataset, member, Run.Status.RUNNING)
    with pytest.raises(ValidationError) as caught:
        store.delete(dataset)
    assert caught.value.code == "in_use" and Dataset.objects.visible_to(member).exists()
    Run.objects.filter(pk=run.pk).update(status=Run.Status.SUCCEEDED)
    store.delete(dataset)
    assert not Dataset.objects.visible_to(member).exists()
    run.refresh_from_db()
    assert (
        store.examples(run.dataset_version, "train", 0, 1)
        and run.dataset_version.dataset.name == "house style"
    )


def test_the_sample_is_registered_once_and_belongs_to_everybody(member, data_dir):
    store.ensure_sample()
    store.ensure_sample()
    sample = Dataset.objects.visible_to(member).get()
    assert {name: entry["rows"] for name, entry in sample.current.splits.items()} == {
        "train": 1000,
        "validation": 100,
    }
    assert not Dataset.objects.changeable_by(member)
    for path in (data_dir / "datasets").glob("*.jsonl"):
        path.unlink()
    store.ensure_sample()  # the data folder was lost: the files come back
    assert store.examples(sample.current, "train", 0, 1)


def test_every_problem_has_words():
    for code, message in store.MESSAGES.items():
        names = {name.split(")")[0] for name in message.split("%(")[1:]}
        found = store.worded(
            {"line": 1, "code": code, "level": "error", "params": dict.fromkeys(names, "7")}
        )
        assert "%(" not in found["message"] and json.dumps(found)
