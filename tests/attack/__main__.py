"""`python -m tests.attack --seed 1 --requests 4000`: a portal of its own, and what is hostile that
a client on this machine can send it: bodies at every door, forms, uploads, heads, chunks, websocket
frames, slow and many connections. Meanwhile another user asks for a page and for an answer.

The last line is a JSON object of figures; exit code 1 when one of them is wrong. The same seed
sends the same things, in an order that depends on the machine.
"""

import argparse
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tests.attack import doors, lines, sockets, values
from tests.attack.client import Neighbour, chunked, head, send
from tests.support.live_portal import Portal, wait_for

MOST_GROWN_MB = 150
LONGEST_WAIT = 1.0  # seconds, of another user
HANDS = 8  # requests at once
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "x"]
CSRF = "a" * 32
PEOPLE = """
import json
from importlib import import_module
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from portal.models import ApiKey, User
from chat.models import Conversation, Message
from tuning.datasets.store import ingest
import io
def session(user):
    store = import_module(settings.SESSION_ENGINE).SessionStore()
    store[SESSION_KEY], store[HASH_SESSION_KEY] = str(user.pk), user.get_session_auth_hash()
    store[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
    store.create()
    return store.session_key
found = {}
for name in ("mallory", "neighbour", "disposable"):
    user = User.objects.create_user(name)
    found[name] = {"id": user.pk, "key": ApiKey.create_for(user)[1], "session": session(user)}
chief = User.objects.get(username="admin")
found["admin"] = {"id": chief.pk, "key": ApiKey.create_for(chief)[1], "session": session(chief)}
mallory = User.objects.get(username="mallory")
conversation = Conversation.objects.create(owner=mallory, title="c")
conversation.messages.create(role="user", content="hi")
answer = conversation.messages.create(role="assistant", content="ho", status="complete")
rows = io.BytesIO(b'{"content": "a", "summary": "b"}\\n' * 30)
rows.name = "rows.json"
dataset = ingest(rows, name="rows", owner=mallory)
found["rows"] = {"conversation": conversation.pk, "message": answer.pk, "dataset": dataset.pk}
print(json.dumps(found))
"""


@dataclass
class Attempt:
    """One request. `path` and `headers` as they go over the line; `strict`: it is HTTP, so that it
    must be answered and not merely ended.
    """

    kind: str
    method: str
    path: str
    headers: list[str]
    body: bytes = b""
    chunks: bool = False
    strict: bool = True

    def __str__(self) -> str:
        shown = [header[:80] for header in self.headers if "Authorization: Bearer sk" not in header]
        return f"{self.kind}: {self.method} {self.path[:120]} {shown} {self.body[:200]!r}"


@dataclass
class Figures:
    seed: int
    requests: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    unanswered: int = 0
    server_errors: int = 0
    faults_logged: int = 0  # errors in the portal's log
    frames: int = 0  # sent over websockets
    sockets_lost: int = 0  # that ended without a close code
    web_grown_mb: float = 0.0
    other_user_answers: int = 0
    other_user_errors: int = 0
    other_user_waited: float = 0.0  # seconds, the longest
    longest_during: str = ""
    seconds: float = 0.0

    def held(self) -> bool:
        return (
            not self.unanswered + self.server_errors + self.faults_logged + self.sockets_lost
            and not self.other_user_errors
            and self.web_grown_mb < MOST_GROWN_MB
            and self.other_user_waited < LONGEST_WAIT
        )


