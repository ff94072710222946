"""The messages between a trainer and the receiver in each TP worker, in JSON; used by both ends.

The trainer opens a session with `OpenSession`, the receiver answers with a `Reply` that holds a `Greeting`, and from
then on with one `Reply` to every command but `Leave`.  Long fields (the contents of a bucket, checksums) are lists of
plain values on both sides, so that coding them takes `json` alone.  Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

Handle = Mapping[str, Any]
"""Exported memory, as `tpcolocate.ipc_payload.Handle.describe` returns it."""
TracedCopies = Mapping[str, Sequence[Any]]
"""Tensor -> its copies in the engine's loader, each [offset, shape, strides, dtype] of what is read.

On the way a list of [copies, names]: of ten thousands of tensors a few different things are read.
"""


class ProtocolError(ValueError):
    """A message that is not understood."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Travels as the name of an empty tensor in SGLang's own request.

    Attributes:
        session: A name that no other session has.
        endpoint: ZeroMQ address that the receiver connects to.
        peer: Pid and start time of the trainer's process; None if not known.
        tp_rank: TP rank that this is for.
        tp_size: Number of TP ranks.
        timeout_s: For the whole session, in seconds.
    """

    session: str
    endpoint: str
    peer: tuple[int, int] | None
    tp_rank: int
    tp_size: int
    timeout_s: float


# --- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Load kernels and make a dry run of the loader; answered with `DryRunResult`.

    Attributes:
        shapes: Of the checkpoint's tensors, each [name, shape].
    """

    shapes: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Probe:
    """Open a handle and compare what is there; answered with `ProbeResult`."""

    handle: Handle
    checksum: Sequence[int]


@dataclass(frozen=True, slots=True)
class ProbeRanks:
    """Find out which ranks' memory can be mapped; answered with `RanksInReach`.

    Attributes:
        probes: Of each rank a little memory: [global rank, handle, checksum].
    """

    probes: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class DryRun:
    """Trace the engine's loader without weights; answered with `DryRunResult`.

    Attributes:
        entries: Tensors, each [name, dtype, shape].
        others: More tensors, each [name, shape], that the loader is to see as well but that are not planned: it may join
            tensors, and what it ignores is to be known of its whole checkpoint.
    """

    entries: Sequence[Sequence[Any]]
    others: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True, slots=True)
class LoadBucket:
    """Load full tensors; answered with `BucketResult`.

    Attributes:
        handle: Of the bucket.
        checksum: Of the bucket.
        entries: Its contents, each [name, dtype, shape, start, num_bytes].
        watch: Run the engine's loader also where the copies are planned, and report tensors that it treats differently.
        report_trace: Report the copies also where they were planned before.
    """

    handle: Handle
    checksum: Sequence[int]
    entries: Sequence[Sequence[Any]]
    watch: bool = False
    report_trace: bool = False


@dataclass(frozen=True, slots=True)
class RunProgram:
    """Unmap and map regions, define programs, run one: what is given, in this order; answered with `ProgramResult`.

    Attributes:
        release: Names of regions to unmap.
        map: Regions to map, each [name, handle].  A name begins with the rank whose memory it is (``r3/``); regions named
            ``stage...`` behind that end with the session.
        define: Programs in the place of all that there were, each [name, number of sums, slices]; see
            `copy_program.CopyProgram`.
        program: Name of the program to run.
        keep_views: Whether the regions that it reads stay mapped after this.
        is_last: Leave the session after the reply.
        flags: Whether to look for numbers that are not finite.
    """

    release: Sequence[str] = ()
    map: Sequence[Sequence[Any]] = ()
    define: Sequence[Sequence[Any]] | None = None
    program: str | None = None
    keep_views: bool = True
    is_last: bool = False
    flags: bool = True


@dataclass(frozen=True, slots=True)
class ReleaseStaging:
    """Unmap the regions of staging memory; answered without a result.

    Attributes:
        mapped: Also those that are mapped from sync to sync.
    """

    mapped: bool = False


@dataclass(frozen=True, slots=True)
class FindUnwritten:
    """Find parameters that no planned copy writes; answered with `UnwrittenParameters`."""


@dataclass(frozen=True, slots=True)
class Leave:
    """End the session; not answered."""


Command = WarmUp | Probe | ProbeRanks | DryRun | LoadBucket | RunProgram | ReleaseStaging | FindUnwritten | Leave


