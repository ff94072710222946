"""Weights that another process broadcasts to a running engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

from tpcolocate.checks import check_flag, check_positive_integer, check_text, check_version
from tpcolocate.deadline import Deadline, check_timeout
from tpcolocate.engine.context import OwnedServer, SliceContext
from tpcolocate.errors import EngineStateError
from tpcolocate.weights import update_group
from tpcolocate.weights.update_group import UpdateGroup, Weight

_LEAST_S = 1.0


class UpdateGroups:
    """The calls of `Engine` for update groups; see there."""

    def __init__(self, context: SliceContext) -> None:
        self._context = context
        self._joined_by = context.server
        self._joined: set[str] = set()

    @property
    def _names(self) -> set[str]:
        """Of the groups that the server is in; another one after a restart is in none."""
        if self._joined_by is not self._context.server:
            self._joined_by, self._joined = self._context.server, set()
        return self._joined

    def join(self, group: UpdateGroup, *, timeout_s: float) -> None:
        context, what = self._context, "join an update group"
        with context.group.together(what) as must_match:
            context.state.check_open(what)
            timeout_s = check_timeout(timeout_s)
            group.check(len(context.group))
            fields = asdict(group)
            must_match |= fields
            if group.group_name in self._names:
                raise EngineStateError(
                    f"the server is in an update group named {group.group_name!r}",
                    hint="destroy_weights_update_group() first, or choose another name",
                )
        context.on_owner(
            what,
            lambda owned: owned.api.init_weights_update_group(timeout_s=timeout_s, **fields),
            timeout_s=timeout_s,
        )
        self._names.add(group.group_name)

    def leave(self, group_name: str, *, timeout_s: float) -> None:
        context, what = self._context, "leave an update group"
        with context.group.together(what) as must_match:
            context.state.check_open(what)
            timeout_s = check_timeout(timeout_s)
            self._check_joined(group_name)
            must_match["group_name"] = group_name
        context.on_owner(
            what,
            lambda owned: owned.api.destroy_weights_update_group(timeout_s=timeout_s, group_name=group_name),
            timeout_s=timeout_s,
        )
        self._names.remove(group_name)

    def update(
        self,
        announce: Callable[[], list[Weight]],
        *,
        group_name: str,
        weight_version: str | int | None,
        bucket_bytes: int,
        partial: bool,
        timeout_s: float,
    ) -> None:
        """Have the server receive weights that rank 0 of the group broadcasts.

        Args:
            announce: Returns them, on every rank; what it raises is raised on all of them.
            group_name, weight_version, bucket_bytes, partial, timeout_s: As for `Engine.update_weights_from_distributed`.
        """
        context, spec = self._context, self._context.sync.spec
        with context.group.together("update weights from a group") as must_match:
            context.state.check_sync()
            timeout_s = check_timeout(timeout_s)
            weight_version = check_version(weight_version)
            check_flag("partial", partial)
            check_positive_integer("bucket_bytes", bucket_bytes)
            self._check_joined(group_name)
            weights = announce()
            names = [name for name, _, _ in weights]
            if spec is not None:
                spec.check([(name, shape) for name, shape, _ in weights], hint=False)
                spec.check_dtypes([(name, getattr(torch, dtype)) for name, _, dtype in weights])
                if not partial:
                    spec.check_complete(names, ignored=context.sync.ignored)
            must_match |= {
                "names": names,
                "dtypes": [dtype for _, _, dtype in weights],
                "shapes": [tuple(shape) for _, shape, _ in weights],
                "group_name": group_name,
                "weight_version": weight_version,
                "bucket_bytes": bucket_bytes,
                "partial": partial,
            }
        version = context.lifecycle.next_version(weight_version)
        deadline = Deadline.after(timeout_s)

        def act(owned: OwnedServer) -> None:
            for request in update_group.requests(weights, bucket_bytes):
                owned.api.receive(request, group_name=group_name, timeout_s=deadline.left(at_least=_LEAST_S))
            owned.updates.end_sync(version, timeout_s=deadline.left(at_least=_LEAST_S))

        with (
            context.going_on(),
            context.lifecycle.weight_update(version, partial=partial) as modified,
        ):
            context.on_owner(
                "open an update of weights",
                lambda owned: owned.updates.begin_sync(timeout_s=timeout_s),
                timeout_s=timeout_s,
            )
            modified()
            if spec is not None:
                context.lifecycle.note_missing(spec.missing(names, ignored=context.sync.ignored))
            context.on_owner("update weights from a group", act, timeout_s=timeout_s)

    def _check_joined(self, group_name: str) -> None:
        check_text("group_name", group_name)
        if group_name not in self._names:
            raise EngineStateError(
                f"the server is in no update group named {group_name!r}", hint="init_weights_update_group() first"
            )


__all__ = ["UpdateGroups"]
