"""That weights cannot leak, be lost or be garbled without being error: on a real engine, with planted faults.

One server serves all checks; the faults are planted on the trainer's side, between our code and the engine.
"""

import copy
import dataclasses
import gc
import os
import shutil
import stat
from pathlib import Path

import psutil
import pytest
import torch
from footprint import Footprint, leftovers
from harness import run_ranks
from test_engine import drive

import tpcolocate
from tpcolocate import errors, ipc_payload
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, BucketResult, DryRun, LoadBucket
from tpcolocate.server import channel
from tpcolocate.weights.plan import slices
from tpcolocate.weights.transport import bucket_sender, checksums, connection, mapped_memory, staging

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

NUM_SYNCS = 200
BUCKET = 400_000


def failing_sync(world, model=None, **options):
    """What a sync with a planted fault says."""
    world.perturb(3)
    try:
        world.engine.sync_weights(world.model if model is None else model(), bucket_bytes=BUCKET, **options)
    except errors.TpColocateError as error:
        return type(error).__name__, str(error)
    return None


def heal(world):
    """Whether generation is refused now, and right again after a sync without fault."""
    try:
        world.generated()
        refused = None
    except errors.EngineStateError as error:
        refused = str(error)
    world.engine.sync_weights(world.model)
    return {"refused": refused, "healed": world.generated() == world.expected()}


class planted:
    """Replaces an attribute on one rank for the length of a block."""

    def __init__(self, place, name, make, *, here=True):
        self.place, self.name, self.make, self.here = place, name, make, here

    def __enter__(self):
        self.original = getattr(self.place, self.name)
        if self.here:
            setattr(self.place, self.name, self.make(self.original))

    def __exit__(self, *exc):
        setattr(self.place, self.name, self.original)


# --- checks ----------------------------------------------------------------------------------------------------------


def everything_is_verified(world):
    world.perturb(1)
    report = world.engine.sync_weights(world.sharded(), bucket_bytes=BUCKET)
    return {
        "equal": world.generated() == world.expected(),
        "transport": report.transport,
        "verified": report.num_verified == report.num_tensors,
        "warnings": report.warnings,
    }


def a_flipped_bit(world):
    """In the staging memory of the last rank, after the checksum was taken and before the engine reads; full tensors."""

    def make(original):
        def commands(self, flat, number, make):
            made = original(self, flat, number, make)
            if any(isinstance(one.command, LoadBucket) for one in made):
                flat[1000] ^= 1
            return made

        return commands

    with planted(bucket_sender.BucketSender, "commands", make, here=world.rank == 1):
        error = failing_sync(world, parts=False)
    return {"error": error, **heal(world)}


def a_flipped_bit_of_a_slice(world):
    """In the staging memory of the last rank, after a part was staged: the sums at both ends differ."""

    def make(original):
        def fill_stage(self, number):
            half = original(self, number)
            half[8] ^= 1
            return half

        return fill_stage

    with planted(staging.Transfer, "fill_stage", make, here=world.rank == 1):
        error = failing_sync(world)
    return {"error": error, **heal(world)}


def slices_that_arrive_in_another_order(world):
    """In staging memory: a rank of a sharded model gives its readers what it should, but in another order."""

    def make(original):
        def fill_stage(self, number):
            half = original(self, number)
            end = self.plan.stages[number].num_bytes
            half[:end] = half[:end].roll(slices.ALIGNMENT)
            return half

        return fill_stage

    with planted(staging.Transfer, "fill_stage", make, here=world.rank == 1):
        error = failing_sync(world, world.sharded)
    return {"error": error, **heal(world)}


def mapped_memory_that_changes_while_it_is_read(world):
    """The trainer goes on training on another stream, say: what was summed up is no longer what is copied."""
    world.model.share_memory()
    for _ in range(3):
        report = world.engine.sync_weights(world.model)
    mapped = [r.num_mapped for r in report.ranks]
    weight = world.model.model.layers[1].mlp.down_proj.weight.data
    before = weight[0, -1].clone()

    def make(original):
        def begin(self, shards):
            sums = original(self, shards)
            if world.rank == 1:
                weight[0, -1] += 1
            return sums

        return begin

    with planted(checksums.DirectChecksums, "begin", make, here=world.rank == 1):
        error = failing_sync(world)
    weight[0, -1] = before
    return {"error": error, "mapped": mapped, **heal(world)}


