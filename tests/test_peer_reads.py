"""Workers that map the memory of several ranks, and what goes wrong with that: four training ranks, two slices of two.

The net of `sync_harness`; of every scenario all ranks return what they saw.
"""

import contextlib
import functools
import gc
import itertools
import os
import re
import tempfile
import weakref

import counted_handles
import pytest
from harness import run_ranks
from sync_harness import Engine, World, ask, divergences, record_everything, replaced, serve_worker, stop_worker
from sync_models import Source, local_of

from tpcolocate.errors import SyncError
from tpcolocate.weights.sync import mapping, mesh_calls
from tpcolocate.weights.transport.checksums import DirectChecksums

pytestmark = pytest.mark.timeout(500)
quick = pytest.mark.quick

RANKS, TP = 4, 2
KEPT = "kept mapped"


def synced(world, engine, source, count, **how):
    """Several syncs with a step in between: how each went, and what was out after it on this rank."""
    found = []
    for _ in range(count):
        source.train()
        found.append((engine.run(source, **how), state_of(world, engine)))
    return found


def state_of(world, engine):
    """What should not grow."""
    state = engine.sync.state
    regions = ask(world.worker, "regions")
    return {
        "out": counted_handles.num_out(),
        "retired": len(state.mappings.retired),
        "ledgers": len(state.abandoned) + sum(bool(one.outstanding()) for one in state.left_elsewhere),
        "regions of this rank": sum(name.startswith(f"r{world.rank}/") for name in regions),
        "regions of others": sum(not name.startswith(f"r{world.rank}/") for name in regions),
        "left": engine.left(),
    }


def refuse(world, pairs, *, probes=True):
    """Some workers cannot map some ranks' memory from now on; without `probes` they find it out too late.

    Args:
        world: Where.
        pairs: (rank of the worker, rank whose memory it is).
        probes: Whether staging memory and the little memory that is tried first cannot be mapped either.
    """
    pids = world.gather(os.getpid())
    ask(world.worker, "refuse", {pids[holder]: probes for reader, holder in pairs if reader == world.rank})


def ended(world, engine):
    """Close an engine; returns what is out of this rank's then."""
    engine.close()
    world.gather(None)
    gc.collect()
    return counted_handles.num_out()


# --- pairs that cannot be reached ----------------------------------------------------------------------------------------

