"""Notices: at the bell once, by e-mail and webhook for whom wants them, and to no host that is not
listed.
"""

import http.server
import json
import smtplib
import threading
from datetime import timedelta

import pytest
from django.core import mail
from django.utils import timezone
from django.utils.translation import override

from portal.budget.models import Account
from portal.budget.signals import nearly_spent
from portal.models import Run, Team, User
from portal.notices import delivery, webhook
from portal.notices.models import Delivery, Notice, NoticeSettings
from portal.notices.notify import KEPT, notify
from portal.runs import lifecycle
from tests.support.page_rows import text_of

pytestmark = pytest.mark.django_db


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 204)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()

    def log_message(self, *arguments): ...


@pytest.fixture
def receiver(settings):
    """A listed receiver on this machine. answers: statuses of the first requests; then 204."""
    settings.WEBHOOK_HOSTS, settings.WEBHOOK_NETWORKS = _listed("127.0.0.1")
    server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.answers = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/hook?a=1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _listed(*entries):
    from portal.settings import _hosts_and_networks

    return _hosts_and_networks(list(entries))


@pytest.fixture
def hooked(member, receiver, monkeypatch):
    monkeypatch.setattr(delivery, "ring", lambda number: None)
    return NoticeSettings.objects.create(user=member, webhook_url=receiver.url)


def claimed(owner, **fields) -> tuple[Run, str]:
    run = Run.objects.create(owner=owner, kind="tuning", name="ads", **fields)
    return run, lifecycle.claim(run.pk)


# ---- in the portal


def test_a_run_that_ends_rings_the_bell_and_opening_reads_it(client, member, other_member):
    run, token = claimed(member)
    lifecycle.succeed(run.pk, token)
    other, token = claimed(member)
    lifecycle.fail(other.pk, token, "unexpected", "x")
    client.force_login(member)
    client.cookies["django_language"] = "en"
    assert '2<span class="vh">unread</span>' in text_of(client.get("/tasks/")).replace(" <", "<")
    page = text_of(client.get("/notices/"))
    assert "“ads” has succeeded." in page and "“ads” has failed." in page
    assert f'href="/tuning/{run.pk}/"' in page
    assert "unread" not in text_of(client.get("/tasks/"))
    client.force_login(other_member)
    assert "ads" not in text_of(client.get("/notices/"))


def test_the_end_and_its_notice_are_one(member, monkeypatch):
    """Killed before the commit neither is there; what is repeated afterwards is fenced off."""
    run, token = claimed(member)
    monkeypatch.setattr(lifecycle, "run_ended", _killed)
    with pytest.raises(KeyboardInterrupt):
        lifecycle.succeed(run.pk, token)
    run.refresh_from_db()
    assert run.status == Run.Status.RUNNING and not Notice.objects.exists()
    monkeypatch.undo()
    lifecycle.succeed(run.pk, token)
    with pytest.raises(lifecycle.FencedOff):
        lifecycle.succeed(run.pk, token)
    assert Notice.objects.count() == 1


def _killed(run_id):
    raise KeyboardInterrupt


def test_a_run_whose_process_is_always_lost_says_so_once(member):
    run, token = claimed(member, max_attempts=1)
    for _again in range(2):
        lifecycle.lost(run.pk, token, "exit code -9")
    assert [notice.kind for notice in Notice.objects.all()] == ["run_failed"]
    lifecycle.resume(run)  # and after another try there is news again
    lifecycle.succeed(run.pk, lifecycle.claim(run.pk))
    assert Notice.objects.filter(user=member).count() == 2


def test_what_one_has_stopped_oneself_is_no_news(member):
    run, token = claimed(member)
    lifecycle.acknowledge_cancel(run.pk, token)
    assert not Notice.objects.exists()


def test_anybody_may_notify(member):
    assert notify(member, "budget", "80 % of your units are used", "/account/", key="b").pk
    assert notify(member, "budget", "80 % of your units are used", "/account/", key="b") is None
    with override("zh-hans"):
        assert Notice.objects.get().sentence == "80 % of your units are used"
        assert Notice(kind="run_failed", text="广告").sentence == "“广告”失败了。"
    for number in range(KEPT + 5):
        notify(member, "other", str(number))
    assert Notice.objects.count() == KEPT and not Notice.objects.filter(kind="budget").exists()


