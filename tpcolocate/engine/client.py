"""HTTP to one SGLang server: requests, deadlines, and its errors in our words.

Nothing is ever sent twice: a request whose answer was lost may have been carried out, and a weight push that was
carried out twice opens its payload twice.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import httpx

from tpcolocate.engine.connections import (
    CONNECT_TIMEOUT_S,
    KEEPALIVE_S,
    MAX_IDLE,
    Connections,
    ConnectTimeout,
    certificates,
)
from tpcolocate.errors import DeadlineError, EngineDeadError, RequestError, TpColocateError

_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=MAX_IDLE, keepalive_expiry=KEEPALIVE_S)
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class _NotOurRequests(logging.Filter):
    """Keeps httpx's line per request out of a training log; requests to other servers stay in it."""

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


_quiet = _NotOurRequests()


class ServerClient:
    """Blocking and asyncio access to one server.  Thread-safe; one asyncio connection pool per event loop.

    Args:
        url: ``http://host:port``.
        api_key: Sent as a bearer token.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url
        _quiet.add(url)
        self._closed = False
        logging.getLogger("httpx").addFilter(_quiet)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._connections = Connections(url, self._headers)
        self._async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = weakref.WeakKeyDictionary()

    def close(self) -> None:
        """Close the idle connections of the blocking side; asyncio pools go with their loops."""
        if not self._closed:
            self._closed = True
            _quiet.remove(self.url)  # others may still talk to the same server
        self._connections.close()

    def get(self, path: str, *, timeout_s: float) -> Any:
        """GET a JSON answer.

        Raises:
            RequestError: The server answered with an error status.
            EngineDeadError: It could not be reached, or closed the connection without an answer.
            DeadlineError: It did not answer within `timeout_s`.
        """
        return self._exchange("GET", path, None, timeout_s=timeout_s)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float, params: Mapping[str, Any] | None = None) -> Any:
        """POST JSON and return the JSON (or text) answer.  Raises as `get`."""
        return self._exchange("POST", path, {} if body is None else body, timeout_s=timeout_s, params=params)

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, timeout_s: float, params: Mapping[str, Any] | None = None
    ) -> Any:
        target = f"{path}?{urlencode(params)}" if params else path
        data = None if body is None else _encode(body)
        with (
            self._errors(path, timeout_s),
            self._connections.request(method, target, body=data, timeout_s=timeout_s) as response,
        ):
            content = response.read()
        return self._answer(path, response.status, response.reason, content)

    async def post_async(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
        """`post` on the running event loop."""
        with self._errors(path, timeout_s):
            response = await self._async_http().post(path, content=_encode(body), timeout=_timeout(timeout_s))
        return self._answer(path, response.status_code, response.reason_phrase, response.content)

    def stream(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Iterator[Any]:
        """POST and yield each server-sent JSON event; `timeout_s` bounds the wait for each."""
        with (
            self._errors(path, timeout_s),
            self._connections.request("POST", path, body=_encode(body), timeout_s=timeout_s) as response,
        ):
            if response.status >= 400:
                self._answer(path, response.status, response.reason, response.read())
            for line in response:
                event = self._event(path, line.decode())
                if event is _DONE:
                    return
                if event is not None:
                    yield event
            raise self._cut(path)

    async def stream_async(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> AsyncIterator[Any]:
        """`stream` on the running event loop."""
        with self._errors(path, timeout_s):
            async with self._async_http().stream("POST", path, content=_encode(body), timeout=_timeout(timeout_s)) as response:
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
        # The standard library takes the end of a connection for the end of a chunked answer that is read by lines.
        return EngineDeadError(f"{path}: the stream ended without [DONE]", hint="see the end of the server's log", url=self.url)

    def is_listening(self, *, timeout_s: float) -> bool:
        """Whether the server answers at all; schedules no forward, so it is safe while memory is released."""
        try:
            self.get("/model_info", timeout_s=timeout_s)
        except RequestError as error:
            return error.status not in (404, 401)
        except (EngineDeadError, DeadlineError):
            return False
        return True

    def is_healthy(self, *, timeout_s: float) -> bool:
        """Whether the server has just generated a token.  Not while memory is released: it schedules a real forward."""
        try:
            self.get("/health", timeout_s=timeout_s)
        except (RequestError, EngineDeadError, DeadlineError):
            return False
        return True

    def _async_http(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._async.get(loop)
        if client is None:
            # trust_env off: a proxy from the environment must not get requests meant for this machine
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
            raise  # some of them are connection errors too
        except (ConnectTimeout, httpx.ConnectTimeout) as error:
            raise EngineDeadError(f"{path}: no connection within {min(CONNECT_TIMEOUT_S, timeout_s):g} s", url=self.url) from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise DeadlineError(
                f"{path}: no answer within {timeout_s:g} s", hint="the request may still be carried out", url=self.url
            ) from error
        except (OSError, http.client.HTTPException, httpx.TransportError) as error:
            raise EngineDeadError(
                f"{path}: {type(error).__name__}: {error}", hint="see the end of the server's log", url=self.url
            ) from error

    def _answer(self, path: str, status: int, reason: str, content: bytes) -> Any:
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
            raise RequestError(f"{path}: {error.get('message', error) if isinstance(error, dict) else error}", url=self.url)
        return event


_DONE = object()


def _encode(body: Mapping[str, Any]) -> bytes:
    return _encoder.encode(body).encode()


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))


def _message(content: bytes, reason: str) -> str:
    """The server's own words, whichever of its three error shapes it chose."""
    try:
        body = json.loads(content)
    except ValueError:
        text = content.decode(errors="replace").strip()
        return text if text else reason
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, str) and error:
            return error
        for key in ("message", "error_message", "detail"):
            if isinstance(error, dict) and error.get(key):
                return str(error[key])
    return json.dumps(body)


__all__ = ["ServerClient"]
