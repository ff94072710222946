"""The mesh collectives that this rank still owes in a sync, in order.

Ranks of other slices share the meshes of sharded weights.  A slice that fails must still make every collective that they
will make, or they would wait in it.  So each is entered in a schedule before it is due, and both paths run through it:
the good path with `make`, which also checks that no phase makes a collective that is not due, and the failure path with
`finish`, which makes all that are left with neutral arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tpcolocate.weights.sources.lazy_tensor import Item, full_tensor, is_collective


@dataclass(frozen=True, slots=True)
class MeshCall:
    """One collective call, or several that belong together.

    Attributes:
        name: Of the call.
        run: Makes it.  Its arguments have defaults, which stand for "this slice has failed".  It enters what will be due
            after it, which may depend on what the ranks agreed on.
        is_collective: False for what no other rank waits for; it is left out after a failure.
    """

    name: str
    run: Callable[..., Any]
    is_collective: bool = True


class MeshSchedule:
    """What this rank owes the ranks of other slices."""

    def __init__(self) -> None:
        self._due: Iterator[MeshCall] = iter(())

    def enter(self, calls: Iterable[MeshCall]) -> None:
        """Replace all that is due.

        Args:
            calls: In order; drawn one by one.
        """
        self._due = iter(calls)

    def make(self, name: str, *arguments: Any) -> Any:
        """Make the next call, and return its result.

        Collective: over the call's groups.

        Args:
            name: Of the call that the caller expects.
        """
        call = next(self._due, None)
        if call is None or call.name != name:
            raise AssertionError(f"{name!r} is made, but {None if call is None else call.name!r} is due")
        return call.run(*arguments)

    def gather(self, item: Item) -> torch.Tensor:
        """Return the full tensor of an item.

        Collective: over the meshes of the item, if it is sharded.
        """
        return self.make("gather") if is_collective(item) else full_tensor(item)

    def finish(self) -> None:
        """Make all calls that are left, after a failure of this slice.

        Collective: over the groups of the calls.
        """
        # A call that fails does so beside the collective itself, and the ranks still wait in the next one.
        with contextlib.suppress(Exception):  # of what makes the calls
            while (call := next(self._due, None)) is not None:
                with contextlib.suppress(Exception):
                    if call.is_collective:
                        call.run()


def gathers(items: Iterable[tuple[str, Item]]) -> Iterator[MeshCall]:
    """Yield a call for each item that ranks of a mesh must gather together, in order."""
    for _, item in items:
        if is_collective(item):
            yield MeshCall("gather", lambda item=item: full_tensor(item))


__all__ = ["MeshCall", "MeshSchedule", "gathers"]
