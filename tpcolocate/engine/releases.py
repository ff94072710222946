"""What differs between SGLang releases, as one table.

Keyed by the version that the running server reports, never by what is installed beside the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from tpcolocate.errors import ConfigError

OLDEST = Version("0.5.9")


@dataclass(frozen=True, slots=True)
class Release:
    """The features of one server.

    Attributes:
        version: As the server reports it.
        weight_session: Weights must be sent between ``/begin_weight_update`` and ``/end_weight_update`` (0.5.21).
        lora_payload_per_rank: ``/load_lora_adapter_from_tensors`` takes one payload per TP rank (0.5.17); before, one
            that all ranks read.
    """

    version: str
    weight_session: bool
    lora_payload_per_rank: bool


def release(version: str) -> Release:
    """Features of the release that reports `version`.

    Raises:
        ConfigError: Older than the oldest supported one, or no version at all.
    """
    try:
        parsed = Version(version)
    except InvalidVersion as error:
        raise ConfigError(
            f"the server reports version {version!r}, which is no version", hint=f"use SGLang {OLDEST} or newer"
        ) from error
    if parsed < OLDEST:
        raise ConfigError(f"SGLang {version} is not supported", hint=f"use {OLDEST} or newer")
    # a development build of a release already behaves as that release
    base = Version(parsed.base_version)
    return Release(
        version=version,
        weight_session=base >= Version("0.5.21"),
        lora_payload_per_rank=base >= Version("0.5.17"),
    )


__all__ = ["OLDEST", "Release", "release"]
