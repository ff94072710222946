"""SGLang's custom weight loader hook, and the commands that a weight sync sends to it.

One request of SGLang's carries a whole sync: inside it the worker takes commands over a local socket until it
is dismissed, its trainer is gone, or the session has timed out.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import kernels, protocol
from .checksums import are_finite, checksum, load_kernels
from .copy_plan import CopyPlan
from .copy_program import CopyProgram
from .dry_run import Handling, dry_run
from .handles import device_uuid, is_elsewhere, open_handle
from .load_bucket import LoadedBucket, load_bucket
from .loader_trace import differing, views
from .protocol import Envelope, OpenSession, Reply, WorkerError

logger = logging.getLogger(__name__)

_POLL_MS = 200
# For the last reply to leave after the socket was closed.
_LINGER_MS = 2000
_STAGE = "stage"
"""How the names of regions begin, behind their rank, that are mapped for the length of one session."""


class WorkerState:
    """What a worker keeps of one model from session to session.

    Attributes:
        plan: Traced from the model's loader.
        handling: How the loader handles all tensors of its checkpoint, once that was traced.
        programs: Defined by the trainer; they copy as the plan does.
        regions: The trainer's memory that is mapped here, by the name that the trainer gave it.
        identity: Of this object: of what is mapped.
    """

    def __init__(self) -> None:
        self.identity = secrets.token_hex(8)
        self.plan = CopyPlan()
        self.handling: Handling | None = None
        self.programs: dict[str, CopyProgram] = {}
        self.regions: dict[str, torch.Tensor] = {}

    def refresh(self) -> None:
        """Discard what was traced, if the parameters have moved since."""
        if not self.plan.is_current():
            self.plan, self.handling, self.programs = CopyPlan(), None, {}

    def release(self, names: Iterable[str]) -> None:
        """Unmap regions, once nothing reads them any more."""
        gone = set(names)
        if not gone:
            return
        for program in self.programs.values():
            if program.regions & gone:
                program.forget_views()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for name in gone:
            self.regions.pop(name, None)

    def prepare_kernels(self, device: torch.device) -> None:
        """Start to compile what the programs could use at the next sync."""
        casts = {cast for program in self.programs.values() for cast in program.wanted_casts}
        kernels.prepare(device, [*kernels.USUAL_CASTS, *casts])

    def release_staging(self) -> None:
        """Unmap the regions that end with the session."""
        self.release([name for name in self.regions if name.partition("/")[2].startswith(_STAGE)])


class Receiver:
    """All sessions of one worker process."""

    def __init__(self) -> None:
        self.states: weakref.WeakKeyDictionary[torch.nn.Module, WorkerState] = weakref.WeakKeyDictionary()
        # A second model in one worker (a draft) gets the same request, and must not open the same handles again.
        self._sessions: deque[str] = deque(maxlen=64)

    def run_session(self, model: torch.nn.Module, opening: OpenSession) -> None:
        """Run a session, unless there was one of this name."""
        if opening.session in self._sessions:
            return
        self._sessions.append(opening.session)
        state = self.states.setdefault(model, WorkerState())
        state.refresh()
        try:
            Session(model, state, opening).run()
        finally:
            state.release_staging()


_RECEIVER = Receiver()


def receive(model: torch.nn.Module, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader hook.  Never raises.

    Args:
        model: The worker's model.
        named_tensors: One tensor without elements, whose name is an `OpenSession`.
    """
    try:
        [(opening, _)] = named_tensors
        _RECEIVER.run_session(model, protocol.decode_session(opening))
    except BaseException:  # an exception that leaves here takes the server down; the trainer misses the reply
        logger.exception("tpcolocate: weight sync session failed")


