"""Random input for everything that reads what others wrote: each gives a value or an error of the library.

    python benchmarks/fuzz_parsers.py --cases 100000
    python benchmarks/fuzz_parsers.py --cases 1500000 --seed 1 --record

Valid input is made first, and most of it is then damaged: fields are dropped, replaced by other types and deep nesting,
text is cut or changed.  The first input that raises anything else is printed, and the script fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import publish, record

from tpcolocate import devices, rendezvous
from tpcolocate.errors import TpColocateError
from tpcolocate.groups import Member, plan_slices
from tpcolocate.in_server.tpcolocate_receiver import protocol
from tpcolocate.placement import plan_roles

UUIDS = tuple(f"GPU-{i:08x}-1111-2222-3333-44444444444{i}" for i in range(4))
MIGS = tuple(f"MIG-{i:08x}-1111-2222-3333-44444444444{i}" for i in range(4))
TOKENS = (
    *"0123", "07", "+1", "-1", "", " 2 ", "1x", "0-3", "x", "\u0661", "\x00", "\ud800", "9" * 30, "9" * 5000, "GPU-", "MIG-",
    UUIDS[0][:9], *UUIDS, *MIGS, f"MIG-{UUIDS[1]}/1/0", "gpu-0", "GPU-\u00df", "[", "None", "NoDevFiles",
)  # fmt: skip
SEPARATORS = (",", ",", ",", ",,", ", ", ";", " ", "\n")
VARIABLES = (*sorted({name for row in devices.VISIBILITY.values() for name in row.variables}), "CUDA_DEVICE_ORDER")
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**200, 0.5, float("nan"), float("inf"), "", "0", "x", "\ud800", "\x00",
    "../../etc", "self", [], [0], [1, [2]], [["a", []]], {}, {"a": 1}, {"kind": "Reply"}, {"kind": ["x"]}, "ConfigError", "Any",
    "LayoutError", "EngineDeadError", "http://127.0.0.1:99999", "http://[::1", "http://host:80",
)  # fmt: skip


def damage(value: Any, dice: random.Random) -> Any:
    """Return JSON types with something in them replaced, dropped or added."""
    if dice.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        return copy.deepcopy(dice.choice(JUNK))
    if isinstance(value, list):
        changed = list(value)
        position = dice.randrange(len(changed))
        changed[position] = damage(changed[position], dice)
        return changed
    name = dice.choice(list(value))
    if dice.random() < 0.2:
        return {other: kept for other, kept in value.items() if other != name}
    if dice.random() < 0.1:
        return {**value, dice.choice(("more", "kind", "rank", "self")): copy.deepcopy(dice.choice(JUNK))}
    return {**value, name: damage(value[name], dice)}


def as_text(value: Any, dice: random.Random) -> str:
    """Return it in JSON, sometimes damaged as text."""
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        value = damage(value, dice)
    text = json.dumps(value)
    chance = dice.random()
    if chance < 0.02:
        text = dice.choice(("[", '{"a":', '{"kind":')) * dice.choice((1, 300, 990, 100_000)) + text
    elif chance < 0.05:
        depth = dice.choice((50, 400, 900, 990, 1100))
        text = dice.choice(
            ('{"kind":%s}', '{"kind":"Reply","result":%s}', '{"host":%s}', '{"slice_ranks":%s}', "%s")
        ) % ("[" * depth + "]" * depth)
    elif chance < 0.12:
        cut = dice.randrange(len(text) + 1)
        text = (
            text[:cut]
            + dice.choice(("", "9" * 5000, "\ud800", "\x00", '"', "\\", "\ufeff"))
            + text[cut:][dice.randrange(3) :]
        )
    return text


def a_list(dice: random.Random) -> str:
    return "".join(dice.choice(TOKENS) + dice.choice(SEPARATORS) for _ in range(dice.randrange(5))) + dice.choice(
        TOKENS
    )


class Devices:
    """The variables that make devices visible."""

    def case(self, dice: random.Random) -> tuple[Any, ...]:
        environ = {name: a_list(dice) for name in VARIABLES if dice.random() < 0.5}
        inventory = None
        if dice.random() < 0.6:
            count = dice.randrange(5)
            migs = tuple((MIGS[i],) if dice.random() < 0.3 else () for i in range(count)) if dice.random() < 0.5 else ()
            names = tuple(dice.choice(("A", "A", "B")) for _ in range(count)) if dice.random() < 0.5 else ()
            inventory = devices.Inventory(UUIDS[:count], migs, names)
        tokens = [dice.choice(TOKENS) for _ in range(dice.randrange(4))]
        return (
            environ,
            dice.choice(("cuda", "hip", "npu", "cuda", "tpu")),
            inventory,
            dice.choice((*range(5), -1, 2**70, None, "0", True)),
            tokens,
        )

    def read(self, environ: Any, kind: str, inventory: Any, index: Any, tokens: Any) -> None:
        for action in (
            lambda: devices.visible_tokens(environ, kind=kind, inventory=inventory),
            lambda: devices.server_environment(tokens, kind=kind),
        ):
            try:
                action()
            except TpColocateError:
                pass
        devices.device_order(environ)
        devices.resolve(index, environ, kind=kind, inventory=inventory)


class Announcements:
    """Files in /dev/shm that another process may have written."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-announcements-", dir="/dev/shm")
        self._path = Path(self._folder.name) / "announcement.json"
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        self._valid = asdict(
            rendezvous.Announcement("http://127.0.0.1:1", "key", "job", 0, (0, 1), os.getpid(), 5, "nonce")
        )

    def case(self, dice: random.Random) -> tuple[Any, ...]:
        content = as_text(self._valid, dice).encode(errors="surrogatepass")
        if dice.random() < 0.05:
            content = bytes(dice.randrange(256) for _ in range(dice.randrange(40))) + content
        return (content,)

    def read(self, content: bytes) -> None:
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content, 0)
        found = rendezvous.read(self._path)
        assert found is not None
        found.writer_is_running()
        rendezvous.path_for(found.nonce)


