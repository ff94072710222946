"""The preflight of a sync: whether handles of this process open in the engine, and on the right GPUs."""

from __future__ import annotations

import os
import time

import torch

from tpcolocate import ipc_payload
from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError, SyncError, TpColocateError
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, Probe
from tpcolocate.weights.sync.phases import SyncPhases
from tpcolocate.weights.transport.bucket_sender import Replies

_PREFLIGHT_S = 15.0
_PREFLIGHT_BYTES = 4096
_PREFLIGHT = -1


class Preflight(SyncPhases):
    """Once per engine and way of making payloads."""

    def preflight(self) -> None:
        """Prove once per engine that a handle opens in every TP rank, on the GPU it should, and comes back."""
        way = self.options.payloads
        if way in self.sync.proven_ways:
            self.delivery.transport = "ipc"
            return
        if way not in self.sync.refused_ways:
            with self.watch.phase("preflight"):
                problem = self.probe()
            if problem is None:
                self.sync.proven_ways.add(way)
                self.delivery.transport = "ipc"
                return
            self.sync.refused_ways[way] = problem
        problem = self.sync.refused_ways[way]
        if self.delivery.transport == "ipc":
            raise SyncError(
                f"handles of this process do not open in the engine: {problem}",
                hint="share IPC and PID namespaces and /dev/shm, switch expandable_segments off in PYTORCH_ALLOC_CONF, or use "
                'transport="auto", which falls back to files',
            )
        self.delivery.transport = "file"

    def probe(self) -> str | None:
        """One small handle there and back; what went wrong anywhere in the slice, or None."""
        error: BaseException | None = None
        commands: list[Addressed] = []
        try:
            if self.delivery.exports:
                flat = ipc_payload.allocate(_PREFLIGHT_BYTES, self.sync.device)
                # Not torch's random numbers: the training's own would be other ones from here on, and a GPU's take time
                # to load.
                flat.copy_(torch.frombuffer(bytearray(os.urandom(_PREFLIGHT_BYTES)), dtype=torch.uint8))
                commands = self.delivery.commands(flat, Probe, number=_PREFLIGHT)
        except (TpColocateError, RuntimeError) as caught:
            error = caught  # an export that fails is an answer, not an accident
        told = self.agree(None, (commands, None if error is None else str(error)), what="make the preflight's handles")
        failed = next((text for _, text in told if text is not None), None)
        if failed is not None:
            self.ledger.reclaim()
            return f"export failed: {failed.splitlines()[0]}"
        per_tp_rank = [command for of_rank, _ in told for command in of_rank]
        replies = self.on_owner(
            "open the preflight's handles", lambda _: self.delivery.ask(per_tp_rank, _PREFLIGHT, _PREFLIGHT_S)
        )
        problem: str | None = None
        error = None
        try:
            problem = self.probed(replies)
        except SyncError as caught:
            error = caught
        problems = self.agree(error, problem, what="take the preflight's handles back")
        return next((text for text in problems if text is not None), None)

    def probed(self, replies: Replies) -> str | None:
        """This rank's part of the preflight's verdict."""
        self.ledger.note_opened(_PREFLIGHT, {rank: reply.opened for rank, reply in replies.items()})
        problem = None
        for tp_rank, reply in replies.items():
            if reply.error is not None:
                problem = f"TP rank {tp_rank}: {reply.error}"
        mine = replies[self.sync.tp_rank]
        if problem is None and self.sync.device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(self.sync.device).uuid)
            if mine.result.device_uuid != uuid:
                # Not a question of transport: no other one would put the server on the right GPUs.
                raise SyncError(
                    f"TP rank {self.sync.tp_rank} of the server runs on GPU {mine.result.device_uuid}, its training rank {self.group.rank} on {uuid}",
                    hint="do not pass base_gpu_id or gpu_id_step, nor CUDA_VISIBLE_DEVICES in env=",
                    rank=self.group.rank,
                )
        try:
            self.ledger.wait_for_release(Deadline.after(min(self.deadline - time.monotonic(), _PREFLIGHT_S)))
        except SyncError as error:
            problem = problem if problem is not None else error.message
        except DeadlineError as error:
            self.sync.abandoned.append(self.ledger.set_aside())
            problem = problem if problem is not None else error.message
        return problem


__all__ = ["Preflight"]
