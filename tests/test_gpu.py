"""Behaviour that only a GPU can show: CUDA handles, the memory saver, UUIDs.  Two ranks, one SGLang server at tp=2.

Only GPUs in CUDA_VISIBLE_DEVICES are used.  On two GPUs each rank takes its own; on a single one both share it
(`TPCOLOCATE_TEST_ARGS` may then hold more server arguments as JSON; NCCL has to permit several ranks on a GPU).
"""

import json
import os
import time

import pytest
import torch
from harness import gpu_environment, run_ranks

import tpcolocate
from tpcolocate import errors, ipc_payload
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, LoadBucket
from tpcolocate.server import channel
from tpcolocate.weights.transport import bucket_sender, staging

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

PROMPTS = [[5, 6, 7, 100, 200], [100, 200, 300, 400]]
SERVER = {
    "attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none", "disable_cuda_graph": True,
    "mem_fraction_static": 0.2, "enable_memory_saver": True, "skip_tokenizer_init": True, "skip_server_warmup": True,
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
            mapped = [mapping.handle for mapping in engine._sync.state.mappings.all()]
            counts = [handle.count() for handle in mapped]
            model.to("cpu")  # a trainer that frees its memory
            torch.cuda.empty_cache()
            dist.barrier()
            before = used_mib()
            engine.wake()
            dist.barrier()
            found["mapped"] = (set(counts), {handle.count() for handle in mapped}, before - used_mib())
            model.to(device)
            begin_checksums = staging.Transfer._begin_checksums

            def spoiled(self):
                begin_checksums(self)
                torch.cuda.synchronize()
                if rank == 1:
                    model.model.layers[1].mlp.down_proj.weight.data[-1, -1] += 1  # which TP rank 1 reads
                    torch.cuda.synchronize()

            for _ in range(2):
                engine.sync_weights(model, parts=True)
            staging.Transfer._begin_checksums = spoiled
            try:
                engine.sync_weights(model, parts=True)
            except errors.SyncError as error:
                found["spoiled"] = str(error)
            staging.Transfer._begin_checksums = begin_checksums
            if rank == 1:
                model.model.layers[1].mlp.down_proj.weight.data[-1, -1] -= 1

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
                ipc_payload.CudaHandle.describe = lambda self: {
                    **describe(self),
                    "uuid": "00000000-0000-0000-0000-000000000000",
                }
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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = str(tmp_path_factory.mktemp("gpu-model"))
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072,
        vocab_size=4096, tie_word_embeddings=False, initializer_range=0.06, dtype="bfloat16",
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
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


def test_a_gpu_that_the_worker_cannot_see_sends_the_weights_through_files(found):
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
