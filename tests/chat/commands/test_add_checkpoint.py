"""`add_checkpoint`, as an administrator types it."""

import pytest
from django.core.management import CommandError, call_command

from chat.models import Checkpoint
from tests.support.folders import checkpoint_folder

pytestmark = pytest.mark.django_db


def test_it_registers_a_folder_and_says_what_it_is(tmp_path, capsys):
    call_command("add_checkpoint", str(checkpoint_folder(tmp_path / "a")), "--name", "tiny")
    call_command("add_checkpoint", str(checkpoint_folder(tmp_path / "b", seed=1)), "--default")
    assert "tiny: Qwen2ForCausalLM" in capsys.readouterr().out
    assert Checkpoint.default().name == "b"


def test_it_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CommandError, match=r"config\.json"):
        call_command("add_checkpoint", str(tmp_path))
    assert not Checkpoint.objects.exists()
