"""`manage.py prune`: counts first, deletes when told, and only what is old."""

import os
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from chat.models import Conversation
from portal.models import Run

pytestmark = pytest.mark.django_db
LONG_AGO = timezone.now() - timedelta(days=100)


@pytest.fixture
def old_and_new(member, data_dir):
    for title, messages in (("old", ["complete"]), ("busy", ["streaming"]), ("new", ["complete"])):
        conversation = Conversation.objects.create(owner=member, title=title)
        for status in messages:
            conversation.messages.create(role="assistant", status=status)
    Conversation.objects.exclude(title="new").update(updated_at=LONG_AGO)
    for name, status, ended in (
        ("old", "failed", LONG_AGO),
        ("recent", "failed", timezone.now()),
        ("running", "running", None),
    ):
        run = Run.objects.create(
            owner=member, kind="tuning", name=name, status=status, finished_at=ended
        )
        run.state_folder.mkdir(parents=True)
        (run.state_folder / "state.pt").write_bytes(b"x" * 2**20)
        run.log_path.write_text("what happened")
    for name, days in (("99-abcd", 100), ("98-abcd", 0)):
        folder = data_dir / "runs" / name
        folder.mkdir()
        stamp = (timezone.now() - timedelta(days=days)).timestamp()
        os.utime(folder, (stamp, stamp))
    return data_dir


def test_a_dry_run_counts_and_delete_deletes(old_and_new, capsys):
    def left():
        states = {run.name for run in Run.objects.all() if run.state_folder.exists()}
        folders = {path.name for path in (old_and_new / "runs").iterdir()}
        return set(Conversation.objects.values_list("title", flat=True)), states, folders

    before = left()
    call_command("prune", "--conversations", "30", "--runs", "30")
    said = capsys.readouterr().out
    assert left() == before and "Nothing was deleted" in said
    assert "1 conversations" in said and "2 folders" in said and "1.0 MB" in said
    call_command("prune", "--conversations", "30", "--runs", "30", "--delete")
    titles, states, folders = left()
    assert titles == {"busy", "new"} and states == {"recent", "running"}
    assert before[2] - folders == {"99-abcd"}
    assert all(run.log_path.exists() for run in Run.objects.all()), "the log explains the run"


@pytest.mark.parametrize("arguments", [[], ["--runs", "0"]])
def test_it_asks_what_is_old(arguments):
    with pytest.raises(CommandError):
        call_command("prune", *arguments)
