"""Checks of arguments, made before anything is sent or changed; all raise `ConfigError` with the name and the value."""

from __future__ import annotations

import numbers
import os
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from tpcolocate.errors import ConfigError, shown

T = TypeVar("T")

# Of one job, which bounds numbers of ranks and of slices.
MOST_RANKS = 2**20
_MAX_TEXT = 1024
# Of numbers that become 64-bit integers elsewhere.
_MOST = 2**62


def check_type(name: str, value: object, kind: type[T] | tuple[type[T], ...], *, expected: str) -> T:
    """Return a value of the expected type.

    Args:
        name: Of the argument.
        value: What was passed.
        kind: What it must be.
        expected: The same in words: ``"a mapping"``.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be {expected}, got {shown(value)}")
    return value


def check_integer(name: str, value: object, *, at_least: int, at_most: int | None = None) -> int:
    """Return an integer within bounds; neither a bool nor a float of the same value is one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, got {shown(value)}")
    if value < at_least or (at_most is not None and value > at_most):
        limits = f"at least {at_least}" if at_most is None else f"between {at_least} and {at_most}"
        raise ConfigError(f"{name} must be {limits}, got {shown(value)}")
    return value


def check_positive_integer(name: str, value: object) -> int:
    """Return an integer above zero."""
    if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
        raise ConfigError(f"{name} must be positive, got {shown(value)}")
    return check_integer(name, value, at_least=1, at_most=_MOST)


def check_flag(name: str, value: object) -> bool:
    """Return True or False; nothing else is taken for one of them."""
    return check_type(name, value, bool, expected="True or False")


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={shown(value)} is unknown", hint=f"one of {', '.join(choices)}")
    return value


def check_text(name: str, value: object, *, max_length: int = _MAX_TEXT) -> str:
    """Return a text that can be sent: not empty, not too long, and UTF-8 can encode it.

    Args:
        name: Of the argument.
        value: What was passed.
        max_length: In characters.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {shown(value)}")
    if not value:
        raise ConfigError(f"{name} must not be empty")
    if len(value) > max_length:
        raise ConfigError(f"{name} has {len(value)} characters, at most {max_length} are possible")
    if "\0" in value:
        raise ConfigError(f"{name} must not have a null character, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name} cannot be encoded in UTF-8: {shown(value)}",
            hint="it has a surrogate of UTF-16 by itself, as os.fsdecode() makes of bytes that are not UTF-8",
        ) from None
    return value


def check_path(name: str, value: object) -> Path:
    """Return a path from a string or another path; nothing is looked up."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be a path, got {shown(value)}", hint="pass a string or a pathlib.Path")
    if not text or "\0" in text:
        raise ConfigError(f"{name}={shown(value)} is not a path", hint="pass a string or a pathlib.Path")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name}={shown(value)} cannot be encoded", hint="pass a path that the file system can have"
        ) from None
    if text.startswith("~"):
        raise ConfigError(
            f"{name}={shown(text)} begins with ~, which a shell expands and Python does not",
            hint=f"pass {os.path.expanduser(text)!r}, or {'./' + text!r} for a name that begins so",
        )
    return Path(text)


def check_folder(name: str, value: object) -> Path:
    """Return a folder that exists, in which this process may make files."""
    path = check_path(name, value)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{name}={shown(str(path))} cannot be used: {error.strerror}") from error
    if not is_folder:
        state = "is not a folder" if path.exists() else "does not exist"
        raise ConfigError(f"{name}={shown(str(path))} {state}", hint="make the folder first")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}={shown(str(path))} is not writable for this process")
    return path


def check_version(value: object, *, name: str = "weight_version") -> str | None:
    """Return a weight version as the server reports it; None stands for the next one.

    Args:
        value: A string, or an integer such as a number of steps, also one of numpy, or None.
        name: Of the argument.
    """
    if value is None:
        return None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return check_text(name, _decimal(name, int(value)))
    if not isinstance(value, str):
        raise ConfigError(
            f"{name} must be a string, an integer or None, got {shown(value)}",
            hint="for example weight_version=str(step)",
        )
    return check_text(name, value)


def _decimal(name: str, value: int) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python writes
        raise ConfigError(f"{name} is an integer of {value.bit_length()} bits", hint="pass a number of steps") from None


__all__ = [
    "MOST_RANKS",
    "check_choice",
    "check_flag",
    "check_folder",
    "check_integer",
    "check_path",
    "check_positive_integer",
    "check_text",
    "check_type",
    "check_version",
]
