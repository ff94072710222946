"""Blocking HTTP connections to one server, kept open between requests.

On the standard library: through httpx a request costs this process half a millisecond to one millisecond more, which
is a tenth of a short generation (``benchmarks/generate_overhead.py``).
"""

from __future__ import annotations

import functools
import http.client
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx

CONNECT_TIMEOUT_S = 5.0
# uvicorn closes idle connections after 5 s; one that is older than this is not used again, so that no request
# races the close and has to be repeated.
KEEPALIVE_S = 2.0
MAX_IDLE = 64


class ConnectTimeout(TimeoutError):
    """Nothing was sent: there was no connection in time."""


class Connections:
    """One connection per request in flight.  Thread-safe; sends nothing twice.

    Args:
        url: ``http://host:port`` or ``https://``, with a path to go before every other if need be.
        headers: Sent with every request.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._address = urlsplit(url)
        self._headers = {**headers, "Content-Type": "application/json"}
        self._lock = threading.Lock()
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []

    def close(self) -> None:
        """Close the idle ones; those in use close or stay with their request."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    @contextmanager
    def request(self, method: str, path: str, *, body: bytes | None, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the body of the `with` reads the answer.

        Args:
            method: ``GET`` or ``POST``.
            path: With the query.
            body: JSON.
            timeout_s: Longest wait for each piece of the answer, in seconds.

        Raises:
            ConnectTimeout, TimeoutError, OSError, http.client.HTTPException: As the standard library does, in the
                `with` statement as well as from reading in its body.
        """
        connection = self._take()
        try:
            if connection is None:
                connection = self._connect(timeout_s)
            connection.sock.settimeout(timeout_s)
            connection.request(method, self._address.path.rstrip("/") + path, body, self._headers)
            response = connection.getresponse()
            yield response
            if response.isclosed() and connection.sock is not None:  # read to its end, and the server keeps it open
                self._give_back(connection)
                connection = None
        finally:
            if connection is not None:
                connection.close()

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        timeout_s = min(CONNECT_TIMEOUT_S, timeout_s)
        connection: http.client.HTTPConnection
        if self._address.scheme == "https":
            connection = http.client.HTTPSConnection(self._address.netloc, timeout=timeout_s, context=certificates())
        else:
            connection = http.client.HTTPConnection(self._address.netloc, timeout=timeout_s)
        try:
            connection.connect()
        except TimeoutError as error:
            raise ConnectTimeout(f"no connection within {timeout_s:g} s") from error
        return connection

    def _take(self) -> http.client.HTTPConnection | None:
        """The idle connection that was used last; those that are old or closed by the server go."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                since, connection = self._idle.pop()
            if time.monotonic() - since < KEEPALIVE_S and not _has_news(connection.sock):
                return connection
            connection.close()

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < MAX_IDLE:
                self._idle.append((time.monotonic(), connection))
                return
        connection.close()


def _has_news(idle: socket.socket) -> bool:
    """Whether there is something to read where nothing is expected: the end of the connection."""
    poller = select.poll()
    poller.register(idle, select.POLLIN)
    return bool(poller.poll(0))


@functools.cache
def certificates() -> ssl.SSLContext:
    """Once for all clients: reading them takes tens of milliseconds, for servers that mostly speak plain HTTP."""
    return httpx.create_ssl_context(trust_env=False)


__all__ = ["ConnectTimeout", "Connections", "certificates"]
