"""Logging in through a provider of OpenID Connect: both are processes, and the test is the browser
between them.
"""

import json
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from tests.support import ROOT, identity_provider
from tests.support.live_portal import free_port, wait_for
from tests.support.web_process import Web

PEOPLE = """
from portal.models import User
def make(name, email, **more):
    User.objects.create_user(name, email, "correct horse", **more)
make("alice", "Alice@example.org")
make("boss", "boss@example.org", is_staff=True, is_superuser=True)
make("gone", "gone@example.org", is_active=False)
make("twin1", "twin@example.org"); make("twin2", "TWIN@example.org")
make("kim", "kim@example.org")
"""


class Site:
    """The portal with single sign-on, and its provider."""

    def __init__(self, web: Web, issuer: str):
        self.web, self.issuer = web, issuer

    def behave(self, fault: str = "", **claims) -> None:
        requests.post(f"{self.issuer}/behave", json={"fault": fault, "claims": claims}, timeout=9)

    def rows(self, query: str, *values) -> list[tuple]:
        """Of the portal's database, as it lies on the disk."""
        with sqlite3.connect(f"{self.web.folder.name}/portal.sqlite3", timeout=20) as database:
            return database.execute(query, values).fetchall()

    def links(self, name: str) -> int:
        query = (
            "select count(*) from portal_externallogin l join portal_user u on l.user_id = u.id "
            "where u.username = ?"
        )
        return self.rows(query, name)[0][0]

    def browser(self) -> requests.Session:
        session = requests.Session()
        session.headers["Accept-Language"] = "en"
        return session

    def login(self, session=None, path: str = "/login/sso/"):
        session = session or self.browser()
        return session, session.get(self.web.url + path, timeout=30)

    def who(self, session) -> str:
        """The name on the account's page, "" for nobody."""
        page = session.get(f"{self.web.url}/account/", timeout=30)
        found = re.search(r"<p>\s*(\S+) ·\s*(\S+)", page.text)
        return f"{found[1]} {found[2]}" if found else ""


@pytest.fixture(scope="module")
def site():
    port = free_port()
    issuer = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tests.support.identity_provider", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        settings = {
            "PORTAL_OIDC_ISSUER": issuer,
            "PORTAL_OIDC_NAME": "Our directory",
            "PORTAL_OIDC_CLIENT_ID": identity_provider.CLIENT,
            "PORTAL_OIDC_CLIENT_SECRET": identity_provider.SECRET,
            "PORTAL_OIDC_CREATE": "1",
            "PORTAL_OIDC_ADMIN_GROUP": "portal-admins",
        }
        with Web(pages=True, **settings) as web:
            wait_for(lambda: _answers(issuer), 60, "the provider")
            web.manage("shell", "-v", "0", "-c", PEOPLE)
            yield Site(web, issuer)
    finally:
        process.kill()
        process.wait()


def _answers(issuer: str) -> bool:
    try:
        return requests.get(f"{issuer}/keys", timeout=5).ok
    except requests.ConnectionError:
        return False


def test_a_verified_address_opens_its_account_and_the_subject_does_from_then_on(site):
    site.behave()
    session, page = site.login(path="/login/sso/?next=/datasets/")
    assert page.url == f"{site.web.url}/datasets/" and page.status_code == 200
    assert site.who(session) == "alice Member"
    ends = next(cookie.expires for cookie in session.cookies if cookie.name == "sessionid")
    assert 11 < (ends - time.time()) / 3600 <= 12
    site.behave(email="renamed@example.org")
    assert site.who(site.login()[0]) == "alice Member"
    assert site.links("alice") == 1


def test_the_page_offers_it_in_both_languages_and_its_policy_allows_it(site):
    for language, text in {
        "en": "Log in with Our directory",
        "zh-hans": "Our directory 登录",
    }.items():
        page = requests.get(
            f"{site.web.url}/login/?next=/chat/", headers={"Accept-Language": language}, timeout=30
        )
        assert text in page.text and 'href="/login/sso/?next=/chat/"' in page.text
        assert "form-action 'self'" in page.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "claims",
    [
        {"email": "kim@example.org", "email_verified": False},
        {"email": "kim@example.org", "email_verified": None},
        {"email": "kim@example.org", "email_verified": "false"},
        {"email": "kim@example.org", "email_verified": 1.5},
        {"email": ["kim@example.org"]},
        {"email": "\u212aim@example.org"},  # its lower case is kim
        {"email": "k\u0131m@example.org"},  # its upper case is KIM
        {"email": "kim@example.org\x00"},
    ],
    ids=str,
)
def test_no_account_is_taken_over_by_what_is_not_its_verified_address(site, claims):
    site.behave(sub=f"stranger {json.dumps(claims)}", preferred_username="kim", **claims)
    session, _page = site.login()
    assert not site.who(session).startswith("kim ")
    assert site.links("kim") == 0


def test_who_is_new_gets_an_account_of_a_name_that_was_free(site):
    site.behave(sub="new", email="new@example.org", preferred_username="boss", is_staff=True)
    assert site.who(site.login()[0]) == "boss-2 Member"
    assert site.who(site.login()[0]) == "boss-2 Member"
    query = "select email, password from portal_user where username = 'boss-2'"
    ((email, password),) = site.rows(query)
    assert email == "new@example.org" and password.startswith("!")  # none opens it