class Session:
    """The commands of one weight sync.

    Args:
        model: The worker's.
        state: What is kept of it.
        opening: From the trainer.
    """

    def __init__(self, model: torch.nn.Module, state: WorkerState, opening: OpenSession) -> None:
        self._model = model
        self._state = state
        self._opening = opening
        self._deadline = time.monotonic() + opening.timeout_s
        self._device = next(model.parameters()).device
        # A trainer that was never seen from here (in another PID namespace) counts as running.
        self._peer = opening.peer if _is_running(opening.peer) else None
        self._opened = False

    def run(self) -> None:
        """Greet the trainer and carry out commands until the session is over."""
        import zmq  # SGLang's own dependency; a failing import at the top would take the server down

        # A context of its own: none of the server's sockets and settings are touched, and it ends with the session.
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, str(self._opening.tp_rank).encode())
            socket.setsockopt(zmq.LINGER, _LINGER_MS)
            socket.connect(self._opening.endpoint)
            socket.send(protocol.encode_reply(self._reply(None, self._greet)))
            while True:
                if not socket.poll(_POLL_MS):
                    if time.monotonic() >= self._deadline or self._is_abandoned():
                        logger.error(
                            "tpcolocate: the trainer left a weight sync; the weights may be half old, half new"
                        )
                        break
                    continue
                reply, is_last = self._handle(protocol.decode_envelope(socket.recv()))
                if reply is not None:
                    socket.send(protocol.encode_reply(reply))
                if is_last:
                    self._state.prepare_kernels(self._device)  # beside what the server does next
                    break

    def _is_abandoned(self) -> bool:
        """Return whether the trainer's process has ended, or has removed its socket."""
        endpoint = Path(self._opening.endpoint.removeprefix("ipc://"))
        return not (_is_running(self._peer) and endpoint.exists())

    def _handle(self, envelope: Envelope) -> tuple[Reply | None, bool]:
        """Carry out one command; return the reply, if there is one, and whether this was the last command."""
        command: protocol.Command | None = None

        def act() -> Any:
            nonlocal command
            command = protocol.decode_command(envelope)
            if isinstance(command, protocol.Leave):
                return None
            self._check_address(envelope.for_tp_rank)
            return _HANDLERS[type(command)](self, command)

        reply = self._reply(envelope.number, act)
        if isinstance(command, protocol.Leave):
            return None, True
        return reply, isinstance(command, protocol.RunProgram) and command.is_last

    def _reply(self, number: int | None, action: Callable[[], Any]) -> Reply:
        """Return the reply to an action; it holds whatever the action raises."""
        self._opened = False
        error: WorkerError | None = None
        result = None
        started = time.perf_counter()
        try:
            result = action()
        except BaseException as caught:
            error = WorkerError(type(caught).__name__, str(caught), traceback.format_exc())
        seconds = time.perf_counter() - started
        return Reply(self._opening.tp_rank, number, error, self._opened, seconds, result)

    def _check_address(self, for_tp_rank: int) -> None:
        """Refuse a command that was made for another worker."""
        tp_rank = self._opening.tp_rank
        if for_tp_rank != tp_rank:
            raise RuntimeError(f"the payload of TP rank {for_tp_rank} reached TP rank {tp_rank}")
        if not torch.distributed.is_initialized():
            return
        rank = torch.distributed.get_rank() % self._opening.tp_size
        if rank != tp_rank:
            raise RuntimeError(f"the payload of TP rank {tp_rank} reached TP rank {rank}")

    def _greet(self) -> protocol.Greeting:
        self._check_address(self._opening.tp_rank)
        return protocol.Greeting(device_uuid(), self._state.plan.identity, self._state.identity)

    def _probe(self, command: protocol.Probe) -> protocol.ProbeResult:
        found = list(checksum(open_handle(command.handle, self._device)))
        self._opened = True
        if found != command.checksum:
            raise RuntimeError("the handle opened, but on other memory than the trainer's")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return protocol.ProbeResult(device_uuid())

    def _probe_ranks(self, command: protocol.ProbeRanks) -> protocol.RanksInReach:
        ranks, problems = [], {}
        for rank, handle, expected in command.probes:
            try:
                flat = open_handle(handle, self._device)
                if flat.device != self._device:
                    raise RuntimeError(f"the handle opened on {flat.device}, which {self._device} cannot read")
                if list(checksum(flat)) != expected:
                    raise RuntimeError("the handle opened, but on other memory than the trainer's")
                ranks.append(rank)
            except Exception as error:  # an answer, not an accident
                problems[str(rank)] = f"{type(error).__name__}: {error}"
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return protocol.RanksInReach(ranks, problems)

    def _load_bucket(self, command: protocol.LoadBucket) -> protocol.BucketResult:
        """Load full tensors by the engine's loader, or by planned copies."""
        clock = _Clock()
        device, entries = self._device, command.entries
        mapped = flat = open_handle(command.handle, device)
        self._opened = True
        source = mapped.device
        try:
            clock.lap("open")
            if is_elsewhere(command.handle, mapped, device):
                # Parameters that the memory saver holds can be reached by their own GPU alone; and the bucket is read four
                # times.
                flat = mapped.to(device, copy=True)
                clock.lap("bring")
            if list(checksum(flat)) != command.checksum:
                # Checked before the first parameter is touched.
                raise RuntimeError("the bucket does not hold what the trainer packed (checksum)")
            clock.lap("check")
            loaded = load_bucket(self._model, self._state.plan, flat, entries, watch=command.watch)
            if loaded.deviating:
                self._state.programs = {}
            clock.lap("load")
            wrong = differing([c for c in loaded.copies if c.entry not in loaded.unverified])
            clock.lap("compare")
            read: dict[str, int] = {}
            for copy in loaded.copies:
                name = entries[copy.entry][0]
                read[name] = read.get(name, 0) + copy.src.numel()
            return protocol.BucketResult(
                differing=sorted(entries[i][0] for i in wrong),
                unverified=sorted(entries[i][0] for i in loaded.unverified),
                read=read,
                replayed=loaded.replayed,
                traced=self._traced(entries) if not loaded.replayed or command.report_trace else None,
                deviating=loaded.deviating,
                step_seconds=clock.seconds,
                nonfinite=sorted(entries[i][0] for i in _nonfinite(loaded, flat, entries)) or None,
            )
        finally:
            if device.type == "cuda":
                # Acknowledged means finished, on the GPU that was read from as well (fan-out).
                for used in {device, source}:
                    torch.cuda.synchronize(used)
            del flat, mapped

    def _traced(self, entries: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the copies of those tensors that are planned."""
        plan = self._state.plan
        return plan.describe([entry[0] for entry in entries if plan.covers([entry])])

    def _warm_up(self, command: protocol.WarmUp) -> protocol.DryRunResult:
        """Make a dry run with the checkpoint's names, in the engine's own dtype, before the trainer's model is known."""
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        # Side by side: the loader is busy in Python, loading kernels in the driver.
        loading = threading.Thread(target=_load_kernels, args=(self._device,))
        loading.start()
        try:
            return self._dry_run(protocol.DryRun([[name, dtype, shape] for name, shape in command.shapes]))
        finally:
            loading.join()

    def _dry_run(self, command: protocol.DryRun) -> protocol.DryRunResult:
        """Trace what is not traced yet, and how the loader handles all tensors together, in one dry run."""
        state, entries = self._state, command.entries
        is_planned = state.plan.covers(entries)
        names = {name for name, *_ in (*entries, *command.others)}
        if not is_planned or state.handling is None or not state.handling.names >= names:
            state.handling = self._handling(entries, command.others, is_planned=is_planned)
        found = self._traced(entries)
        if state.handling is None:
            return protocol.DryRunResult(found)
        return protocol.DryRunResult(found, state.handling.ignored, state.handling.joined)

    def _handling(
        self, entries: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]], *, is_planned: bool
    ) -> Handling | None:
        """Make a dry run; if the loader cannot be traced with the tensors that no trainer sends, without them.

        Args:
            entries, others: See `dry_run`.
            is_planned: Whether the entries are planned already.
        """
        plan = self._state.plan
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        try:
            return dry_run(self._model, plan, entries, others=[[name, dtype, shape] for name, shape in others])
        except Exception:
            if not others:
                raise
            logger.warning("tpcolocate: the loader was not traced with its whole checkpoint", exc_info=True)
        if entries and not is_planned:
            dry_run(self._model, plan, entries)
        return None

    def _run_program(self, command: protocol.RunProgram) -> protocol.ProgramResult:
        clock = _Clock()
        state = self._state
        state.release(command.release)
        for name, handle in command.map:
            state.regions[name] = open_handle(handle, self._device)
        self._opened = True
        clock.lap("open")
        if command.define is not None:
            state.programs = {
                name: CopyProgram(num_sums, slices, state.plan) for name, num_sums, slices in command.define
            }
        clock.lap("define")
        checksums: list[int] | None = None
        nonfinite: list[int] = []
        if command.program is not None:
            if not state.plan.is_current():
                raise RuntimeError("the parameters moved during a sync")
            program = state.programs[command.program]
            with torch.no_grad():
                checksums, seconds = program.run(
                    state.plan, state.regions, keep_views=command.keep_views, flags=command.flags
                )
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            nonfinite = program.nonfinite
            clock.lap("load")
            clock.seconds.update(seconds)
        return protocol.ProgramResult(checksums, clock.seconds, nonfinite or None)

    def _release_staging(self, command: protocol.ReleaseStaging) -> None:
        if command.mapped:
            self._state.release(list(self._state.regions))
        self._state.release_staging()

    def _find_unwritten(self, command: protocol.FindUnwritten) -> protocol.UnwrittenParameters:
        return protocol.UnwrittenParameters(self._state.plan.unwritten(self._model))


