"""Django's admin of chat: checkpoints and adapters can be managed, conversations cannot be read."""

from pathlib import Path

import pytest
from django.contrib import admin

from chat import registry
from chat.models import Adapter, Checkpoint, Conversation, Message
from tests.support.folders import adapter_folder, checkpoint_folder

pytestmark = pytest.mark.django_db


@pytest.fixture
def base(tmp_path, data_dir):
    return registry.register_checkpoint(checkpoint_folder(tmp_path / "base"))


@pytest.fixture
def adapter(base, member, tmp_path):
    return registry.publish_adapter(
        adapter_folder(tmp_path / "tuned"), name="tuned", checkpoint=base, owner=member
    )


def test_every_page_opens(admin_client, base, adapter):
    for path in (
        "checkpoint",
        f"checkpoint/{base.pk}/change",
        "adapter",
        f"adapter/{adapter.pk}/change",
    ):
        assert admin_client.get(f"/admin/chat/{path}/").status_code == 200


def test_conversations_are_not_in_it(admin_client):
    assert not {Conversation, Message} & set(admin.site._registry)
    assert admin_client.get("/admin/chat/conversation/").status_code == 404


def test_another_checkpoint_becomes_the_default(admin_client, base, tmp_path):
    other = registry.register_checkpoint(checkpoint_folder(tmp_path / "other", seed=1))
    form = {"action": "make_default", "_selected_action": [other.pk]}
    assert admin_client.post("/admin/chat/checkpoint/", form).status_code == 302
    assert Checkpoint.objects.get(is_default=True) == other
    form["_selected_action"] = [base.pk, other.pk]
    admin_client.post("/admin/chat/checkpoint/", form)
    assert Checkpoint.objects.get(is_default=True) == other


@pytest.mark.parametrize("name", ["base", "base:other", "12", ".hidden"])
def test_a_name_that_can_be_no_model_id_is_refused(admin_client, base, adapter, name):
    answer = admin_client.post(f"/admin/chat/adapter/{adapter.pk}/change/", {"name": name})
    assert answer.status_code == 200 and answer.context["errors"]
    assert (
        admin_client.post(
            f"/admin/chat/checkpoint/{base.pk}/change/", {"name": "tuned"}
        ).status_code
        == 200
    )
    adapter.refresh_from_db()
    assert (adapter.name, Checkpoint.objects.get().name) == ("tuned", "base")
    assert (
        admin_client.post(
            f"/admin/chat/adapter/{adapter.pk}/change/", {"name": "better"}
        ).status_code
        == 302
    )
    assert Adapter.objects.get().name == "better"


def test_deleting_an_adapter_deletes_its_files(admin_client, adapter):
    admin_client.post(f"/admin/chat/adapter/{adapter.pk}/delete/", {"post": "yes"})
    assert not Adapter.objects.exists() and not adapter.path.exists()


def test_deleting_a_checkpoint_deletes_its_adapters_and_keeps_its_folder(
    admin_client, base, adapter
):
    admin_client.post(f"/admin/chat/checkpoint/{base.pk}/delete/", {"post": "yes"})
    assert not Checkpoint.objects.exists() and not adapter.path.exists()
    assert Path(base.path, "config.json").exists()


def test_members_stay_outside(client, member):
    client.force_login(member)
    assert client.get("/admin/chat/checkpoint/").status_code == 302
