"""The cells of the fault matrix: what is done, to which process, at which moment; which make no sense; what is expected.

Pure: nothing is started here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAULTS = ("exception", "SIGSTOP", "SIGKILL", "SIGTERM", "Ctrl-C")
SYNC_PHASES = ("open", "preflight", "trace", "replicas", "samples", "transfer", "buckets", "finish")
"""Of `tpcolocate.weights.sync.pipeline`."""
MOMENTS = (
    "init", "launch", "publish", "idle", "generate", *(f"sync: {phase}" for phase in SYNC_PHASES), "sleep", "wake",
    "restart", "shutdown",
)  # fmt: skip
RANKS = {"owner rank": 0, "client rank": 1}
SERVER_PROCESSES = ("server main process", "TP worker", "detokenizer", "supervisor")
VICTIMS = (*RANKS, *SERVER_PROCESSES)

# The timeouts that the ranks pass, in seconds; a survivor may take as long as its call documents, and `MARGIN_S` more.
GROUP_S, HEALTH_S, GENERATE_S, SYNC_S, SLEEP_S, SHUTDOWN_S = 20.0, 100.0, 20.0, 20.0, 20.0, 20.0
SERVER_ENDS_S = 40.0
# A rank that leaves a launch by an exception or Ctrl-C says so; the others end what has started of the server.
LEFT_S = 10.0
MARGIN_S = 2.0
LIMITS_S: Mapping[str, float] = {
    "init": GROUP_S,
    "launch": HEALTH_S + GROUP_S + SERVER_ENDS_S,  # for the server, for the ranks, and for the end of what was started
    "generate": GENERATE_S,
    # Ranks that have met have the timeout of the sync; those that wait for one that never comes have the group's.
    "sync": SYNC_S,
    "sleep": GROUP_S + SLEEP_S,
    "wake": GROUP_S + SLEEP_S,
    "restart": SERVER_ENDS_S + HEALTH_S + GROUP_S,
    "shutdown": SHUTDOWN_S + SERVER_ENDS_S,
    "end": SERVER_ENDS_S,
}  # fmt: skip
"""Call -> the longest that it may take after a fault, in seconds."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One fault.

    Attributes:
        moment: One of `MOMENTS`.
        fault: One of `FAULTS`.
        victim: One of `VICTIMS`.
    """

    moment: str
    fault: str
    victim: str

    @property
    def name(self) -> str:
        return f"{self.moment}/{self.fault}/{self.victim}"

    @property
    def phase(self) -> str | None:
        """The phase of a sync in which it happens, if any."""
        return self.moment.partition(": ")[2] or None

    @property
    def call(self) -> str | None:
        """The call during which it happens; None between calls."""
        return (
            None
            if self.moment == "idle"
            else "sync"
            if self.phase
            else {"publish": "launch"}.get(self.moment, self.moment)
        )

    @property
    def rank(self) -> int | None:
        """The rank that is the victim, if one is."""
        return RANKS.get(self.victim)

    @property
    def ends_a_rank(self) -> bool:
        """Whether a training rank is gone afterwards: the job is over, and its launcher ends it."""
        return self.rank is not None and self.fault in ("SIGSTOP", "SIGKILL", "SIGTERM")

    @property
    def leaves_the_server(self) -> bool:
        """Whether the server may still run afterwards, with all of its processes."""
        return self.rank is not None and self.fault in ("exception", "Ctrl-C")

    @property
    def needs(self) -> str:
        """What has to be there: "ranks", "group" (after init) or "server"."""
        return {"init": "ranks", "launch": "group", "publish": "group"}.get(self.moment, "server")


def all_cells() -> Iterator[Cell]:
    """Yield every combination, those that make no sense included."""
    for moment in MOMENTS:
        for fault in FAULTS:
            for victim in VICTIMS:
                yield Cell(moment, fault, victim)


def senseless(cell: Cell) -> str | None:
    """Return why a cell makes no sense, or None if it does."""
    if cell.victim in SERVER_PROCESSES:
        if cell.moment == "init":
            return "there is no server yet"
        if cell.fault == "exception":
            return "an exception ends that process, as SIGKILL does; those of a TP worker in a sync are planted in tests/test_faults.py"
        if cell.fault == "Ctrl-C":
            return "the server has a session of its own: a terminal's Ctrl-C does not reach it"
    elif cell.moment == "idle" and cell.fault in ("exception", "Ctrl-C"):
        return "between the library's calls it is the script's own"
    elif cell.moment == "generate" and cell.fault == "exception":
        return "generate() is one request, which is not collective: its errors concern no other rank"
    return None


def priority(cell: Cell) -> int:
    """Order in which the cells are run, so that a run that is cut off has the most important ones."""
    hard = cell.fault in ("SIGKILL", "SIGSTOP")
    if hard and cell.moment in ("idle", "generate", "sync: transfer", "launch"):
        return 0
    if cell.fault == "exception" and cell.phase:
        return 0
    if cell.fault == "Ctrl-C" and cell.moment in ("launch", "shutdown"):
        return 0
    if cell.fault in ("exception", "Ctrl-C"):
        return 1
    if cell.fault == "SIGKILL" or cell.moment in ("shutdown", "publish", "init"):
        return 2
    return 3 if cell.fault == "SIGSTOP" else 4


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Order cells so that those that can share a server follow one another.

    Within one priority: what leaves the server as it was, then what ends the server alone, then what ends a rank.
    """

    def rank_of(cell: Cell) -> tuple[object, ...]:
        # A launch that is interrupted would first need the server of the cell before it to end.
        return (
            priority(cell),
            cell.ends_a_rank,
            not cell.leaves_the_server,
            cell.needs != "server",
            MOMENTS.index(cell.moment),
        )

    return sorted(cells, key=rank_of)


