"""Prompts as users have them -- texts, token ids, tensors, arrays, a tokenizer's output -- as SGLang takes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from tpcolocate.engine.limits import ServerLimits
from tpcolocate.engine.values import MAX_INT, contents, is_array, is_list, number, scalar, text, unpacked
from tpcolocate.errors import ConfigError, TpColocateError, shown

logger = logging.getLogger(__name__)

Prompt = str | list[int] | list[list[float]]

CHAT_HINT = "make ids of chat messages first: tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
_KINDS_HINT = "texts and token ids go into separate calls"
_EMPTY_HINT = "leave it out, or begin with the tokenizer's bos_token_id"


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of one call.

    Attributes:
        field: SGLang's field for them: ``text``, ``input_ids`` or ``input_embeds``.
        items: One each: what is sent, or why it is not.
        is_single: Whether it was given as one prompt, not as a list.
    """

    field: str
    items: list[Prompt | TpColocateError]
    is_single: bool

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """Return what a prompt is called in messages."""
        return "the prompt" if self.is_single else f"prompt {index}"

    @property
    def bad(self) -> dict[int, TpColocateError]:
        return {i: item for i, item in enumerate(self.items) if isinstance(item, TpColocateError)}


def read_prompts(given: Any, limits: ServerLimits, *, field: str | None = None) -> Prompts:
    """Return the prompts of one call.  A bad prompt of a list is an error in its place.

    Args:
        given: As for `Engine.generate`.
        limits: Of the server.
        field: SGLang's field that they were passed as; None: as prompts.

    Raises:
        ConfigError: This is no prompt and no list of prompts.
    """
    given = unpacked(_of_tokenizer(given))
    if field == "input_embeds":
        return _read_embeds(given, limits)
    if isinstance(given, str):
        if field == "input_ids":
            raise ConfigError(f"input_ids is a text: {shown(given)}", hint="pass it as prompts or text=")
        rows, is_single = [given], True
    else:
        rows, is_single = _rows(given)
    if field is None:
        field = "text" if rows and isinstance(rows[0], str) else "input_ids"
    if field == "text" and rows:
        limits.check_tokenizer("a text as prompt", instead="pass token ids")
    prompts = Prompts(field, [], is_single)
    for i, row in enumerate(rows):
        prompts.items.append(_read(row, prompts, i, limits))
    if is_array(given) and (token := _padding([item for item in prompts.items if isinstance(item, list)])) is not None:
        logger.warning(
            "prompts of this array begin or end with token %d repeated, others do not: if that is padding, it is a part of these "
            "prompts; pass the tokenizer's whole output, whose attention_mask leaves it out",
            token,
        )
    return prompts


def _padding(rows: Sequence[Sequence[Any]]) -> Any:
    """Return the token that seems to pad some of these rows to the length of the others; None if there is none."""
    for first, second in ((0, 1), (-1, -2)):
        repeated = {row[first] for row in rows if len(row) > 1 and row[first] == row[second]}
        if len(repeated) == 1 and any(row[first] not in repeated for row in rows):
            return repeated.pop()
    return None


def _read(row: Any, prompts: Prompts, index: int, limits: ServerLimits) -> Prompt | TpColocateError:
    try:
        if prompts.field == "text":
            return _text(row, prompts.name(index), limits)
        return _ids(row, prompts.name(index), limits)
    except TpColocateError as error:
        return error


def _of_tokenizer(given: Any) -> Any:
    """Return the ids of a tokenizer's output, without its padding; anything else as it is."""
    if not isinstance(given, Mapping):
        return given
    if "input_ids" not in given:
        raise ConfigError(
            f"prompts is a {type(given).__name__} without input_ids: {shown(dict(given))}", hint=_hint_of_dict(given)
        )
    ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is None:
        return ids
    ids, mask = _plain_rows(ids), _plain_rows(mask)
    try:
        if len(ids) > 0 and is_list(ids[0]):
            return [_unpadded(row, row_mask) for row, row_mask in zip(ids, mask, strict=True)]
        return _unpadded(ids, mask)
    except (TypeError, ValueError):
        raise ConfigError(
            "input_ids and attention_mask of the prompts have different shapes", hint="pass input_ids alone"
        ) from None


def _hint_of_dict(given: Mapping[Any, Any]) -> str:
    return (
        CHAT_HINT if "role" in given or "messages" in given else "pass texts or token ids, such as one of its entries"
    )


def _plain_rows(given: Any) -> Any:
    """Lists in place of arrays: of all rows, or of each."""
    if is_array(given):
        return contents(given)
    return [contents(row) if is_array(row) else row for row in given] if is_list(given) else given


def _unpadded(ids: Sequence[Any], mask: Sequence[Any]) -> list[Any]:
    return [each for each, is_token in zip(ids, mask, strict=True) if is_token]


def _rows(given: Any) -> tuple[list[Any], bool]:
    """Return prompts one by one, and whether there is only the one."""
    if is_array(given):
        _check_integers(given, "the prompts")
        if given.ndim > 2:
            raise ConfigError(
                f"the prompts have shape {tuple(given.shape)}", hint="pass (tokens,) or (prompts, tokens), or a list"
            )
        return ([given], True) if given.ndim == 1 and len(given) > 0 else (list(given), False)
    if not is_list(given):
        hint = "pass a text, token ids, or a list of either"
        if hasattr(given, "keys"):
            hint = "pass one of its columns, which are texts or token ids"
        elif hasattr(given, "__iter__") and not isinstance(given, (bytes, bytearray)):
            hint = "make a list of it"
        raise ConfigError(f"prompts must be texts or token ids, got {shown(given)}", hint=hint)
    rows = list(given)
    if rows and _is_token(rows[0]):
        return [rows], True
    return rows, False


