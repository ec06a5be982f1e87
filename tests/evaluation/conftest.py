"""A tiny real checkpoint, an adapter of it, and a dataset, registered in the portal."""

import pytest
import torch

from chat.checkpoints import describe
from chat.engine import adapters
from chat.models import Adapter, Checkpoint
from evaluation.metrics.original import Scorer
from tests.support import tiny_training as tiny
from tests.support.uploads import lines, upload
from tuning.datasets.store import add_split, ingest

PRE_SEQ_LEN = 4


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny.write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def scorer():
    """Loads jieba's dictionary once."""
    return Scorer()


@pytest.fixture
def checkpoint(checkpoint_folder):
    return Checkpoint.objects.create(
        name="tiny",
        path=str(checkpoint_folder),
        fingerprint=describe.fingerprint(checkpoint_folder),
        description=describe.describe(checkpoint_folder),
    )


@pytest.fixture
def adapter(checkpoint, member, data_dir):
    tensor = torch.randn(3, 2, 2, PRE_SEQ_LEN, 8, generator=torch.Generator().manual_seed(1))
    folder = data_dir / "adapters" / "one"
    sha256 = adapters.save(adapters.KVPrefix(tensor, True, checkpoint.fingerprint, {}), folder)
    return Adapter.objects.create(
        name="tuned",
        checkpoint=checkpoint,
        owner=member,
        folder="adapters/one",
        sha256=sha256,
        pre_seq_len=PRE_SEQ_LEN,
    )


@pytest.fixture
def dataset(member, data_dir):
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in tiny.examples(20)]
    made = ingest(upload(lines(*rows)), name="sums", owner=member)
    add_split(made, 8, seed=1)
    return made
