"""Generation on a running server, for any process that has its URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tpcolocate.checks import check_text
from tpcolocate.deadline import Deadline, check_timeout
from tpcolocate.engine.limits import ModelFolders, ServerLimits
from tpcolocate.engine.requests import KNOWN_FIELDS, GenerateCall, check_call
from tpcolocate.engine.values import Array
from tpcolocate.errors import ConfigError, TpColocateError, shown
from tpcolocate.parallel import in_background
from tpcolocate.processes import OfOneProcess
from tpcolocate.server.http import ServerClient

Prompts = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Array
    | Sequence[Array]
    | Mapping[str, Any]
    | Sequence[Mapping[str, Any]]
)
SamplingParams = Mapping[str, Any] | Sequence[Mapping[str, Any]]

HEALTH_TIMEOUT_S = 30.0
_DESCRIPTION_S = 600.0


class Health(StrEnum):
    """What `health` found."""

    STARTING = "starting"
    READY = "ready"
    PAUSED = "paused"
    ASLEEP = "asleep"
    STOPPED = "stopped"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, eq=False)
class _InFlight:
    """A request that is not finished.

    Attributes:
        loop: The event loop that it runs on, if there is one.
    """

    loop: asyncio.AbstractEventLoop | None

    @property
    def is_over(self) -> bool:
        """Whether it never comes to its end: a loop that is closed drops its tasks where they are."""
        return self.loop is not None and self.loop.is_closed()


class Client(OfOneProcess):
    """Generation on one SGLang server; a context manager that closes it.  Thread-safe; nothing here is collective.

    Args:
        url: Base URL of the server.
        api_key: Its key.
        check: Called before each request, and again once it is counted; raises if none may be made.
        folders: Of the model, if they are not to be looked for.

    Raises:
        ConfigError: `url` is not the address of a server, or `api_key` is no text.

    Attributes:
        http: For endpoints that have no method here.
        num_in_flight: Requests of this client that are not finished.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        check: Callable[[], None] = lambda: None,
        folders: ModelFolders = ModelFolders(),  # noqa: B008  (frozen)
    ) -> None:
        self.url = _address(url)
        self.api_key = None if api_key is None else check_text("api_key", api_key)
        self.http = ServerClient(url, api_key=api_key)
        self._check = check
        self._folders = folders
        # Without a lock, which the handler of a signal or a forked process might meet while it is held.
        self._in_flight: set[_InFlight] = set()
        self._described_fields: frozenset[str] | None = None
        self._limits: ServerLimits | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def num_in_flight(self) -> int:
        self._in_flight.difference_update([request for request in list(self._in_flight) if request.is_over])
        return len(self._in_flight)

    def close(self) -> None:
        """Close this side's connections; the server runs on."""
        self.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        on_error: str = "raise",
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Any:
        """Generate on the server; arguments, return value and errors as for `Engine.generate`.

        A client of `connect` does not know the state of the engine: while that is paused or asleep, requests wait in the
        server.
        """
        self._check()
        deadline = _check_options(stream, on_error, timeout_s)
        call = self._checked(prompts, sampling_params, fields, stream, deadline)
        if len(call.prompts) == 0:
            return iter(()) if stream else []
        if on_error == "return":
            return self._each_in_a_loop(call, deadline)
        body = call.body()
        if stream:
            return self._stream(body, timeout_s=_time_of_each_event(deadline))
        with self._counted():
            return self.http.post("/generate", body, timeout_s=deadline)

    async def generate_async(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        on_error: str = "raise",
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Any:
        """`generate` for asyncio; with ``stream=True`` the awaited value is an asynchronous iterator."""
        self._check()
        deadline = _check_options(stream, on_error, timeout_s)
        if self._limits is None or not KNOWN_FIELDS.issuperset(fields):
            # The server is asked first, which must not hold the event loop.
            call = await asyncio.to_thread(self._checked, prompts, sampling_params, fields, stream, deadline)
        else:
            call = self._checked(prompts, sampling_params, fields, stream, deadline)
        if len(call.prompts) == 0:
            return _nothing() if stream else []
        if on_error == "return":
            return await self._each(call, deadline)
        body = call.body()
        if stream:
            return self._stream_async(body, timeout_s=_time_of_each_event(deadline))
        with self._counted(asyncio.get_running_loop()):
            return await self.http.post_async("/generate", body, timeout_s=deadline)

    def _checked(
        self, prompts: Any, sampling_params: Any, fields: Mapping[str, Any], stream: bool, deadline: Deadline
    ) -> GenerateCall:
        return check_call(
            prompts,
            sampling_params,
            fields,
            stream=stream,
            limits=self._server_limits(deadline),
            known=lambda: self._server_fields(deadline),
        )

    def _each_in_a_loop(self, call: GenerateCall, deadline: Deadline) -> Any:
        """`_each` for a caller that blocks, which may be one inside an event loop, as in a notebook."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._each(call, deadline))
        return in_background(lambda: asyncio.run(self._each(call, deadline)), name="tpcolocate generate").result()

    async def _each(self, call: GenerateCall, deadline: Deadline) -> Any:
        """Make one request per prompt; an error is the answer of its prompt."""

        async def answers(index: int) -> list[Any]:
            item = call.prompts.items[index]
            if isinstance(item, TpColocateError):
                return [item] * call.samples
            try:
                answer = await self.http.post_async("/generate", call.body_of(index), timeout_s=deadline)
            except TpColocateError as error:
                return [error] * call.samples
            return answer if isinstance(answer, list) else [answer]

        with self._counted(asyncio.get_running_loop()):
            found = await asyncio.gather(*(answers(index) for index in range(len(call.prompts))))
        flat = [answer for of_prompt in found for answer in of_prompt]
        return flat[0] if call.prompts.is_single and call.samples == 1 else flat

    def _stream(self, body: Mapping[str, Any], *, timeout_s: float | None) -> Iterator[Any]:
        """Yield the events of a request, which is made when the first one is asked for."""
        with self._counted():
            yield from self.http.stream("/generate", body, timeout_s=timeout_s)

    async def _stream_async(self, body: Mapping[str, Any], *, timeout_s: float | None) -> AsyncIterator[Any]:
        with self._counted(asyncio.get_running_loop()):
            async for event in self.http.stream_async("/generate", body, timeout_s=timeout_s):
                yield event

    def _server_limits(self, deadline: Deadline) -> ServerLimits:
        if self._limits is None:
            # SGLang's schedulers answer the first, which may be in a sync or compile kernels.
            info, model_info = (self._described(path, deadline) for path in ("/server_info", "/model_info"))
            self._limits = ServerLimits.of(info, model_info, self._folders)
        return self._limits

    def _server_fields(self, deadline: Deadline) -> frozenset[str]:
        if self._described_fields is None:
            schemas = self._described("/openapi.json", deadline)["components"]["schemas"]
            self._described_fields = frozenset(schemas["GenerateReqInput"]["properties"])
        return self._described_fields

    def _described(self, path: str, deadline: Deadline) -> Any:
        """Ask the server what it is, within the time of the call that needs it."""
        return self.http.get(path, timeout_s=_DESCRIPTION_S if deadline.is_never else deadline)

    @contextmanager
    def _counted(self, loop: asyncio.AbstractEventLoop | None = None) -> Iterator[None]:
        request = _InFlight(loop)
        try:
            self._in_flight.add(request)
            # Again, now that it is counted: `sleep` first changes the state and then looks for requests, so that one of
            # the two sees the other.  And a stream begins when it is first read.
            self._check()
            yield
        finally:
            self._in_flight.discard(request)

    def health(self) -> Health:
        """Return ``ready`` if the server answers, ``stopped`` if a process of it is (by SIGSTOP), else ``dead``.

        Only that: whether it is asleep is known inside the job alone, and a token generated to find out would touch
        memory that a sleeping server has released.
        """
        if self.http.is_stopped:
            return Health.STOPPED
        return Health.READY if self.http.is_listening(timeout_s=HEALTH_TIMEOUT_S) else Health.DEAD


def _address(url: object) -> str:
    checked = check_text("url", url)
    try:
        parts = urlsplit(checked)
        is_server = parts.scheme == "http" and bool(parts.hostname) and parts.path in ("", "/")
    except ValueError:  # such as brackets without an address
        is_server = False
    if not is_server:
        raise ConfigError(f"url={shown(url)} is not the address of a server", hint="pass engine.url, http://HOST:PORT")
    return checked


def _check_options(stream: object, on_error: object, timeout_s: object) -> Deadline:
    if not isinstance(on_error, str) or on_error not in ("raise", "return"):
        raise ConfigError(f"on_error is {shown(on_error)}", hint='"raise" or "return"')
    if on_error == "return" and stream:
        raise ConfigError('on_error="return" with stream=True', hint="a stream raises its error where it ends")
    return Deadline.of(None if timeout_s is None else check_timeout(timeout_s))


def _time_of_each_event(deadline: Deadline) -> float | None:
    """Return how long a stream waits for one event: as long as another call waits for its whole answer."""
    return None if deadline.is_never else deadline.timeout_s


async def _nothing() -> AsyncIterator[Any]:
    return
    yield


__all__ = ["HEALTH_TIMEOUT_S", "Client", "Health", "Prompts", "SamplingParams"]
