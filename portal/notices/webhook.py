"""One signed POST to an address that a member has named, and nothing else that it could be made
into: hosts are allow-listed, private addresses refused unless they are listed themselves, redirects
not followed, what comes back not shown to anybody.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import socket
import ssl
from urllib.parse import SplitResult, urlsplit

from django.conf import settings
from django.utils.translation import gettext as _

TIMEOUT = 5.0  # seconds, for each of connecting, sending and the answer


class NotAllowed(Exception):
    """The address may not be asked; trying again would not help."""


class Failed(Exception):
    """The receiver did not take it."""


def check(url: str) -> SplitResult:
    """The parts of an address that may be used. Raises NotAllowed, in the active language."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise NotAllowed(_("This is no address.")) from None
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host or parts.username or port == 0:
        raise NotAllowed(_("An address begins with https:// or http:// and names a host."))
    if any(character <= " " or character == "\x7f" for character in url):
        raise NotAllowed(_("This is no address."))
    if host.lower() not in settings.WEBHOOK_HOSTS and not _listed(host):
        raise NotAllowed(
            _("Notices may not be sent to %(host)s; an administrator can list it.") % {"host": host}
        )
    return parts


def _listed(address: str) -> bool:
    """Is it an address in one of the listed networks?"""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(
        parsed in network
        for network in settings.WEBHOOK_NETWORKS
        if network.version == parsed.version
    )


def _resolved(host: str, port: int) -> str:
    """An address of the host that may be connected to: a public one, or one that is listed. What is
    connected to is what was looked at.
    """
    try:
        found = {
            str(info[4][0]) for info in socket.getaddrinfo(host, port, proto=socket.IPPROTO_TCP)
        }
    except OSError as error:
        raise Failed(f"{host}: {error}") from error
    for address in sorted(found):
        parsed = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(parsed, "ipv4_mapped", None) or parsed
        public = mapped.is_global and not mapped.is_multicast
        if public or _listed(str(mapped)):
            return address
    raise NotAllowed(f"{host} is a private address")


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """HMAC-SHA256 over the timestamp, a full stop and the body."""
    signed = f"{timestamp}.".encode() + body
    return "sha256=" + hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def post(url: str, body: bytes, secret: str, timestamp: int) -> None:
    """Raises NotAllowed or Failed."""
    parts = check(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.sock = socket.create_connection((_resolved(host, port), port), TIMEOUT)
        if secure:
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "portal",
            "X-Portal-Timestamp": str(timestamp),
            "X-Portal-Signature": signature(secret, timestamp, body),
        }
        connection.request("POST", path, body, headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{host}: {error}") from error
    finally:
        connection.close()
    if not 200 <= status < 300:  # a redirect too
        raise Failed(f"{host} answered {status}")
