"""A server of files for whatever downloads."""

import huggingface_hub.constants
import pytest

from chat.checkpoints.fetch import transfer
from tests.support.file_server import FileServer


@pytest.fixture
def server(monkeypatch):
    """Hub and package index on a port of this machine; the hub's library may go out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_ENDPOINT", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.01)  # the real waits, shorter
    with FileServer() as server:
        yield server
