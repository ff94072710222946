"""Behaviour that only a GPU can show: CUDA handles, the memory saver, UUIDs.  Two ranks, one SGLang server at tp=2.

Only GPUs in CUDA_VISIBLE_DEVICES are used.  On two GPUs each rank takes its own; on a single one both share it
(`TPCOLOCATE_TEST_ARGS` may then hold more server arguments as JSON; NCCL has to permit several ranks on a GPU).
"""

import base64
import copy
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import gpu_environment, run_ranks

import tpcolocate
from tpcolocate import errors, ipc_payload
from tpcolocate.in_server.tpcolocate_receiver import kernels
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.in_server.tpcolocate_receiver.copy_program import CopyProgram
from tpcolocate.in_server.tpcolocate_receiver.handles import open_handle
from tpcolocate.in_server.tpcolocate_receiver.kernel_tables import CASTS, ChecksumTable, CopyTable, Layout, Slices
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, LoadBucket
from tpcolocate.server import channel
from tpcolocate.weights.transport import bucket_sender
from tpcolocate.weights.transport.checksums import DirectChecksums

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_kernels import WITHOUT_COMPILER

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

PROMPTS = [[5, 6, 7, 100, 200], [100, 200, 300, 400]]
SERVER = {
    **WITHOUT_COMPILER, "mem_fraction_static": 0.2, "enable_memory_saver": True, "skip_tokenizer_init": True,
    "context_length": 512,
}  # fmt: skip


def used_mib():
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def gap(engine, model, device):
    """Largest difference of a log-probability between the engine and the trainer."""
    worst = 0.0
    answers = engine.generate(PROMPTS, {"temperature": 1.0, "max_new_tokens": 16}, return_logprob=True)
    for prompt, answer in zip(PROMPTS, answers):
        pairs = answer["meta_info"]["output_token_logprobs"]
        ids = torch.tensor([prompt + [pair[1] for pair in pairs]], device=device)
        with torch.no_grad():
            logits = model(ids).logits[0].float().log_softmax(-1)
        for i, (logprob, token, *_) in enumerate(pairs):
            worst = max(worst, abs(logprob - logits[len(prompt) - 1 + i, token].item()))
    return worst


def spoiled_handle(handle):
    """One that CUDA opens on no device, as that of a GPU without peer access; its kind and version stay."""
    content = base64.b64decode(handle["handle"])
    return {**handle, "handle": base64.b64encode(content[:2] + bytes(len(content) - 2)).decode()}


