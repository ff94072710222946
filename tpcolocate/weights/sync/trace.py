"""Phases trace and verify: what the engine's loader does, by a dry run without weights and by samples of real ones."""

from __future__ import annotations

from tpcolocate.errors import some
from tpcolocate.in_server.tpcolocate_receiver.protocol import DryRun, addressed_to_all
from tpcolocate.weights.plan.loader_map import TensorEntry
from tpcolocate.weights.sync.buckets import send_buckets
from tpcolocate.weights.sync.mesh_calls import sample_items
from tpcolocate.weights.sync.records import BucketsSent, Opened, Prepared, Route
from tpcolocate.weights.sync.session import SyncSession
from tpcolocate.weights.transport.bucket_sender import BucketSender
from tpcolocate.weights.transport.connection import Replies
from tpcolocate.weights.transport.mapped_memory import MAPPABLE


def trace_loader(session: SyncSession, prepared: Prepared, opened: Opened, *, transport: str) -> bool:
    """Have the workers trace their loader with descriptions of the tensors that are not traced yet.

    Collective: over the slice.  The engine's weights stay as they are.  A loader that needs values is no error: it is
    traced while it loads, bucket by bucket.  What can be mapped and is not exported yet is exported beside this.

    Returns:
        Whether something was traced.
    """
    state, spec = session.state, session.context.spec
    if opened.repeats or state.dry_run_problem is not None:
        return False
    shards = prepared.shards if transport == "ipc" else {}
    entries = [TensorEntry(name, one.shape, one.local.dtype) for name, one in shards.items()]
    new = [entry for entry in entries if not state.loader_map.is_traced(entry)]
    if not new and (spec is None or state.loader_map.is_complete):
        return False
    # The loader sees its whole checkpoint, also what is not sent or cannot be planned: it may join tensors.
    shapes = {} if spec is None else spec.shapes
    others = [[name, list(shape)] for name, shape in shapes.items() if name not in shards]
    number = session.next_command()
    with session.stats.watch.phase("trace"):
        what = "trace the engine's loader"
        error: BaseException | None = None
        try:
            described = [[one.name, str(one.dtype).removeprefix("torch."), list(one.shape)] for one in entries]
            command = DryRun(described, others)
            session.connection.post(addressed_to_all(command, session.context.tp_size), number)
        except BaseException as caught:
            error = caught
        session.transient.export(
            (
                one.local.untyped_storage()
                for name, one in shards.items()
                if opened.memory_uses.get(name) == MAPPABLE and one.local.numel()
            ),
            session.context.layout.rank,
            session.context.tp_rank,
        )

        def collect() -> Replies:
            if error is not None:
                raise error
            return session.connection.collect(number, timeout_s=session.left(what))

        replies = session.on_owner(what, collect)
        for tp_rank, reply in replies.items():
            if reply.error is not None:
                _give_up_dry_runs(session, f"TP rank {tp_rank}: {reply.error}")
                return False
        traced = {tp_rank: reply.result.traced for tp_rank, reply in replies.items()}
        state.loader_map.update(traced, new, session.context.tp_size, loaded=False)
        results = [replies[k].result for k in range(session.context.tp_size)]
        state.loader_map.note_handling([one.ignored for one in results], [one.joined for one in results], of=shapes)
        return bool(new)


def _give_up_dry_runs(session: SyncSession, why: str) -> None:
    session.transient.reclaim()
    session.state.dry_run_problem = why
    session.stats.warnings.append(f"the engine's loader is traced from whole buckets, which takes longer: {why}")


def verify_samples(
    session: SyncSession, prepared: Prepared, opened: Opened, route: Route, sender: BucketSender
) -> tuple[bool, BucketsSent]:
    """Find out whether the engine's loader does with real weights, one of each kind, what it did in the dry run.

    Each worker compares every copy with what was traced, and what arrived with what was sent, bit for bit.

    Collective: over the slice, and over the meshes of the weights, whose gathers the slices share: if one of them has to
    look, all do, and if one finds its loader deviating, all of them send full tensors in this sync.

    Returns:
        Whether it does in all slices, and what was sent for it.
    """
    samples = sample_items(session, prepared.weights.items or [], route)
    with session.stats.watch.phase("verify"):
        sent = send_buckets(session, sender, samples, opened.bucket_bytes, are_samples=True)
        holds = session.schedule.make("verdict", not sent.deviating)
    if sent.deviating:
        session.state.loader_map.clear()
        names = some(sent.deviating, between=", ")
        _give_up_dry_runs(session, f"its loader treats {names} differently than in the dry run")
    return holds, sent


__all__ = ["trace_loader", "verify_samples"]
