"""A batch on the portal as people run it, its process killed on the way."""

import io
import json
import os
import signal

import openai
import pytest

from tests.support.live_portal import Portal, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("web")]
LINES = 400


@pytest.fixture(scope="module")
def portal(tmp_path_factory):
    with Portal(tmp_path_factory.mktemp("batches") / "data") as running:
        wait_for(running.healthy, 240, "the portal with its model")
        yield running


@pytest.fixture(scope="module")
def client(portal):
    key = portal.manage("create_api_key", "admin").strip()
    return openai.OpenAI(base_url=f"{portal.url}/v1", api_key=key)


def test_the_official_client_has_every_line_answered_once(portal, client):
    model = client.models.list().data[0].id
    asked = [
        {
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [{"role": "user", "content": f"写一段话 {i}"}],
                "max_tokens": 60,
            },
        }
        for i in range(LINES)
    ]
    text = "\n".join(map(json.dumps, asked)).encode()
    sent = client.files.create(file=("asked.jsonl", io.BytesIO(text)), purpose="batch")
    batch = client.batches.create(
        input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h"
    )

    def part_done():
        counts = client.batches.retrieve(batch.id).request_counts
        return 0 < counts.completed < LINES and counts.completed

    before = wait_for(part_done, 120, "the first lines")
    os.kill(portal.pid_of("portal.runs.process"), signal.SIGKILL)
    wait_for(
        lambda: client.batches.retrieve(batch.id).status == "completed", 240, "the batch's end"
    )
    ended = client.batches.retrieve(batch.id)
    assert ended.request_counts.completed == LINES > before
    answers = [json.loads(line) for line in client.files.content(ended.output_file_id).iter_lines()]
    assert sorted(each["custom_id"] for each in answers) == sorted(
        each["custom_id"] for each in asked
    )
    assert ended.error_file_id is None