@dataclass(frozen=True, slots=True)
class Addressed:
    """A command and the TP rank that it was made for: a handle may be opened by one reader only.

    The address is set where the command is made, not where it is sent, and every other worker refuses it.
    """

    for_tp_rank: int
    command: Command


def addressed_to_all(command: Command, tp_size: int) -> dict[int, Addressed]:
    """Return the same command for every TP rank."""
    return {tp_rank: Addressed(tp_rank, command) for tp_rank in range(tp_size)}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A command as it arrives, not decoded yet: what is wrong with it is an answer, and `number` says to what.

    Attributes:
        number: Of the command; repeated in the reply.
        for_tp_rank: The TP rank that it was made for.
        command: In JSON types; see `decode_command`.
    """

    number: int
    for_tp_rank: int
    command: Any


# --- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerError:
    """An exception in a TP worker."""

    type: str
    message: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


@dataclass(frozen=True, slots=True)
class Greeting:
    """Who connected.

    Attributes:
        device_uuid: UUID of the worker's GPU; None on a CPU.
        plan_id: Another one once the worker has discarded what it traced.
        worker_id: Another one in a worker that has mapped nothing yet.
    """

    device_uuid: str | None
    plan_id: str
    worker_id: str


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """See `Greeting`."""

    device_uuid: str | None


@dataclass(frozen=True, slots=True)
class RanksInReach:
    """Which ranks' memory could be mapped.

    Attributes:
        ranks: Those whose memory was mapped and holds what it should.
        problems: Rank, as text in JSON -> why its memory was not.
    """

    ranks: Sequence[int]
    problems: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """What a dry run has shown.

    Attributes:
        traced: Copies of the tensors that can be planned; the others are missing.
        ignored: Tensors of which the loader reads nothing; None if it cannot be traced with all of them.
        joined: Lists of tensors that the loader loads only together.
    """

    traced: TracedCopies
    ignored: Sequence[str] | None = None
    joined: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, slots=True)
class BucketResult:
    """What became of a bucket.

    Attributes:
        differing: Tensors whose parameters, read back, hold something else.
        unverified: Tensors that cannot be read back, because the loader transforms them.
        read: Tensor -> number of its elements that were copied.
        replayed: Whether planned copies were made without the engine's loader.
        traced: The copies of the tensors that can be planned; None if they were planned before and not asked for.
        deviating: Tensors that the loader treated differently than planned; None unless it was watched for that.
        step_seconds: Step -> seconds.
        nonfinite: Tensors that left a NaN or an infinite number in the parameters; None if there are none.
    """

    differing: Sequence[str]
    unverified: Sequence[str]
    read: Mapping[str, int]
    replayed: bool
    traced: TracedCopies | None
    deviating: Sequence[str] | None
    step_seconds: Mapping[str, float]
    nonfinite: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """What a program did.

    Attributes:
        checksums: The program's sums; None if no program was run.
        step_seconds: Step -> seconds.
        nonfinite: Numbers of the sums whose parameters hold a NaN or an infinite number; None if there are none.
    """

    checksums: Sequence[int] | None
    step_seconds: Mapping[str, float]
    nonfinite: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class UnwrittenParameters:
    """Names of the parameters that no planned copy, or only a part of them, writes."""

    names: Sequence[str]


Result = Greeting | ProbeResult | RanksInReach | DryRunResult | BucketResult | ProgramResult | UnwrittenParameters


@dataclass(frozen=True, slots=True)
class Reply:
    """Sent by a receiver when it has connected and after every command.

    Attributes:
        tp_rank: Of the worker.
        number: Of the command; None for the greeting.
        error: What went wrong; None if nothing did.
        opened: Whether all handles of the command were opened, so that the worker gives them back.
        seconds: Time that the command took.
        result: None after an error, and for commands without one.
    """

    tp_rank: int
    number: int | None
    error: WorkerError | None
    opened: bool
    seconds: float
    result: Any = None


# --- coding ----------------------------------------------------------------------------------------------------------


def to_json(message: Any) -> dict[str, Any]:
    """Return a message in JSON types, with its kind; its fields are not copied."""
    return {"kind": type(message).__name__, **{name: getattr(message, name) for name in _FIELDS[type(message)]}}


def decode_session(text: str | bytes) -> OpenSession:
    """Decode what opens a session.

    Raises:
        ProtocolError: It is something else.
    """
    return _decoded(_loads(text), (OpenSession,))


def encode_command(command: Addressed, number: int) -> bytes:
    """Encode a command; `number` identifies its reply."""
    envelope = {"number": number, "for_tp_rank": command.for_tp_rank, "command": to_json(command.command)}
    return json.dumps(envelope).encode()


def decode_envelope(text: str | bytes) -> Envelope:
    """Decode the envelope of a command, and not the command.

    Raises:
        ProtocolError: It is something else.
    """
    return _filled(Envelope, _loads(text))


def decode_command(envelope: Envelope) -> Command:
    """Decode the command in an envelope.

    Raises:
        ProtocolError: It is something else.
    """
    return _decoded(envelope.command, _COMMANDS)


def encode_reply(reply: Reply) -> bytes:
    """Encode a reply."""
    parts = to_json(reply)
    for name in ("error", "result"):
        if parts[name] is not None:
            parts[name] = to_json(parts[name])
    result = parts["result"]
    if result is not None and result.get("traced") is not None:
        result["traced"] = _grouped(result["traced"])
    return json.dumps(parts).encode()


def decode_reply(text: str | bytes) -> Reply:
    """Decode a reply.

    Raises:
        ProtocolError: It is something else.
    """
    parts = _loads(text)
    if isinstance(parts, dict):
        for name, classes in (("error", (WorkerError,)), ("result", _RESULTS)):
            if parts.get(name) is not None:
                parts[name] = _decoded(parts[name], classes)
        result = parts.get("result")
        if isinstance(result, (DryRunResult, BucketResult)) and result.traced is not None:
            parts["result"] = replace(result, traced=_ungrouped(result.traced))
    return _decoded(parts, (Reply,))


def _grouped(traced: TracedCopies) -> list[list[Any]]:
    """Group tensors by the object that says what is read of them."""
    groups: dict[int, list[Any]] = {}
    for name, copies in traced.items():
        groups.setdefault(id(copies), [copies, []])[1].append(name)
    return list(groups.values())


def _ungrouped(groups: Any) -> TracedCopies:
    try:
        return {name: copies for copies, names in groups for name in names}
    except (TypeError, ValueError):
        raise ProtocolError(f"{_short(groups)} is no list of [copies, names]") from None


_COMMANDS = (WarmUp, Probe, ProbeRanks, DryRun, LoadBucket, RunProgram, ReleaseStaging, FindUnwritten, Leave)
_RESULTS = (Greeting, ProbeResult, RanksInReach, DryRunResult, BucketResult, ProgramResult, UnwrittenParameters)
_MESSAGES: tuple[type[Any], ...] = (OpenSession, Envelope, WorkerError, Reply, *_COMMANDS, *_RESULTS)
_FIELDS = {cls: tuple(field.name for field in fields(cls)) for cls in _MESSAGES}
_REQUIRED = {cls: tuple(field.name for field in fields(cls) if field.default is MISSING) for cls in _MESSAGES}


def _loads(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message is not JSON: {error}") from None


def _decoded(parts: Any, classes: Iterable[type[Any]]) -> Any:
    kind = parts.get("kind") if isinstance(parts, dict) else None
    for cls in classes:
        if kind == cls.__name__:
            return _filled(cls, {name: value for name, value in parts.items() if name != "kind"})
    kinds = ", ".join(cls.__name__ for cls in classes)
    raise ProtocolError(
        f"kind {_short(kind)} is none of {kinds}" if kind is not None else f"{_short(parts)} is no message"
    )


def _filled(cls: type[Any], values: Any) -> Any:
    if not isinstance(values, dict):
        raise ProtocolError(f"{_short(values)} is no message")
    unknown = [name for name in values if name not in _FIELDS[cls]]
    missing = [name for name in _REQUIRED[cls] if name not in values]
    if unknown or missing:
        faults = [f"has no field {name!r}" for name in unknown] + [f"needs a field {name!r}" for name in missing]
        raise ProtocolError(f"{cls.__name__} {'; '.join(faults)}")
    return cls(**values)


def _short(value: Any) -> str:
    try:
        return repr(value)[:60]
    except RecursionError:
        return f"a nested {type(value).__name__}"
