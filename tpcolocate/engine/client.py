"""Generation on a running server, for anybody who has its URL."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from tpcolocate.errors import ConfigError
from tpcolocate.server.http import ServerClient

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]

HEALTH_TIMEOUT_S = 30.0
# Fields of /generate in every supported release; any other is looked up in the server's own description, because
# SGLang drops what it does not know without a word.
_KNOWN_FIELDS = frozenset(
    "text input_ids input_embeds image_data sampling_params rid return_logprob logprob_start_len top_logprobs_num "
    "token_ids_logprob return_text_in_logprobs stream lora_path return_hidden_states session_params".split()
)


class Health(StrEnum):
    """What `health` found."""

    STARTING = "starting"
    READY = "ready"
    PAUSED = "paused"
    ASLEEP = "asleep"
    DEAD = "dead"


class Client:
    """Generation on one SGLang server.  Thread-safe; nothing here is collective.

    Args:
        url: Base URL of the server.
        api_key: Its key.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url
        self.api_key = api_key
        self._client = ServerClient(url, api_key=api_key)
        self._lock = threading.Lock()
        self._in_flight = 0
        self._described_fields: frozenset[str] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def close(self) -> None:
        """Close this side's connections; the server runs on."""
        self._client.close()

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: bool = False,
        timeout_s: float = 600.0,
        **fields: Any,
    ) -> Any:
        """Generate on the slice's server; any rank, any time, any number at once.

        Args:
            prompts: Text, token ids, or a list of either.
            sampling_params: SGLang's; one for all prompts, or one each.
            stream: Return an iterator over SGLang's events instead of the finished answer.
            timeout_s: Longest wait for the answer (streaming: for the next event), in seconds.
            fields: Any other field of SGLang's ``/generate``, such as ``return_logprob=True`` or ``lora_path="name"``.

        Returns:
            SGLang's response dict; a list for a list of prompts, with ``n > 1`` all samples of the first prompt first.

        Raises:
            ConfigError: A field that this server does not know.
            EngineStateError: Asleep, or the weights are not the trainer's.
            RequestError: The server refused, in its own words.
            EngineDeadError, DeadlineError: The server is gone, or too slow.
        """
        body = self._body(prompts, sampling_params, fields, stream)
        if body is None:
            return iter(()) if stream else []
        if stream:
            return self._streaming(body, timeout_s)
        with self._counted():
            return self._client.post("/generate", body, timeout_s=timeout_s)

    async def generate_async(
        self,
        prompts: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
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
            return self._streaming_async(body, timeout_s)
        with self._counted():
            return await self._client.post_async("/generate", body, timeout_s=timeout_s)

    def _streaming(self, body: dict[str, Any], timeout_s: float) -> Iterator[Any]:
        with self._counted():
            yield from self._client.stream("/generate", body, timeout_s=timeout_s)

    async def _streaming_async(self, body: dict[str, Any], timeout_s: float) -> AsyncIterator[Any]:
        with self._counted():
            async for event in self._client.stream_async("/generate", body, timeout_s=timeout_s):
                yield event

    def _body(
        self, prompts: Prompts | None, sampling_params: Any, fields: dict[str, Any], stream: bool
    ) -> dict[str, Any] | None:
        self._check_generate()
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
        unknown = set(body) - _KNOWN_FIELDS
        if unknown and (unknown := unknown - self._server_fields()):
            raise ConfigError(
                f"this server's /generate has no field {', '.join(sorted(unknown))}",
                hint="SGLang would ignore it without a word; sampling parameters go into sampling_params",
                url=self.url,
            )
        if sampling_params is not None:
            body["sampling_params"] = sampling_params
        if stream:
            body["stream"] = True
        return body

    def _server_fields(self) -> frozenset[str]:
        if self._described_fields is None:
            schemas = self._client.get("/openapi.json", timeout_s=HEALTH_TIMEOUT_S)["components"]["schemas"]
            self._described_fields = frozenset(schemas["GenerateReqInput"]["properties"])
        return self._described_fields

    def _check_generate(self) -> None:
        """Overridden where the state of the engine is known."""

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._in_flight += 1
        try:
            # Also now that it counts: `sleep` first says that the engine sleeps and then looks for requests, so that one of
            # the two sees the other.  And a stream begins when it is first read.
            self._check_generate()
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def health(self) -> Health:
        """``ready`` if the server answers, else ``dead``.

        Only that: whether it is asleep is known inside the job, and a token generated to find out would touch memory
        that a sleeping server has released.
        """
        return Health.READY if self._client.is_listening(timeout_s=HEALTH_TIMEOUT_S) else Health.DEAD


def _is_text(prompts: Prompts) -> bool:
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], str)


async def _nothing() -> AsyncIterator[Any]:
    return
    yield


__all__ = ["Client", "Health"]
