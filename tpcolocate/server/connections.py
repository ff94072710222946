"""Connections to one server: how many, for how long, and whose.

Requests of ``/generate`` can be hundreds at once, and take as many connections as `most_connections` permits; the rest wait
for one.  All other requests go past them.
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import os
import resource
import ssl
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.wait import wait_for_read

from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError

# uvicorn closes idle connections after 5 s; one that is older than this is not used again, so that no request
# races the close and has to be repeated.
_KEEPALIVE_S = 2.0
_MAX_IDLE = 64
_MOST_CONNECTIONS = 256
# How often a request without a timeout looks whether the server is still up.
LOOK_S = 60.0
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_IDLE, keepalive_expiry=_KEEPALIVE_S)


class _Response(http.client.HTTPResponse):
    """Closes its connection after a 5xx: uvicorn does so too, but a little later, and the next request would meet that."""

    def begin(self) -> None:
        super().begin()
        if self.status >= 500:
            self.will_close = True


class _PatientConnection:
    """Looks whether the server is up while a request without a timeout waits for its answer."""

    timeout: Any
    sock: Any

    def __init__(self, *args: Any, look: Callable[[], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._look = look

    def getresponse(self) -> Any:
        while self.timeout is None and not wait_for_read(self.sock, timeout=LOOK_S):
            self._look()
        return super().getresponse()  # type: ignore[misc]


class _Connection(_PatientConnection, HTTPConnection):
    response_class = _Response  # type: ignore[assignment]


class _SecureConnection(_PatientConnection, HTTPSConnection):
    response_class = _Response  # type: ignore[assignment]


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


@dataclass(slots=True)
class LoopConnections:
    """Connections of one event loop.

    Attributes:
        client: Of httpx.
        slots: One for each request of `/generate` that may be in flight.
        closer: Closes the client when its loop ends the asynchronous generators, as `asyncio.run` does.
    """

    client: httpx.AsyncClient
    slots: asyncio.Semaphore
    closer: AsyncGenerator[None, None]


@dataclass(slots=True)
class _OfProcess:
    """Connections of one process.  A fork must not use those of its parent: both would read the answers.

    Attributes:
        pid: Of the process.
        slots: One for each blocking request of `/generate` that may be in flight.
        most: How many there are.
        lock: Of one thread at a time, but a signal's handler may close what its own thread is about to use.
    """

    pid: int
    slots: threading.Semaphore
    most: int
    lock: threading.RLock = field(default_factory=threading.RLock)
    pool: urllib3.HTTPConnectionPool | None = None
    used: float = 0.0
    loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopConnections] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    @classmethod
    def current(cls) -> _OfProcess:
        most = most_connections()
        return cls(os.getpid(), threading.Semaphore(most), most)


class Connections:
    """Connections to one server, per process, and for asyncio per event loop.  Thread-safe.

    Args:
        url: Of the server.
        headers: Of every asyncio request.
        look: Raises if the server is not up; called now and then while a request without a timeout waits.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str], look: Callable[[], None]) -> None:
        self._url = url
        self._headers = headers
        self._look = look
        self._of_process = _OfProcess.current()
        self._inherited: list[_OfProcess] = []

    def _mine(self) -> _OfProcess:
        """Return the connections of this process."""
        found = self._of_process
        if found.pid != os.getpid():
            # Kept, not closed: another thread of the parent may have held a lock of theirs when this process began.
            self._inherited.append(found)
            found = self._of_process = _OfProcess.current()
        return found

    def close(self) -> None:
        """Close the idle connections of this process; those of requests in flight close with them."""
        connections = self._mine()
        with connections.lock:
            pool, connections.pool = connections.pool, None
            loops = list(connections.loops.items())
            connections.loops.clear()
        if pool is not None:
            pool.close()
        for loop, of_loop in loops:
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(of_loop.client.aclose(), loop)

    def pool(self) -> urllib3.HTTPConnectionPool:
        """Return the pool of blocking requests, without connections that were idle for long."""
        connections = self._mine()
        with connections.lock:
            now = time.monotonic()
            if connections.pool is not None and now - connections.used > _KEEPALIVE_S:
                # Requests in flight keep their connections; the idle ones may be about to be closed by the server.
                connections.pool.close()
                connections.pool = None
            if connections.pool is None:
                connections.pool = self._new_pool()
            connections.used = now
            return connections.pool

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        url = urllib3.util.parse_url(self._url)
        assert url.host is not None
        if url.scheme == "https":
            return _SecurePool(url.host, url.port, maxsize=_MAX_IDLE, ssl_context=certificates(), look=self._look)
        return _Pool(url.host, url.port, maxsize=_MAX_IDLE, look=self._look)

    @contextmanager
    def slot(self, path: str, deadline: Deadline) -> Iterator[None]:
        """Wait for the right to a connection to an endpoint, and hold it."""
        if path != "/generate":
            yield
            return
        connections = self._mine()
        if not connections.slots.acquire(timeout=deadline.socket_timeout()):
            raise _no_connection(path, deadline, connections.most)
        try:
            yield
        finally:
            connections.slots.release()

    @asynccontextmanager
    async def slot_async(self, path: str, deadline: Deadline) -> AsyncIterator[None]:
        """`slot` on the running event loop."""
        slots = (await self.of_loop()).slots
        try:
            async with asyncio.timeout(deadline.socket_timeout()):  # wait_for of Python 3.11 may lose a cancellation
                await slots.acquire()
        except TimeoutError:
            raise _no_connection(path, deadline, self._mine().most) from None
        try:
            yield
        finally:
            slots.release()

    async def of_loop(self) -> LoopConnections:
        """Return the connections of the running event loop."""
        connections, loop = self._mine(), asyncio.get_running_loop()
        with connections.lock:  # other threads have loops of their own
            found = connections.loops.get(loop)
            if found is not None:
                return found
            for other in list(connections.loops):
                if other.is_closed():  # not by asyncio.run, which would have ended the closer; its sockets go with it
                    del connections.loops[other]
            found = connections.loops[loop] = self._new_loop_connections(connections.most)
        await anext(found.closer)
        return found

    def _new_loop_connections(self, most: int) -> LoopConnections:
        # trust_env off: a proxy from the environment must not get requests to this machine
        client = httpx.AsyncClient(
            base_url=self._url,
            headers={**self._headers, "Content-Type": "application/json"},
            trust_env=False,
            verify=certificates(),
            limits=_LIMITS,
        )
        return LoopConnections(client, asyncio.Semaphore(most), _closing(client))


def most_connections() -> int:
    """Return how many connections generation may use, of each kind: a fraction of this process's descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(4, min(_MOST_CONNECTIONS, soft // 4))


async def _closing(client: httpx.AsyncClient) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await client.aclose()


def _no_connection(path: str, deadline: Deadline, most: int) -> DeadlineError:
    return DeadlineError(
        f"{path}: no free connection within {deadline.timeout_s:g} s: {most} requests of this process are in flight",
        hint="nothing was sent; for more time raise timeout_s",
    )


@functools.cache
def certificates() -> ssl.SSLContext:
    """Load them once for all clients: that takes tens of milliseconds, and most servers use plain HTTP."""
    return httpx.create_ssl_context(trust_env=False)


__all__ = ["LOOK_S", "Connections", "certificates", "most_connections"]