def staging_that_fails_on_one_rank(world):
    def make(original):
        def fill_stage(self, number):
            original(self, number)
            raise MemoryError("no memory to stage in")

        return fill_stage

    with planted(staging.Transfer, "fill_stage", make, here=world.rank == 1):
        error = failing_sync(world, world.sharded)
    return {"error": error, **heal(world)}


def swapped_payloads(world):
    """What was made for TP rank 0 reaches TP rank 1, and the other way round."""

    def make(original):
        def post(self, commands, number):
            return original(self, {k: commands[len(commands) - 1 - k] for k in commands}, number)

        return post

    with planted(channel.Channel, "post", make):
        error = failing_sync(world)
    return {"error": error, **heal(world)}


def a_skipped_tensor(world):
    """Under a name that the engine does not know, as an unpatched SGLang would ignore it behind a 200."""
    victim = "model.layers.1.mlp.down_proj.weight"

    def make(original):
        def described(entries):
            return [
                [e[0].replace("mlp.down_proj", "mlp.nowhere") if e[0] == victim else e[0], *e[1:]]
                for e in original(entries)
            ]

        return described

    with planted(ipc_payload, "described", make):
        error = failing_sync(world, parts=False)
    return {"error": error, **heal(world)}


def a_loader_that_fails(world):
    """A shape that raises inside the engine: with SGLang's own deserialisation this kills the server."""

    def make(original):
        def described(entries):
            # one row too many for what the bucket holds of it: the view raises in the worker
            return [
                [*e[:2], [e[2][0] + 1, *e[2][1:]], *e[3:]] if e[0] == "model.norm.weight" else e
                for e in original(entries)
            ]

        return described

    with planted(ipc_payload, "described", make):
        error = failing_sync(world, parts=False)
    return {"error": error, **heal(world), "health": world.engine.health().value}


def one_payload_for_two_readers(world):
    """The defect that this library exists to end: the handle of TP rank 0 is opened by both workers."""

    def make(original):
        def post(self, commands, number):
            if isinstance(commands[0].command, LoadBucket):
                commands = {k: Addressed(k, commands[0].command) for k in commands}
            return original(self, commands, number)

        return post

    before = set(os.listdir("/dev/shm"))
    with planted(channel.Channel, "post", make):
        error = failing_sync(world, parts=False)
    result = {"error": error, **heal(world)}
    # What the fault left is taken back by the sync that healed it.
    result["left"] = sorted(
        name for name in set(os.listdir("/dev/shm")) - before if name.startswith(f"torch_{os.getpid()}_")
    )
    return result


def an_export_that_fails_on_one_rank(world):
    def make(original):
        def export(self, *args, **kwargs):
            raise MemoryError("no memory for a handle")

        return export

    with planted(ipc_payload.Ledger, "export", make, here=world.rank == 1):
        error = failing_sync(world)
    return {"error": error, **heal(world)}


# What the folder holds besides the files of syncs; see `tpcolocate.runtime_folder`.
OF_THE_LAUNCH = {"owner.json", "processes.json", "announcement.json", "tmp"}


def handles_that_do_not_open(world):
    """As with separate IPC namespaces: the name means nothing over there.  The server must survive it."""

    def make(original):
        def describe(self):
            return {**original(self), "name": ipc_payload._text(b"/torch_0_0_0")}

        return describe

    sync = world.engine._sync
    sync.state.handle_problems.clear()
    found = {}
    with planted(ipc_payload.CpuHandle, "describe", make, here=world.rank == 1):
        try:
            world.engine.sync_weights(world.model, transport="ipc", parts=False)
        except errors.SyncError as error:
            found["ipc"] = str(error)
        world.perturb(7)
        shared = copy.deepcopy(world.model)
        shared.share_memory()  # which an engine that is new could have mapped
        sync.state.loader_map.clear()
        report = world.engine.sync_weights(shared, bucket_bytes=BUCKET)
    found.update(
        exported=[r.num_exported for r in report.ranks],
        transport=report.transport, warnings=report.warnings, verified=report.num_verified == report.num_tensors,
        equal=world.generated() == world.expected(),
        files=sorted(set(os.listdir(sync.context.folder)) - OF_THE_LAUNCH),
    )  # fmt: skip
    sync.state.handle_problems.clear()
    return found


