"""HTTP to one SGLang server: requests, deadlines, and errors of this library's classes.

Nothing is ever sent twice: a request whose answer was lost may have been carried out, and a weight push that was
carried out twice opens its payload twice.

Two libraries, because each lacks what the other has.  httpx serves asyncio: urllib3 would need a thread for each of the
hundreds of requests that a rollout makes at once.  urllib3 serves blocking calls: through httpx each one took 1.2 ms more
than a bare connection, 12 % of a short generation, and through urllib3 0.2 ms (``benchmarks/generate_overhead.py``).
`ServerClient._errors` maps both to the same errors, and the tests run against both.

Requests of `/generate` can be hundreds at once, and take as many connections as `most_connections` permits; the rest
wait for one.  All other requests go past them.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import resource
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
import urllib3

from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, DeadlineError, EngineDeadError, RequestError, TpColocateError
from tpcolocate.processes import raised_by_handler
from tpcolocate.server.connections import LOOK_S, Connections
from tpcolocate.server.evidence import Evidence, Finding

logger = logging.getLogger(__name__)
T = TypeVar("T")

_PROBES = ("/model_info", "/health")
# Of a request without a timeout.  A server that is too busy to take connections has them wait, and once too many do (128 with
# Linux before 5.4) the kernel lets the others try again and again: that is no death, after which there is nothing to connect to.
_CONNECT_TIMEOUT_S = 60.0
_LOOK_TIMEOUT_S = 10.0
# How long a server whose processes all run may leave such looks unanswered: while its main process tokenizes a large batch, or
# the machine swaps.  As long as SGLang's watchdog waits for a scheduler.
_SILENT_S = 300.0
# After a lost connection, however little is left of the request's own time: a busy server may be late.
_LEAST_LOOKS_S, _LEAST_LOOK_S = 5.0, 0.5
# A server that ends closes its connections a little before its port.
_ENDING_S = 1.0
_UNAUTHORIZED = 401
_NO_KEY = "pass the key of this server, api_key=engine.api_key; after a restart it is another one, as the URL is"
# SGLang's words, and what to do.  For an adapter that was unloaded it looks on the Hugging Face hub.
_HINTS = {
    "Failed to implicitly load LoRA adapter": "it was unloaded, or set_lora() is replacing it: ask once set_lora() has returned",
    "LoRA adapter that has never been loaded": "the names are those of set_lora(), and of lora_paths= in launch()",
}
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
    """Blocking and asyncio access to one server.  Thread-safe; connections per process, and for asyncio per event loop.

    Args:
        url: ``http://host:port``.
        api_key: Sent as a bearer token.

    Attributes:
        check: Called before every `post`, with the path and all names in body and query; raises if they must not be sent.
        evidence: Of why the server does not answer; None if nothing is known of its processes.
        held: Returns why the server holds requests of `/generate`; None if it does not, as far as that is known.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url
        self.check: Callable[[str, Mapping[str, Any]], None] | None = None
        self.evidence: Evidence | None = None
        self.held: Callable[[], str | None] = lambda: None
        self._warned_at = -math.inf
        # When a look was not answered for the first time, and for the last.
        self._silent_since = self._silent_at = -math.inf
        _quiet.add(url)
        self._closed = False
        logging.getLogger("httpx").addFilter(_quiet)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._connections = Connections(url, headers=self._headers, look=self._look)

    def close(self) -> None:
        """Close the idle connections of this process; those of requests in flight close with them."""
        if not self._closed:
            self._closed = True
            _quiet.remove(self.url)  # other clients of the same server may go on
        self._connections.close()

    @property
    def is_stopped(self) -> bool:
        """Whether a process of the server is stopped, by SIGSTOP or a debugger; found without a request."""
        return self.evidence is not None and bool(self.evidence.stopped())

    def get(self, path: str, *, timeout_s: float | Deadline) -> Any:
        """GET a JSON answer.

        Args:
            path: Of the endpoint.
            timeout_s: In seconds, or the deadline of a call that makes several requests.

        Raises:
            RequestError: The server answered with an error status.
            EngineDeadError: It could not be reached, or closed the connection without an answer.
            DeadlineError: It did not answer within `timeout_s`.
        """
        return self._exchange("GET", path, None, deadline=Deadline.of(timeout_s))

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | Deadline | None,
        params: Mapping[str, Any] | None = None,
        sent: Callable[[], None] | None = None,
    ) -> Any:
        """POST JSON and return the JSON (or text) answer.  Raises as `get` and `check`.

        Args:
            path: Of the endpoint.
            body: Its fields.
            timeout_s: As for `get`; None waits as long as the server is up.
            params: Of the query.
            sent: Called once the whole request has left, before the answer is awaited.
        """
        if self.check is not None:
            self.check(path, {**({} if body is None else body), **({} if params is None else params)})
        return self._exchange(
            "POST", path, {} if body is None else body, deadline=Deadline.of(timeout_s), params=params, sent=sent
        )

    def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        deadline: Deadline,
        params: Mapping[str, Any] | None = None,
        sent: Callable[[], None] | None = None,
    ) -> Any:
        target = f"{path}?{urlencode(params)}" if params else path
        data = None if body is None else encode(body)
        with self._connections.slot(path, deadline), self._errors(path, deadline):
            response = self._send(method, target, data, deadline.socket_timeout(), whole=True, sent=sent)
        return self._answer(path, response.status, response.reason, response.data)

    def _send(
        self,
        method: str,
        target: str,
        data: bytes | None,
        timeout_s: float | None,
        *,
        whole: bool,
        sent: Callable[[], None] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        headers = {**self._headers, "Content-Type": "application/json"}
        body: bytes | Iterator[bytes] | None = data
        if data is not None and sent is not None:
            headers["Content-Length"] = str(len(data))  # without it, it would be chunked
            body = _reporting_sent(data, sent)
        return self._connections.pool().urlopen(
            method,
            target,
            body=body,
            headers=headers,
            timeout=urllib3.Timeout(connect=_connect_timeout(timeout_s), read=timeout_s),
            retries=False,
            redirect=False,
            preload_content=whole,
        )

    async def post_async(self, path: str, body: Mapping[str, Any], *, timeout_s: float | Deadline | None) -> Any:
        """`post` on the running event loop."""
        content, deadline = encode(body), Deadline.of(timeout_s)
        async with self._connections.slot_async(path, deadline), self._errors_async(path, deadline):
            sent = self._send_async(path, content, deadline.socket_timeout())
            response = await (self._while_up(sent) if deadline.is_never else sent)
        return self._answer(path, response.status_code, response.reason_phrase, response.content)

    async def _send_async(self, path: str, content: bytes, timeout_s: float | None) -> httpx.Response:
        of_loop = await self._connections.of_loop()
        async with of_loop.client.stream("POST", path, content=content, timeout=_timeout(timeout_s)) as response:
            await response.aread()
            if response.status_code >= 500:
                # As for `_Response`.  It is idle and none of ours waits in httpx for one, so that it is not taken again.
                await response.extensions["network_stream"].aclose()
        return response

    async def _while_up(self, sent: Awaitable[T]) -> T:
        """Await an answer, or an event of one, for as long as the server is up."""
        task = asyncio.ensure_future(sent)
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=LOOK_S)
                if done:
                    return task.result()
                await asyncio.to_thread(self._look)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})  # what it reads must not be closed under it

    def stream(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None) -> Iterator[Any]:
        """POST and yield each server-sent JSON event; `timeout_s` bounds the wait for each."""
        deadline = Deadline.of(timeout_s)
        with self._connections.slot(path, deadline), self._errors(path, deadline, of_each_event=True):
            response = self._send("POST", path, encode(body), timeout_s, whole=False)
            ended = nullcontext() if timeout_s is not None else _ended_if_down(self._look, response.shutdown)
            try:
                with ended:
                    if response.status >= 400:
                        self._answer(path, response.status, response.reason, response.read())
                    for line in response:
                        event = self._event(path, line.decode())
                        if event is _DONE:
                            return
                        if event is not None:
                            yield event
                    raise _ConnectionLost(path, "the stream ended without [DONE]")
            finally:
                response.close()

    async def stream_async(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None) -> AsyncIterator[Any]:
        """`stream` on the running event loop."""
        content, deadline = encode(body), Deadline.of(timeout_s)
        async with (
            self._connections.slot_async(path, deadline),
            self._errors_async(path, deadline, of_each_event=True),
        ):
            of_loop = await self._connections.of_loop()
            request = of_loop.client.build_request("POST", path, content=content, timeout=_timeout(timeout_s))
            sent = of_loop.client.send(request, stream=True)
            async with aclosing(await (self._while_up(sent) if timeout_s is None else sent)) as response:
                if response.is_error:
                    self._answer(path, response.status_code, response.reason_phrase, await response.aread())
                lines = response.aiter_lines()
                while True:
                    awaited = anext(lines, None)
                    line = await (self._while_up(awaited) if timeout_s is None else awaited)
                    if line is None:
                        break
                    event = self._event(path, line)
                    if event is _DONE:
                        return
                    if event is not None:
                        yield event
                raise _ConnectionLost(path, "the stream ended without [DONE]")

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

    def _is_up(self, deadline: Deadline = Deadline.never()) -> bool:  # noqa: B008  (frozen)
        """Return whether the server answers on a connection of its own; one of two looks may be late.

        Args:
            deadline: Of both looks together; without one they have the time that a busy server needs.
        """

        def look_s() -> float:
            return min(_LOOK_TIMEOUT_S, deadline.left(at_least=_LEAST_LOOK_S))

        return any(self.is_listening(timeout_s=look_s()) for _ in range(2))

    def _look(self) -> None:
        """Look at the server for a request without a timeout: raise if it is not up, and warn if it holds requests."""
        self._raise_if_down()
        why, now = self.held(), time.monotonic()
        if why is not None and now - self._warned_at > LOOK_S / 2:  # once for all that wait
            self._warned_at = now
            logger.warning("requests to %s wait: %s", self.url, why)

    def _raise_if_down(self) -> None:
        began = time.monotonic()
        if self._is_up():
            self._silent_at = -math.inf
            return
        found, now = None if self.evidence is None else self.evidence(), time.monotonic()
        if now - self._silent_at > 2 * LOOK_S:  # of another request, or it has answered since
            self._silent_since = began
        self._silent_at, silent_s = now, now - self._silent_since
        if found is None or found.is_dead or found.cause is not None:
            raise self._dead(f"the server does not answer: twice nothing within {_LOOK_TIMEOUT_S:g} s", found)
        if silent_s > _SILENT_S:
            raise self._dead(
                f"the server does not answer: nothing for {silent_s:.0f} s, though its processes run", found
            )
        logger.warning("%s has not answered for %.0f s, but all its processes run: waiting on", self.url, silent_s)

    @contextmanager
    def _errors(self, path: str, deadline: Deadline, *, of_each_event: bool = False) -> Iterator[None]:
        """Raise this library's errors.

        Args:
            path: Of the endpoint.
            deadline: Of the request.
            of_each_event: Whether each event of the answer has the time of `deadline` anew.
        """
        try:
            with _caught(path, deadline.timeout_s):
                yield
        except _Failure as failure:
            if (raised := raised_by_handler(failure)) is not None:
                raise raised from raised.__cause__
            raise self._explained(failure, _looks_until(deadline, anew=of_each_event)) from failure.__cause__

    @asynccontextmanager
    async def _errors_async(self, path: str, deadline: Deadline, *, of_each_event: bool = False) -> AsyncIterator[None]:
        try:
            with _caught(path, deadline.timeout_s):
                yield
        except _Failure as failure:
            looks_until = _looks_until(deadline, anew=of_each_event)
            # In a thread: to look at the server takes seconds, in which the loop's other requests go on.
            raise await asyncio.to_thread(self._explained, failure, looks_until) from failure.__cause__

    def _explained(self, failure: _Failure, deadline: Deadline) -> TpColocateError:
        """Return the error of a request that has no answer, with what is known of the server's processes.

        Args:
            failure: What happened.
            deadline: For looks whether the server is up.
        """
        path, found = failure.path, None
        if _has_no_descriptors(failure.__cause__):
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return ConfigError(
                f"{path}: this process has no file descriptor left for a connection; its limit is {most}",
                hint="raise `ulimit -n`, or make fewer requests and open fewer files at once",
                url=self.url,
            )
        # Probes ask whether the server answers, not why it does not.
        if self.evidence is not None and path not in _PROBES:
            found = self.evidence()
        if isinstance(failure, _TimedOut) and (found is None or not found.is_dead):
            cause, hint = None, "the request may still be carried out; for more time raise timeout_s"
            if isinstance(failure, _NotConnected):
                hint = "nothing was sent: the server is busy, or has too many connections; ask again, with a higher timeout_s"
            if found is not None and found.cause is not None:
                cause, hint = found.cause, found.hint
            elif path == "/generate" and (cause := self.held()) is not None:
                hint = "call engine.continue_generation() on every rank; the request may still be carried out then"
            return DeadlineError(f"{path}: {failure}{'' if cause is None else f': {cause}'}", hint=hint, url=self.url)
        # Of generation alone: whether weights were taken is unknown then, which EngineDeadError stands for.
        if isinstance(failure, _ConnectionLost) and path == "/generate" and (found is None or not found.is_dead):
            if self._is_still_up(deadline):
                return RequestError(
                    f"{path}: the server is up, but closed the connection without an answer: {failure}",
                    hint="see the end of the server's log; the request may have been carried out",
                    url=self.url,
                )
        return self._dead(f"{path}: {failure}", found)

    def _is_still_up(self, deadline: Deadline) -> bool:
        if not self._is_up(deadline):
            return False
        time.sleep(_ENDING_S)
        return self._is_up(deadline)

    def _dead(self, what: str, found: Finding | None) -> EngineDeadError:
        if found is None:
            return EngineDeadError(what, hint="see the end of the server's log", url=self.url)
        cause = "" if found.cause is None else f"{found.cause}; "
        return EngineDeadError(f"{cause}{what}", hint=found.hint, url=self.url, details=found.tail)

    def _answer(self, path: str, status: int, reason: str | None, content: bytes) -> Any:
        if status >= 400:
            message = _message(content, reason)
            raise RequestError(f"{path}: {status}: {message}", hint=_hint(status, message), status=status, url=self.url)
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