def _nonfinite(loaded: LoadedBucket, flat: torch.Tensor, entries: Sequence[Sequence[Any]]) -> set[int]:
    """Return the entries that left what is not finite in the parameters, or that were sent so and cannot be read back."""
    seen = [(copy.entry, copy.dst) for copy in loaded.copies if copy.entry not in loaded.unverified]
    if loaded.unverified:
        sent = views(flat, entries)
        seen += [(number, sent[number][1]) for number in loaded.unverified]
    return {number for (number, _), is_finite in zip(seen, are_finite([one for _, one in seen])) if not is_finite}


_HANDLERS: dict[type[Any], Callable[[Session, Any], Any]] = {
    protocol.WarmUp: Session._warm_up,
    protocol.Probe: Session._probe,
    protocol.ProbeRanks: Session._probe_ranks,
    protocol.DryRun: Session._dry_run,
    protocol.LoadBucket: Session._load_bucket,
    protocol.RunProgram: Session._run_program,
    protocol.ReleaseStaging: Session._release_staging,
    protocol.FindUnwritten: Session._find_unwritten,
}


def _is_running(peer: tuple[int, int] | None) -> bool:
    """Return whether the process of this pid and start time runs; one that has ended and was not waited for does not."""
    if peer is None:
        return True
    pid, started = peer
    try:
        # Counted behind the name in brackets, which may hold spaces; see proc(5).
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return fields[0] not in (b"Z", b"X") and int(fields[19]) == started


def _load_kernels(device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        load_kernels(device)
    except RuntimeError:  # out of memory, say; what needs them will raise again
        logger.warning("tpcolocate: kernels were not loaded ahead", exc_info=True)


class _Clock:
    """Seconds per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
