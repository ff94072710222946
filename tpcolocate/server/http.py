"""HTTP to one SGLang server: requests, deadlines, and errors of this library's classes.

Nothing is ever sent twice: a request whose answer was lost may have been carried out, and a weight push that was
carried out twice opens its payload twice.

Two libraries, because each lacks what the other has.  httpx serves asyncio: urllib3 would need a thread for each of the
hundreds of requests that a rollout makes at once.  urllib3 serves blocking calls: through httpx each one took 1.2 ms more
than a bare connection, 12 % of a short generation, and through urllib3 0.2 ms (``benchmarks/generate_overhead.py``).
`ServerClient._errors` maps both to the same errors, and the tests run against both.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import ssl
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import httpx
import urllib3

from tpcolocate.errors import DeadlineError, EngineDeadError, RequestError, TpColocateError
from tpcolocate.server.evidence import Evidence, Finding

_PROBES = ("/model_info", "/health")
_CONNECT_TIMEOUT_S = 5.0
# uvicorn closes idle connections after 5 s; one that is older than this is not used again, so that no request
# races the close and has to be repeated.
_KEEPALIVE_S = 2.0
_MAX_IDLE = 64
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_IDLE, keepalive_expiry=_KEEPALIVE_S)
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class _HideOwnRequests(logging.Filter):
    """Keep httpx's line per request out of a training log; requests to other servers stay in it."""

    def __init__(self) -> None:
        super().__init__()
        self._users: Counter[str] = Counter()

    def add(self, url: str) -> None:
        self._users[url + "/"] += 1  # with the slash: port 3000 is not port 30001

    def remove(self, url: str) -> None:
        self._users[url + "/"] -= 1

    def filter(self, record: logging.LogRecord) -> bool:
        quiet = tuple(origin for origin, users in list(self._users.items()) if users > 0)
        arguments = record.args if isinstance(record.args, tuple) else ()
        return not any(str(argument).startswith(quiet) for argument in arguments)


_quiet = _HideOwnRequests()


