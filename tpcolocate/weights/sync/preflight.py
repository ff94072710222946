"""Phase preflight: whether handles of this process open in the engine, and on the right GPUs.

Once per engine and way of making payloads.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import ConfigError, DeadlineError, SyncError, TpColocateError
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, Probe
from tpcolocate.weights.sync.records import Opened
from tpcolocate.weights.sync.session import SyncSession
from tpcolocate.weights.transport.bucket_sender import BucketSender
from tpcolocate.weights.transport.connection import Replies

_PREFLIGHT_S = 15.0
_PREFLIGHT_BYTES = 4096
_PREFLIGHT = -1
"""Number of the command."""


def choose_sender(session: SyncSession, opened: Opened) -> BucketSender:
    """Return this rank's way of sending buckets; the first sync of an engine finds out whether its handles open.

    Collective: over the slice.

    Raises:
        SyncError: They do not, and ``transport="ipc"`` asks for them; or the server runs on other GPUs.
    """
    options = session.options
    sender = BucketSender(
        tp_rank=session.context.tp_rank,
        tp_size=session.context.tp_size,
        is_owner=session.context.server is not None,
        payloads=options.payloads,
        transport="file" if options.transport == "file" else "ipc",
        session=opened.session,
        files=session.files,
        ledger=session.ledger,
        peak=session.stats.peak,
    )
    if options.transport == "file":
        return sender
    problems = session.state.handle_problems
    if options.payloads not in problems:
        with session.stats.watch.phase("preflight"):
            problems[options.payloads] = _probe(session, sender)
    problem = problems[options.payloads]
    if problem is None:
        return sender
    if options.transport == "ipc":
        raise SyncError(
            f"memory handles of this process do not open in the engine: {problem}",
            hint="in containers share namespaces (--ipc host --pid host), unset expandable_segments in PYTORCH_ALLOC_CONF, or pass "
            'sync_weights(transport="auto"), which falls back to files; python -m tpcolocate doctor looks for the cause',
        )
    return replace(sender, transport="file")


def _probe(session: SyncSession, sender: BucketSender) -> str | None:
    """Send one small handle there and back; return what went wrong anywhere in the slice, or None."""
    error: BaseException | None = None
    commands: list[Addressed] = []
    try:
        if sender.exports:
            flat = ipc_payload.allocate(_PREFLIGHT_BYTES, session.context.device)
            # Not torch's random numbers: the training's own would be other ones from here on, and a GPU's take time to load.
            flat.copy_(torch.frombuffer(bytearray(os.urandom(_PREFLIGHT_BYTES)), dtype=torch.uint8))
            commands = sender.commands(flat, _PREFLIGHT, Probe)
    except (TpColocateError, RuntimeError) as caught:
        error = caught  # an export that fails is an answer, not an accident
    # What a user can mend is not: files would meet it too.
    refused = error if isinstance(error, ConfigError) else None
    of_ranks = session.agree(
        refused, (commands, None if error is None else str(error)), what="make the preflight's handles"
    )
    failed = next((text for _, text in of_ranks if text is not None), None)
    if failed is not None:
        session.ledger.reclaim()
        return f"export failed: {failed.splitlines()[0]}"
    per_tp_rank = [command for of_rank, _ in of_ranks for command in of_rank]
    replies = session.ask("open the preflight's handles", per_tp_rank, number=_PREFLIGHT, timeout_s=_PREFLIGHT_S)
    problem: str | None = None
    error = None
    try:
        problem = _problem_here(session, replies)
    except SyncError as caught:
        error = caught
    problems = session.agree(error, problem, what="take the preflight's handles back")
    return next((text for text in problems if text is not None), None)


def _problem_here(session: SyncSession, replies: Replies) -> str | None:
    """This rank's part of the verdict."""
    context = session.context
    session.ledger.note_opened(_PREFLIGHT, {rank: reply.opened for rank, reply in replies.items()})
    problem = None
    for tp_rank, reply in replies.items():
        if reply.error is not None:
            problem = f"TP rank {tp_rank}: {reply.error}"
    if problem is None and context.device.type == "cuda":
        uuid = str(torch.cuda.get_device_properties(context.device).uuid)
        there = replies[context.tp_rank].result.device_uuid
        if there != uuid:
            # Not a question of transport: no other one would put the server on the right GPUs.
            raise SyncError(
                f"TP rank {context.tp_rank} of the server runs on GPU {there}, its training rank {context.group.rank} on {uuid}",
                hint="do not pass base_gpu_id or gpu_id_step, nor CUDA_VISIBLE_DEVICES in env=",
                rank=context.group.rank,
            )
    try:
        session.ledger.wait_for_release(session.deadline.within(_PREFLIGHT_S))
    except SyncError as error:
        problem = problem if problem is not None else error.message
    except DeadlineError as error:
        session.state.abandoned.append(session.ledger.set_aside())
        problem = problem if problem is not None else error.message
    return problem


__all__ = ["choose_sender"]