def files_in_a_folder(world):
    """The other transport by choice, in a folder of the user's."""
    world.perturb(8)
    folder = Path(world.model_dir).parent / "exchange"
    folder.mkdir(exist_ok=True)
    report = world.engine.sync_weights(world.sharded(), transport="file", folder=folder, bucket_bytes=BUCKET)
    return {
        "equal": world.generated() == world.expected(), "transport": report.transport, "left": os.listdir(folder),
        "verified": report.num_verified == report.num_tensors, "exported": [r.num_exported for r in report.ranks],
    }  # fmt: skip


def a_removed_folder(world):
    """What systemd does with files in /dev/shm when their user logs out."""
    world.perturb(9)
    shared = world.engine._sync.context.folder
    if world.colo.is_owner:
        shutil.rmtree(shared)
    world.colo._slice.all_gather(None, what="remove the folder")
    report = world.engine.sync_weights(world.model, bucket_bytes=BUCKET)
    with tpcolocate.connect(world.colo.job) as client:
        url = client.url
    return {
        "equal": world.generated() == world.expected(), "verified": report.num_verified == report.num_tensors,
        "mode": stat.S_IMODE(shared.stat().st_mode), "found": url == world.engine.url,
    }  # fmt: skip


def footprint():
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    # Of this rank and its server alone: others on this machine may have servers of their own.
    ours = tuple(f"torch_{process.pid}_" for process in processes)
    shm = {name: (Path("/dev/shm") / name).stat().st_size for name in os.listdir("/dev/shm") if name.startswith(ours)}
    return {
        "files": len(shm),
        "bytes": sum(shm.values()),
        "fds": sum(p.num_fds() for p in processes),
        "rss": sum(p.memory_info().rss for p in processes),
    }


def repeated(world, times, **options):
    """Syncs in a row: what the machine holds before and after, and how many were as they should be."""
    for _ in range(10):
        world.engine.sync_weights(world.model, **options)
    world.generated()
    gc.collect()  # what the checks before this one have left
    world.engine.sync_weights(world.model, **options)
    before = footprint()
    good = moved = 0
    for _ in range(times):
        report = world.engine.sync_weights(world.model, **options)
        good += (
            all(r.num_exported == r.num_returned and r.num_exported + r.num_mapped > 0 for r in report.ranks)
            and report.num_verified == report.num_tensors == report.num_replayed
        )
        moved += report.num_bytes
    world.generated()
    return {
        "before": before, "after": footprint(), "good": good, "times": times, "moved": moved, "warnings": report.warnings,
        "bytes": [(r.direct_bytes, r.staged_bytes) for r in report.ranks],
    }  # fmt: skip


def many_syncs(world):
    """/dev/shm, descriptors and memory over 200 syncs, and every handle back each time."""
    return repeated(world, NUM_SYNCS)


def many_syncs_of_full_tensors(world):
    return repeated(world, 40, parts=False)


def many_syncs_of_mapped_memory(world):
    """The worker reads the trainer's parameters where they lie: nothing is exported, nothing staged."""
    world.model.share_memory()
    return repeated(world, 40)


def a_sync_that_repeats(world):
    """What has not changed is not looked at again; what has, on whichever rank, is."""
    sync = world.engine._sync
    found = {}

    def step(name, seed):
        world.perturb(seed)
        report = world.engine.sync_weights(world.model)
        [mine] = [r for r in report.ranks if r.rank == world.rank]
        found[name] = {
            "phases": set(mine.seconds) & {"plan", "export"}, "equal": world.generated() == world.expected(),
            "verified": report.num_verified == report.num_tensors, "bytes": report.num_bytes,
        }  # fmt: skip

    for _ in range(2):
        world.engine.sync_weights(world.model)
    step("repeated", 21)
    projection = world.model.model.layers[0].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().clone().share_memory_())
    step("a parameter elsewhere", 22)
    for _ in range(2):
        world.engine.sync_weights(world.model)
    step("repeated again", 23)
    if world.rank == 1:
        sync.state.cached_sync = None
    step("one rank is not sure", 24)
    step("and is again", 25)
    sync.state.loader_map._plan_ids = ("other", "workers")
    step("workers that are others", 26)
    return found


