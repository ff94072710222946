"""What a running server can take in one request, as far as it can be known outside of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from tpcolocate.errors import ConfigError
from tpcolocate.server.api import serves_adapters
from tpcolocate.server.releases import IGNORED_FIELDS
from tpcolocate.weights.sources.model_spec import local_folder

# Where the configurations of models with several parts keep the language model's.
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
NEEDED = {
    "sampling_seed": "enable_deterministic_inference",
    "priority": "enable_priority_scheduling",
    "return_routed_experts": "enable_return_routed_experts",
    "return_indexer_topk": "enable_return_indexer_topk",
}
"""Sampling parameters and fields, and the argument of the server without which it ignores them."""


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """Where a served model is on this machine, as its owner has found it.

    Attributes:
        model: Of its configuration; empty to look for it.
        tokenizer: Of its tokenizer, if that is elsewhere; likewise.
    """

    model: str = ""
    tokenizer: str = ""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server can take.

    Attributes:
        version: Of SGLang.
        vocab_size: Token ids are smaller than it; None if it is not known.
        hidden_size: Of the embeddings; None if it is not known.
        prompt_tokens: A prompt has fewer tokens than this; None: no limit is known, or the server shortens prompts.
        context_tokens: Most tokens of a prompt and its answer; None likewise.
        has_lora: Whether adapters can be served.
        has_tokenizer: Whether it takes texts, and looks for some in answers.
        generates: Whether its model does; one for embeddings, rewards or classification does not.
        ignored: Of `NEEDED` and `IGNORED_FIELDS`, what the server ignores.
        media: Kinds of input beside text that the model takes, of ``image``, ``video`` and ``audio``; None if it is not known.
        without_embedding: Finds texts that the tokenizer makes tokens outside of the vocabulary from; None: none are known.
    """

    version: Version | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    prompt_tokens: int | None = None
    context_tokens: int | None = None
    has_lora: bool = True
    has_tokenizer: bool = True
    generates: bool = True
    ignored: frozenset[str] = frozenset()
    media: frozenset[str] | None = None
    without_embedding: re.Pattern[str] | None = None

    @classmethod
    def of(
        cls,
        info: Mapping[str, Any],
        model_info: Mapping[str, Any],
        folders: ModelFolders = ModelFolders(),  # noqa: B008  (frozen)
    ) -> ServerLimits:
        """Read them from what a server reports of itself, and from its model's configuration.

        Args:
            info: Of ``/server_info``.
            model_info: Of ``/model_info``.
            folders: Of the model.
        """
        shortens = bool(info.get("allow_auto_truncate"))
        context, longest = _integer(info.get("context_length")), _integer(info.get("max_req_input_len"))
        lengths = [length for length in (context, longest) if length is not None and not shortens]
        folder = _folder(folders.model, info.get("model_path"))
        config, media = _model_config(folder, info), _media(model_info)
        vocab_size = _integer(_find(config, "vocab_size"))
        ignored = {name for name, argument in NEEDED.items() if info.get(argument) is False}
        try:
            version = Version(str(info.get("version")))
            ignored |= {name for name, span in IGNORED_FIELDS.items() if version in span}
        except InvalidVersion:
            version = None
        return cls(
            version=version,
            vocab_size=vocab_size,
            hidden_size=_integer(_find(config, "hidden_size")),
            prompt_tokens=min(lengths, default=None),
            context_tokens=None if shortens else context,
            has_lora=serves_adapters(info),
            has_tokenizer=not info.get("skip_tokenizer_init"),
            generates=model_info.get("is_generation") is not False,
            ignored=frozenset(ignored),
            media=media,
            # A model with several parts may have embeddings of its own for such tokens.
            without_embedding=None
            if vocab_size is None or media or any(name in config for name in _PARTS)
            else _without_embedding(_tokenizer_folder(info, folders, folder), vocab_size),
        )

    def check_used(self, name: str, what: str) -> None:
        """Check that the server does not ignore a sampling parameter or field.

        Args:
            name: Of it.
            what: The same in messages.

        Raises:
            ConfigError: It does.
        """
        if name in self.ignored:
            needed = NEEDED.get(name)
            raise ConfigError(
                f"{what} is given, and this server would ignore it",
                hint=f"leave it out: nothing in SGLang {self.version} reads it"
                if needed is None
                else f"launch({needed}=True), or leave it out",
            )

    def check_tokenizer(self, what: str, *, instead: str) -> None:
        """Check that the server has a tokenizer.

        Some releases, such as SGLang 0.5.9, look for it in the scheduler, which ends without; later ones refuse most of it.

        Args:
            what: What needs one, for messages.
            instead: What does not.

        Raises:
            ConfigError: It has none.
        """
        if not self.has_tokenizer:
            raise ConfigError(
                f"{what} needs the tokenizer, which this server has not loaded (skip_tokenizer_init=True)",
                hint=f"{instead}, or launch() without skip_tokenizer_init",
            )


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _media(model_info: Mapping[str, Any]) -> frozenset[str] | None:
    images, audio = model_info.get("has_image_understanding"), model_info.get("has_audio_understanding")
    if images is None or audio is None:
        return None
    return frozenset((["image", "video"] if images else []) + (["audio"] if audio else []))


def _folder(found: str, path: object) -> Path | None:
    """Return the folder of a model or tokenizer: as the owner has found it, or by the path that the server reports."""
    return Path(found) if found and Path(found).is_dir() else local_folder(str(path))


def _tokenizer_folder(info: Mapping[str, Any], folders: ModelFolders, of_model: Path | None) -> Path | None:
    path = info.get("tokenizer_path")
    return of_model if not path or path == info.get("model_path") else _folder(folders.tokenizer, path)


def _model_config(folder: Path | None, info: Mapping[str, Any]) -> dict[str, Any]:
    if folder is None:
        return {}
    try:
        config = json.loads((folder / "config.json").read_bytes())
        overrides = json.loads(info.get("json_model_override_args") or "{}")
    except (OSError, ValueError, TypeError):
        return {}
    return {**config, **overrides} if isinstance(config, dict) and isinstance(overrides, dict) else {}


def _without_embedding(folder: Path | None, vocab_size: int) -> re.Pattern[str] | None:
    """Return what finds tokens that were added to a tokenizer, such as one for padding, without resizing the model."""
    texts = []
    for added in [] if folder is None else _added_tokens(folder):
        number, text = added.get("id"), added.get("content")
        if isinstance(number, int) and number >= vocab_size and isinstance(text, str) and text:
            is_word = added.get("single_word") is True
            texts.append(rf"(?<!\w){re.escape(text)}(?!\w)" if is_word else re.escape(text))
    return re.compile("|".join(texts)) if texts else None


def _added_tokens(folder: Path) -> list[dict[str, Any]]:
    """Return the tokens that were added to a tokenizer, as its file has them; none if it cannot be read."""
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        # Of the whole file, which takes a second to parse, only this list, which comes before the vocabulary.
        found, _ = json.JSONDecoder().raw_decode(text, text.index("[", text.index('"added_tokens"')))
    except (OSError, ValueError, RecursionError):
        return []
    return [each for each in found if isinstance(each, dict)]


def _find(config: Mapping[str, Any], name: str) -> Any:
    """Return an entry of the language model; None if there is none."""
    return next((part[name] for part in _parts(config) if part.get(name) is not None), None)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name in _PARTS:
        if isinstance(config.get(name), Mapping):
            yield from _parts(config[name])
    yield config


__all__ = ["NEEDED", "ModelFolders", "ServerLimits"]