@contextmanager
def _ended_if_down(look: Callable[[], None], end_reading: Callable[[], None]) -> Iterator[None]:
    """Look now and then whether the server is up while a stream without a timeout is read, and end the reading if it is not.

    In a thread, because a read of http.client that has timed out once cannot be gone on with.

    Args:
        look: Raises if the server is not up.
        end_reading: Called from the thread then, once.

    Raises:
        TpColocateError: What `look` raised, instead of what the reading ended with.
    """
    is_over = threading.Event()
    found: list[TpColocateError] = []

    def run() -> None:
        while not is_over.wait(LOOK_S):
            try:
                look()
            except TpColocateError as error:
                found.append(error)
                with suppress(RuntimeError, ValueError, OSError):  # it was closed just now
                    end_reading()
                return

    threading.Thread(target=run, name="tpcolocate stream", daemon=True).start()
    try:
        yield
    except Exception as error:
        if found:
            raise found[0] from error
        raise
    finally:
        is_over.set()


class _Failure(Exception):
    """A request has no answer; its cause is the error of the library that made it.

    Args:
        path: Of the endpoint.
        what: What happened, for the message.
    """

    def __init__(self, path: str, what: str) -> None:
        super().__init__(what)
        self.path = path


class _Unreachable(_Failure):
    """There is no connection."""