def test_reviewers_are_told_what_waits_for_them(member, other_member, staff, settings):
    from evaluation import reviewing

    User.objects.filter(pk=other_member.pk).update(is_reviewer=True)

    class Evaluation:
        pk, name, owner_id, adapter = 7, "scores", member.pk, object()

    settings.APPROVAL_NEEDED = False
    reviewing.ask_for_review(Evaluation)
    assert not Notice.objects.exists()
    settings.APPROVAL_NEEDED = True
    reviewing.is_approved, before = lambda adapter: False, reviewing.is_approved
    try:
        for _twice in range(2):
            reviewing.ask_for_review(Evaluation)
    finally:
        reviewing.is_approved = before
    assert {n.user for n in Notice.objects.filter(kind="review")} == {other_member, staff}
    assert Notice.objects.count() == 2


def test_a_balance_that_is_nearly_spent_is_told(member, other_member):
    team = Team.objects.create(name="ads")
    team.members.add(member, other_member)
    for account in (Account(user=member), Account(team=team)):
        nearly_spent.send(Account, account=account, percent=81)
    told = list(Notice.objects.order_by("id").values_list("user__username", "text"))
    assert told == [("member", "81"), ("member", "81"), ("other", "81")]
    with override("en"):
        assert Notice.objects.first().sentence == "81 % of the compute units are used."


# ---- webhooks


def test_a_webhook_is_signed_and_sent_once(hooked, receiver, member):
    notice = notify(member, "run_failed", "广告", "/tuning/1/")
    sending = Delivery.objects.get()
    assert delivery.deliver(sending.pk) == "sent"
    assert delivery.deliver(sending.pk) == "nothing to do"
    ((path, headers, body),) = receiver.got
    assert path == "/hook?a=1"
    stamp = headers["X-Portal-Timestamp"]
    assert headers["X-Portal-Signature"] == webhook.signature(
        hooked.webhook_secret, int(stamp), body
    )
    assert webhook.signature("other", int(stamp), body) != headers["X-Portal-Signature"]
    told = json.loads(body)
    assert (told["id"], told["kind"], told["text"]) == (notice.pk, "run_failed", "广告")


def test_the_signature_is_the_documented_one():
    """HMAC-SHA256 of "1.{}" with "key", by openssl."""
    assert webhook.signature("key", 1, b"{}") == (
        "sha256=1ba6b8171186efc613e8bcc0cbdab2748f24984d7c5a84faa2637afa0e40d224"
    )


def test_it_is_tried_again_and_given_up(hooked, receiver, member):
    receiver.answers = [500] * 10
    notify(member, "other", "x")
    sending = Delivery.objects.get()
    for attempt in range(1, 5):
        Delivery.objects.update(next_at=timezone.now())
        assert delivery.deliver(sending.pk) == "failed"
        sending.refresh_from_db()
        assert (sending.attempts, "500" in sending.error) == (attempt, True)
        assert (sending.done_at is not None) == (attempt == 4)
    assert delivery.deliver(sending.pk) == "nothing to do" and len(receiver.got) == 4


def test_another_process_that_has_begun_is_left_alone(hooked, receiver, member):
    receiver.answers = [500]
    notify(member, "other", "x")
    sending = Delivery.objects.get()
    delivery.deliver(sending.pk)
    assert delivery.deliver(sending.pk) == "somebody else does it" and len(receiver.got) == 1


def test_a_redirect_is_not_followed(hooked, receiver, member):
    receiver.answers = [307]
    notify(member, "other", "x")
    assert delivery.deliver(Delivery.objects.get().pk) == "failed"
    assert len(receiver.got) == 1 and "307" in Delivery.objects.get().error


@pytest.mark.parametrize(
    "url",
    [
        "ftp://hooks.example/",
        "https://",
        "//hooks.example/",
        "https://user:password@hooks.example/",
        "https://evil.example/",
        "https://hooks.example.evil.example/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://169.254.169.254/latest/meta-data/",
        "https://hooks.example:99999/",
        "https://hooks.example/\r\nX: y",
        "javascript:alert(1)",
    ],
)
def test_what_is_not_listed_is_refused_in_both_languages(url, settings, client, member):
    settings.WEBHOOK_HOSTS, settings.WEBHOOK_NETWORKS = _listed("hooks.example", "10.0.0.0/8")
    with override("zh-hans"), pytest.raises(webhook.NotAllowed) as refused:
        webhook.check(url)
    assert any("\u4e00" <= letter <= "\u9fff" for letter in str(refused.value))
    client.force_login(member)
    client.post("/notices/settings/", {"webhook_url": url})
    assert not NoticeSettings.objects.exclude(webhook_url="").exists()


