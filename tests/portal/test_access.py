"""Keys, and who sees what."""

import io
import os
import stat
import subprocess
import sys

import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings

from chat.models import Adapter, Checkpoint, Conversation, Message
from portal.models import ApiKey, Run
from tests.support import ROOT
from tuning.models import Dataset

pytestmark = pytest.mark.django_db


def test_create_api_key_prints_the_key_alone_and_keeps_only_its_hash(member):
    out = io.StringIO()
    call_command("create_api_key", "member", "--name", "laptop", stdout=out)
    secret = out.getvalue().strip()
    assert secret.startswith("sk-") and len(secret.split()) == 1
    key = ApiKey.objects.get()
    assert secret not in (key.digest, key.prefix) and ApiKey.user_of(secret) == member
    with pytest.raises(CommandError):
        call_command("create_api_key", "nobody")


def test_revoked_keys_and_keys_of_inactive_users_open_nothing(member):
    key, secret = ApiKey.create_for(member)
    member.is_active = False
    member.save()
    assert ApiKey.user_of(secret) is None
    member.is_active = True
    member.save()
    assert ApiKey.user_of(secret) == member
    key.revoked_at = key.created_at
    key.save()
    assert ApiKey.user_of(secret) is None


def test_visibility(member, other_member, staff):
    from django.contrib.auth.models import AnonymousUser

    mine = Dataset.objects.create(owner=member, name="mine")
    sample = Dataset.objects.create(owner=None, name="sample")
    assert set(Dataset.objects.visible_to(member)) == {mine, sample}
    assert set(Dataset.objects.visible_to(other_member)) == {sample}
    assert set(Dataset.objects.visible_to(staff)) == {mine, sample}
    assert not Dataset.objects.visible_to(AnonymousUser()) and not Dataset.objects.visible_to(None)
    assert set(Dataset.objects.changeable_by(member)) == {mine}  # the sample belongs to the portal
    assert not Dataset.objects.changeable_by(other_member)

    conversation = Conversation.objects.create(owner=member)
    message = Message.objects.create(conversation=conversation, role="user", content="hello")
    assert list(Message.objects.visible_to(member)) == [message]
    for stranger in (other_member, staff):  # conversations are private, also from staff
        assert not Conversation.objects.visible_to(stranger) and not Message.objects.visible_to(
            stranger
        )

    checkpoint = Checkpoint.objects.create(name="base", path="/nowhere")
    assert list(Checkpoint.objects.visible_to(member)) == [
        checkpoint
    ] and not Checkpoint.objects.changeable_by(member)
    adapter = Adapter.objects.create(name="a", checkpoint=checkpoint, owner=member, pre_seq_len=8)
    assert not Adapter.objects.visible_to(other_member)
    adapter.shared = True
    adapter.save()
    assert list(Adapter.objects.visible_to(other_member)) == [adapter]
    assert not Adapter.objects.changeable_by(other_member)

    run = Run.objects.create(owner=member, kind="tuning", name="r")
    assert list(Run.objects.visible_to(staff)) == [run] and not Run.objects.visible_to(other_member)


def test_an_inactive_user_sees_nothing(member):
    Dataset.objects.create(owner=member, name="mine")
    member.is_active = False
    assert not Dataset.objects.visible_to(member)