class _ConnectionLost(_Failure):
    """A connection closed before its answer was complete."""


class _TimedOut(_Failure):
    """There was no answer in time."""


class _NotConnected(_TimedOut):
    """There was no connection in time."""


@contextmanager
def _caught(path: str, timeout_s: float) -> Iterator[None]:
    """Raise a `_Failure` for whatever either library raises."""
    try:
        yield
    except (TpColocateError, _Failure):
        raise  # some are connection errors too
    except (urllib3.exceptions.ConnectTimeoutError, httpx.ConnectTimeout) as error:
        if isinstance(error, urllib3.exceptions.NewConnectionError):  # refused; for urllib3 a kind of timeout
            raise _Unreachable(path, f"{type(error).__name__}: {error}") from error
        raise _NotConnected(path, f"no connection within {_connect_timeout(timeout_s):g} s") from error
    except (urllib3.exceptions.ReadTimeoutError, httpx.TimeoutException) as error:
        raise _TimedOut(path, f"no answer within {timeout_s:g} s") from error
    except httpx.ConnectError as error:
        raise _Unreachable(path, f"{type(error).__name__}: {error}") from error
    except (urllib3.exceptions.HTTPError, httpx.TransportError, OSError) as error:
        if isinstance(error.__context__, TpColocateError):  # of a look; for urllib3 the connection's error
            raise error.__context__ from None
        raise _ConnectionLost(path, f"{type(error).__name__}: {error}") from error