def mapped_memory_that_the_trainer_dropped(world):
    """As when the trainer has moved its weights away: what only the worker still maps is called back by wake()."""
    had = world.engine._sync.state.mappings.all()
    before = [handle.count() for mapping in had for handle in mapping.handles.values()]
    with planted(mapped_memory.PersistentMappings, "expired", lambda original: lambda self: self.all()):
        world.engine.wake()
    after = [handle.count() for mapping in had for handle in mapping.handles.values()]
    world.perturb(9)
    report = world.engine.sync_weights(world.model)
    return {
        "before": set(before), "after": set(after), "num": len(had), "equal": world.generated() == world.expected(),
        "verified": report.num_verified == report.num_tensors,
    }  # fmt: skip


def mapped_memory_of_another_model(world):
    """A model in other memory: the mappings of the one before are released at its first sync."""
    world.engine.sync_weights(world.model)
    world.engine.sync_weights(world.model)
    mapped = world.engine._sync.state.mappings.all()
    old, world.model = world.model, copy.deepcopy(world.model)
    world.perturb(10)
    report = world.engine.sync_weights(world.model)
    del old
    return {
        "mapped": len(mapped), "back": {handle.count() for one in mapped for handle in one.handles.values()}, "left": [r.num_mapped for r in report.ranks],
        "equal": world.generated() == world.expected(),
    }  # fmt: skip


def handles_of_mapped_memory_that_do_not_open(world):
    """The handles of staging memory do, those of the trainer's own memory do not: the library stages, and says so."""
    world.model.share_memory()
    world.engine.sync_weights(world.model)

    def make(original):
        def add(self, storage, readers):
            added = original(self, storage, readers)
            for handle in added.handles.values():
                describe = handle.describe
                handle.describe = lambda describe=describe: {
                    **describe(), "name": ipc_payload._text(b"/torch_0_0_0")
                }  # fmt: skip
            return added

        return add

    with planted(mapped_memory.PersistentMappings, "add", make, here=world.rank == 1):
        report = world.engine.sync_weights(world.model)
        later = world.engine.sync_weights(world.model)
    world.engine._sync.state.mapped.problem = None
    world.model = copy.deepcopy(world.model)
    return {
        "warnings": report.warnings, "later": later.warnings, "mapped": [r.num_mapped for r in later.ranks],
        "equal": world.generated() == world.expected(), "verified": later.num_verified == later.num_tensors,
    }  # fmt: skip


def traced_anew(world, model=None, times=1):
    """As with an engine that was just started: what is known of its loader is asked for again."""
    world.engine._sync.state.loader_map.clear()
    world.perturb(31)
    reports = [world.engine.sync_weights(world.model if model is None else model) for _ in range(times)]
    return reports, {
        "equal": world.generated() == world.expected(),
        "verified": all(report.num_verified == report.num_tensors for report in reports),
        "by_plan": [report.num_replayed == report.num_tensors for report in reports],
        "warnings": reports[0].warnings,
        "phases": [{"trace", "verify"} & set(report.ranks[0].seconds) for report in reports],
        "staged": [r.staged_bytes / report.num_bytes for report in reports for r in report.ranks],
    }


def memory_that_is_mapped_for_the_first_sync_alone(world):
    """Nothing but samples is staged, where an engine could map the trainer's memory, and all of it comes back."""
    world.model = copy.deepcopy(world.model)
    world.model.share_memory()
    order = []

    def noting(word):
        def make(original):
            def noted(self, *args, **kwargs):
                order.append(word)
                return original(self, *args, **kwargs)

            return noted

        return make

    with (
        planted(ipc_payload.Ledger, "export_storage", noting("export")),
        planted(connection.OwnerConnection, "wait", noting("wait for the workers")),
    ):
        reports, found = traced_anew(world, times=2)
    model = sum(p.numel() * p.element_size() for p in world.model.parameters())
    return {
        **found,
        "exported while the server is waited for": order.index("export") < order.index("wait for the workers")
        if world.rank == 0
        else None,
        "direct": [r.direct_bytes / model for report in reports for r in report.ranks],
        "mapped": [r.num_mapped > 0 for report in reports for r in report.ranks],
        "back": all(r.num_exported == r.num_returned for report in reports for r in report.ranks),
    }