ALL = set(itertools.product(range(RANKS), repeat=2))
REFUSALS = {
    "everybody": set(),
    "alone": {(q, p) for q, p in ALL if q != p},
    "their slice": {(q, p) for q, p in ALL if q // TP != p // TP},
    "one direction": {(0, 3), (1, 2)},
}


def reached(world, which, kind="FSDP2"):
    refuse(world, REFUSALS[which])
    engine, source = Engine(world, moe="experts" in kind), Source(kind, KEPT, TP)
    found = synced(world, engine, source, 4)
    refuse(world, ())
    return found, ended(world, engine)


def experts_are_spread(world):
    """Expert parallelism: a TP rank reads all of some experts, and nothing of the others."""
    engine, source = Engine(world, moe=True, habit="spreads experts"), Source("FSDP2 experts", KEPT, TP)
    found = synced(world, engine, source, 4)
    return found, ended(world, engine)


def a_rank_that_cannot_export_its_probe(world):
    engine, source = Engine(world), Source("FSDP2", KEPT, TP)

    def refuse_to(_):
        def checksum(flat):
            raise RuntimeError("no memory for a probe")

        return checksum

    with replaced(mapping, "checksum", refuse_to) if world.rank == 3 else contextlib.nullcontext():
        found = synced(world, engine, source, 1)
    found += synced(world, engine, source, 2)
    return found, ended(world, engine)


def mapping_fails_in_one_worker(world, num_before):
    """What could be mapped when it was tried first, or in the first syncs, cannot any more."""
    engine, source = Engine(world), Source("FSDP2", KEPT, TP)
    found = synced(world, engine, source, num_before)
    refuse(world, {(3, 0)}, probes=False)
    found += synced(world, engine, source, 4 - num_before)
    refuse(world, ())
    found += synced(world, engine, source, 1)
    return found, ended(world, engine)


# --- engines that are started anew ---------------------------------------------------------------------------------------


def an_engine_is_started_anew(world, is_killed):
    """That of the second slice, three times; the first slice goes on with its own."""
    engine, source = Engine(world), Source("FSDP2", KEPT, TP)
    found = [synced(world, engine, source, 3)]
    for _ in range(3):
        if world.rank < TP:
            for _ in range(3):
                world.gather(None)  # the other slice closes one and makes another
        else:
            if is_killed and world.is_owner:
                for worker in world.workers:
                    ask(worker, "die")
            engine.close()
            engine = Engine(world)
        found.append(synced(world, engine, source, 3))
    return found, ended(world, engine)


def agreements_of_the_sync_that_maps(world):
    """How many agreements a slice makes in the sync that maps for good, the second one."""
    engine = Engine(world)
    _, (second, _) = synced(world, engine, Source("FSDP2", KEPT, TP), 2)
    engine.close()
    return len(second.record.of("agree"))


def syncs_fail_in_between(world):
    """In the second slice, at each agreement of the sync that maps for good; a sync after it that is good, and one more."""
    found = []
    for number in range(agreements_of_the_sync_that_maps(world)):
        engine, source = Engine(world), Source("FSDP2", KEPT, TP)
        synced(world, engine, source, 1)
        source.train()
        failed = engine.run(source, fault=("agreement", number) if world.rank == 2 else None)
        found.append((failed, synced(world, engine, source, 3), ended(world, engine)))
    return found


def a_repeated_sync_fails_where_ranks_do_not_agree(world):
    """Between its agreements a sync that repeats the last one sends its command; one rank fails before that."""
    engine, source = Engine(world), Source("FSDP2", KEPT, TP)
    synced(world, engine, source, 3)
    source.train()

    def failing(original):
        def expected(*args):
            original(*args)
            raise SyncError("planted after the sums")

        return expected

    here = replaced(DirectChecksums, "expected", failing) if world.rank == 3 else contextlib.nullcontext()
    with here:
        failed = engine.run(source, timeout_s=8.0)
    return [(failed, synced(world, engine, source, 3), ended(world, engine))]


# --- memory that the trainer replaces -------------------------------------------------------------------------------------


def moved(source):
    """The trainer holds its weights in other memory from now on."""
    views = [one for one in gc.get_objects() if type(one).__name__ == "FSDPParam"]  # FSDP2 keeps a flat view of each
    for parameter in source.parameters:
        local = local_of(parameter)
        if local.numel():
            before = local.untyped_storage().data_ptr()
            local.data = local.data.clone()
            local.untyped_storage().share_memory_()
            for one in views:
                if one._sharded_param_data.untyped_storage().data_ptr() == before:
                    one._sharded_param_data = local.view(-1)


def some_ranks_replace_their_parameters(world):
    engine, source = Engine(world), Source("FSDP2", KEPT, TP)
    found = [synced(world, engine, source, 3)]
    for ranks in ({1}, {2, 3}, {0, 3}):
        if world.rank in ranks:
            moved(source)
        found.append(synced(world, engine, source, 4))
    return found, ended(world, engine)


def the_source_is_another_and_back(world):
    engine, sharded = Engine(world), Source("FSDP2", KEPT, TP)
    found = [synced(world, engine, sharded, 3)]
    for _ in range(2):
        found.append(synced(world, engine, Source("state dict", KEPT, TP), 3))
        found.append(synced(world, engine, sharded, 3))
    return found, ended(world, engine)


def memory_is_called_back(world):
    engine, source = Engine(world), Source("FSDP2", KEPT, TP)
    found = [synced(world, engine, source, 3)]
    old = [weakref.ref(local_of(parameter).untyped_storage()) for parameter in source.parameters]
    mapped = sum(one.num_bytes for one in engine.sync.state.mappings.all())
    moved(source)
    gc.collect()
    kept = sum(one() is not None for one in old)
    returned = engine.sync.call_back(timeout_s=20.0)
    seen = state_of(world, engine)
    again = engine.sync.call_back(timeout_s=20.0)
    found.append(synced(world, engine, source, 4))
    return {"syncs": found, "mapped": mapped, "kept": kept, "returned": (returned, again), "seen": seen,
            "out": ended(world, engine)}  # fmt: skip


def the_trainer_drops_its_model(world, memory):
    engine, source = Engine(world), Source("FSDP2", memory, TP)
    found = synced(world, engine, source, 3)
    refs = [weakref.ref(parameter) for parameter in source.parameters]
    del source
    gc.collect()
    alive = sum(one() is not None for one in refs)
    expired = len(engine.sync.state.mappings.expired())
    other = Source("plain", KEPT, TP)
    after = synced(world, engine, other, 3)
    return found, alive, expired, after, ended(world, engine)


def buckets_take_the_place(world, fails=None):
    """A full sync that maps nothing, of other weights, after those that were mapped; then these again.

    Args:
        world: Where.
        fails: Number of the agreement, in the second slice, at which the sync that maps nothing fails; None: it does not.
    """
    engine, sharded, other = Engine(world), Source("FSDP2", KEPT, TP), Source("generator", KEPT, TP)
    found = [synced(world, engine, sharded, 3)]
    other.train()
    world.gather(None)  # it has nothing to do with other slices, which may not have looked at their handles yet
    fault = ("agreement", fails) if fails is not None and world.rank == 2 else None
    buckets = engine.run(other, fault=fault)
    world.gather(None)  # the other slice may be behind
    engine.sync.state.mappings.forget_released()
    state = state_of(world, engine)
    found.append(synced(world, engine, sharded, 4))
    return {"syncs": found, "buckets": (buckets, state), "out": ended(world, engine)}


def a_rank_cannot_plan(world):
    """One rank fails in the sync that maps for good, once the workers have mapped."""
    engine, sharded, other = Engine(world), Source("FSDP2", KEPT, TP), Source("generator", KEPT, TP)
    found = [synced(world, engine, sharded, 1)]
    sharded.train()

    def failing(original):
        planted = []

        def plan(*args, **more):
            if not planted:
                planted.append(True)
                raise RuntimeError("planted in the plan")
            return original(*args, **more)  # which it tries again, for the collectives of the other slice

        return plan

    with replaced(mesh_calls, "plan_transfer", failing) if world.rank == 3 else contextlib.nullcontext():
        failed = engine.run(sharded)
    found.append(synced(world, engine, other, 2))
    returned = engine.sync.call_back(timeout_s=20.0)
    found.append(synced(world, engine, sharded, 3))
    return {"failed": failed, "syncs": found, "returned": returned, "out": ended(world, engine)}


def buckets_after_a_failure(world):
    """Two syncs that map nothing after one that mapped for good and failed in the second slice, at each agreement of it."""
    found = []
    for number in range(agreements_of_the_sync_that_maps(world)):
        engine, sharded, other = Engine(world), Source("FSDP2", KEPT, TP), Source("generator", KEPT, TP)
        synced(world, engine, sharded, 1)
        sharded.train()
        engine.run(sharded, fault=("agreement", number) if world.rank == 2 else None)
        world.gather(None)
        buckets = synced(world, engine, other, 2)
        found.append((buckets, synced(world, engine, sharded, 4), ended(world, engine)))
    return found


# --- many syncs ----------------------------------------------------------------------------------------------------------

MANY = [
    *(("FSDP2", memory) for memory in ("staged", "mapped once", KEPT, "mixed")), ("FSDP2 experts", KEPT), ("FSDP2 experts", "mixed"),
    ("peft FSDP2", KEPT), ("peft FSDP2", "staged"), ("plain", KEPT), ("HSDP", KEPT), ("DTensor TP", "mixed"),
]  # fmt: skip


def many(world, kind, memory):
    engine, source = Engine(world, moe="experts" in kind), Source(kind, memory, TP)
    found = synced(world, engine, source, 10)
    return found, ended(world, engine)


# --- what sums notice ----------------------------------------------------------------------------------------------------


def slices_trade_places(world):
    """Rank 1 describes two tensors of its expert in each other's place, to all workers."""
    engine, source = Engine(world, moe=True), Source("FSDP2 experts", KEPT, TP)

    def make(block_rows):
        def swapped(*args):
            rows = block_rows(*args)
            of_experts = [row for row in rows if re.search(r"experts\.\d\.(gate|up)_proj", row[0])]
            for one in of_experts:
                for other in of_experts:
                    if one[0] < other[0] and one[3] == other[3]:
                        one[5], other[5] = other[5], one[5]
                        return rows
            return rows

        return swapped

    source.train()
    with replaced(mapping, "block_rows", make) if world.rank == 1 else contextlib.nullcontext():
        failed = engine.run(source)
    after = synced(world, engine, source, 1)
    return failed, after, ended(world, engine)


SCENARIOS = {
    **{f"reach: {which}": functools.partial(reached, which=which) for which in REFUSALS},
    "reach: experts, their slice": functools.partial(reached, which="their slice", kind="FSDP2 experts"),
    "experts are spread": experts_are_spread,
    "no probe": a_rank_that_cannot_export_its_probe,
    **{f"mapping fails in sync {n + 1}": functools.partial(mapping_fails_in_one_worker, num_before=n) for n in (0, 1, 2)},
    "engine started anew": functools.partial(an_engine_is_started_anew, is_killed=False),
    "engine killed and started anew": functools.partial(an_engine_is_started_anew, is_killed=True),
    "failures": syncs_fail_in_between,
    "failure in a repeated sync": a_repeated_sync_fails_where_ranks_do_not_agree,
    "replaced": some_ranks_replace_their_parameters,
    "another source": the_source_is_another_and_back,
    "buckets": buckets_take_the_place,
    **{f"buckets fail at agreement {n}": functools.partial(buckets_take_the_place, fails=n) for n in (0, 4, 8)},
    "no plan": a_rank_cannot_plan,
    "buckets after failures": buckets_after_a_failure,
    "called back": memory_is_called_back,
    "dropped": functools.partial(the_trainer_drops_its_model, memory=KEPT),
    "dropped, staged": functools.partial(the_trainer_drops_its_model, memory="staged"),
    "swapped": slices_trade_places,
    **{f"many: {kind}, {memory}": functools.partial(many, kind=kind, memory=memory) for kind, memory in MANY},
}  # fmt: skip


def on_a_rank(rank, folder, names):
    if rank >= RANKS:
        serve_worker(folder, rank - RANKS)
        return None
    try:
        record_everything(folder)
        world = World(rank, RANKS, folder)
        found = {}
        for name in names:
            world.cut(TP)
            (world.folder / f"doing{rank}").write_text(name)
            found[name] = SCENARIOS[name](world)
        world.close()
        gc.collect()  # shared memory that is still held when a process exits stays behind
        return found
    finally:
        stop_worker(folder, rank)


def run(names, timeout_s):
    with tempfile.TemporaryDirectory(prefix="tpcs-") as folder:  # a socket's path must be short
        return run_ranks(on_a_rank, 2 * RANKS, folder, names, init_group=False, timeout_s=timeout_s)[:RANKS]


SHORT = [
    "reach: everybody",
    "reach: alone",
    "mapping fails in sync 2",
    "engine killed and started anew",
    "swapped",
]
"""What the quick tests look at."""


@pytest.fixture(scope="module")
def short():
    """Of every rank, name of a scenario -> what it saw; ranks are started once for all."""
    return run(SHORT, 150)


@pytest.fixture(scope="module")
def long():
    return run([name for name in SCENARIOS if name not in SHORT], 480)


@pytest.fixture
def seen(request):
    """Of every rank, what it saw in the scenario that the test is about."""
    name = request.param
    return [of_rank[name] for of_rank in request.getfixturevalue("short" if name in SHORT else "long")]


def scenarios(*names):
    """Run a test for each scenario; marked as quick where that is short."""
    marked = [pytest.param(name, marks=(quick, pytest.mark.slow) if name in SHORT else ()) for name in names]
    return pytest.mark.parametrize("seen", marked, indirect=True)


def check_good(*of_ranks, waits_after=None):
    """Syncs of all ranks, one after the other, are good and leave nothing.

    Args:
        of_ranks: Of each, its syncs and states.
        waits_after: Number of a sync after which something is left for the next one.
    """
    last = len(of_ranks[0]) - 1
    for number, one in enumerate(zip(*of_ranks, strict=True)):
        syncs = [synced for synced, _ in one]
        assert [s.error for s in syncs] == [None] * RANKS, number
        assert [s.differing for s in syncs] == [[]] * RANKS, number
        assert divergences(syncs, TP) == [], number
        if number == waits_after:
            continue
        assert [(state["left"], state["ledgers"]) for _, state in one] == [([], 0)] * RANKS, number
        assert number < last or [state["retired"] for _, state in one] == [0] * RANKS


def total(synced, key):
    return sum(synced.facts[key])


def warned(synced):
    return [text for text in synced.facts["warnings"] if "map" in text]


# --- pairs that cannot be reached ----------------------------------------------------------------------------------------


@scenarios(*(f"reach: {which}" for which in REFUSALS), "reach: experts, their slice")
def test_what_a_worker_cannot_map_is_staged(seen, request):
    syncs, out = zip(*seen)
    check_good(*syncs)
    assert out == (0,) * RANKS
    which = request.node.callspec.id.rpartition(" ")[2]
    for rank, of_rank in enumerate(syncs):
        missing = sorted(
            p for q, p in ALL if q == rank and (q != p and which == "alone" or which == "slice" and q // TP != p // TP
                                               or which == "direction" and (q, p) in REFUSALS["one direction"])
        )  # fmt: skip
        first, *later = (warned(synced) for synced, _ in of_rank)
        if missing:
            names = ", ".join(f"rank {p}" for p in missing)
            assert first == [
                f"the worker of rank {rank} cannot map the memory of {names}, which is staged: RuntimeError: memory of that rank cannot be mapped here"
            ]
        else:
            assert first == []
        assert later == [[]] * 3, "once"
        for synced, _ in of_rank[2:]:
            k, facts = rank % TP, synced.facts
            assert facts["own"][k] > 0
            assert (facts["peer"][k] > 0) == (which != "alone")
            assert total(synced, "staged") > 0 or which in ("everybody", "direction")
    assert (total(syncs[0][-1][0], "staged") > 0) == (which != "everybody"), (
        "of the first slice, which misses some in each"
    )


@quick
@pytest.mark.slow
def test_bytes_by_way_add_up(short):
    """What is read of its own rank does not depend on whom a worker reaches; all of it is what the loader takes."""
    for rank, of_rank in enumerate(short):
        k = rank % TP
        facts = {which: of_rank[f"reach: {which}"][0][-1][0].facts for which in ("everybody", "alone")}
        assert facts["everybody"]["own"][k] == facts["alone"]["own"][k]
        assert facts["everybody"]["staged"] == [0, 0]
        rest = facts["everybody"]["peer"][k]
        assert facts["alone"]["staged"][k] >= rest > facts["everybody"]["own"][k]


@scenarios("no probe")
def test_a_rank_that_cannot_give_a_probe_is_not_reached_by_others(seen):
    syncs, out = zip(*seen)
    check_good(*syncs)
    assert out == (0,) * RANKS
    for of_rank in syncs[:3]:
        synced, _ = of_rank[-1]
        assert total(synced, "peer") > 0 and total(synced, "staged") > 0


@scenarios(*(f"mapping fails in sync {n}" for n in (1, 2, 3)))
def test_after_a_mapping_that_failed_everything_is_staged_in_all_slices(seen, request):
    number = int(request.node.callspec.id[-1]) - 1
    syncs, out = zip(*seen)
    check_good(*syncs, waits_after=number)
    assert out == (0,) * RANKS
    if number == 2:
        return  # the third sync maps nothing, so nothing can fail
    text = "the trainer's memory is not mapped by the engine: TP rank 1: RuntimeError: memory of that rank cannot be mapped here"
    for of_rank in syncs:
        assert [warned(synced) for synced, _ in of_rank] == [[text] if i == number else [] for i in range(5)]
        for synced, _ in of_rank[number:]:
            assert total(synced, "direct") == 0 and total(synced, "staged") > 0
        for _, state in of_rank[number + 1 :]:
            assert (state["out"], state["regions of this rank"], state["regions of others"]) == (0, 0, 0)


# --- engines that are started anew ---------------------------------------------------------------------------------------


STEADY = ("out", "regions of this rank", "regions of others")


def steady(state):
    return [state[key] for key in STEADY]


@scenarios("engine started anew", "engine killed and started anew")
def test_an_engine_that_is_started_anew_maps_anew_and_the_other_goes_on(seen):
    rounds, out = zip(*seen)
    for of_round in zip(*rounds):
        check_good(*of_round)
    for of_rank in rounds:
        last = [steady(of_round[-1][1]) for of_round in of_rank]
        assert last == [last[0]] * 4 and all(last[0]), "nothing grows, and all is mapped again"
        assert all(total(of_round[-1][0], "staged") == 0 < total(of_round[-1][0], "peer") for of_round in of_rank)
    assert out == (0,) * RANKS


@scenarios("failures", "failure in a repeated sync")
def test_after_a_sync_that_failed_in_one_slice_all_handles_come_back(seen):
    for number, of_ranks in enumerate(zip(*seen)):
        failed, after, out = zip(*of_ranks)
        assert [one.error is None for one in failed] == [True, True, False, False], number
        assert divergences(failed, TP) == [], number
        check_good(*after)
        for of_rank in after:
            states = [steady(state) for _, state in of_rank]
            assert states[-1] == states[-2] and all(states[-1]), number
        assert out == (0,) * RANKS, number


# --- memory that the trainer replaces -------------------------------------------------------------------------------------


@scenarios("replaced")
def test_memory_that_some_ranks_replace_is_mapped_anew(seen):
    rounds, out = zip(*seen)
    for of_round in zip(*rounds):
        check_good(*of_round)
    for of_rank in rounds:
        last = [steady(of_round[-1][1]) for of_round in of_rank]
        assert last == [last[0]] * len(last)
    assert out == (0,) * RANKS


@scenarios("experts are spread")
def test_a_worker_that_has_some_experts_alone_reads_these_alone(seen):
    syncs, out = zip(*seen)
    check_good(*syncs)
    for of_rank in syncs:
        assert total(of_rank[-1][0], "peer") > 0 and total(of_rank[-1][0], "staged") == 0
    assert out == (0,) * RANKS


@scenarios("another source")
def test_another_source_takes_the_place_of_what_was_mapped(seen):
    rounds, out = zip(*seen)
    for of_round in zip(*rounds):
        check_good(*of_round)
    for of_rank in rounds:
        last = [steady(of_round[-1][1]) for of_round in of_rank]
        assert last[0] == last[2] == last[4] and last[1] == last[3]
        assert last[1][2] == 0, "what the other slice and rank gave was let go"
    assert out == (0,) * RANKS


@scenarios("buckets")
def test_a_full_sync_that_maps_nothing_unmaps_everything_in_all_slices(seen):
    for of_rank in seen:
        synced, state = of_rank["buckets"]
        assert synced.error is None and synced.differing == []
        regions = {key: state[key] for key in ("out", "retired", "regions of this rank", "regions of others")}
        assert set(regions.values()) == {0}, regions
    check_good(*(of_rank["syncs"][0] for of_rank in seen))
    check_good(*(of_rank["syncs"][1] for of_rank in seen))
    for of_rank in seen:
        before, after = of_rank["syncs"]
        assert steady(after[-1][1]) == steady(before[-1][1])
    assert [of_rank["out"] for of_rank in seen] == [0] * RANKS


@scenarios(*(f"buckets fail at agreement {n}" for n in (0, 4, 8)))
def test_a_slice_that_fails_before_it_unmaps_maps_anew(seen):
    assert [of_rank["buckets"][0].error is None for of_rank in seen] == [True, True, False, False]
    check_good(*(of_rank["syncs"][1] for of_rank in seen))
    for of_rank in seen:
        before, after = of_rank["syncs"]
        assert steady(after[-1][1]) == steady(before[-1][1])
    assert [of_rank["out"] for of_rank in seen] == [0] * RANKS


@scenarios("no plan")
def test_a_rank_that_knows_of_other_mappings_than_the_rest_does_not_put_them_out_of_step(seen):
    assert all(of_rank["failed"].error is not None for of_rank in seen[TP:])
    for number in range(3):
        check_good(*(of_rank["syncs"][number] for of_rank in seen))
    for of_rank in seen:
        regions = [of_rank["syncs"][1][-1][1][f"regions of {whose}"] for whose in ("this rank", "others")]
        assert regions == [0, 0]
    assert [of_rank["out"] for of_rank in seen] == [0] * RANKS


@scenarios("buckets after failures")
def test_after_a_failure_in_another_slice_a_sync_that_maps_nothing_unmaps_everything(seen):
    for number, of_ranks in enumerate(zip(*seen)):
        buckets, after, out = zip(*of_ranks)
        check_good(*after)
        for of_rank in buckets:
            synced, state = of_rank[-1]
            assert synced.error is None and synced.differing == [], number
            assert state["regions of this rank"] == state["regions of others"] == 0, number
        for of_rank in after:
            states = [steady(state) for _, state in of_rank]
            assert states[-1] == states[-2] and all(states[-1]), number
        assert out == (0,) * RANKS, number


@scenarios("called back")
def test_what_other_slices_map_comes_back_with_the_next_sync(seen):
    for of_rank in seen:
        before, after = of_rank["syncs"]
        assert of_rank["kept"] == 0, "mappings keep nothing alive"
        assert of_rank["returned"][1] == 0
        assert of_rank["seen"]["regions of this rank"] == 0
    check_good(*(of_rank["syncs"][0] for of_rank in seen))
    check_good(*(of_rank["syncs"][1] for of_rank in seen))
    for of_rank in seen:
        before, after = of_rank["syncs"]
        assert steady(after[-1][1]) == steady(before[-1][1])
    assert [of_rank["out"] for of_rank in seen] == [0] * RANKS


@scenarios("dropped", "dropped, staged")
def test_a_model_that_the_trainer_drops_is_freed(seen, request):
    is_mapped = "staged" not in request.node.callspec.id
    syncs, alive, expired, after, out = zip(*seen)
    check_good(*syncs)
    assert alive == (0,) * RANKS
    assert all(number > 0 for number in expired) == is_mapped
    check_good(*after)
    assert out == (0,) * RANKS


# --- many syncs, and what sums notice --------------------------------------------------------------------------------------


@scenarios(*(f"many: {kind}, {memory}" for kind, memory in MANY))
def test_nothing_grows_over_many_syncs(seen):
    syncs, out = zip(*seen)
    check_good(*syncs)
    for of_rank in syncs:
        states = [steady(state) for _, state in of_rank]
        assert states[3:] == [states[3]] * (len(states) - 3)
    assert out == (0,) * RANKS


@scenarios("swapped")
def test_slices_that_trade_places_are_noticed(seen):
    failed, after, out = zip(*seen)
    for one in failed:
        kind, text = one.error
        assert kind == "SyncError" and re.search(
            r"holds other values than were sent: .*experts\.\*\.gate_proj", text
        ), text
    check_good(*after)
    assert out == (0,) * RANKS
