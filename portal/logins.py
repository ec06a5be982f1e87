"""Open sockets and running streams end when what opened them does: logout, a changed password, a
deactivated account, a revoked or expired key. One look at the database a second for all of them,
so that it also holds across several web processes and for what is done in a shell.
"""

import asyncio
import contextvars
import logging
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from channels.db import database_sync_to_async
from django.contrib.sessions.models import Session
from django.db import DatabaseError
from django.utils import timezone
from django.utils.crypto import constant_time_compare

from portal.models import ApiKey, User

logger = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Login:
    """What opened a connection: a key, or a session with the hash of the password it stands on."""

    user: int
    key: int | None = None
    session: str | None = None
    session_hash: str = ""


def login_of(user, session=None) -> Login:
    key = getattr(user, "api_key", None)
    if key is not None:
        return Login(user.pk, key=key.pk)
    if session is not None and session.session_key:
        return Login(user.pk, None, session.session_key, user.get_session_auth_hash())
    return Login(user.pk)


def over(logins: set[Login]) -> set[Login]:
    """Those that are not valid any more. Asks the database three times, however many there are."""
    now = timezone.now()
    users = User.objects.filter(is_active=True).in_bulk({login.user for login in logins})
    sessions = set(
        Session.objects.filter(
            session_key__in={login.session for login in logins if login.session},
            expire_date__gt=now,
        ).values_list("pk", flat=True)
    )
    keys = set(
        ApiKey.objects.valid()
        .filter(pk__in={login.key for login in logins if login.key})
        .values_list("pk", flat=True)
    )

    def holds(login: Login) -> bool:
        user = users.get(login.user)
        if user is None:
            return False
        if login.key is not None:
            return login.key in keys
        if login.session is None:
            return True
        same = constant_time_compare(login.session_hash, user.get_session_auth_hash())
        return same and login.session in sessions

    return {login for login in logins if not holds(login)}


@dataclass
class _Watch:
    """Of one event loop."""

    waiting: dict[asyncio.Future, Login] = field(default_factory=dict)
    task: asyncio.Task | None = None

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                ended = await database_sync_to_async(over)(set(self.waiting.values()))
            except DatabaseError:
                logger.exception("could not look whether open connections may stay open")
                continue
            for future, login in list(self.waiting.items()):
                if login in ended and not future.done():
                    future.set_result(None)


_watches: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch] = WeakKeyDictionary()


async def ended(login: Login) -> None:
    """Returns when the login is over; cancel it when that is of no interest any more."""
    loop = asyncio.get_running_loop()
    watch = _watches.setdefault(loop, _Watch())
    future = loop.create_future()
    watch.waiting[future] = login
    if watch.task is None or watch.task.done():
        # a context of its own: this one may be a request's, whose database thread ends with it
        watch.task = loop.create_task(watch.run(), context=contextvars.Context())
    try:
        await future
    finally:
        del watch.waiting[future]
        if not watch.waiting and watch.task is not None:
            watch.task.cancel()
            watch.task = None
