"""Every sync by its transcript: what ranks agree on, exchange, ask of the server and send to its workers.

A transcript must be the same on all ranks, and the one of tests/golden/sync_transcripts.txt.  After a change that is
meant to change it:

    TRANSCRIPTS=write .venv/bin/python -m pytest -m '' -k test_transcripts tests/test_sync_transcript.py

and review the difference as code.  `TRANSCRIPTS=<part of a case's name>` runs those cases alone.
"""

import contextlib
import difflib
import gc
import itertools
import os
import tempfile
from pathlib import Path

import pytest
from harness import RanksFailed, run_ranks
from sync_harness import (
    A_BRANCH,
    COMMAND_COUNTER,
    FINISH_MESH_COLLECTIVES,
    PATIENCE_S,
    RECORD,
    Engine,
    World,
    divergences,
    faults,
    is_known_defect,
    record_everything,
    replaced,
    serve_worker,
    shorten_grace,
    stop_worker,
    warm_up,
    wrong_after,
)
from sync_models import MEMORIES, SOURCES, Source

from tpcolocate.errors import SyncError

# The first test runs everything.
pytestmark = pytest.mark.timeout(600)
quick, slow = pytest.mark.quick, pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "sync_transcripts.txt"
MOST = 4
"""Training ranks, and as many workers."""
LAYOUTS = {"tp=1": (1, 1), "tp=2": (2, 2), "tp=4": (4, 4), "two slices of 2": (4, 2)}
"""How many training ranks, and how many of them to a slice."""
SYNCS = ("first", "second", "third", "fourth", "fifth")

VARIANTS = {
    "": {},
    "a loader that needs values": {"habit": "needs values"},
    "a loader that does otherwise": {"habit": "does otherwise"},
    "files": {"transport": "file"},
    "fan out": {"payloads": "fan_out"},
    "full tensors": {"parts": False},
    "little memory": {"bucket_bytes": 512},
    "a warm engine": {"is_warm": True},
}


def case(layout, kind, memory, variant="", num_syncs=3):
    return layout, kind, memory, variant, num_syncs


def name_of(layout, kind, memory, variant, num_syncs):
    return ", ".join(filter(None, (kind, memory, variant, layout)))


def can_be(layout, kind, memory):
    if kind == "HSDP" and LAYOUTS[layout][0] < 4:
        return False
    return kind != "generator" or memory in ("staged", "kept mapped")


def num_syncs_of(layout):
    """The fourth sync is as the third, in every layout that was ever tried; one shows it."""
    return 4 if layout == "tp=2" else 3


FIVE = case("tp=2", "peft", "kept mapped", num_syncs=5)
EVERYTHING = [
    *(case(*key, num_syncs=num_syncs_of(key[0])) for key in itertools.product(LAYOUTS, SOURCES, MEMORIES) if can_be(*key) and key != FIVE[:3]),
    FIVE,
    *(case(layout, kind, "staged", variant)
      for layout in ("tp=2", "two slices of 2") for kind in ("plain", "FSDP2") for variant in VARIANTS if variant),
]  # fmt: skip

SWEEPS = [
    ("tp=2", "peft FSDP2", "kept mapped", 0, False, 3),
    ("tp=2", "plain", "kept mapped", 2, True, 1),
    ("two slices of 2", "FSDP2", "staged", 0, False, 3),
    ("tp=2", "peft FSDP2", "kept mapped", 0, True, 3),
    ("tp=2", "plain", "mixed", 0, True, 2),
    ("tp=2", "FSDP2", "kept mapped", 2, True, 2),
    ("two slices of 2", "FSDP2 experts", "mixed", 0, False, 3),
    ("two slices of 2", "FSDP2", "kept mapped", 2, False, 2),
    ("two slices of 2", "FSDP2", "kept mapped", 1, False, 3),
    ("two slices of 2", "FSDP2 experts", "kept mapped", 2, False, 3),
]
"""Arguments of `swept`."""


# --- What runs on the ranks ----------------------------------------------------------------------------------------------


def on_a_rank(rank, folder, cases, sweeps, with_plants):
    if rank >= MOST:
        serve_worker(folder, rank - MOST)
        return None
    try:
        return on_a_training_rank(rank, folder, cases, sweeps, with_plants)
    finally:
        stop_worker(folder, rank)


