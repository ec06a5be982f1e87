"""What hangs on a checkpoint, counted."""

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from chat import inventory
from chat.models import Adapter, Conversation
from tests.support.page_fixtures import *  # noqa: F403  a member's rows

pytestmark = pytest.mark.django_db


def test_each_kind_is_counted_on_its_own(member, checkpoint, adapter, tuning_run, evaluated):
    """Joined, a thousand of each would be 10^12 rows: a page that never comes."""
    for number in range(2):
        Adapter.objects.create(
            name=f"x{number}", checkpoint=checkpoint, owner=member, folder="x", sha256="a" * 64,
            pre_seq_len=8,
        )  # fmt: skip
        Conversation.objects.create(owner=member, checkpoint=checkpoint)
    with CaptureQueriesContext(connection) as queries:
        (found,) = (one for one in inventory.stored(member) if one.checkpoint == checkpoint)
    assert not any("JOIN" in each["sql"] for each in queries)
    assert found.adapters == checkpoint.adapters.count() >= 3
    assert found.runs == checkpoint.tuning_runs.count() + checkpoint.evaluation_runs.count() >= 2
    assert found.conversations == checkpoint.conversation_set.count() >= 2