class Messages:
    """Commands and replies of a weight sync."""

    def __init__(self) -> None:
        handle = {"kind": "file", "name": "x"}
        self._commands = [
            protocol.WarmUp([["a", [2]]]), protocol.Probe(handle, [1, 2]), protocol.ProbeRanks([[0, handle, [1]]]),
            protocol.DryRun([["a", "float32", [2]]]), protocol.LoadBucket(handle, [1], [["a", "float32", [2], 0, 8]]),
            protocol.RunProgram(["r0/a"], [["r0/a", handle]], [["p", 1, []]], "p"), protocol.ReleaseStaging(), protocol.FindUnwritten(),
            protocol.Leave(),
        ]  # fmt: skip
        traced = {"a": [[0, [2], [1], "float32"]], "b": [[0, [2], [1], "float32"]]}
        self._results = [
            None, protocol.Greeting(None, "p", "w"), protocol.ProbeResult("GPU-1"), protocol.RanksInReach([0], {"1": "no"}),
            protocol.DryRunResult(traced), protocol.BucketResult([], [], {"a": 2}, True, traced, None, {"copy": 0.1}),
            protocol.ProgramResult([1], {}), protocol.UnwrittenParameters(["a"]),
        ]  # fmt: skip
        self._session = protocol.OpenSession("s", "ipc://x", (1, 2), 0, 2, 60.0)

    def case(self, dice: random.Random) -> tuple[Any, ...]:
        kind = dice.choice(("session", "command", "reply", "reply"))
        if kind == "session":
            value = protocol.to_json(self._session)
        elif kind == "command":
            value = json.loads(protocol.encode_command(protocol.Addressed(0, dice.choice(self._commands)), 7))
        else:
            error = protocol.WorkerError("E", "m", "t") if dice.random() < 0.3 else None
            value = json.loads(
                protocol.encode_reply(protocol.Reply(0, 7, error, True, 0.1, dice.choice(self._results)))
            )
        text = as_text(value, dice)
        return kind, text.encode(errors="surrogatepass") if dice.random() < 0.5 else text

    def read(self, kind: str, text: str | bytes) -> None:
        if kind == "session":
            protocol.decode_session(text)
        elif kind == "command":
            protocol.decode_command(protocol.decode_envelope(text))
        else:
            protocol.decode_reply(text)


