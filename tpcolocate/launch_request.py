"""What the ranks of a slice pass to `Colocation.launch`, checked, and their agreement on it before anything is started."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcolocate.agreement import RankGroup
from tpcolocate.checks import check_integer, check_path, check_text, check_type
from tpcolocate.deadline import check_timeout
from tpcolocate.errors import ConfigError, shown, some
from tpcolocate.server.arguments import check_installed, server_arguments
from tpcolocate.server.installed import find_installed
from tpcolocate.server.model_folder import check_model_files, check_model_path
from tpcolocate.weights.sources.checkpoint import saved_version
from tpcolocate.weights.sources.model_spec import check_not_quantised


@dataclass(frozen=True, slots=True)
class TpSlice:
    """A tp slice, as one of its ranks sees it.

    Attributes:
        group: The ranks of the slice, in tp order.
        owner_rank: Global rank that launches the server.
        device: Training device of this rank.
        visible_devices: Device tokens of the slice, in tp order.
        shared: All TP ranks share one device.
        job: Identity of the job.
        slice_index: Number of the slice.
    """

    group: RankGroup
    owner_rank: int
    device: torch.device
    visible_devices: tuple[str, ...]
    shared: bool
    job: str
    slice_index: int

    @property
    def tp_size(self) -> int:
        return len(self.group)

    @property
    def is_owner(self) -> bool:
        return self.group.rank == self.owner_rank


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What one rank passes to `Colocation.launch`.

    Attributes:
        model_path: Folder or hub id.
        arguments: All of SGLang's arguments.
        env: Environment variables for the server alone.
        nonce: Identity of this launch; only the owner's counts.
        health_timeout_s: From the start of the server's process to its first generated token, in seconds.
        restart: How often the engine restarts its server by itself.
        repeated: Names in `env` that have the same value in this rank's own environment, as in a copy of that.
        log_path: For the server's log, by its absolute path; only the owner's counts.
        working_directory: Of the server, in which relative paths among its arguments are; likewise.
    """

    model_path: str
    arguments: dict[str, Any]
    env: dict[str, str]
    nonce: str
    health_timeout_s: float
    restart: int = 0
    repeated: frozenset[str] = frozenset()
    log_path: str | None = None
    working_directory: str | None = None

    def again(self) -> dict[str, Any]:
        """Return the arguments of `agree_on_launch` for another launch like this one.

        Nothing that the script has changed since has an effect on it: lists and dicts that it has passed, the working
        directory, its environment.
        """
        return {
            "env": {name: value for name, value in self.env.items() if name not in self.repeated},
            "server_args": self.arguments,
            "health_timeout_s": self.health_timeout_s,
            "log_path": self.log_path,
            "restart": self.restart,
            "working_directory": self.working_directory,
        }

    def difference(self, other: LaunchRequest) -> str | None:
        """Describe the first difference that matters; None if there is none."""
        if self.model_path != other.model_path:
            return f"model_path {self.model_path!r} and {other.model_path!r}"
        for name in sorted(set(self.arguments) | set(other.arguments)):
            value, other_value = self.arguments.get(name), other.arguments.get(name)
            if value != other_value:
                return f"{name}={value!r} and {name}={other_value!r}"
        if self.restart != other.restart:
            return f"restart={self.restart!r} and restart={other.restart!r}"
        if self.health_timeout_s != other.health_timeout_s:
            return f"health_timeout_s={self.health_timeout_s:g} and health_timeout_s={other.health_timeout_s:g}"
        asked = (self.env.keys() - self.repeated) | (other.env.keys() - other.repeated)
        if names := sorted(name for name in asked if self.env.get(name) != other.env.get(name)):
            return f"env with other values, or none, of {some(names, between=', ')}"  # which may be secrets
        return None