def _hint(status: int, message: str) -> str | None:
    if status == _UNAUTHORIZED:
        return _NO_KEY
    return next((hint for words, hint in _HINTS.items() if words in message), None)


def _looks_until(deadline: Deadline, *, anew: bool) -> Deadline:
    """Return until when a request that has lost its connection looks whether the server is up.

    Args:
        deadline: Of the request.
        anew: Whether its time begins with the look.
    """
    return Deadline.after(max(deadline.timeout_s if anew else deadline.left(), _LEAST_LOOKS_S))


def _has_no_descriptors(error: BaseException | None) -> bool:
    """Return whether an error comes from the limit of open files, of the process or the machine."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    if isinstance(error, BaseExceptionGroup):
        return any(_has_no_descriptors(each) for each in error.exceptions)
    return _has_no_descriptors(error.__cause__ if error.__cause__ is not None else error.__context__)


def _reporting_sent(data: bytes, sent: Callable[[], None]) -> Iterator[bytes]:
    """Yield a body in one chunk; urllib3 asks for the next one once it has left."""
    yield data
    sent()


def encode(body: Mapping[str, Any]) -> bytes:
    """Return a body as JSON.

    Raises:
        ConfigError: JSON cannot hold it.
    """
    try:
        return _encoder.encode(body).encode()
    except (TypeError, ValueError, RecursionError) as error:  # of another type, not finite, circular, or no text
        raise ConfigError(f"the request is no JSON: {error}") from error


def _connect_timeout(timeout_s: float | None) -> float:
    return _CONNECT_TIMEOUT_S if timeout_s is None or timeout_s == math.inf else timeout_s


def _timeout(timeout_s: float | None) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=_connect_timeout(timeout_s))


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


__all__ = ["ServerClient", "encode"]