def drive(rank, folder, world):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    shared = torch.cuda.device_count() < world
    device = torch.device("cuda", 0 if shared else rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    extra = json.loads(os.environ.get("TPCOLOCATE_TEST_ARGS", "{}"))
    found = {}
    with tpcolocate.init(world, device=device, allow_shared_devices=shared, timeout_s=120) as colo:
        found["visible"] = colo.visible_devices
        with colo.launch(folder, health_timeout_s=500, **{**SERVER, **extra}) as engine:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            dist.barrier()
            found["gap_before"] = gap(engine, model, device)
            found["report"] = engine.sync_weights(model, bucket_bytes=64 * 2**20)
            found["gap_after"] = gap(engine, model, device)

            used = []
            for _ in range(20):
                report = engine.sync_weights(model, bucket_bytes=64 * 2**20, parts=False)
                dist.barrier()
                used.append(used_mib())
            found["used"], found["replayed"] = used, report.num_replayed == report.num_tensors

            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            parts = []
            for _ in range(3):  # staged, then mapped
                parts.append(engine.sync_weights(model, bucket_bytes=64 * 2**20, parts=True))
            found["parts"], found["gap_parts"] = parts, gap(engine, model, device)
            used = []
            for _ in range(20):
                engine.sync_weights(model, bucket_bytes=64 * 2**20, parts=True)
                dist.barrier()
                used.append(used_mib())
            found["used_parts"] = used
            ends = time.monotonic() + 60  # the workers' kernel is compiled beside all this
            while True:
                found["worker_seconds"] = engine.sync_weights(model, bucket_bytes=64 * 2**20).worker_seconds
                ready = torch.tensor(
                    [int("one_pass" in found["worker_seconds"] or time.monotonic() > ends)], device=device
                )
                dist.all_reduce(ready, op=dist.ReduceOp.MIN)
                if ready.item():
                    break
            found["gap_one_pass"] = gap(engine, model, device)
            found["one_launch"] = engine._sync.state.cached_plan.planned.direct.is_one_launch
            with torch.no_grad():  # in place, which the graphs must read anew; and elsewhere, which they must not
                model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
                model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
                    model.model.layers[1].mlp.up_proj.weight * 1.5
                )
            engine.sync_weights(model, bucket_bytes=64 * 2**20)
            found["gap_replaced"] = gap(engine, model, device)
            for _ in range(3):  # all of it is mapped again
                engine.sync_weights(model, bucket_bytes=64 * 2**20)
            mapped = [handle for one in engine._sync.state.mappings.all() for handle in one.handles.values()]
            counts = [handle.count() for handle in mapped]
            model.to("cpu")  # a trainer that frees its memory
            torch.cuda.empty_cache()
            dist.barrier()
            before = used_mib()
            engine.wake()
            dist.barrier()
            found["mapped"] = (set(counts), {handle.count() for handle in mapped}, before - used_mib())
            model.to(device)
            begin = DirectChecksums.begin
            before = model.model.layers[1].mlp.down_proj.weight.detach().clone()

            def spoiled(self, shards):
                sums = begin(self, shards)
                torch.cuda.synchronize()
                if rank == 1:
                    model.model.layers[1].mlp.down_proj.weight.data[-1, -1] += 1  # which TP rank 1 reads
                    torch.cuda.synchronize()
                return sums

            for _ in range(2):
                engine.sync_weights(model, parts=True)
            DirectChecksums.begin = spoiled
            try:
                engine.sync_weights(model, parts=True)
            except errors.SyncError as error:
                found["spoiled"] = str(error)
            DirectChecksums.begin = begin
            if rank == 1:
                # To the last bit: replicas are compared.
                model.model.layers[1].mlp.down_proj.weight.data.copy_(before)

            original = bucket_sender.BucketSender.commands

            def corrupted(self, flat, number, make):
                made = original(self, flat, number, make)
                if rank == 1 and any(isinstance(one.command, LoadBucket) for one in made):
                    flat[12345] ^= 1
                    torch.cuda.synchronize()
                return made

            bucket_sender.BucketSender.commands = corrupted
            try:
                engine.sync_weights(model, parts=False)
            except errors.SyncError as error:
                found["flipped"] = str(error)
            bucket_sender.BucketSender.commands = original

            describe = ipc_payload.CudaHandle.describe
            engine._sync.state.handle_problems.clear()
            if rank == 1:
                ipc_payload.CudaHandle.describe = lambda self: spoiled_handle(describe(self))
            found["file"] = engine.sync_weights(model).transport
            ipc_payload.CudaHandle.describe = describe
            engine._sync.state.handle_problems.clear()

            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            before = used_mib()
            engine.sleep()
            found["freed"] = before - used_mib()
            found["garbage"] = []
            for tags in (["weights"], None):
                engine.wake(tags)
                try:
                    engine.generate(PROMPTS)
                except errors.EngineStateError as error:
                    found["garbage"].append(str(error))
            engine.sleep()
            engine.wake(["weights"])
            engine.sync_weights(model)
            engine.wake()
            found["gap_fsdp2"] = gap(engine, model, device)
            found["fsdp2_parts"] = [engine.sync_weights(model, parts=True, bucket_bytes=64 * 2**20) for _ in range(4)]
            found["gap_fsdp2_parts"] = gap(engine, model, device)
            found["fan_out"] = engine.sync_weights(model, payloads="fan_out").num_verified
            # FSDP's forward is a collective: no rank may go on while another still asks the trainer
            dist.barrier()

            # The last, since it leaves a handle that is never opened: what was made for TP rank 0 is opened by both workers.
            post = channel.Channel.post

            def duplicated(self, commands, number):
                if isinstance(commands[0].command, LoadBucket):
                    commands = {k: Addressed(k, commands[0].command) for k in commands}
                return post(self, commands, number)

            channel.Channel.post = duplicated
            try:
                engine.sync_weights(model, parts=False, bucket_bytes=64 * 2**20)
            except errors.TpColocateError as error:
                found["duplicated"] = str(error)
            channel.Channel.post = post
    dist.destroy_process_group()
    return found