def a_loader_that_cannot_make_a_dry_run(world):
    """One that asks for a weight's values, say, on one TP rank: it is traced while it loads whole buckets, with a warning."""

    def make(original):
        def post(self, commands, number):
            if isinstance(commands[0].command, DryRun):
                commands = {**commands, 1: Addressed(1, DryRun([["model.norm.weight", "no_such_dtype", [1]]]))}
            return original(self, commands, number)

        return post

    with planted(channel.Channel, "post", make):
        _, found = traced_anew(world, times=2)
    world.engine._sync.state.dry_run_problem = None
    return found


def a_loader_that_deviates_from_its_dry_run(world):
    """One TP rank says so of a sample: all that was traced is discarded, and full tensors are sent."""

    def make(original):
        def collect(self, number, *, timeout_s):
            replies = original(self, number, timeout_s=timeout_s)
            result = replies[1].result
            if isinstance(result, BucketResult) and result.deviating is not None:
                result = dataclasses.replace(result, deviating=["model.norm.weight"])
                replies[1] = dataclasses.replace(replies[1], result=result)
            return replies

        return collect

    with planted(channel.Channel, "collect", make):
        _, found = traced_anew(world, times=2)
    world.engine._sync.state.dry_run_problem = None
    return found


def a_transient_export_that_fails_on_one_rank(world):
    """The library stages, as where nothing can be mapped."""
    world.model = copy.deepcopy(world.model)
    world.model.share_memory()

    def make(original):
        def export_storage(storage):
            if storage.nbytes() == world.model.model.norm.weight.untyped_storage().nbytes():
                raise RuntimeError("no memory for a handle")
            return original(storage)

        return export_storage

    with planted(ipc_payload, "export_storage", make, here=world.rank == 1):
        reports, found = traced_anew(world, times=2)
    world.engine._sync.state.mapped.problem = None
    return {
        **found,
        "direct": [r.direct_bytes for report in reports for r in report.ranks],
        "back": all(r.num_exported == r.num_returned for r in reports[1].ranks),
    }


def samples_that_do_not_arrive(world):
    def make(original):
        def commands(self, flat, number, make):
            made = original(self, flat, number, make)
            if any(isinstance(one.command, LoadBucket) and one.command.watch for one in made):
                flat[1000] ^= 1
            return made

        return commands

    world.engine._sync.state.loader_map.clear()
    with planted(bucket_sender.BucketSender, "commands", make, here=world.rank == 1):
        error = failing_sync(world)
    return {"error": error, **heal(world)}


def a_peft_model_in_shared_memory(world):
    """Its base stays where it is and gets persistent mappings; the merged weights follow in buckets, sync after sync."""
    import peft

    torch.manual_seed(11)  # the same adapters on every rank
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(world.model), config)
    model.share_memory()
    generator = torch.Generator().manual_seed(12)
    steps = []
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        report = world.engine.sync_weights(model, bucket_bytes=BUCKET)
        merged = copy.deepcopy(model).merge_and_unload()
        steps.append({
            "equal": world.generated() == world.expected(merged),
            "verified": report.num_verified == report.num_tensors,
            "mapped": all(r.num_mapped for r in report.ranks),
            "by plan and in buckets": report.num_buckets > 1,
        })  # fmt: skip
    return steps


CHECKS = [
    everything_is_verified, a_skipped_tensor, a_loader_that_fails, a_flipped_bit, a_flipped_bit_of_a_slice, slices_that_arrive_in_another_order,
    staging_that_fails_on_one_rank, swapped_payloads, an_export_that_fails_on_one_rank, handles_that_do_not_open, files_in_a_folder, a_removed_folder,
    many_syncs, many_syncs_of_full_tensors, handles_of_mapped_memory_that_do_not_open, mapped_memory_that_changes_while_it_is_read,
    many_syncs_of_mapped_memory, a_sync_that_repeats, memory_that_is_mapped_for_the_first_sync_alone, a_loader_that_cannot_make_a_dry_run,
    a_loader_that_deviates_from_its_dry_run, a_transient_export_that_fails_on_one_rank, samples_that_do_not_arrive, mapped_memory_that_the_trainer_dropped, mapped_memory_of_another_model, a_peft_model_in_shared_memory, one_payload_for_two_readers,
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tiny_model_dir):
    before = Footprint.now()
    found = run_ranks(drive, 2, str(tiny_model_dir(family="qwen3", tie=False)), 2, CHECKS, timeout_s=1500)
    return found, leftovers(before)