class Members:
    """Descriptions of the ranks of a job."""

    def case(self, dice: random.Random) -> tuple[Any, ...]:
        world = dice.choice((1, 2, 2, 3, 4))
        tp_size = dice.choice((1, 2, 2, 3))
        texts = []
        for rank in range(world):
            physical = {"token": str(rank), "index": rank, "uuid": None} if dice.random() < 0.8 else None
            facts = {
                "kind": "cuda", "physical": physical, "order": "PCI_BUS_ID", "job": "1-ab", "job_name": None, "shared": False,
                "version": "1", "gloo": {"address": dice.choice(("127.0.0.1", "10.0.0.1", "10.0.0.2", "::1", "")), "origin": "x"},
            }  # fmt: skip
            error = {"kind": "ConfigError", "message": "m", "hint": None} if dice.random() < 0.1 else None
            described = {
                "rank": rank,
                "world_size": world,
                "tp_size": tp_size,
                "host": {
                    "boot_id": dice.choice("aaab"),
                    "network": "net:[1]",
                    "shm": "23",
                    "name": "a",
                    "pids": "pid:[1]",
                },
                "pid": 7,
                "started": 8,
                "facts": facts,
                "error": error,
            }
            texts.append(as_text(described, dice) if dice.random() < 0.4 else json.dumps(described))
        if dice.random() < 0.05:
            dice.shuffle(texts)
        if dice.random() < 0.05:
            texts = texts[: dice.randrange(len(texts) + 1)]
        return (texts,)

    def read(self, texts: list[str]) -> None:
        members = [Member.from_json(text) for text in texts]
        for member in members:
            member.is_running()
        plan_slices(members)
        plan_roles(members)


PARSERS: dict[str, Callable[[], Any]] = {
    "devices": Devices,
    "announcements": Announcements,
    "messages": Messages,
    "members": Members,
}


def run(name: str, *, cases: int, seed: int) -> tuple[Counter[str], float]:
    """Return how often each outcome came, and the seconds that it took.

    Args:
        name: One of `PARSERS`.
        cases: Number of inputs.
        seed: Of the inputs.

    Raises:
        Exception: What an input raised that is no error of the library; the input is in its notes.
    """
    parser, dice, outcomes = PARSERS[name](), random.Random(f"{name} {seed}"), Counter[str]()
    started = time.monotonic()
    for number in range(cases):
        given = parser.case(dice)
        try:
            parser.read(*given)
            outcomes["value"] += 1
        except (TpColocateError, protocol.ProtocolError) as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            error.add_note(f"{name}, case {number} of seed {seed}: {ascii(given)[:2000]}")
            raise
    return outcomes, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="for each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARSERS, help="one parser")
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    options = parser.parse_args()
    load_before = os.getloadavg()
    names = [options.only] if options.only else list(PARSERS)
    outcomes, rates = {}, []
    for name in names:
        outcomes[name], seconds = run(name, cases=options.cases, seed=options.seed)
        rates.append(options.cases / seconds)
        print(f"{name}: {options.cases} cases in {seconds:.0f} s, {dict(outcomes[name])}", file=sys.stderr, flush=True)
    result = record(
        "fuzz_parsers" if options.only is None else f"fuzz_parsers_{options.only}",
        metric="cases of one parser per second",
        unit="1/s",
        samples=rates,
        settings={"parsers": names, "cases_per_parser": options.cases, "seed": options.seed},
        checks={
            "cases": options.cases * len(names),
            "neither_a_value_nor_an_error_of_the_library": 0,
            "outcomes": {name: dict(sorted(found.items())) for name, found in outcomes.items()},
        },
        target="every input gives a value or an error of the library",
        target_met=True,
        load_before=load_before,
    )
    publish(result, write=options.record)


if __name__ == "__main__":
    main()