def problems_of(cell: Cell, result: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with what a cell has shown; empty if nothing is.

    Args:
        cell: The cell.
        result: With ``calls`` (rank, call, outcome, message, after_s), ``left``, ``handles`` and ``goes_on``.
    """
    found = []
    for one in result["calls"]:
        who = f"rank {one['rank']} in {one['call']}()"
        if one["outcome"] == "hangs" and waits_as_documented(cell, one["call"]):
            continue
        if one["outcome"] == "hangs":
            found.append(f"{who} was still waiting after {one['after_s']:.0f} s")
        elif one["after_s"] > (limit := limit_of(cell, one["call"])) + MARGIN_S:
            found.append(f"{who} took {one['after_s']:.1f} s, its limit is {limit:.0f} s")
        if one["outcome"] == "error" and not one["ours"] and one["rank"] != cell.rank:
            found.append(f"{who}: {one['kind']} is no error of this library: {one['message']}")
    if must_be_reported(cell) and not any(one["outcome"] in ("error", "hangs") for one in result["calls"]):
        found.append("no rank had an error")
    if cell.fault == "exception" and not any("planted" in one["message"] for one in result["calls"]):
        found.append("the exception did not come: the call had failed before it")
    survivors = {
        one["rank"]: one for one in result["calls"] if one["outcome"] == "error" and one["ours"] and one["shared"]
    }
    if not cell.ends_a_rank and len({(one["kind"], one["message"]) for one in survivors.values()}) > 1:
        found.append(
            "the ranks had different errors: "
            + "; ".join(f"rank {r}: {o['kind']}: {o['message']}" for r, o in survivors.items())
        )
    if result["left"]:
        found.append("left behind: " + ", ".join(name.strip() for name in result["left"]))
    if result["handles"]:
        found.append(f"{result['handles']} handles were not given back")
    if result["goes_on"].startswith("no"):
        found.append(f"the job could not go on: {result['goes_on']}")
    return found


def limit_of(cell: Cell, call: str) -> float:
    """Return the longest that a call may take after a fault, in seconds."""
    if cell.leaves_the_server and cell.moment in ("launch", "publish", "restart") and call in ("launch", "restart"):
        return LEFT_S
    return LIMITS_S[call]


def waits_as_documented(cell: Cell, call: str) -> bool:
    """Whether a call has no limit after this fault.

    Ranks that come to a collective call wait for the others while their processes run, and a stopped one does; a warning
    names it.
    """
    return cell.fault == "SIGSTOP" and cell.rank is not None and cell.moment in ("idle", "generate") and call == "sync"


def must_be_reported(cell: Cell) -> bool:
    """Whether some call has to raise: not where the call does its work all the same."""
    if cell.moment == "shutdown":
        return False  # what is to be ended has ended
    # The supervisor only ends the server, and not for SIGTERM, which a whole job gets; until then the server works.
    return not (cell.victim == "supervisor" and cell.fault in ("SIGSTOP", "SIGTERM"))


def short(result: Mapping[str, Any]) -> str:
    """What a cell has shown, in a few words for a table."""
    if result["status"] != "run":
        return {"senseless": "-", "not run": "not run", "not reached": "not reached"}[result["status"]]
    shown: dict[str, list[str]] = {}
    for one in result["calls"]:
        if one["outcome"] in ("error", "hangs"):
            what = "still waiting" if one["outcome"] == "hangs" else one["kind"]
            shown.setdefault(f"{what}", []).append(f"{one['rank']}: {one['after_s']:.1f} s")
    text = ", ".join(f"{kind} ({'; '.join(dict.fromkeys(of_ranks))})" for kind, of_ranks in shown.items())
    mark = "**wrong** " if result["problems"] else ""
    return f"{mark}{text if text else 'no error'}; {result['goes_on']}"


def table(results: Mapping[str, Mapping[str, Any]], fault: str) -> list[str]:
    """Lines of one fault's table in Markdown: a row for each moment, a column for each victim."""
    victims = [
        victim for victim in VICTIMS if any(senseless(Cell(moment, fault, victim)) is None for moment in MOMENTS)
    ]
    lines = ["| moment | " + " | ".join(victims) + " |", "|---" * (len(victims) + 1) + "|"]
    for moment in MOMENTS:
        row = [Cell(moment, fault, victim) for victim in victims]
        lines.append(f"| {moment} | " + " | ".join(_entry(cell, results) for cell in row) + " |")
    return lines


def _entry(cell: Cell, results: Mapping[str, Mapping[str, Any]]) -> str:
    if senseless(cell) is not None:
        return "-"
    return short(results[cell.name]) if cell.name in results else "not run"


__all__ = [
    "FAULTS", "LEFT_S", "LIMITS_S", "MARGIN_S", "MOMENTS", "RANKS", "SERVER_PROCESSES", "SYNC_PHASES", "VICTIMS", "Cell", "all_cells",
    "in_order", "limit_of", "must_be_reported", "priority", "problems_of", "senseless", "short", "table", "waits_as_documented",
]  # fmt: skip