def test_the_web_process_is_free_of_torch_and_collects_no_garbage_among_its_imports():
    code = (
        "import gc, os, sys; os.environ['DJANGO_SETTINGS_MODULE'] = 'portal.settings'; import "
        "portal.asgi; import portal.urls;"
        "frozen = gc.get_freeze_count() > len(gc.get_objects());"
        "from django.urls import get_resolver; get_resolver().url_patterns; from django.contrib "
        "import admin; admin.autodiscover();"
        "print(frozen, sorted({'torch', 'transformers', 'peft', 'jieba', 'nltk'} & "
        "set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip().splitlines()[-1] == "True []"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORTAL_DATASET_MAX_MB", "lots"),
        ("PORTAL_CACHE_SHARE", "half"),
        ("PORTAL_TIME_ZONE", "Mars/Olympus"),
        ("PORTAL_LOG_LEVEL", "loud"),
        ("PORTAL_DATABASE_URL", "nonsense"),
        ("PORTAL_DATA_DIR", "/proc/nowhere"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named_in_one_line(tmp_path, name, value):
    environment = {**os.environ, "PORTAL_DATA_DIR": str(tmp_path), name: value}
    command = [sys.executable, "-c", "import portal.settings"]
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (
        refused.returncode == 1 and name in refused.stderr and len(refused.stderr.splitlines()) == 1
    )


def test_two_installations_have_different_secrets_that_only_the_owner_can_read(tmp_path):
    def settings_of(folder):
        code = "from django.conf import settings; print(settings.SECRET_KEY, settings.WORKER_TOKEN)"
        environment = {
            **os.environ,
            "PORTAL_DATA_DIR": str(folder),
            "DJANGO_SETTINGS_MODULE": "portal.settings",
        }
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first, again, second = (
        settings_of(tmp_path / "a"),
        settings_of(tmp_path / "a"),
        settings_of(tmp_path / "b"),
    )
    assert first == again and not set(first.split()) & set(second.split())
    for name in ("secret_key", "worker_token"):
        assert stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) == 0o600


class TestChecks:
    @pytest.mark.parametrize(
        ("mode", "umask", "found"),
        [(0o755, 0o077, True), (0o750, 0o077, True), (0o700, 0o077, False), (0o770, 0o007, False)],
    )
    def test_a_data_folder_that_others_can_open_is_named(
        self, settings, data_dir, mode, umask, found
    ):
        data_dir.chmod(mode)
        settings.UMASK = umask
        assert ("portal.E008" in self.ids()) == found

    def ids(self):
        from django.core.checks import run_checks

        return {problem.id for problem in run_checks()}

    def test_the_default_configuration_is_clean(self, settings, data_dir):
        # the test runner adds a name of its own
        settings.ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]
        assert self.ids() <= {"portal.I001"}  # the interpreter's age is not of our choosing

    def test_a_misspelt_variable_is_named(self, monkeypatch):
        monkeypatch.setenv("PORTAL_DATADIR", "/x")
        from portal.checks import unknown_variables

        assert "PORTAL_DATA_DIR" in unknown_variables()[0].hint

    @pytest.mark.parametrize(
        ("setting", "value", "problem"),
        [
            ("WORKER_URLS", ["worker.sock"], "portal.E003"),
            ("UPSTREAMS", ["http://gpu:8000"], "portal.E004"),
            ("CACHE_SHARE", 1.5, "portal.E006"),
            ("OIDC_ISSUER", "https://id.example", "portal.E009"),  # and no client
            ("OIDC_ISSUER", "http://id.example", "portal.E010"),
            ("ALLOWED_HOSTS", ["*"], "portal.W002"),
            ("ALLOWED_HOSTS", ["portal.example"], "portal.W003"),
        ],
    )
    def test_wrong_settings_are_found(self, setting, value, problem):
        with override_settings(**{setting: value}):
            assert problem in self.ids()

    def test_debug_on_a_public_name_is_an_error(self):
        with override_settings(DEBUG=True, ALLOWED_HOSTS=["portal.example"]):
            assert "portal.E005" in self.ids()

    def test_a_readable_secret_is_an_error(self, data_dir):
        (data_dir / "secret_key").write_text("x")
        (data_dir / "secret_key").chmod(0o644)
        assert "portal.E002" in self.ids()

    def test_a_data_folder_that_is_not_there_is_an_error(self, settings, tmp_path):
        settings.DATA_DIR = tmp_path / "missing"
        assert "portal.E001" in self.ids()