def _is_token(value: Any) -> bool:
    return isinstance(scalar(value), (int, float))


def _text(row: Any, name: str, limits: ServerLimits) -> str:
    if isinstance(row, Mapping):
        raise ConfigError(f"{name} is a dict: {shown(dict(row))}", hint=_hint_of_dict(row))
    if not isinstance(row, str):
        is_ids = is_list(row) or is_array(row)
        raise ConfigError(
            f"{name} is {_kind(row)}, prompt 0 is a text",
            hint=_KINDS_HINT if is_ids else "leave it out, or make it a text",
        )
    found = text(row, name, hint=_EMPTY_HINT)
    if limits.without_embedding is not None and (token := limits.without_embedding.search(found)) is not None:
        raise ConfigError(
            f"{name} has the token {shown(token[0])}, which is outside of the vocabulary of {limits.vocab_size} tokens",
            hint="it was added to the tokenizer alone: leave it out, or resize the model's embedding and save both",
        )
    return found


def _kind(row: Any) -> str:
    return f"of type {type(row).__name__} ({shown(row)})"


def _ids(row: Any, name: str, limits: ServerLimits) -> list[int]:
    if isinstance(row, Mapping):
        if "input_ids" not in row:
            raise ConfigError(f"{name} is a dict: {shown(dict(row))}", hint=_hint_of_dict(row))
        row = _of_tokenizer(row)
        if is_list(row) and len(row) == 1 and is_list(row[0]):  # of one text, in a batch of its own
            row = row[0]
    row = unpacked(row)
    if is_array(row):
        _check_integers(row, name)
        if row.ndim == 2 and len(row) == 1:  # a tokenizer's output for one text, as a tensor
            row = row[0]
        if row.ndim != 1:
            raise ConfigError(f"{name} has shape {tuple(row.shape)}", hint="a prompt is (tokens,)")
        ids: list[Any] = contents(row)
    elif is_list(row):
        ids = list(row)
    else:
        hint = _KINDS_HINT if isinstance(row, str) else "a prompt is a list of token ids"
        raise ConfigError(f"{name} is {_kind(row)}, not a list of token ids", hint=hint)
    if not ids:
        raise ConfigError(f"{name} is empty", hint=_EMPTY_HINT)
    if set(map(type, ids)) != {int}:
        ids = [_token(each, name, i) for i, each in enumerate(ids)]
    _check_vocabulary(ids, name, limits.vocab_size)
    if limits.prompt_tokens is not None and len(ids) >= limits.prompt_tokens:
        context = "" if limits.context_tokens is None else f"; its context is {limits.context_tokens} tokens"
        raise ConfigError(
            f"{name} has {len(ids)} tokens, and this server takes fewer than {limits.prompt_tokens}{context}",
            hint="shorten it, or launch with a larger context_length, as far as the model goes, or more memory for the cache",
        )
    return ids


def _token(value: Any, name: str, position: int) -> int:
    found = scalar(value)
    if isinstance(found, bool) or not isinstance(found, Integral):
        hint = CHAT_HINT if isinstance(value, Mapping) else "a prompt is (tokens,)"
        raise ConfigError(f"token {position} of {name} is {shown(value)}, not an integer", hint=hint)
    return int(found)


def _check_integers(array: Any, name: str) -> None:
    dtype = str(array.dtype)
    if "int" not in dtype:
        raise ConfigError(
            f"{name} is an array of {dtype}, not of token ids", hint="pass integers, as .long() makes them"
        )


def _check_vocabulary(ids: list[int], name: str, vocab_size: int | None) -> None:
    limit = MAX_INT if vocab_size is None else vocab_size
    if min(ids) >= 0 and max(ids) < limit:
        return
    position, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token < limit)
    size = "" if vocab_size is None else f" of {vocab_size} tokens"
    hint = "-100 marks labels that are ignored in a loss" if token == -100 else "is it another model's tokenizer?"
    raise ConfigError(f"token {position} of {name} is {shown(token)}, outside of the vocabulary{size}", hint=hint)


def _read_embeds(given: Any, limits: ServerLimits) -> Prompts:
    if is_array(given):
        given = contents(given)
    if not is_list(given) or not all(is_list(row) or is_array(row) for row in given):
        raise ConfigError(
            f"input_embeds must be (tokens, hidden) or (prompts, tokens, hidden), got {shown(given)}",
        )
    rows = [contents(row) if is_array(row) else list(row) for row in given]
    is_single = bool(rows) and bool(rows[0]) and _is_token(rows[0][0])
    prompts = Prompts("input_embeds", [], is_single)
    for i, row in enumerate([rows] if is_single else rows):
        try:
            prompts.items.append(_embeds(row, f"input_embeds of {prompts.name(i)}", limits.hidden_size))
        except TpColocateError as error:
            prompts.items.append(error)
    return prompts


def _embeds(rows: list[Any], name: str, hidden_size: int | None) -> list[list[float]]:
    if not rows:
        raise ConfigError(f"{name} is empty", hint=_EMPTY_HINT)
    vectors: list[list[float]] = []
    for i, row in enumerate(rows):
        row = contents(row) if is_array(row) else row
        if not is_list(row):
            raise ConfigError(f"token {i} in {name} is {shown(row)}, not a vector")
        width = len(row) if hidden_size is None and not vectors else hidden_size or len(vectors[0])
        if len(row) != width or not width:
            raise ConfigError(f"token {i} in {name} has {len(row)} values, the model's embeddings have {width}")
        # SGLang recognises the shape by a float.
        vectors.append([float(number(x, f"token {i} in {name}", low=-3e38, high=3e38)) for x in row])
    return vectors


__all__ = ["CHAT_HINT", "Prompt", "Prompts", "read_prompts"]