def results(found, check):
    values = [
        of_rank.get(check.__name__, AssertionError("not reached: see the checks before it")) for of_rank in found[0]
    ]
    for rank, value in enumerate(values):
        if isinstance(value, Exception):
            raise AssertionError(f"rank {rank}: {type(value).__name__}: {value}") from value
    return values


def test_a_sync_verifies_every_tensor(found):
    for value in results(found, everything_is_verified):
        assert value == {"equal": True, "transport": "ipc", "verified": True, "warnings": ()}


FAULTS = [
    (a_flipped_bit, "SyncError", "TP rank 1: RuntimeError: the bucket does not hold what the trainer packed"),
    (a_flipped_bit_of_a_slice, "SyncError", "TP rank 1 holds other values than were sent"),
    (slices_that_arrive_in_another_order, "SyncError", "holds other values than were sent"),
    (
        mapped_memory_that_changes_while_it_is_read,
        "SyncError",
        "TP rank 1 holds other values than were sent: model.layers.1.mlp.down_proj.weight",
    ),
    (staging_that_fails_on_one_rank, "RankFailedError", "MemoryError: no memory to stage in"),
    (
        samples_that_do_not_arrive,
        "SyncError",
        "TP rank 1: RuntimeError: the bucket does not hold what the trainer packed",
    ),
    (swapped_payloads, "SyncError", "the payload of TP rank 1 reached TP rank 0"),
    (a_skipped_tensor, "SyncError", "in part or not at all: model.layers.1.mlp.down_proj.weight"),
    (a_loader_that_fails, "SyncError", "TP rank 0: RuntimeError"),
    (an_export_that_fails_on_one_rank, "RankFailedError", "MemoryError: no memory for a handle"),
    # Which of the two handles is found first depends on when SGLang lets go: the one that was opened twice is then
    # over-released, the one that was never opened does not come back.
    (one_payload_for_two_readers, ("SyncError", "DeadlineError"), "bucket "),
]