def on_a_training_rank(rank, folder, cases, sweeps, with_plants):
    record_everything(folder)
    found = {"sweeps": {}, "plants": {}}
    for size in (1, 2, 4):
        if rank >= size:
            continue
        world = World(rank, size, folder)
        for layout, (its_size, tp_size) in LAYOUTS.items():
            of_layout = [one for one in cases if one[0] == layout]
            sweeps_of_layout = [one for one in sweeps if one[0] == layout]
            if its_size == size and (of_layout or sweeps_of_layout):
                world.cut(tp_size)
                for one in of_layout:
                    found[name_of(*one)] = synced(world, *one)
                for one in sweeps_of_layout:
                    world.cut(tp_size)
                    found["sweeps"][one] = swept(world, *one)
        if with_plants:
            shorten_grace(0.5)
            for plant, its_size in PLANTS.items():
                if its_size == size:
                    world.cut(2)  # anew: the plant before has broken it
                    found["plants"][plant.__name__] = plant(world)
        world.close()
    gc.collect()  # shared memory that is still held when a process exits stays behind
    return found


def swept(world, layout, kind, memory, num_before, on_every_rank, stride):
    """Errors planted in one sync after the other.

    Args:
        world: Where.
        layout, kind, memory: See `case`.
        num_before: Good syncs before the one with an error; 0 and 1 take a new engine for each error.
        on_every_rank: See `faults`.
        stride: Of the faults, take one in so many.

    Returns:
        (fault, how its sync ended, what was wrong) of each.
    """
    source = Source(kind, memory, world.tp_size)

    def run(**more):
        source.train()
        return engine.run(source, **more)

    engine = Engine(world, moe="experts" in kind)
    good = [run() for _ in range(num_before + 1)][-1]
    records = world.gather(good.record)
    found = []
    planned = faults(records, world.gather(world.owner_rank), on_every_rank=on_every_rank)
    known = {
        "is_mapped": memory != "staged",
        "is_sharded": "FSDP2" in kind,
        "is_lazy": kind in ("FSDP2 experts", "peft FSDP2"),
        "num_slices": world.size // world.tp_size,
    }
    for fault in [one for one in planned if not is_known_defect(one, **known)][::stride]:
        (world.folder / f"doing{world.rank}").write_text(f"{layout}, {kind}, {memory}: {fault}")
        if num_before < 2:
            engine.close()
            engine = Engine(world, moe="experts" in kind)
        if num_before:
            run()
        failed = run(fault=(fault.seam, fault.number) if fault.rank == world.rank else None, timeout_s=8.0)
        healed = run()
        of_ranks = world.gather((failed, healed, engine.left()))
        found.append((fault, failed.error, wrong_after(fault.rank, *zip(*of_ranks), world.tp_size)))
        if found[-1][-1]:
            return found  # ranks may be out of step for good
    engine.close()
    return found


def synced(world, layout, kind, memory, variant, num_syncs):
    """Several syncs of one source with a new engine, and what they leave behind."""
    options = dict(VARIANTS[variant])
    engine = Engine(world, moe="experts" in kind, habit=options.pop("habit", None))
    if options.pop("is_warm", False):
        warm_up(engine.sync)
    source = Source(kind, memory, world.tp_size)
    found = []
    for _ in range(num_syncs):
        source.train()
        found.append(engine.run(source, **options))
    left = engine.left()
    engine.close()
    return found, left


# --- Divergences planted on one rank, to see that they are found ---------------------------------------------------------


def planted(world, kind, memory, *, num_before=0, meddle=None, here=None, timeout_s=3.0, **options):
    """A sync after good ones; with `here` an attribute of the library is another on this rank, see `replaced`."""
    engine, source = Engine(world), Source(kind, memory, world.tp_size)
    for _ in range(num_before):
        source.train()
        engine.run(source, **options)
    source.train()
    with replaced(*here) if here is not None else contextlib.nullcontext():
        return engine.run(source, meddle=meddle, timeout_s=timeout_s, **options)


def a_counter_advanced_on_one_rank(world):
    """The owner draws a number for a command that the others do not draw, as when it was drawn in what it alone runs."""
    place, name = COMMAND_COUNTER

    def make(draw):
        def twice(self):
            if draw(self) == 0:
                return 0
            return draw(self)

        return twice

    here = (place, name, make) if world.is_owner else None
    # Several buckets, whose agreements have their numbers.
    return planted(world, "peft", "kept mapped", num_before=1, here=here, parts=False, bucket_bytes=512)


