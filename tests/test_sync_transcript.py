"""Every sync by its transcript: what ranks agree on, exchange, ask of the server and send to its workers.

A transcript must be the same on all ranks, and the one of tests/golden/sync_transcripts.txt.  After a change that is
meant to change it:

    TRANSCRIPTS=write .venv/bin/python -m pytest -m '' -k transcripts_of_everything tests/test_sync_transcript.py

and review the difference as code.  `TRANSCRIPTS=<part of a case's name>` runs those cases alone.
"""

import difflib
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from harness import run_ranks
from sync_harness import Engine, World, divergences, record_everything, serve_worker, stop_worker
from sync_models import MEMORIES, SOURCES, Source

pytestmark = pytest.mark.timeout(300)
quick = pytest.mark.quick

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
    "SGLang's own loader": {"transport": "stock"},
    "fan out": {"payloads": "fan_out"},
    "full tensors": {"parts": False},
    "little memory": {"bucket_bytes": 512},
}


def case(layout, kind, memory, variant="", num_syncs=4):
    return layout, kind, memory, variant, num_syncs


def name_of(layout, kind, memory, variant, num_syncs):
    return ", ".join(filter(None, (kind, memory, variant, layout)))


def can_be(layout, kind, memory):
    if kind == "HSDP" and LAYOUTS[layout][0] < 4:
        return False
    return kind != "generator" or memory in ("staged", "kept mapped")


FIVE = case("tp=2", "peft", "kept mapped", num_syncs=5)
EVERYTHING = [
    *(case(*key) for key in itertools.product(LAYOUTS, SOURCES, MEMORIES) if can_be(*key) and key != FIVE[:3]),
    FIVE,
    *(case(layout, kind, "staged", variant)
      for layout in ("tp=2", "two slices of 2") for kind in ("plain", "FSDP2") for variant in VARIANTS if variant),
]  # fmt: skip
QUICK = [
    *(case("tp=1", kind, memory, num_syncs=3) for kind, memory in [("plain", "staged"), ("plain", "kept mapped"), ("FSDP2", "mixed"), ("peft", "kept mapped")]),
    *(case("tp=2", kind, memory, num_syncs=3) for kind, memory in [
        *(("plain", memory) for memory in MEMORIES), ("DDP", "kept mapped"), ("FSDP2", "staged"), ("FSDP2", "mapped once"),
        ("FSDP2 experts", "mixed"), ("peft", "staged"), ("peft", "mapped once"), ("peft FSDP2", "kept mapped"),
        ("state dict", "kept mapped"), ("generator", "staged"), ("DTensor TP", "staged"),
    ]),
    FIVE,
    *(case("tp=2", "plain", "staged", variant, num_syncs=2) for variant in VARIANTS if variant),
    case("tp=4", "plain", "kept mapped", num_syncs=3), case("tp=4", "HSDP", "mixed", num_syncs=3), case("tp=4", "FSDP2 experts", "kept mapped", num_syncs=2),
    *(case("two slices of 2", kind, memory, num_syncs=3) for kind, memory in [
        ("plain", "mixed"), ("FSDP2", "kept mapped"), ("FSDP2 experts", "kept mapped"), ("peft FSDP2", "mixed"), ("HSDP", "staged"), ("DTensor TP", "kept mapped"),
    ]),
    case("two slices of 2", "FSDP2", "staged", "little memory", num_syncs=2),
]  # fmt: skip


# --- What runs on the ranks ----------------------------------------------------------------------------------------------


def on_a_rank(rank, folder, cases, sweeps, with_plants):
    if rank >= MOST:
        serve_worker(folder, rank - MOST)
        return None
    try:
        return on_a_training_rank(rank, folder, cases, sweeps)
    finally:
        stop_worker(folder, rank)


def on_a_training_rank(rank, folder, cases, sweeps):
    record_everything()
    found = {}
    for size in (1, 2, 4):
        if rank >= size:
            continue
        world = World(rank, size, folder)
        for layout, (its_size, tp_size) in LAYOUTS.items():
            of_layout = [one for one in cases if one[0] == layout]
            if its_size == size and of_layout:
                world.cut(tp_size)
                for one in of_layout:
                    found[name_of(*one)] = synced(world, *one)
        world.close()
    return found