class ServerClient:
    """Blocking and asyncio access to one server.  Thread-safe; one asyncio connection pool per event loop.

    Args:
        url: ``http://host:port``.
        api_key: Sent as a bearer token.

    Attributes:
        check: Called before every `post`, with the path and all names in body and query; raises if they must not be sent.
        evidence: Of why the server does not answer; None if nothing is known of its processes.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url
        self.check: Callable[[str, Mapping[str, Any]], None] | None = None
        self.evidence: Evidence | None = None
        _quiet.add(url)
        self._closed = False
        logging.getLogger("httpx").addFilter(_quiet)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._lock = threading.Lock()
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._used = 0.0
        self._async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    def close(self) -> None:
        """Close the idle connections of the blocking side; asyncio pools go with their loops."""
        if not self._closed:
            self._closed = True
            _quiet.remove(self.url)  # other clients of the same server may go on
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    @property
    def is_stopped(self) -> bool:
        """Whether a process of the server is stopped, by SIGSTOP or a debugger; found without a request."""
        return self.evidence is not None and bool(self.evidence.stopped())

    def get(self, path: str, *, timeout_s: float) -> Any:
        """GET a JSON answer.

        Raises:
            RequestError: The server answered with an error status.
            EngineDeadError: It could not be reached, or closed the connection without an answer.
            DeadlineError: It did not answer within `timeout_s`.
        """
        return self._exchange("GET", path, None, timeout_s=timeout_s)

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
        params: Mapping[str, Any] | None = None,
        sent: Callable[[], None] | None = None,
    ) -> Any:
        """POST JSON and return the JSON (or text) answer.  Raises as `get` and `check`.

        Args:
            path: Of the endpoint.
            body: Its fields.
            timeout_s: In seconds.
            params: Of the query.
            sent: Called once the whole request has left, before the answer is awaited.
        """
        if self.check is not None:
            self.check(path, {**({} if body is None else body), **({} if params is None else params)})
        return self._exchange("POST", path, {} if body is None else body, timeout_s=timeout_s, params=params, sent=sent)

    def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        timeout_s: float,
        params: Mapping[str, Any] | None = None,
        sent: Callable[[], None] | None = None,
    ) -> Any:
        target = f"{path}?{urlencode(params)}" if params else path
        data = None if body is None else _encode(body)
        with self._errors(path, timeout_s):
            response = self._send(method, target, data, timeout_s, whole=True, sent=sent)
        return self._answer(path, response.status, response.reason, response.data)

    def _send(
        self,
        method: str,
        target: str,
        data: bytes | None,
        timeout_s: float,
        *,
        whole: bool,
        sent: Callable[[], None] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        headers = {**self._headers, "Content-Type": "application/json"}
        body: bytes | Iterator[bytes] | None = data
        if data is not None and sent is not None:
            headers["Content-Length"] = str(len(data))  # without it, it would be chunked
            body = _reporting_sent(data, sent)
        return self._fresh_pool().urlopen(
            method,
            target,
            body=body,
            headers=headers,
            timeout=urllib3.Timeout(connect=min(_CONNECT_TIMEOUT_S, timeout_s), read=timeout_s),
            retries=False,
            redirect=False,
            preload_content=whole,
        )

    def _fresh_pool(self) -> urllib3.HTTPConnectionPool:
        with self._lock:
            now = time.monotonic()
            if self._pool is not None and now - self._used > _KEEPALIVE_S:
                # Requests in flight keep their connections; the idle ones may be about to be closed by the server.
                self._pool.close()
                self._pool = None
            if self._pool is None:
                more = {"ssl_context": certificates()} if self.url.startswith("https") else {}
                self._pool = urllib3.connection_from_url(self.url, maxsize=_MAX_IDLE, **more)
            self._used = now
            return self._pool

    async def post_async(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
        """`post` on the running event loop."""
        with self._errors(path, timeout_s):
            response = await self._async_http().post(path, content=_encode(body), timeout=_timeout(timeout_s))
        return self._answer(path, response.status_code, response.reason_phrase, response.content)

    def stream(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Iterator[Any]:
        """POST and yield each server-sent JSON event; `timeout_s` bounds the wait for each."""
        with self._errors(path, timeout_s):
            response = self._send("POST", path, _encode(body), timeout_s, whole=False)
            try:
                if response.status >= 400:
                    self._answer(path, response.status, response.reason, response.read())
                for line in response:
                    event = self._event(path, line.decode())
                    if event is _DONE:
                        return
                    if event is not None:
                        yield event
                raise self._cut(path)
            finally:
                response.close()

    async def stream_async(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> AsyncIterator[Any]:
        """`stream` on the running event loop."""
        with self._errors(path, timeout_s):
            async with self._async_http().stream(
                "POST", path, content=_encode(body), timeout=_timeout(timeout_s)
            ) as response:
                if response.is_error:
                    self._answer(path, response.status_code, response.reason_phrase, await response.aread())
                async for line in response.aiter_lines():
                    event = self._event(path, line)
                    if event is _DONE:
                        return
                    if event is not None:
                        yield event
                raise self._cut(path)

    def _cut(self, path: str) -> EngineDeadError:
        return self._dead(path, "the stream ended without [DONE]")

    def is_listening(self, *, timeout_s: float) -> bool:
        """Return whether the server answers at all; schedules no forward, so it is safe while memory is released."""
        try:
            self.get("/model_info", timeout_s=timeout_s)
        except RequestError as error:
            return error.status not in (404, 401)
        except (EngineDeadError, DeadlineError):
            return False
        return True

    def is_healthy(self, *, timeout_s: float) -> bool:
        """Return whether the server has just generated a token.  Not while memory is released: that runs a forward."""
        try:
            self.get("/health", timeout_s=timeout_s)
        except (RequestError, EngineDeadError, DeadlineError):
            return False
        return True

    def _async_http(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._async.get(loop)
        if client is None:
            # trust_env off: a proxy from the environment must not get requests to this machine
            client = httpx.AsyncClient(
                base_url=self.url,
                headers={**self._headers, "Content-Type": "application/json"},
                trust_env=False,
                verify=certificates(),
                limits=_LIMITS,
            )
            self._async[loop] = client
        return client

    @contextmanager
    def _errors(self, path: str, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except TpColocateError:
            raise  # some are connection errors too
        except (urllib3.exceptions.ConnectTimeoutError, httpx.ConnectTimeout) as error:
            if isinstance(error, urllib3.exceptions.NewConnectionError):  # refused; for urllib3 a kind of timeout
                raise self._unreachable(path, error) from error
            raise self._dead(path, f"no connection within {min(_CONNECT_TIMEOUT_S, timeout_s):g} s") from error
        except (urllib3.exceptions.ReadTimeoutError, httpx.TimeoutException) as error:
            found = self._finding(path)
            if found is not None and found.is_dead:
                raise self._dead(path, f"no answer within {timeout_s:g} s", found) from error
            cause = "" if found is None or found.cause is None else f": {found.cause}"
            raise DeadlineError(
                f"{path}: no answer within {timeout_s:g} s{cause}",
                hint="the request may still be carried out" if found is None or not cause else found.hint,
                url=self.url,
            ) from error
        except (urllib3.exceptions.HTTPError, httpx.TransportError, OSError) as error:
            raise self._unreachable(path, error) from error

    def _unreachable(self, path: str, error: Exception) -> EngineDeadError:
        return self._dead(path, f"{type(error).__name__}: {error}")

    def _finding(self, path: str) -> Finding | None:
        # Probes ask whether the server answers, not why it does not.
        return None if self.evidence is None or path in _PROBES else self.evidence()

    def _dead(self, path: str, what: str, found: Finding | None = None) -> EngineDeadError:
        found = self._finding(path) if found is None else found
        if found is None:
            return EngineDeadError(f"{path}: {what}", hint="see the end of the server's log", url=self.url)
        cause = "" if found.cause is None else f"{found.cause}; "
        return EngineDeadError(f"{cause}{path}: {what}", hint=found.hint, url=self.url, details=found.tail)

    def _answer(self, path: str, status: int, reason: str | None, content: bytes) -> Any:
        if status >= 400:
            raise RequestError(f"{path}: {status}: {_message(content, reason)}", status=status, url=self.url)
        if not content:
            return None
        try:
            return json.loads(content)
        except ValueError:
            return content.decode(errors="replace")

    def _event(self, path: str, line: str) -> Any:
        if not line.startswith("data:"):
            return None
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            return _DONE
        event = json.loads(data)
        if isinstance(event, dict) and "error" in event:
            error = event["error"]
            raise RequestError(
                f"{path}: {error.get('message', error) if isinstance(error, dict) else error}", url=self.url
            )
        return event


_DONE = object()


def _reporting_sent(data: bytes, sent: Callable[[], None]) -> Iterator[bytes]:
    """Yield a body in one chunk; urllib3 asks for the next one once it has left."""
    yield data
    sent()


def _encode(body: Mapping[str, Any]) -> bytes:
    return _encoder.encode(body).encode()


@functools.cache
def certificates() -> ssl.SSLContext:
    """Load them once for all clients: that takes tens of milliseconds, and most servers use plain HTTP."""
    return httpx.create_ssl_context(trust_env=False)


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(_CONNECT_TIMEOUT_S, timeout_s))


def _message(content: bytes, reason: str | None) -> str:
    """Return the server's own message, in whichever of its three forms it comes."""
    try:
        body = json.loads(content)
    except ValueError:
        text = content.decode(errors="replace").strip()
        return text if text else str(reason)
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, str) and error:
            return error
        for key in ("message", "error_message", "detail"):
            if isinstance(error, dict) and error.get(key):
                return str(error[key])
    return json.dumps(body)


__all__ = ["ServerClient"]