@pytest.mark.parametrize("check, kind, words", FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_planted_fault_is_caught_on_every_rank_and_can_be_healed(found, check, kind, words):
    values = results(found, check)
    for value in values:
        assert value["error"] is not None, "the fault went unnoticed"
        assert value["error"][0] in ((kind,) if isinstance(kind, str) else kind) and words in value["error"][1]
        assert "weights are unknown" in value["refused"], "nothing may be generated from such weights"
        assert value["healed"]
    assert values[0]["error"] == values[1]["error"]


def test_a_failing_loader_does_not_kill_the_server(found):
    assert {value["health"] for value in results(found, a_loader_that_fails)} == {"ready"}


def test_one_payload_for_two_readers_is_named_on_the_first_sync_and_leaves_nothing(found):
    for value in results(found, one_payload_for_two_readers):
        assert any(
            words in value["error"][1] for words in ("two readers had one payload", "never opened", "did not arrive")
        )
        assert value["left"] == []


def test_handles_that_do_not_open_are_found_by_the_preflight_and_files_take_over(found):
    for value in results(found, handles_that_do_not_open):
        assert "do not open in the engine: TP rank 1" in value["ipc"] and 'transport="auto"' in value["ipc"]
        assert value["transport"] == "file" and value["verified"] and value["equal"]
        assert any("go through files" in warning for warning in value["warnings"])
        assert value["files"] == [] and value["exported"] == [0, 0]


def test_a_sync_needs_no_folder_that_something_else_has_removed(found):
    for value in results(found, a_removed_folder):
        assert value == {"equal": True, "verified": True, "mode": 0o700, "found": True}


def test_files_by_choice(found):
    for value in results(found, files_in_a_folder):
        assert value == {"equal": True, "transport": "file", "left": [], "verified": True, "exported": [0, 0]}


@pytest.mark.parametrize(
    "check", [many_syncs, many_syncs_of_full_tensors, many_syncs_of_mapped_memory], ids=lambda check: check.__name__
)
def test_many_syncs_grow_nothing(found, check):
    for value in results(found, check):
        before, after = value["before"], value["after"]
        assert value["good"] == value["times"] and value["warnings"] == ()
        assert (after["files"], after["bytes"]) == (before["files"], before["bytes"])
        assert after["fds"] <= before["fds"] + 2
        assert after["rss"] - before["rss"] < max(16 * 2**20, value["moved"] / 20)


def test_slices_are_less_than_full_tensors_and_mapped_memory_is_not_staged(found):
    [staged, _] = results(found, many_syncs)
    [whole, _] = results(found, many_syncs_of_full_tensors)
    [mapped, _] = results(found, many_syncs_of_mapped_memory)
    model = whole["moved"] / whole["times"]
    for (none, parts), (also_none, full), (direct, nothing) in zip(staged["bytes"], whole["bytes"], mapped["bytes"]):
        assert (none, also_none, nothing) == (0, 0, 0) and full >= model
        assert direct == parts and model / 2 <= parts < 0.55 * model, "half of it, and the norms"


def test_a_sync_repeats_the_last_one_only_if_every_rank_finds_all_as_it_was(found):
    for value in results(found, a_sync_that_repeats):
        assert all(step["equal"] and step["verified"] for step in value.values())
        assert len({step["bytes"] for step in value.values()}) == 1
        assert {name: step["phases"] for name, step in value.items()} == {
            "repeated": set(), "a parameter elsewhere": {"plan"}, "repeated again": set(), "one rank is not sure": {"plan"},
            "and is again": set(), "workers that are others": {"plan"},
        }  # fmt: skip


def test_a_first_sync_makes_a_dry_run_and_transient_mappings(found):
    for value in results(found, memory_that_is_mapped_for_the_first_sync_alone):
        assert value["equal"] and value["verified"] and value["by_plan"] == [True, True] and value["warnings"] == ()
        assert value["phases"] == [{"trace", "verify"}, {"verify"}]
        # One of each kind, which is one of two layers and the embeddings.
        assert all(0.6 < staged < 0.7 for staged in value["staged"][:2]) and value["staged"][2:] == [0, 0]
        assert value["direct"][:2] == value["direct"][2:] and all(0.5 <= direct < 0.55 for direct in value["direct"])
        assert value["mapped"] == [False, False, True, True] and value["back"]
        assert value["exported while the server is waited for"] is not False


def test_where_memory_cannot_be_exported_the_first_sync_stages(found):
    for value in results(found, a_transient_export_that_fails_on_one_rank):
        assert value["equal"] and value["verified"] and value["by_plan"] == [True, True] and value["back"]
        [warning] = value["warnings"]
        assert "is not mapped by the engine: no memory for a handle" in warning and value["direct"] == [0] * 4


@pytest.mark.parametrize("check, words", [
    (a_loader_that_cannot_make_a_dry_run, "TP rank 1: AttributeError"),
    (a_loader_that_deviates_from_its_dry_run, "its loader treats model.norm.weight differently than in the dry run"),
])  # fmt: skip
def test_what_a_dry_run_cannot_show_is_traced_from_weights(found, check, words):
    for value in results(found, check):
        assert value["equal"] and value["verified"]
        [warning] = value["warnings"]
        assert "traced from whole buckets" in warning and words in warning
        assert all(staged >= 1 for staged in value["staged"][:2]), "whole"
        assert all(staged < 1.1 for staged in value["staged"][2:]), "no samples beside it"


def test_memory_that_the_trainer_dropped_comes_back(found):
    for value in results(found, mapped_memory_that_the_trainer_dropped):
        assert value["num"] > 0 and value["before"] == {1} and value["after"] == {0}
        assert value["equal"] and value["verified"]
    for value in results(found, mapped_memory_of_another_model):
        assert value["mapped"] > 0 and value["back"] == {0} and value["left"] == [0, 0] and value["equal"]


def test_a_peft_model_in_shared_memory_is_synced_five_times(found):
    for steps in results(found, a_peft_model_in_shared_memory):
        assert [step["mapped"] for step in steps] == [False, True, True, True, True]
        assert all(step["equal"] and step["verified"] and step["by plan and in buckets"] for step in steps), steps


def test_what_cannot_be_mapped_is_staged_with_a_warning(found):
    for value in results(found, handles_of_mapped_memory_that_do_not_open):
        [warning] = value["warnings"]
        assert "is not mapped by the engine: TP rank 1" in warning
        assert value["later"] == () and value["mapped"] == [0, 0] and value["equal"] and value["verified"]


def test_the_fault_was_planted_into_mapped_memory(found):
    for value in results(found, mapped_memory_that_changes_while_it_is_read):
        assert all(value["mapped"])


def test_nothing_is_left_behind(found):
    assert found[1] == []
