"""Chat and a run that do not fit beside each other, in a whole portal whose one device is declared
small.
"""

import pytest

from tests.support.live_portal import Portal, wait_for
from tests.tuning.test_processes import Runs

pytestmark = pytest.mark.slow


def test_chat_is_paused_for_a_run_and_comes_back(tmp_path):
    """Each needs about 0.42 GB, of 0.6."""
    room = {"PORTAL_DEVICES": "cpu=600MB", "PORTAL_BESIDE_CHAT": "pause", "OMP_NUM_THREADS": "1"}
    with Portal(tmp_path / "data", **room) as portal:
        wait_for(portal.healthy, 180, "the portal")
        runs = Runs(portal, tmp_path)

        def holders():
            (device,) = runs.get("devices")["devices"]
            return [holder["use"] for holder in device["holders"]]

        wait_for(lambda: holders() == ["chat"], 30, "chat's claim")
        run = runs.start(60)
        seen = wait_for(lambda: holders() == ["tuning"] and runs.get("devices"), 60, "the run")
        assert seen["devices"][0]["holders"][0]["run"] == run
        (chat,) = wait_for(lambda: runs.get("devices")["waiting"], 30, "chat in the line")
        assert chat["use"] == "chat" and f"#{run}" in chat["reason"]
        runs.end(run)
        wait_for(lambda: holders() == ["chat"], 30, "chat to come back")
        wait_for(portal.healthy, 60, "chat to answer")
