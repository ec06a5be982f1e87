"""The HTTP client that everything here goes out with: limits on every wait, no packed answers."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from functools import lru_cache

import httpx2

# seconds; a server that says nothing for so long counts as cut off
CONNECT, SILENCE = 15.0, 20.0


@lru_cache
def _trust(certificate: str | None, environment: str) -> ssl.SSLContext:
    """Reading all certificates takes a while; once is enough."""
    if certificate:
        return ssl.create_default_context(cafile=certificate)
    return httpx2.create_ssl_context()


def open_client(
    *, proxy: str | None = None, certificate: str | None = None, verify: bool = True
) -> httpx2.Client:
    """An HTTP client with limits on every wait. Proxies and CA bundle come from the environment
    unless they are given.
    """
    return httpx2.Client(
        timeout=httpx2.Timeout(SILENCE, connect=CONNECT),
        follow_redirects=True,
        max_redirects=5,
        proxy=proxy,
        verify=verify and _trust(certificate, os.environ.get("SSL_CERT_FILE", "")),
        headers={
            "Accept-Encoding": "identity"
        },  # a packed answer could not be resumed by its bytes
    )


def read_answer(
    client: httpx2.Client, url: str, *, most: int, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, httpx2.Response]:
    """(status, body, response without body) of a GET whose answer has at most `most` bytes, however
    it is packed. httpx2.HTTPError, or ValueError for a longer one.
    """
    with client.stream("GET", url, headers=headers) as response:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > most:
                raise ValueError("an answer without end")
        return response.status_code, bytes(body), response