def in_a_process(rank, work, *arguments):
    return work(*arguments)


def save_model(folder):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072,
        vocab_size=4096, tie_word_embeddings=False, initializer_range=0.06, dtype="bfloat16",
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("gpu-model"))
    # In a process of its own: CUDA has seen the devices of this one before the session's environment was cleaned.
    run_ranks(
        in_a_process,
        1,
        save_model,
        folder,
        timeout_s=100,
        init_group=False,
        start_method="spawn",
        env=gpu_environment(),
    )
    return run_ranks(
        drive,
        2,
        folder,
        2,
        timeout_s=800,
        init_group=False,
        start_method="spawn",
        env={"GLOO_SOCKET_IFNAME": None, "OMP_NUM_THREADS": "4", **gpu_environment()},
    )


def test_log_probabilities_follow_the_trainer_only_after_a_sync(found):
    for value in found:
        # bf16 noise on random weights is some tenths; other weights are whole units away
        assert value["gap_after"] < 1.0 and value["gap_fsdp2"] < 1.0
        assert value["gap_before"] > 4 * max(value["gap_after"], value["gap_fsdp2"])
        assert value["report"].transport == "ipc" and value["report"].num_verified == value["report"].num_tensors


def test_twenty_syncs_take_no_device_memory(found):
    used = found[0]["used"]
    # Both halves of the staging memory may be allocated a second time, once: if a handle comes back too late to be reused.
    assert len(set(used)) <= 2 and max(used) - min(used) <= 2 * 64, used
    assert all(value["replayed"] for value in found)


def test_a_first_sync_plans_by_a_dry_run_and_reads_the_trainers_memory_in_place(found):
    for value in found:
        report = value["report"]
        assert report.num_replayed == report.num_tensors and report.warnings == ()
        assert all(r.direct_bytes > 0 and r.num_mapped == 0 and r.num_exported == r.num_returned for r in report.ranks)


def test_parts_are_copied_from_mapped_memory_and_take_none(found):
    for value in found:
        assert value["gap_parts"] < 1.0 and value["gap_fsdp2_parts"] < 1.0
        for report in (value["parts"][-1], value["fsdp2_parts"][-1]):
            assert report.num_verified == report.num_tensors == report.num_replayed and report.warnings == ()
            assert all(r.num_mapped > 0 and r.direct_bytes > 0 for r in report.ranks)
        assert all(r.staged_bytes == 0 for r in value["parts"][-1].ranks), "a plain module is read in place"
        assert max(value["used_parts"]) == min(value["used_parts"])


def test_repeated_syncs_are_queued_as_one_launch_that_reads_current_values(found):
    assert all(value["one_launch"] and value["gap_replaced"] < 1.0 for value in found)


def test_one_kernel_copies_and_reads_back_once_it_is_compiled(found):
    assert all("one_pass" in value["worker_seconds"] and value["gap_one_pass"] < 1.0 for value in found)


def test_memory_that_the_trainer_moved_away_goes_back_to_the_driver(found):
    for value in found:
        before, after, freed = value["mapped"]
        assert before == {1} and after == {0} and freed > 100


def test_mapped_memory_that_changes_while_it_is_read_is_reported(found):
    words = "TP rank 1 holds other values than were sent: model.layers.1.mlp.down_proj.weight"
    assert all(words in value["spoiled"] for value in found)


