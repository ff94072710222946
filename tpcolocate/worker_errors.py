"""Errors of the TP workers, raised in the trainer with the worker's traceback."""

from __future__ import annotations

from collections.abc import Mapping

from tpcolocate.errors import SyncError
from tpcolocate.in_server.tpcolocate_receiver.protocol import Reply


def worker_error(reply: Reply, what: str, *, hint: str | None = None, rank: int | None = None) -> SyncError:
    """Return the error for a reply with an error; its details are the worker's traceback.

    Args:
        reply: From the worker.
        what: Begins the message.
        hint: See `TpColocateError`.
        rank: Global rank that found the error.
    """
    assert reply.error is not None
    return SyncError(
        f"{what}: TP rank {reply.tp_rank}: {reply.error}", hint=hint, rank=rank, details=worker_details(reply)
    )


def worker_details(reply: Reply) -> str | None:
    """Return the traceback of a worker's error, with a line that says whose it is; None without an error."""
    return None if reply.error is None else f"TP rank {reply.tp_rank}:\n{reply.error.traceback}"


def raise_worker_errors(
    replies: Mapping[int, Reply], what: str, *, hint: str | None = None, rank: int | None = None
) -> None:
    """Raise the first error among the replies of the TP workers, if there is one; see `worker_error`."""
    for reply in replies.values():
        if reply.error is not None:
            raise worker_error(reply, what, hint=hint, rank=rank)


__all__ = ["raise_worker_errors", "worker_details", "worker_error"]
