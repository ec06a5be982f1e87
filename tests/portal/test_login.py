"""Wrong passwords at the two login forms."""

import pytest
from django.core.cache import cache

from portal import web_server
from portal.login import MOST_FAILURES, MOST_OF_ADDRESS

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery"


@pytest.fixture(autouse=True)
def nothing_counted():
    cache.clear()
    yield
    cache.clear()


def attempt(client, path, username, password, **where) -> bool:
    """Is somebody logged in afterwards?"""
    return (
        client.post(path, {"username": username, "password": password}, **where).status_code == 302
    )


@pytest.mark.parametrize("path", ["/login/", "/admin/login/"])
def test_ten_wrong_passwords_make_a_pause_for_this_name_and_address_alone(
    client, staff, member, path
):
    for _attempt in range(MOST_FAILURES):
        assert not attempt(client, path, staff.username, "wrong")
    assert not attempt(client, path, staff.username, PASSWORD)
    told = client.post(
        path, {"username": staff.username, "password": PASSWORD}, headers={"Accept-Language": "en"}
    )
    assert "Too many failed attempts. Try again in 5 minutes." in told.content.decode()
    assert attempt(client, path, staff.username, PASSWORD, REMOTE_ADDR="192.0.2.7")
    assert attempt(client, "/login/", member.username, PASSWORD)


def test_a_login_forgets_the_failures_before_it(client, member):
    for _round in range(2):
        for _attempt in range(MOST_FAILURES - 1):
            assert not attempt(client, "/login/", member.username, "wrong")
        assert attempt(client, "/login/", member.username, PASSWORD)
        client.logout()


def test_a_pause_is_not_ended_by_attempts_on_other_names(client, member):
    for _attempt in range(MOST_FAILURES):
        assert not attempt(client, "/login/", member.username, "wrong")
    for number in range(1000):
        assert not attempt(client, "/login/", f"nobody{number}", "")  # costs no hash
        if number < 200:
            attempt(client, "/login/", f"nobody{number}", "x", REMOTE_ADDR=f"192.0.2.{number}")
    assert not attempt(client, "/login/", member.username, PASSWORD)


def test_one_password_is_not_tried_on_every_name(client, member):
    for number in range(MOST_OF_ADDRESS):
        assert not attempt(client, "/login/", f"nobody{number}", "123456")
    assert not attempt(client, "/login/", member.username, PASSWORD)
    assert attempt(client, "/login/", member.username, PASSWORD, REMOTE_ADDR="192.0.2.7")


def test_a_household_of_ipv6_addresses_is_one(client, member):
    for number in range(MOST_FAILURES):
        address = f"2001:db8::{number:x}"
        assert not attempt(client, "/login/", member.username, "wrong", REMOTE_ADDR=address)
    other, same = "2001:db8:0:1::1", "2001:db8::ffff"
    assert not attempt(client, "/login/", member.username, PASSWORD, REMOTE_ADDR=same)
    assert attempt(client, "/login/", member.username, PASSWORD, REMOTE_ADDR=other)


def test_the_old_password_is_guessed_no_oftener(client, member):
    client.force_login(member)
    new = {
        "action": "change_password",
        "new_password1": "x9 y8 z7 q6",
        "new_password2": "x9 y8 z7 q6",
    }
    for _attempt in range(MOST_FAILURES):
        client.post("/account/", {**new, "old_password": "wrong"})
    assert client.post("/account/", {**new, "old_password": PASSWORD}).status_code == 200
    member.refresh_from_db()
    assert member.check_password(PASSWORD)


@pytest.mark.parametrize(
    ("peer", "header", "found"),
    [
        ("127.0.0.1", b"6.6.6.1, 203.0.113.9", "203.0.113.9"),  # what the client wrote, then nginx
        ("127.0.0.1", b"6.6.6.1, 203.0.113.9, 127.0.0.1", "203.0.113.9"),
        ("198.51.100.1", b"6.6.6.1", "198.51.100.1"),  # not through the proxy
    ],
)
def test_behind_a_proxy_the_address_is_the_one_that_it_saw(settings, peer, header, found):
    settings.HTTPS = True
    scope = {"type": "http", "client": [peer, 1], "scheme": "http"}
    scope["headers"] = [(b"x-forwarded-for", header)]
    web_server.behind_proxy(scope)
    assert scope["client"][0] == found