class Memory(threading.Thread):
    """The most that a process has held since `reset`, in MB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.ended = psutil.Process(pid), threading.Event()
        self.reset()

    def reset(self) -> None:
        self.begin = self.most = self.process.memory_info().rss / 2**20

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.most = max(self.most, self.process.memory_info().rss / 2**20)


class Attack:
    def __init__(self, portal: Portal, options: argparse.Namespace):
        self.portal, self.options = portal, options
        self.chance, self.figures = random.Random(options.seed), Figures(options.seed)
        self.lock, self.statuses = threading.Lock(), Counter()
        self.people = json.loads(
            portal.manage("shell", "-v", "0", "-c", PEOPLE).strip().splitlines()[-1]
        )
        rows = self.people["rows"]
        self.run = self._run(rows["dataset"])
        self.numbers = {
            "/chat/": rows["conversation"], "/api/v1/conversations/": rows["conversation"],
            "/api/v1/messages/": rows["message"], "/datasets/": rows["dataset"],
            "/api/v1/datasets/": rows["dataset"], "/tuning/": self.run, "/adapters/": 1,
            "/api/v1/tuning-runs/": self.run, "/api/v1/adapters/": 1,
            "/admin/portal/user/": self.people["disposable"]["id"],
        }  # fmt: skip
        self.who = {
            "stranger": [],
            "key": [f"Authorization: Bearer {self.people['mallory']['key']}"],
            "session": self._session("mallory"),
            "chief": self._session("admin"),
            "chief's key": [f"Authorization: Bearer {self.people['admin']['key']}"],
        }
        self.paths = doors.paths(self._number)

    def _session(self, name: str) -> list[str]:
        cookie = f"sessionid={self.people[name]['session']}; csrftoken={CSRF}"
        return [f"Cookie: {cookie}", f"X-CSRFToken: {CSRF}"]

    def _number(self, begin: str) -> int:
        """The id that stands in a path: of a row of the attacker's where there is one. A row that
        the neighbour needs (the base model) is in none.
        """
        return self.numbers.get(begin, 99_999)

    def _run(self, dataset: int) -> int:
        """A tuning run of the attacker's that has made an adapter."""
        key = self.people["mallory"]["key"]
        plan = {"dataset": dataset, "checkpoint": "starter", "max_steps": 1, "pre_seq_len": 4}
        plan["checkpoint"] = self.portal.get("/api/v1/checkpoints/", key=key)[1]["results"][0]["id"]
        status, run = self.portal.call("POST", "/api/v1/tuning-runs/", plan, key=key)
        assert status == 201, run

        def ended():
            told = self.portal.get(f"/api/v1/tuning-runs/{run['id']}/", key=key)[1]
            return told["status"] not in ("queued", "running") and told

        told = wait_for(ended, 300, "a tuning run")
        assert told["status"] == "succeeded", told
        return run["id"]

    # ---- what is sent

    def attempts(self) -> Iterator[Attempt]:
        """As many as were asked for, kinds in turn."""
        schema = self.portal.get("/api/schema/", headers={"Accept": "application/json"})[1]
        described = doors.described(schema, self._number)
        spoken = [("POST", path, body) for path, body in doors.SPOKEN.items()]
        pages = self._forms()
        kinds: list[Callable[[], Attempt]] = [
            lambda: self._json(*self.chance.choice(described)),
            lambda: self._json(*self.chance.choice(spoken)),
            lambda: self._form(*self.chance.choice(pages)),
            self._raw, self._upload, self._head, self._query, self._chunks,
        ]  # fmt: skip
        for number in range(self.options.requests):
            yield kinds[number % len(kinds)]()

    def _forms(self) -> list[tuple[str, doors.Form]]:
        found = []
        for who in ("session", "chief", "stranger"):
            for path in self.paths:
                if path.startswith(("/api/", "/v1/")) or (who == "session" and "/admin/" in path):
                    continue
                start = head(
                    "GET", path, *self.who[who], "Connection: close", port=self.portal.port
                )
                status, answer, _taken = send(self.portal.port, start)
                if status == 200 and b"text/html" in answer:
                    html = answer.decode(errors="replace")
                    found += [(who, form) for form in doors.forms(path, html)]
        return [
            (who, form)
            for who, form in found
            if "logout" not in form.action and "/checkpoint" not in form.action + form.page
        ]

    def _anybody(self) -> list[str]:
        return self.who[self.chance.choice(["key", "key", "session", "chief", "stranger"])]

    def _json(self, method: str, path: str, body) -> Attempt:
        spoilt = values.as_json(values.mutated(self.chance, body))
        who = self.who["chief's key" if self.chance.random() < 0.1 else "key"]
        return Attempt("json", method, path, [*who, "Content-Type: application/json"], spoilt)

    def _form(self, who: str, form: doors.Form) -> Attempt:
        fields = values.mutated(self.chance, form.fields)
        if not isinstance(fields, dict):
            fields = {"x": fields}
        kind, body = values.form(fields)
        path = form.action if form.action.startswith("/") else form.page
        return Attempt("form", "POST", path, [*self.who[who], f"Content-Type: {kind}"], body)

    def _raw(self) -> Attempt:
        kind, body = self.chance.choice(values.TYPES), self.chance.choice(values.BODIES)
        method, path = self.chance.choice(METHODS), self.chance.choice(self.paths)
        if method in ("GET", "HEAD", "TRACE") and self.chance.random() < 0.7:
            body = b""
        if method == "DELETE" and path.startswith("/api/"):  # what the other attempts need
            path = re.sub(r"/\d+/", "/99999/", path)
        return Attempt("raw", method, path, [*self._anybody(), f"Content-Type: {kind}"], body)

    def _upload(self) -> Attempt:
        fields = {
            "name": self.chance.choice(values.TEXTS), "prompt_column": "content",
            "response_column": self.chance.choice(["summary", *values.TEXTS]),
            "purpose": "fine-tune",
        }  # fmt: skip
        kind, body = values.form(fields, values.upload(self.chance))
        path = self.chance.choice(doors.UPLOADS)
        who = self.who["session" if path.startswith("/datasets") else "key"]
        return Attempt("upload", "POST", path, [*who, f"Content-Type: {kind}"], body)

    def _head(self) -> Attempt:
        method = self.chance.choice(METHODS[:7])
        more = self.chance.sample(values.HEADERS, self.chance.choice((1, 2, 5)))
        who = self._anybody()
        return Attempt("head", method, self.chance.choice(self.paths), [*who, *more], strict=False)

    def _query(self) -> Attempt:
        query = "&".join(self.chance.sample(values.QUERIES, self.chance.choice((1, 1, 3))))
        path = f"{self.chance.choice(self.paths)}?{query}"
        if self.chance.random() < 0.2:
            odd = self.chance.choice(
                ["%00", "..%2f..", "//x", "%ff", ";", "\\", "²", "%2e%2e/", "*"]
            )
            path = path.replace("/", f"/{odd}/", 1)
        return Attempt("query", "GET", path, self._anybody())

    def _chunks(self) -> Attempt:
        body = self.chance.choice([b"{}", b"x" * 100_000, b"", *values.BODIES[:8]])
        path = self.chance.choice([path for path in self.paths if "{" not in path])
        kind = f"Content-Type: {self.chance.choice(values.TYPES[:7])}"
        return Attempt("chunks", "POST", path, [*self._anybody(), kind], body, chunks=True)

    def answer_to(self, attempt: Attempt) -> int | None:
        """The status; None: the line was ended without one. TimeoutError: neither."""
        headers = [*attempt.headers, "Connection: close"]
        body = [attempt.body[at : at + 65536] for at in range(0, len(attempt.body), 65536)]
        pieces = body
        if attempt.chunks:
            headers.append("Transfer-Encoding: chunked")
            pieces = chunked(body)
        elif attempt.strict and (attempt.body or attempt.method in ("POST", "PUT", "PATCH")):
            headers.append(f"Content-Length: {len(attempt.body)}")
        start = head(attempt.method, attempt.path, *headers, port=self.portal.port)
        return send(self.portal.port, start, pieces)[0]

    def one(self, attempt: Attempt) -> None:
        try:
            status = self.answer_to(attempt)
        except (TimeoutError, OSError) as error:
            return self.count("unanswered", f"{error!r} {attempt}")
        with self.lock:
            self.statuses["ended" if status is None else str(status)] += 1
        if status is None and attempt.strict:
            self.count("unanswered", str(attempt))
        elif status is not None and status >= 500:
            self.count("server_errors", f"{status} {attempt}")

    def count(self, what: str, told: str) -> None:
        with self.lock:
            setattr(self.figures, what, getattr(self.figures, what) + 1)
            print(f"  {what}: {told}", flush=True)

    # ---- the whole

    def attack(self) -> Figures:
        figures, began = self.figures, time.monotonic()
        attempts = list(self.attempts())
        memory = Memory(self.portal.pid_of("portal.web_server"))
        key = {"Authorization": f"Bearer {self.people['neighbour']['key']}"}
        asked = {"model": "starter", "messages": [{"role": "user", "content": "hi"}]}
        says = values.as_json({**asked, "max_tokens": 4})
        typed = {**key, "Content-Type": "application/json"}
        url = self.portal.url
        with (
            Neighbour(f"{url}/api/v1/conversations/", key) as reads,
            Neighbour(f"{url}/v1/chat/completions", typed, 0.2, says) as talks,
        ):
            time.sleep(1)
            memory.reset()
            memory.start()
            neighbours = {"page": reads, "answer": talks}

            def phase(name: str, work: Callable[[], None]) -> None:
                for each in neighbours.values():
                    each.longest = 0.0
                at = time.monotonic()
                work()
                waited = {what: round(each.longest, 2) for what, each in neighbours.items()}
                took = time.monotonic() - at
                most = memory.most
                print(f"{name}: {took:.1f} s, others waited {waited}, web {most:.0f} MB")
                if max(waited.values()) > figures.other_user_waited:
                    figures.other_user_waited = max(waited.values())
                    figures.longest_during = name

            by_kind: dict[str, list[Attempt]] = {}
            for attempt in attempts:
                by_kind.setdefault(attempt.kind, []).append(attempt)
            for kind, those in by_kind.items():
                phase(kind, lambda those=those: self._all(those))
            line = lines.Lines(self.portal.port, self.chance, self.who["key"])
            phase("no HTTP", lambda: self._count_lines(line.nonsense(100)))
            phase("slow heads and bodies", lambda: line.slow(150, 12.0))
            phase("slow readers", lambda: line.unread(30, 8.0))
            page = sockets.Sockets(self.portal, self.people, self.chance)
            for name, work in (
                ("frames", lambda: page.frames(self.options.requests // 8)),
                ("frames that are none", lambda: page.nonsense(60)),
                ("a flood of frames", lambda: page.flood(10, 4.0)),
            ):
                phase(name, work)
            phase("long prompts", lambda: self._long_prompts(20))
            figures.frames, figures.sockets_lost = page.sent, page.lost
            for told in page.told:
                print(f"  sockets_lost: {told}")
        memory.ended.set()
        figures.web_grown_mb = round(memory.most - memory.begin, 1)
        figures.other_user_answers = reads.answers + talks.answers
        figures.other_user_errors = len(reads.errors) + len(talks.errors)
        for error in [*reads.errors, *talks.errors][:5]:
            print(f"  the other user: {error!r}")
        log = self.portal.output()
        figures.faults_logged = len(_errors(log))
        figures.requests, figures.statuses = len(attempts), dict(sorted(self.statuses.items()))
        figures.seconds = round(time.monotonic() - began, 1)
        return figures

    def _all(self, attempts: list[Attempt]) -> None:
        with ThreadPoolExecutor(HANDS) as hands:
            list(hands.map(self.one, attempts))

    def _count_lines(self, unanswered: list[str]) -> None:
        for told in unanswered:
            self.count("unanswered", told)

    def _long_prompts(self, count: int) -> None:
        body = {"model": "starter", "messages": [{"role": "user", "content": "长" * 800_000}]}
        said = values.as_json(body)
        headers = [*self.who["key"], "Content-Type: application/json"]
        attempt = Attempt("long prompt", "POST", "/v1/chat/completions", headers, said)
        self._all([attempt] * count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=4000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        data = Path(folder) / "data"
        os.environ["PORTAL_DATA_DIR"] = str(data)  # for the URL conf, which is read here
        os.environ["DJANGO_SETTINGS_MODULE"] = "portal.settings"
        with Portal(data, PORTAL_DEVICE="cpu") as portal:
            wait_for(portal.healthy, 240, "the portal")
            import django

            django.setup()
            figures = Attack(portal, options).attack()
            if figures.faults_logged or figures.server_errors:
                for entry in _errors(portal.output())[:5]:
                    print(entry[:1500], "...", entry[-1500:])
    print(json.dumps(asdict(figures)))
    return 0 if figures.held() else 1


def _errors(log: str) -> list[str]:
    """The errors of a log, each with what belongs to it; that a host is not one is none."""
    entries = re.split(r"^(?=\d{4}-\d\d-\d\d )", log, flags=re.MULTILINE)
    found = [entry for entry in entries if re.match(r"\S+ \S+ (?:ERROR|CRITICAL) ", entry)]
    return [entry for entry in found if "django.security.DisallowedHost" not in entry[:80]]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