def a_branch_taken_on_one_rank(world):
    place, name, value = A_BRANCH
    here = (place, name, lambda _: lambda *args, **kwargs: value)
    return planted(world, "plain", "staged", here=here if world.rank == 1 else None)


def an_agreement_left_out_on_one_rank(world):
    meddle = lambda number, what, error: None if number == 4 else (what, error)
    return planted(world, "plain", "staged", meddle=meddle if world.rank == 1 else None)


def two_agreements_swapped_on_one_rank(world):
    names = {}

    def note(number, what, error):
        names[number] = what
        return what, error

    planted(world, "plain", "staged", meddle=note, timeout_s=20.0)  # nothing is wrong with this one
    assert names[3] != names[4]
    meddle = lambda number, what, error: (names.get({3: 4, 4: 3}.get(number), what), error)
    return planted(world, "plain", "staged", meddle=meddle if world.rank == 1 else None)


def a_mesh_collective_not_made_after_a_failure(world):
    """One slice fails after the meshes' ranks have agreed on the way, and leaves the other alone in what follows."""

    def meddle(number, what, error):
        is_after_mesh = bool(RECORD.of("mesh"))
        return what, SyncError("planted") if is_after_mesh and world.rank == 0 else error

    place, name = FINISH_MESH_COLLECTIVES
    here = (place, name, lambda _: lambda *args, **kwargs: None)
    return planted(world, "FSDP2", "staged", meddle=meddle, here=here if world.rank < 2 else None)


PLANTS = {
    a_counter_advanced_on_one_rank: 2,
    a_branch_taken_on_one_rank: 2,
    an_agreement_left_out_on_one_rank: 2,
    two_agreements_swapped_on_one_rank: 2,
    a_mesh_collective_not_made_after_a_failure: 4,
}
"""Plant -> how many ranks it takes, in slices of two.  The last one leaves a mesh that cannot be used any more."""


def run_all(folder, *args, timeout_s):
    try:
        return run_ranks(on_a_rank, 2 * MOST, folder, *args, init_group=False, timeout_s=timeout_s)
    except RanksFailed as error:
        for path in sorted(Path(folder).glob("doing*")):
            error.add_note(f"rank {path.name[-1]} was at {path.read_text()}")
        raise


# --- Transcripts ---------------------------------------------------------------------------------------------------------


def chosen(cases):
    words = os.environ.get("TRANSCRIPTS", "write")
    return cases if words == "write" else [one for one in cases if words in name_of(*one)]


def transcript(synced):
    """As text; full tensors that are gathered one after the other are counted."""
    lines = []
    for (kind, name), events in itertools.groupby(synced.record.events, key=lambda event: event[:2]):
        events = list(events)
        if name == "full_tensor" and len(events) > 1:
            lines.append(f"{kind} {name} x{len(events)} {sum(int(event[2].split()[0]) for event in events)} bytes")
        else:
            lines += [" ".join(event) for event in events]
    return "\n".join([*lines, *(f"> {line}" for line in synced.record.requests)])


def transcripts(found):
    """Name of a sync -> its transcript, of the first slice's owner."""
    texts = {}
    for name in names_of(found):
        of_ranks = [of_rank[name][0] for of_rank in found if of_rank is not None and name in of_rank]
        owner = next(syncs for syncs in of_ranks if syncs[0].record.requests)
        for which, synced in zip(SYNCS, owner):
            texts[f"{name}: {which}"] = transcript(synced)
    return texts


HEAD = """\
# What syncs do, in order, on the owner of the first slice: what its ranks agree on, collectives over the meshes of the
# weights, commands to the workers (number, kind, counts; with | where the TP ranks' differ), and requests of the server,
# whose lists come first.  Written by tests/test_sync_transcript.py, see there.
"""


def written(texts):
    """As a file: what was there before is named only."""
    requests, events, blocks = {}, {}, []
    for name, text in texts.items():
        lines = text.split("\n")
        asked = tuple(line for line in lines if line.startswith("> "))
        done = tuple(lines[: len(lines) - len(asked)])
        number = requests.setdefault(asked, f"requests {len(requests) + 1}")
        first = events.setdefault(done, name)
        blocks.append(
            "\n".join([f"== {name} > {number}", *done] if first == name else [f"== {name} = {first} > {number}"])
        )
    lists = ["\n".join([f"== {name}", *asked]) for asked, name in requests.items()]
    return "\n".join([HEAD, *lists, *blocks]) + "\n"


