"""`fetch_checkpoint`, as an administrator types it, from a folder of this machine."""

import pytest
from django.core.management import CommandError, call_command
from django.utils.translation import override

from chat.models import Checkpoint, FetchRun
from tests.support.folders import checkpoint_folder

pytestmark = pytest.mark.django_db(transaction=True)


def test_it_fetches_registers_and_says_what_has_come(tmp_path, capsys, data_dir, admin_user):
    folder = checkpoint_folder(tmp_path / "brought")
    call_command("fetch_checkpoint", str(folder), "--name", "tiny", "--default")
    assert "tiny: Qwen2ForCausalLM" in capsys.readouterr().out
    assert Checkpoint.default().name == "tiny"
    run = FetchRun.objects.get()
    assert run.status == "succeeded" and run.owner == admin_user
    assert str(run.pk) in run.log_tail()


def test_it_refuses_in_a_sentence(tmp_path, data_dir, admin_user, member):
    with pytest.raises(CommandError, match="nobody-here"):
        call_command("fetch_checkpoint", "nobody-here")
    # whatever language an earlier test has left
    with override("en"), pytest.raises(CommandError, match="Only administrators"):
        call_command("fetch_checkpoint", str(tmp_path), "--user", member.username)
    with pytest.raises(CommandError, match="nobody"):
        call_command("fetch_checkpoint", str(tmp_path), "--user", "nobody")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError):
        call_command("fetch_checkpoint", str(tmp_path / "empty"))
    assert not Checkpoint.objects.exists()


def test_without_an_administrator_it_says_how_to_make_one(tmp_path, data_dir, member):
    with pytest.raises(CommandError, match="createsuperuser"):
        call_command("fetch_checkpoint", str(checkpoint_folder(tmp_path / "brought")))
