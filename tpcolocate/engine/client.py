"""Generation on a running server, for any process that has its URL."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from tpcolocate.errors import ConfigError
from tpcolocate.server.http import ServerClient

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
SamplingParams = Mapping[str, Any] | Sequence[Mapping[str, Any]]

HEALTH_TIMEOUT_S = 30.0
# Fields of /generate in every supported release; any other is looked up in the server's own description, because
# SGLang ignores silently what it does not know.
KNOWN_FIELDS = frozenset(
    "text input_ids input_embeds image_data sampling_params rid return_logprob logprob_start_len top_logprobs_num "
    "token_ids_logprob return_text_in_logprobs stream lora_path return_hidden_states session_params".split()
)


class Health(StrEnum):
    """What `health` found."""

    STARTING = "starting"
    READY = "ready"
    PAUSED = "paused"
    ASLEEP = "asleep"
    STOPPED = "stopped"
    DEAD = "dead"


class Client:
    """Generation on one SGLang server.  Thread-safe; nothing here is collective.

    Args:
        url: Base URL of the server.
        api_key: Its key.
        check: Called before each request, and again once it is counted; raises if none may be made.

    Attributes:
        http: For endpoints that have no method here.
        num_in_flight: Requests of this client that are not finished.
    """

    def __init__(self, url: str, *, api_key: str | None = None, check: Callable[[], None] = lambda: None) -> None:
        self.url = url
        self.api_key = api_key
        self.http = ServerClient(url, api_key=api_key)
        self.num_in_flight = 0
        self._check = check
        self._lock = threading.Lock()
        self._described_fields: frozenset[str] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def close(self) -> None:
        """Close this side's connections; the server runs on."""
        self.http.close()

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        timeout_s: float = 600.0,
        **fields: Any,
    ) -> Any:
        """Generate on the server; arguments, return value and errors as for `Engine.generate`.

        A client of `connect` does not know the state of the engine: while that is paused or asleep, requests wait in the
        server.
        """
        body = self._body(prompts, sampling_params, fields, stream)
        if body is None:
            return iter(()) if stream else []
        if stream:
            return self._stream(body, timeout_s=timeout_s)
        with self._counted():
            return self.http.post("/generate", body, timeout_s=timeout_s)

    async def generate_async(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        timeout_s: float = 600.0,
        **fields: Any,
    ) -> Any:
        """`generate` for asyncio; with ``stream=True`` the awaited value is an asynchronous iterator."""
        body = self._body(prompts, sampling_params, fields, stream)
        if body is None:
            return _nothing() if stream else []
        if stream:
            return self._stream_async(body, timeout_s=timeout_s)
        with self._counted():
            return await self.http.post_async("/generate", body, timeout_s=timeout_s)

    def _stream(self, body: Mapping[str, Any], *, timeout_s: float) -> Iterator[Any]:
        """Yield the events of a request, which is made when the first one is asked for."""
        with self._counted():
            yield from self.http.stream("/generate", body, timeout_s=timeout_s)

    async def _stream_async(self, body: Mapping[str, Any], *, timeout_s: float) -> AsyncIterator[Any]:
        with self._counted():
            async for event in self.http.stream_async("/generate", body, timeout_s=timeout_s):
                yield event

    def _body(
        self,
        prompts: Prompts | None,
        sampling_params: SamplingParams | None,
        fields: Mapping[str, Any],
        stream: bool,
    ) -> dict[str, Any] | None:
        """Return the body of a request; None if there is no prompt to generate from."""
        self._check()
        body = dict(fields)
        if prompts is not None:
            if "text" in body or "input_ids" in body:
                raise ConfigError("prompts are given twice", hint="pass prompts, or text=, or input_ids=")
            body["text" if _is_text(prompts) else "input_ids"] = prompts if isinstance(prompts, str) else list(prompts)
        given = body.get("text", body.get("input_ids"))
        if given is None and body.get("input_embeds") is None:
            raise ConfigError(
                "there is nothing to generate from", hint="pass prompts, or text=, input_ids= or input_embeds="
            )
        if given is not None and not isinstance(given, str) and len(given) == 0:
            return None
        unknown = set(body) - KNOWN_FIELDS
        if unknown and (unknown := unknown - self._server_fields()):
            raise ConfigError(
                f"this server's /generate has no field {', '.join(sorted(unknown))}",
                hint="SGLang would ignore it silently; sampling parameters go into sampling_params",
                url=self.url,
            )
        if sampling_params is not None:
            body["sampling_params"] = sampling_params
        if stream:
            body["stream"] = True
        return body

    def _server_fields(self) -> frozenset[str]:
        if self._described_fields is None:
            schemas = self.http.get("/openapi.json", timeout_s=HEALTH_TIMEOUT_S)["components"]["schemas"]
            self._described_fields = frozenset(schemas["GenerateReqInput"]["properties"])
        return self._described_fields

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.num_in_flight += 1
        try:
            # Again, now that it is counted: `sleep` first changes the state and then looks for requests, so that one of
            # the two sees the other.  And a stream begins when it is first read.
            self._check()
            yield
        finally:
            with self._lock:
                self.num_in_flight -= 1

    def health(self) -> Health:
        """Return ``ready`` if the server answers, ``stopped`` if a process of it is (by SIGSTOP), else ``dead``.

        Only that: whether it is asleep is known inside the job alone, and a token generated to find out would touch
        memory that a sleeping server has released.
        """
        if self.http.is_stopped:
            return Health.STOPPED
        return Health.READY if self.http.is_listening(timeout_s=HEALTH_TIMEOUT_S) else Health.DEAD


def _is_text(prompts: Prompts) -> bool:
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], str)


async def _nothing() -> AsyncIterator[Any]:
    return
    yield


__all__ = ["HEALTH_TIMEOUT_S", "KNOWN_FIELDS", "Client", "Health", "Prompts", "SamplingParams"]