def agree_on_launch(
    tp_slice: TpSlice,
    model_path: str | os.PathLike[str],
    *,
    env: Mapping[str, str],
    server_args: Mapping[str, Any],
    health_timeout_s: float,
    log_path: str | os.PathLike[str] | None = None,
    closed: bool,
    restart: int = 0,
    working_directory: str | None = None,
) -> LaunchRequest:
    """Check the arguments of a launch, and that all ranks of the slice pass the same.

    Collective: over the slice.

    Args:
        tp_slice: The slice.
        model_path: Folder or hub id.
        env: Environment variables for the server alone.
        server_args: The user's arguments for SGLang.
        health_timeout_s: As passed by the user, in seconds.
        log_path: As passed by the user.
        closed: Whether this rank's `Colocation` is closed.
        restart: How often the engine restarts its server by itself.
        working_directory: Of the server; default: that of this process.

    Returns:
        The owner's request.

    Raises:
        ConfigError: An argument is invalid or differs between ranks; the same on every rank.
        RankLostError: A rank of the slice died or is in another call.
    """
    arguments: dict[str, Any] = {}
    error: BaseException | None = None
    try:
        if closed:
            raise ConfigError("launch() after close()", hint="call init() again")
        check_timeout(health_timeout_s, name="health_timeout_s")
        model_path = _same_anywhere(check_path("model_path", model_path), os.fspath(model_path))
        if log_path is not None:
            log_path = check_path("log_path", log_path).absolute()
        if working_directory is None:
            working_directory = _working_directory()
        env = _checked_environment(env)
        check_integer("restart", restart, at_least=0)
        arguments = server_arguments(
            server_args, tp_size=tp_slice.tp_size, device_type=tp_slice.device.type, shared_device=tp_slice.shared
        )
        check_not_quantised(model_path)
        version = saved_version(model_path)
        if version is not None:
            arguments.setdefault("weight_version", version)
        if tp_slice.is_owner:  # its environment is the server's
            check_model_path(model_path)
            check_model_files(model_path, arguments)
            check_installed(arguments, find_installed({**os.environ, **env}, folder=working_directory))
    except BaseException as caught:
        error = caught
    request = (
        LaunchRequest(
            str(model_path),
            arguments,
            dict(env),
            nonce=f"{os.getpid()}-{secrets.token_hex(8)}",
            health_timeout_s=float(health_timeout_s),
            restart=restart,
            repeated=frozenset(name for name, value in env.items() if os.environ.get(name) == value),
            log_path=None if log_path is None else str(log_path),
            working_directory=working_directory,
        )
        if error is None
        else None
    )
    requests = [one for one in tp_slice.group.agree(error, request, what="agree on the launch") if one is not None]
    own = requests[tp_slice.group.ranks.index(tp_slice.owner_rank)]
    for rank, other in zip(tp_slice.group.ranks, requests):
        if (difference := own.difference(other)) is not None:
            raise ConfigError(
                f"ranks {tp_slice.owner_rank} and {rank} launch different servers: {difference}",
                hint="every rank of a slice must pass the same arguments to launch()",
                slice_ranks=tp_slice.group.ranks,
            )
    return own


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed; a process can start in it all the same
        return None


def _same_anywhere(path: Path, text: str) -> str:
    """Return a folder by its absolute path, anything else (a hub id) as it was given.

    The server reports it to processes that run elsewhere, and a restart may come after a change of the working directory.
    """
    return str(path.absolute()) if os.path.isdir(path) else text


def _checked_environment(env: object) -> dict[str, str]:
    """Return environment variables for the server.

    Raises:
        ConfigError: Something that no environment can have.
    """
    found: Mapping[object, object] = check_type("env", env, Mapping, expected="a mapping of names to values")
    checked: dict[str, str] = {}
    for key, value in found.items():
        name = check_text("a name in env", key)
        if "=" in name:
            raise ConfigError(f"env has a name with an equals sign: {shown(name)}")
        # Not shown: it may be a secret.
        if not isinstance(value, str):
            raise ConfigError(f"env[{name!r}] must be a string, got a {type(value).__name__}")
        try:
            is_valid = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            is_valid = False
        if not is_valid:
            raise ConfigError(f"env[{name!r}] cannot be the value of an environment variable")
        checked[name] = value
    return checked


__all__ = ["LaunchRequest", "TpSlice", "agree_on_launch"]