@pytest.mark.parametrize(
    ("claims", "told"),
    [
        ({"sub": "g", "email": "gone@example.org"}, "deactivated"),
        ({"sub": "b", "email": "boss@example.org"}, "Administrators log in with their password"),
        ({"sub": "t", "email": "twin@example.org"}, "Several accounts have your e-mail address"),
        ({"sub": 5}, "not accepted"),
        ({"sub": "x" * 300}, "not accepted"),
    ],
)
def test_who_stays_out_is_told_why(site, claims, told):
    site.behave(**claims)
    session, page = site.login()
    assert page.status_code == 403 and told in page.text and not site.who(session)


def test_who_is_deactivated_later_is_out_at_once_and_stays_out(site):
    site.behave(sub="leaver", email="leaver@example.org", preferred_username="leaver")
    session, _page = site.login()
    assert site.who(session) == "leaver Member"
    site.rows("update portal_user set is_active = 0 where username = 'leaver'")
    assert not site.who(session)
    again, page = site.login()
    assert page.status_code == 403 and not site.who(again)


def test_the_group_makes_administrators_and_unmakes_them(site):
    person = {"sub": "chief", "email": "chief@example.org", "preferred_username": "chief"}
    for groups, role in (
        ("portal-admins", "Member"),  # a text is no list of groups
        (["portal-admins", "x"], "Administrator"),
        (["x"], "Member"),
    ):
        site.behave(**person, groups=groups)
        assert site.who(site.login()[0]) == f"chief {role}"


@pytest.mark.parametrize(
    "fault",
    [
        "wrong nonce", "no nonce", "wrong signature", "unsigned", "signed with what is public",
        "unknown key", "no kid", "wrong audience", "another's token", "wrong issuer", "expired",
        "no end", "no subject", "garbage", "no token", "another's userinfo", "denied",
    ],
)  # fmt: skip
def test_what_a_provider_may_not_say_lets_nobody_in(site, fault):
    site.behave(fault)
    session, page = site.login()
    assert page.status_code == 403 and "The login was not accepted" in page.text
    assert not site.who(session)
    log = Path(site.web.log.name).read_text()
    assert "Traceback" not in log and identity_provider.SECRET not in log


def test_a_way_back_without_the_way_there_lets_nobody_in(site):
    site.behave()
    mine, theirs = site.browser(), site.browser()
    back = f"{site.web.url}/login/sso/callback/"
    for query in ("", "?code=x", "?state=x", "?code=x&state=x", "?code=%00&state=%00", "?error=x"):
        page = mine.get(back + query, timeout=30)
        assert page.status_code == 403 and "not accepted" in page.text, query
    # an attacker's own code and state, in somebody else's browser
    asked = theirs.get(f"{site.web.url}/login/sso/", allow_redirects=False, timeout=30)
    way = requests.get(asked.headers["Location"], allow_redirects=False, timeout=30)
    assert mine.get(way.headers["Location"], timeout=30).status_code == 403
    # beside a password's form, where nothing has looked at the state
    form = mine.get(f"{site.web.url}/login/", timeout=30)
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', form.text)[1]
    page = mine.post(
        f"{site.web.url}/login/?{urlsplit(way.headers['Location']).query}",
        {"csrfmiddlewaretoken": token, "username": "alice", "password": "wrong"}, timeout=30,
    )  # fmt: skip
    assert page.status_code == 200 and not site.who(mine)
    # in the browser where it began it is good, once
    assert theirs.get(way.headers["Location"], timeout=30).status_code == 200
    assert site.who(theirs) == "alice Member"
    again = site.browser()
    again.cookies.update(theirs.cookies)
    again.post(f"{site.web.url}/logout/", {"csrfmiddlewaretoken": ""}, timeout=30)
    assert not site.who(again.__class__())


@pytest.mark.parametrize("where", ["https://evil.example/", "//evil.example", "javascript:1"])
def test_it_leads_to_no_other_site(site, where):
    site.behave()
    _session, page = site.login(path=f"/login/sso/?next={where}")
    assert urlsplit(page.url).netloc == urlsplit(site.web.url).netloc


def test_logging_out_ends_the_session_here_and_offers_to_end_it_there(site):
    site.behave()
    session, page = site.login()
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)[1]
    page = session.post(
        f"{site.web.url}/logout/", {"csrfmiddlewaretoken": token},
        headers={"Referer": site.web.url}, timeout=30,
    )  # fmt: skip
    assert not site.who(session) and 'href="/login/sso/leave/"' in page.text
    told = session.get(f"{site.web.url}/login/sso/leave/", timeout=30)
    assert told.url.startswith(f"{site.issuer}/logout?")
    query = parse_qs(urlsplit(told.url).query)
    assert query["post_logout_redirect_uri"] == [f"{site.web.url}/login/"]


def test_a_password_still_opens_and_its_pause_is_not_undone(site):
    session = site.browser()

    def attempt(password: str) -> str:
        form = session.get(f"{site.web.url}/login/", timeout=30)
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', form.text)[1]
        return session.post(
            f"{site.web.url}/login/",
            {"csrfmiddlewaretoken": token, "username": "kim", "password": password}, timeout=30,
        ).text  # fmt: skip

    attempt("correct horse")
    assert site.who(session) == "kim Member"
    session = site.browser()
    for _attempt in range(10):
        attempt("wrong")
    site.behave()
    assert site.who(site.login()[0]) == "alice Member"
    assert "Too many failed attempts" in attempt("correct horse") and not site.who(session)