def synced(world, layout, kind, memory, variant, num_syncs):
    """Several syncs of one source with a new engine, and what they leave behind."""
    options = dict(VARIANTS[variant])
    engine = Engine(world, moe="experts" in kind, habit=options.pop("habit", None))
    source = Source(kind, memory, world.tp_size)
    found = []
    for _ in range(num_syncs):
        source.train()
        found.append(engine.run(source, **options))
    left = engine.left()
    engine.close()
    return found, left


@pytest.fixture(scope="module")
def folder():
    path = tempfile.mkdtemp(prefix="tpcs-")  # a socket's path must be short
    yield path
    shutil.rmtree(path)


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
    told = {}
    for name in found[0]:
        of_ranks = [of_rank[name][0] for of_rank in found if of_rank is not None and name in of_rank]
        owner = next(syncs for syncs in of_ranks if syncs[0].record.requests)
        for which, synced in zip(SYNCS, owner):
            told[f"{name}: {which}"] = transcript(synced)
    return told


HEAD = """\
# What syncs do, in order, on the owner of the first slice: what its ranks agree on, collectives over the meshes of the
# weights, commands to the workers (number, kind, counts; with | where the TP ranks' differ), and requests of the server,
# whose lists come first.  Written by tests/test_sync_transcript.py, see there.
"""


def written(told):
    """As a file: what was there before is named only."""
    requests, events, blocks = {}, {}, []
    for name, text in told.items():
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
    told, events = {}, {}
    for block in text.split("\n== ")[1:]:
        head, *lines = block.strip("\n").split("\n")
        head, _, requests = head.partition(" > ")
        name, _, other = head.partition(" = ")
        events[name] = events[other] if other else lines
        told[name] = "\n".join([*events[name], *(events[requests] if requests else [])])
    return told


def differences(told, golden):
    """In words; empty if every transcript is as it was."""
    found = []
    for name, text in told.items():
        if name not in golden:
            found.append(f"{name}: not in {GOLDEN.name}")
        elif text != golden[name]:
            lines = difflib.unified_diff(
                golden[name].splitlines(), text.splitlines(), "golden", "now", lineterm="", n=2
            )
            found.append(f"{name}:\n" + "\n".join(lines))
    return found


def problems(found):
    """What is wrong with syncs that nothing was done to."""
    wrong = []
    for name in found[0]:
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
    told = transcripts(found)
    wrong = differences(told, read(GOLDEN.read_text()))
    more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
    assert not wrong, "\n\n".join(
        [f"{len(wrong)} of {len(told)} transcripts changed (see the top of this file)", *wrong[:5], *more]
    )


@pytest.fixture(scope="module")
def found(folder):
    """Of every rank, all that the quick tests need; ranks are started once."""
    return run_ranks(on_a_rank, 2 * MOST, folder, chosen(QUICK), [], True, init_group=False, timeout_s=200)


@quick
def test_transcripts(found):
    check(found)


def test_transcripts_of_everything(folder):
    found = run_ranks(on_a_rank, 2 * MOST, folder, chosen(EVERYTHING), [], False, init_group=False, timeout_s=280)
    if os.environ.get("TRANSCRIPTS") == "write":
        wrong = problems(found)
        assert not wrong, "\n".join([f"{len(wrong)} problems", *wrong[:10]])
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(written(transcripts(found)))
    check(found)


@quick
def test_a_peft_model_in_shared_memory_is_synced_five_times(found):
    """Its base stays mapped and what is merged follows in buckets, so that numbers of commands must go on alike."""
    for of_rank in found[:2]:
        syncs, _ = of_rank["peft, kept mapped, tp=2"]
        assert [(s.error, s.differing) for s in syncs] == [(None, [])] * 5
        assert [bool(s.facts["mapped"][0]) for s in syncs] == [False, True, True, True, True]
        assert all(s.facts["buckets"] > 1 for s in syncs)