def test_a_listed_name_that_leads_to_a_private_address_is_refused(settings, monkeypatch):
    settings.WEBHOOK_HOSTS, settings.WEBHOOK_NETWORKS = _listed("hooks.example", "10.1.0.0/16")
    leads_to = ["192.168.0.9"]

    def resolve(host, port, **_more):
        return [(2, 1, 6, "", (leads_to[0], port))]

    monkeypatch.setattr(webhook.socket, "getaddrinfo", resolve)
    for leads_to[0] in ("192.168.0.9", "127.0.0.1", "169.254.169.254", "10.2.0.1", "224.0.0.1"):
        with pytest.raises(webhook.NotAllowed):
            webhook._resolved("hooks.example", 443)
    for leads_to[0] in ("10.1.2.3", "93.184.216.34"):
        assert webhook._resolved("hooks.example", 443) == leads_to[0]
    leads_to[0] = "::ffff:127.0.0.1"
    with pytest.raises(webhook.NotAllowed):
        webhook._resolved("hooks.example", 443)


def test_a_clock_that_was_set_back_delays_nothing_for_long(hooked, member, monkeypatch):
    notify(member, "other", "x")
    rung = []
    monkeypatch.setattr(delivery, "ring", rung.append)
    Delivery.objects.update(next_at=timezone.now() + timedelta(days=30))
    delivery.ring_due()
    assert not rung and Delivery.objects.get().next_at <= timezone.now()
    Delivery.objects.update(next_at=timezone.now() - timedelta(minutes=1))
    delivery.ring_due()
    assert rung == [Delivery.objects.get().pk]


# ---- e-mail, settings


def test_e_mail_for_whom_wants_it(member, other_member, settings, monkeypatch):
    monkeypatch.setattr(delivery, "ring", lambda number: None)
    settings.EMAIL_HOST = "mail.example"
    settings.CSRF_TRUSTED_ORIGINS = ["https://portal.example"]
    for user in (member, other_member):
        User.objects.filter(pk=user.pk).update(email=f"{user}@team.example")
        user.refresh_from_db()
    NoticeSettings.objects.create(user=member, by_email=True)
    for user in (member, other_member):
        notify(user, "run_failed", "a\r\nBcc: b", "/tuning/1/")
    sending = Delivery.objects.get()
    with override("en"):
        assert delivery.deliver(sending.pk) == "sent"
    (sent,) = mail.outbox
    assert sent.to == ["member@team.example"] and sent.subject == "“a Bcc: b” has failed."
    assert "https://portal.example/tuning/1/" in sent.body

    def away(*arguments, **options):
        raise smtplib.SMTPServerDisconnected("away")

    monkeypatch.setattr(delivery, "send_mail", away)
    notify(member, "other", "x")
    assert delivery.deliver(Delivery.objects.latest("id").pk) == "failed"


def test_settings_on_the_account_page(client, member, receiver):
    client.force_login(member)
    client.cookies["django_language"] = "en"
    client.post("/notices/settings/", {"by_email": "on", "webhook_url": receiver.url})
    mine = NoticeSettings.objects.get(user=member)
    assert mine.by_email and mine.webhook_url == receiver.url
    page = text_of(client.get("/account/"))
    assert mine.webhook_secret in page and receiver.url in page
    client.post("/notices/settings/", {"action": "new_secret"})
    again = NoticeSettings.objects.get(user=member)
    assert again.webhook_secret != mine.webhook_secret and again.by_email
    client.post("/notices/settings/", {"webhook_url": ""})
    assert not NoticeSettings.objects.get(user=member).webhook_url


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("", ("", 587, "", "", False, False)),
        ("smtp://a%40b:p%3A@mail.example", ("mail.example", 587, "a@b", "p:", True, False)),
        ("smtps://mail.example", ("mail.example", 465, "", "", False, True)),
        ("smtp://localhost:25", ("localhost", 25, "", "", False, False)),
    ],
)
def test_the_mail_server(url, found):
    from portal.settings import _mail_server

    assert _mail_server(url) == found


@pytest.mark.parametrize("url", ["mail.example", "http://mail.example", "smtp://", "smtp://a:x"])
def test_what_is_no_mail_server(url):
    from portal.settings import _mail_server

    with pytest.raises(ValueError):
        _mail_server(url)
