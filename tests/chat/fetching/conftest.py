import pytest

from chat.fetching.plan import set_endpoints
from tests.support.folders import checkpoint_folder


@pytest.fixture
def files(tmp_path):
    """A checkpoint's files."""
    folder = checkpoint_folder(tmp_path / "original")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(server, files, db, data_dir):
    """Hugging Face, as far as the portal knows: org/name is there."""
    server.add_repository("org/name", files, cardData={"license": "mit"})
    for name in ("hf", "modelscope"):
        set_endpoints(name, [server.url])
    return server
