"""SQLite under everybody at once, each writer a process of its own, as fast as it can, through the
portal's own functions.

    python -m tests.bench.portal.database ROLE NUMBER SECONDS
        one of them: web, heartbeat or ingest

A web writer writes turns (question and answer), saves the answer's progress and its end; a
heartbeat renews a run's lease; the ingest takes in datasets. Prints {"took": [milliseconds of every
call], "errors": calls that found the database locked}.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator

ROLES = {"web": 8, "heartbeat": 2, "ingest": 1}


def calls(role: str, number: int) -> Iterator:
    """What the writer does, one call after the other, without end."""
    return {"web": _web, "heartbeat": _heartbeat, "ingest": _ingest}[role](number)


def _web(number: int):
    from chat.conversations import messages, turns
    from chat.conversations.frames import LiveAnswer
    from chat.models import Conversation, Message

    conversation = (
        Conversation.objects.select_related("owner").filter(owner__username=f"member{number}").get()
    )
    while True:
        made = []
        yield lambda made=made: made.extend(
            turns.create_turn(conversation, conversation.owner, "你好")
        )
        answer = LiveAnswer.of_row(made[1])
        answer.content, answer.status = "你好！" * 100, Message.Status.STREAMING
        rows = [(answer.message_id, answer.content, answer.seq, answer.status)]
        yield lambda rows=rows: messages.save_progress(rows)
        answer.status, answer.finish_reason = Message.Status.COMPLETE, "stop"
        yield lambda answer=answer: messages.save_end(answer)


def _heartbeat(number: int):
    from portal.models import User
    from portal.runs import lifecycle
    from tuning.models import Dataset
    from tuning.plan import Checkpoint, create_run

    owner = User.objects.get(username="reader")
    run = create_run(
        owner, dataset=Dataset.objects.last(), checkpoint=Checkpoint.default(), in_queue=False
    )
    token = lifecycle.claim(run.pk)
    while True:
        yield lambda: lifecycle.heartbeat(run.pk, token, progress=number)


def _ingest(number: int):
    from chat.starter import sample
    from tuning.datasets.store import ingest

    rows = sample.load(sample.TRAIN)
    count = 0
    while True:
        count += 1
        lines = "\n".join(
            json.dumps(row | {"content": f"{row['content']}{count}"}, ensure_ascii=False)
            for row in rows
        )
        file = io.BytesIO(lines.encode())
        yield lambda file=file: ingest(
            file, name="bench", owner=None, prompt_column="content", response_column="summary"
        )


def write(role: str, number: int, seconds: float) -> dict:
    """Works from a common beginning on; a locked database counts as an error, and the call is made
    again.
    """
    import django

    django.setup()
    from django.db import OperationalError

    took, errors = [], 0
    print("ready", flush=True)
    sys.stdin.readline()  # everybody is
    deadline = time.monotonic() + seconds
    for call in calls(role, number):
        while True:
            begun = time.perf_counter()
            try:
                call()
            except OperationalError as error:
                if "locked" not in str(error):
                    raise
                errors += 1
            else:
                took.append(1000 * (time.perf_counter() - begun))
                break
        if time.monotonic() > deadline:
            break
    return {"took": took, "errors": errors}


def measure(seconds: float) -> dict[str, dict]:
    """role -> the same figures over its writers."""
    writers = []
    for role, count in ROLES.items():
        for number in range(count):
            argv = [
                sys.executable,
                "-m",
                "tests.bench.portal.database",
                role,
                str(number),
                str(seconds),
            ]
            writers.append(
                (
                    role,
                    subprocess.Popen(
                        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                    ),
                )
            )
    for _role, process in writers:
        process.stdout.readline()
    for _role, process in writers:
        process.stdin.write("\n")
        process.stdin.flush()
    found = {role: {"took": [], "errors": 0} for role in ROLES}
    for role, process in writers:
        outcome = json.loads(process.communicate()[0])
        found[role]["took"] += outcome["took"]
        found[role]["errors"] += outcome["errors"]
    return found


if __name__ == "__main__":
    print(json.dumps(write(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