def test_a_flipped_bit_is_caught_on_every_rank(found):
    assert all("TP rank 1" in value["flipped"] and "checksum" in value["flipped"] for value in found)


def test_one_payload_for_two_readers_is_reported_on_the_first_sync(found):
    assert found[0]["duplicated"] == found[1]["duplicated"]
    assert "two readers had one payload" in found[0]["duplicated"]


def test_memory_that_a_worker_cannot_open_sends_the_weights_through_files(found):
    assert {value["file"] for value in found} == {"file"}


def test_sleep_frees_memory_and_garbage_is_not_generated_from(found):
    assert all(value["freed"] > 1000 for value in found)
    for value in found:
        asleep, lost = value["garbage"]
        assert "while asleep" in asleep and "hold garbage" in lost


def test_fan_out_is_verified_too(found):
    assert all(value["fan_out"] == value["report"].num_tensors for value in found)


def offloaded(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    from tpcolocate.weights.sources.lazy_tensor import full_tensor
    from tpcolocate.weights.sources.named_weights import NamedWeights

    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fully_shard(model, mesh=init_device_mesh("cuda", (world,)), offload_policy=CPUOffloadPolicy())
    shards = {parameter.to_local().device.type for parameter in model.parameters()}
    full = {name: full_tensor(item) for name, item in NamedWeights.of(model)}
    equal = all(torch.equal(full[name].cpu(), tensor) for name, tensor in expected.items())
    return shards, {tensor.device.type for tensor in full.values()}, equal


def test_offloaded_shards_are_gathered_by_the_gpus(monkeypatch):
    for name, value in gpu_environment().items():
        monkeypatch.setenv(name, value)
    world = min(2, torch.cuda.device_count())
    found = run_ranks(offloaded, world, world, backend="nccl", timeout_s=120, env=gpu_environment())
    assert found == [({"cpu"}, {"cuda"}, True)] * world


# --- kernels, without a server ---------------------------------------------------------------------------------------


def bits_of(tensor):
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def every_number(dtype, device):
    """All of two bytes; of four, all signs, exponents and leading bits, with what decides how they are rounded behind."""
    if dtype is not torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    leading = torch.arange(-(2**15), 2**15, dtype=torch.int64) << 16
    behind = torch.tensor(
        [
            0,
            1,
            0xFFF,
            0x1000,
            0x1001,
            0x2FFF,
            0x3000,
            0x3001,
            0x7FFE,
            0x7FFF,
            0x8000,
            0x8001,
            0x8002,
            0xFFFE,
            0xFFFF,
            0xABC,
        ]
    )
    return (leading[:, None] | behind).flatten().to(torch.int32).view(torch.float32).to(device)


def every_variant(device_name):
    """Runs in a process of its own: kernels are compiled there."""
    device = torch.device(device_name)
    torch.cuda.set_device(device)
    started = time.monotonic()
    kernels.prepare(device, CASTS)
    kernels.wait_until_prepared(device, timeout_s=300)
    seconds = time.monotonic() - started
    launch = kernels.ready(device)
    found = {"ready": launch is not None, "casts": kernels.casts(device), "seconds": seconds}
    for cast in CASTS:
        source = every_number(cast[0], device)
        expected, target = source.to(cast[1]), torch.zeros(source.shape, dtype=cast[1], device=device)
        slices, to_sum = Slices(), Slices()
        layout = Layout(tuple(source.shape), (1,), (1,), *cast)
        for weight in (1, 2**31 - 1):  # the same twice, into one slot
            slices.add(layout, 0, target.data_ptr(), slot=1, weight=weight, region="r0/x")
            to_sum.add(Layout.to_sum(source.shape, (1,), *cast), source.data_ptr(), slot=1, weight=weight)
        sums = torch.zeros(4, dtype=torch.int64, device=device)
        CopyTable(slices, {"r0/x": source}, device, casts=kernels.casts(device)).run(launch, sums[:2])
        ChecksumTable(to_sum, device, casts=kernels.casts(device)).run(launch, sums[2:])
        found[cast] = (torch.equal(bits_of(target), bits_of(expected)), sums.tolist(), int(word_sum(expected) * 2**31))
    return found


def test_every_cast_of_every_number_is_torchs_and_so_are_the_sums():
    """Numbers that are none included: on a GPU torch does what the hardware does."""
    [found] = run_ranks(
        in_a_process,
        1,
        every_variant,
        "cuda:0",
        timeout_s=400,
        init_group=False,
        start_method="spawn",
        env=gpu_environment(),
    )
    assert found["ready"] and found["casts"] == set(CASTS)
    for cast in CASTS:
        is_equal, sums, expected = found[cast]
        assert is_equal, cast
        assert sums == [0, expected, 0, expected], cast
    assert found["seconds"] < 120


def merged_on_a_gpu(device_name):
    """By how much regions are off, and which are not as they would be if float64 were rounded; runs in a process of its own."""
    import peft
    from test_peft_merge import exact_sum, narrowed, off_by
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from tpcolocate.in_server.tpcolocate_receiver.regions import Region, whole
    from tpcolocate.weights.plan.sharding import ShardFinder
    from tpcolocate.weights.sources.lazy_tensor import LazyTensor, full_tensor
    from tpcolocate.weights.sources.named_weights import NamedWeights

    device, found = torch.device(device_name), {}
    for base in (torch.bfloat16, torch.float32):
        for factors in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            for kind in ("linear", "conv"):
                layer = nn.Linear(1536, 1024, bias=False) if kind == "linear" else Conv1D(1536, 1024)
                model = nn.Sequential(layer, copy.deepcopy(layer)).to(device, base)
                config = peft.LoraConfig(r=16, lora_alpha=5, target_modules=["0", "1"], fan_in_fan_out=kind == "conv")
                model = peft.inject_adapter_in_model(config, model)
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.data = (torch.randn(parameter.shape, device=device) * 0.1).to(factors)
                items = dict(NamedWeights.of(model))
                weights = [item for item in items.values() if isinstance(item, LazyTensor)]
                ingredients = weights[0].recipe.ingredients
                ingredients.gather()
                assert len(ingredients._pairs) == 2
                for item, layer in zip(weights, model):
                    exact, magnitude = exact_sum(layer, ["default"])
                    rows, columns = item.shape
                    for region in (
                        whole(item.shape),
                        Region((0, columns // 2), (rows, columns // 2)),  # of a shard of columns
                        Region((rows // 2, 0), (rows // 2, columns)),
                        Region((3, 5), (301, 77)),  # aligned to nothing
                    ):
                        out = torch.full((region.volume + 8,), 7.0, dtype=base, device=device)
                        here = out[:-8].view(region.lengths)
                        with ingredients.together():
                            made = ShardFinder().find(item).compute(region, here)
                        assert made.data_ptr() == out.data_ptr() and out[-8:].eq(7).all()
                        exact_here = narrowed(exact, region)
                        off = off_by(made, exact_here, narrowed(magnitude, region))
                        differing = (made != exact_here.to(base)).double().mean().item()
                        before = found.get((base, factors), (0.0, 0.0))
                        found[base, factors] = max(before[0], off), max(before[1], differing)
                ingredients.forget()
                torch.testing.assert_close(  # as peft merges
                    full_tensor(weights[0]).double(), exact_sum(model[0], ["default"])[0], rtol=0.02, atol=0.02
                )
    return found


def test_adapters_are_added_in_float32_and_rounded_once():
    [found] = run_ranks(
        in_a_process,
        1,
        merged_on_a_gpu,
        "cuda:0",
        timeout_s=300,
        init_group=False,
        start_method="spawn",
        env=gpu_environment(),
    )
    for (base, factors), (off, differing) in found.items():
        # In units in the last place; what is rounded once is off by half a one, and float32 by what it sums up.
        assert off <= (0.51 if base is torch.bfloat16 else 4), (base, factors, off)
        if base is torch.bfloat16:  # rounded a second time, one in fifteen would differ
            assert differing < 0.01, (base, factors, differing)


class Targets:
    """Stands in for a `CopyPlan`."""

    def __init__(self, targets):
        self.targets = targets

    def target(self, name, number):
        return self.targets[name]

    def write_constants(self, names):
        pass


def read_each_other(rank, folder, world, num_gpus, alone):
    """Every rank exports float32 memory to the next, which copies half of its own and half of that as bfloat16."""
    import torch.distributed as dist

    index = 0 if num_gpus < world else rank
    if alone:  # before CUDA looks
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index) if visible is None else visible.split(",")[index]
        index = 0
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    kernels.prepare(device)
    kernels.wait_until_prepared(device, timeout_s=120)
    count = 3 * 2**20
    value = lambda holder: torch.arange(count, device=device).mul(holder + 3).remainder(65521).to(torch.float32).div(7)
    flat = ipc_payload.allocate(4 * count, device)
    flat.view(torch.float32).copy_(value(rank))
    torch.cuda.synchronize()
    handle = ipc_payload.export_storage(flat.untyped_storage())
    described = [None] * world
    dist.all_gather_object(described, handle.describe())
    peer = (rank - 1) % world
    regions = {f"r{rank}/flat": flat, f"r{peer}/flat": open_handle(described[peer], device)}
    mapped_on = regions[f"r{peer}/flat"].device == device
    targets = {name: torch.zeros(count, dtype=torch.bfloat16, device=device) for name in ("own", "peer", "odd")}
    slices = [
        ["own", 0, None, None, f"r{rank}/flat", 0, "float32", [1], 0, 3],
        ["peer", 0, None, None, f"r{peer}/flat", 0, "float32", [1], 1, 5],
        ["odd", 0, [0], [count - 8], f"r{peer}/flat", 4, "float32", [1], 1, 7],  # between two pairs: torch's
    ]
    program = CopyProgram(3, slices, Targets(targets))
    found = []
    for _ in range(3):  # the second is captured as a graph
        for target in targets.values():
            target.zero_()
        sums, seconds = program.run(Targets(targets), regions, keep_views=True)
        expected = {"own": value(rank).bfloat16(), "peer": value(peer).bfloat16()}
        expected["odd"] = torch.cat(
            [value(peer)[1 : count - 7].bfloat16(), torch.zeros(8, dtype=torch.bfloat16, device=device)]
        )
        of = {name: int(word_sum(tensor)) for name, tensor in expected.items()}
        wanted = [3 * of["own"], 5 * of["peer"] + 7 * of["odd"], 0]
        is_equal = all(torch.equal(targets[name], tensor) for name, tensor in expected.items())
        found.append((is_equal, [(sums[i] - wanted[i]) % 2**64 for i in range(3)], program._rest, list(seconds)))
    program.forget_views()
    regions.clear()
    dist.barrier()
    count = handle.count()
    dist.barrier()
    dist.destroy_process_group()
    return mapped_on, count, found, torch.cuda.device_count()


@pytest.mark.parametrize("alone", [False, True], ids=["visible", "invisible"])
def test_a_program_reads_own_and_peer_memory_and_casts(tmp_path, monkeypatch, alone):
    for name, value in gpu_environment().items():
        monkeypatch.setenv(name, value)
    arguments = (str(tmp_path), 2, torch.cuda.device_count(), alone)
    options = {"timeout_s": 200, "init_group": False, "start_method": "spawn", "env": gpu_environment()}
    for mapped_on, count, found, visible in run_ranks(read_each_other, 2, *arguments, **options):
        assert mapped_on and count == 0, "mapped on the reader's device, and released once"
        assert found == [(True, [0, 0, 0], [2], ["copy"])] * 3
        assert visible == 1 or not alone
