"""Wrong passwords at the two login forms."""

import pytest
from django.core.cache import cache

from portal.login import MOST_FAILURES

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
    for number in range(MOST_FAILURES):
        assert not attempt(client, path, staff.username, "wrong" if number % 2 else "")
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