def read(text):
    texts, events = {}, {}
    for block in text.split("\n== ")[1:]:
        head, *lines = block.strip("\n").split("\n")
        head, _, requests = head.partition(" > ")
        name, _, other = head.partition(" = ")
        events[name] = events[other] if other else lines
        texts[name] = "\n".join([*events[name], *(events[requests] if requests else [])])
    return texts


def differences(texts, golden):
    """In words; empty if every transcript is as it was."""
    found = []
    for name, text in texts.items():
        if name not in golden:
            found.append(f"{name}: not in {GOLDEN.name}")
        elif text != golden[name]:
            lines = difflib.unified_diff(
                golden[name].splitlines(), text.splitlines(), "golden", "now", lineterm="", n=2
            )
            found.append(f"{name}:\n" + "\n".join(lines))
    return found


def names_of(found):
    return [name for name in found[0] if name not in ("sweeps", "plants")]


def problems(found):
    """What is wrong with syncs that nothing was done to."""
    wrong = []
    for name in names_of(found):
        of_ranks = [of_rank[name] for of_rank in found if of_rank is not None and name in of_rank]
        layout = next(layout for layout in LAYOUTS if name.endswith(layout))
        for which, *syncs in zip(SYNCS, *(syncs for syncs, _ in of_ranks)):
            wrong += [f"{name}: {which}: {words}" for words in divergences(syncs, LAYOUTS[layout][1])]
            wrong += [f"{name}: {which}: rank {r}: {s.error}" for r, s in enumerate(syncs) if s.error is not None]
        wrong += [f"{name}: rank {rank} has left {left}" for rank, (_, left) in enumerate(of_ranks) if left]
    return wrong


def check(found):
    wrong = problems(found)
    assert not wrong, "\n".join([f"{len(wrong)} problems", *wrong[:10]])
    texts = transcripts(found)
    wrong = differences(texts, read(GOLDEN.read_text()))
    more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
    assert not wrong, "\n\n".join(
        [f"{len(wrong)} of {len(texts)} transcripts changed (see the top of this file)", *wrong[:5], *more]
    )


@pytest.fixture(scope="module")
def found():
    """Of every rank, everything; ranks are started once."""
    with tempfile.TemporaryDirectory(prefix="tpcs-") as folder:  # a socket's path must be short
        return run_all(folder, chosen(EVERYTHING), SWEEPS, True, timeout_s=PATIENCE_S)


@quick
@slow
def test_transcripts(found):
    if os.environ.get("TRANSCRIPTS") == "write":
        wrong = problems(found)
        assert not wrong, "\n".join([f"{len(wrong)} problems", *wrong[:10]])
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(written(transcripts(found)))
    check(found)


@quick
@slow
def test_a_peft_model_in_shared_memory_is_synced_five_times(found):
    """Its base stays mapped and what is merged follows in buckets, so that numbers of commands must go on alike."""
    for of_rank in found[:2]:
        syncs, _ = of_rank["peft, kept mapped, tp=2"]
        assert [(s.error, s.differing) for s in syncs] == [(None, [])] * 5
        assert [bool(s.facts["mapped"][0]) for s in syncs] == [False, True, True, True, True]
        assert all(s.facts["buckets"] > 1 for s in syncs)


@quick
@slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_divergence_is_found(found, plant):
    of_ranks = [of_rank["plants"][plant.__name__] for of_rank in found[: PLANTS[plant]]]
    words = divergences(of_ranks, 2)
    expected = "different mesh collectives" if "mesh" in plant.__name__ else "do different things"
    assert any(expected in one for one in words), words


@quick
@slow
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: ", ".join(map(str, sweep)))
def test_an_error_on_one_rank_ends_a_sync_alike_everywhere_and_the_next_one_succeeds(found, sweep):
    """For errors in every phase: no rank is left in a collective, and no handle stays out."""
    seen = next(of_rank["sweeps"][sweep] for of_rank in found if sweep in of_rank["sweeps"])
    wrong = [f"{', '.join(sweep[:3])}: {fault}: {words}" for fault, _, of_fault in seen for words in of_fault]
    assert not wrong, "\n".join(wrong)
    assert len(seen) > 2
