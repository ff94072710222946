"""Checks of single values: what JSON and SGLang take of numbers, texts and arrays, and errors that name the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sized
from numbers import Integral, Real
from typing import Any, Protocol

from tpcolocate.errors import ConfigError, shown

MAX_INT = 2**63 - 1
_MOST_LEVELS = 32
# Names of the dtypes of numbers, in torch, NumPy and pandas.
_NUMBERS = re.compile(r"(torch\.)?(q?u?int|b?float|complex|bool)", re.IGNORECASE)


class Array(Protocol):
    """A tensor, an array of NumPy, or a column of pandas."""

    @property
    def dtype(self) -> Any: ...

    @property
    def ndim(self) -> int: ...

    def tolist(self) -> Any: ...


def refuse(where: str, what: str, value: object, hint: str | None = None) -> ConfigError:
    """Return the error of a value: ``{where} must be {what}, got {value}``."""
    return ConfigError(f"{where} must be {what}, got {shown(value)}", hint=hint)


def scalar(value: Any) -> Any:
    """Return the Python number of a tensor or array without dimensions, and of NumPy's numbers; others as they are.

    Raises:
        ConfigError: It has no content.
    """
    if type(value) in (int, float, str, bool) or value is None:
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _content(value.item, value)
    return value


def contents(array: Any) -> Any:
    """Return the content of a tensor or array (`is_array`) as lists.

    Raises:
        ConfigError: It has none.
    """
    return _content(array.tolist, array)


def _content(read: Callable[[], Any], value: object) -> Any:
    try:
        return read()
    except Exception as error:  # a tensor without memory, of a layout that has no lists, or inside of a transform
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{shown(value)} cannot be read: {why}", hint="pass a list, or a tensor that has values"
        ) from error


def integer(value: Any, where: str, *, low: int, high: int, hint: str | None = None) -> int:
    """Return an integer of a range; a float without a fraction, as a division leaves it, is one.

    Raises:
        ConfigError: It is not.
    """
    found = scalar(value)
    is_whole = isinstance(found, Integral) or (isinstance(found, float) and found.is_integer())
    if isinstance(found, bool) or not is_whole:
        raise refuse(where, "an integer", value, hint)
    if not low <= (whole := int(found)) <= high:
        raise refuse(where, _range(low, high), value, hint)
    return whole


def number(
    value: Any, where: str, *, low: float, high: float, without_low: bool = False, hint: str | None = None
) -> float:
    """Return a finite number of a range, as a float: SGLang's messages hold no integers beyond 64 bits.

    Raises:
        ConfigError: It is not.
    """
    found = scalar(value)
    if isinstance(found, bool) or not isinstance(found, Real) or not math.isfinite(_float(found)):
        raise refuse(where, "a finite number", value, hint)
    real = float(found)
    if not low <= real <= high or (without_low and real == low):
        raise refuse(where, f"in {'(' if without_low else '['}{low:g}, {high:g}]", value, hint)
    return real


def flag(value: Any, where: str, *, hint: str | None = None) -> bool:
    """Return a boolean.

    Raises:
        ConfigError: It is not; SGLang's processes take no 0 and 1.
    """
    found = scalar(value)
    if not isinstance(found, bool):
        raise refuse(where, "True or False", value, hint)
    return found


def text(value: Any, where: str, *, may_be_empty: bool = False, hint: str | None = None) -> str:
    """Return a text that can be sent.

    Raises:
        ConfigError: It is not a str, is empty, or has surrogates that no encoding has.
    """
    if not isinstance(value, str):
        raise refuse(where, "a str", value, hint)
    if not value and not may_be_empty:
        raise ConfigError(f"{where} is empty", hint=hint)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{where} cannot be encoded: character {error.start} is {shown(value[error.start])}",
                hint='decode with errors="replace" where the text comes from',
            ) from None
    return str(value)


def is_array(value: object) -> bool:
    """Return whether a value is a tensor or array with at least one dimension."""
    return hasattr(value, "dtype") and hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0


def unpacked(value: Any) -> Any:
    """Return an array of anything but numbers, such as a column of texts of pandas, as the list that it is; others as they are."""
    return contents(value) if is_array(value) and not _NUMBERS.match(str(value.dtype)) else value


def is_list(value: object) -> bool:
    """Return whether a value is an ordered collection of others, not a text, a mapping or an array.

    What has keys is a mapping, whatever its class: a DataFrame of pandas iterates over the names of its columns.
    """
    if isinstance(value, (list, tuple)):
        return True
    # By the classes of the protocol: a member of an enum has none of its methods, but its class, which has a length, does.
    return (
        isinstance(value, Sized)
        and isinstance(value, Iterable)
        and hasattr(value, "__getitem__")
        and not hasattr(value, "keys")
        and not isinstance(value, (str, bytes, bytearray, memoryview, Mapping))
        and not hasattr(value, "dtype")
    )


def plain(value: Any, where: str, *, levels: int = _MOST_LEVELS) -> Any:
    """Return what JSON makes of any value.

    Raises:
        ConfigError: JSON, or SGLang's messages between its processes, cannot hold it.
    """
    value = scalar(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, where, may_be_empty=True)
    if isinstance(value, Integral):
        return integer(value, where, low=-(2**63), high=MAX_INT)
    if isinstance(value, Real):
        return number(value, where, low=-math.inf, high=math.inf)
    if levels == 0:
        raise ConfigError(f"{where} is nested more than {_MOST_LEVELS} levels deep")
    if isinstance(value, Mapping):
        return {
            text(name, f"a name in {where}", may_be_empty=True): plain(each, f"{where}[{name!r}]", levels=levels - 1)
            for name, each in value.items()
        }
    if is_array(value):
        value = contents(value)
    if not is_list(value):
        raise refuse(where, "text, numbers, lists and dicts", value)
    return [plain(each, f"{where}[{i}]", levels=levels - 1) for i, each in enumerate(value)]


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _range(low: int, high: int) -> str:
    if high >= MAX_INT:
        return f"at least {low}" if low > -(2**63) else "within 64 bits"
    return f"from {low} to {high}"


__all__ = [
    "MAX_INT",
    "Array",
    "contents",
    "flag",
    "integer",
    "is_array",
    "is_list",
    "number",
    "plain",
    "refuse",
    "scalar",
    "text",
    "unpacked",
]
