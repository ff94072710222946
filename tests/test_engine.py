"""The main job on a real SGLang server: tokens, syncs, sleep, failures.

Starting a server takes half a minute on two cores, so each set-up is started once: its ranks run all checks in order
(`drive`), and every check is a test of its own that reads what its ranks returned or raised.
"""

import asyncio
import gc
import logging
import logging.handlers
import os
import stat
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from footprint import Footprint, leftovers
from harness import run_ranks

import tpcolocate
from tpcolocate import errors
from tpcolocate.weights.sync import opening, prepare
from tpcolocate.weights.transport import memory

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

ARGS = {"context_length": 256, "max_total_tokens": 2048, "max_running_requests": 8}
GREEDY = {"temperature": 0, "max_new_tokens": 8}
PROMPTS = [[5, 6, 7], [100, 200, 300, 400], [17], [9, 8, 7, 6, 5, 4, 3, 2]]
HEALTH_S = 240.0


class World:
    """What the checks of one set-up share on one rank."""

    def __init__(self, rank, model_dir, colo):
        from transformers import AutoModelForCausalLM

        self.rank, self.model_dir, self.colo = rank, model_dir, colo
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.engine = None
        self.log = logging.handlers.BufferingHandler(10**6)

    def expected(self, model=None):
        """Greedy continuations by transformers, token by token, without a cache."""
        model = self.model if model is None else model
        found = []
        with torch.no_grad():
            for prompt in PROMPTS:
                ids = list(prompt)
                for _ in range(GREEDY["max_new_tokens"]):
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                    if ids[-1] == model.config.eos_token_id:
                        break
                found.append(ids[len(prompt) :])
        return found

    def generated(self):
        return [answer["output_ids"] for answer in self.engine.generate(PROMPTS, GREEDY)]

    def perturb(self, seed, scale=0.05):
        """The same random step on every rank, as an optimiser would take."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)

    def sharded(self):
        import copy

        from torch.distributed.fsdp import fully_shard

        model = copy.deepcopy(self.model)
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)


def checked(world, checks):
    """What every check returned or raised, by name; for test files that share this way of testing."""
    found = {}
    for check in checks:
        try:
            found[check.__name__] = check(world)
        except Exception as error:
            found[check.__name__] = error
            if isinstance(error, (errors.RankLostError, errors.EngineDeadError)):
                break  # the ones after it would only say so again
    return found


def drive(rank, model_dir, tp_size, checks):
    """One set-up on one rank: launch, all checks, the end."""
    with tpcolocate.init(tp_size, device="cpu", timeout_s=60.0) as colo:
        world = World(rank, model_dir, colo)
        logging.getLogger("tpcolocate.weights.sync.syncer").addHandler(world.log)
        logging.getLogger("tpcolocate.weights.sync.syncer").setLevel(logging.DEBUG)
        with colo.launch(model_dir, health_timeout_s=HEALTH_S, **ARGS) as world.engine:
            found = checked(world, checks)
        return found


# --- checks: run on every rank, return what the test asserts on -----------------------------------------------------


def warm_up(world):
    """What was logged of it at launch, on the owner."""
    return world.colo.is_owner, [line for line in (r.getMessage() for r in world.log.buffer) if "warmed up" in line]


def tokens_before(world):
    return world.generated() == world.expected()


def tokens_after_fsdp2_sync(world):
    old = world.expected()
    world.perturb(1)
    random_state = torch.get_rng_state()
    report = world.engine.sync_weights(world.sharded(), bucket_bytes=400_000)
    undisturbed = torch.equal(torch.get_rng_state(), random_state)
    new = world.expected()
    return {
        "equal": world.generated() == new,
        "undisturbed": undisturbed,
        "changed": new != old,
        "report": report,
        "version": world.engine.weight_version,
    }


def tokens_after_plain_sync(world):
    old = world.expected()
    world.perturb(2)
    report = world.engine.sync_weights(world.model)
    new = world.expected()
    return {"equal": world.generated() == new, "changed": new != old, "report": report}


def dropped_weights(world):
    """Storages of weights that were synced, and how many of them are gone once the trainer has dropped them."""
    import copy

    from torch.multiprocessing.reductions import StorageWeakRef

    model = copy.deepcopy(world.model)
    gc.collect()
    gc.disable()  # its next run may be a training step away
    try:
        for _ in range(2):
            world.engine.sync_weights(model)
        storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
        return len(storages), sum(storage.expired() for storage in storages)
    finally:
        gc.enable()


def memory_when_free_memory_is_reported(world):
    """Of this rank's staging memory, at syncs that repeat: whether they do, and bytes."""
    allocated = []

    def reported(device):
        allocated.append(memory.allocated_bytes(device))
        return memory.free_bytes(device)

    with mock.patch.object(opening, "free_bytes", reported), mock.patch.object(prepare, "free_bytes", reported):
        reports = [world.engine.sync_weights(world.model) for _ in range(3)]
    return "plan" not in reports[-1].ranks[0].seconds, reports[-1].ranks[0].staged_bytes > 0, allocated


def tokens_after_ddp_sync(world):
    from torch.nn.parallel import DistributedDataParallel

    world.perturb(3)
    world.engine.sync_weights(DistributedDataParallel(world.model))
    return world.generated() == world.expected()


def tokens_after_two_dimensional_sync(world):
    """FSDP2 over two ranks, tensor parallelism over two: every weight is sharded twice, over all slices."""
    import copy

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world.perturb(6)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    columns = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    columns |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    rows = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    model = copy.deepcopy(world.model)
    for layer in model.model.layers:
        fully_shard(parallelize_module(layer, mesh["tp"], {**columns, **rows}), mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    world.engine.sync_weights(model)
    return world.generated() == world.expected()


def tokens_after_fan_out_sync(world):
    world.perturb(4)
    report = world.engine.sync_weights(world.sharded(), payloads="fan_out", bucket_bytes=100_000)
    exported = {r.rank: (r.num_exported, r.num_returned) for r in report.ranks}
    return {"equal": world.generated() == world.expected(), "exported": exported, "buckets": report.num_buckets}


def tokens_after_generator_sync(world):
    world.perturb(5)
    pairs = ((name, tensor) for name, tensor in world.model.state_dict().items())
    report = world.engine.sync_weights(pairs, weight_version="five")
    [answer] = world.engine.generate([PROMPTS[0]], GREEDY)
    return {
        "equal": world.generated() == world.expected(),
        "version": answer["meta_info"]["weight_version"],
        "report": report.weight_version,
    }


def step_of_sharded(world, model, seed):
    """The same random step for the whole model and for the sharded one, in place."""
    from torch.distributed.tensor import distribute_tensor

    world.perturb(seed)
    whole = dict(world.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(distribute_tensor(whole[name].detach(), parameter.device_mesh, parameter.placements))


def tokens_by_parts(world):
    """Sync after sync: what is known of the engine's loader is used, shards go where they are read."""
    model = world.sharded()
    found = []
    for seed in range(30, 33):
        old = world.expected()
        step_of_sharded(world, model, seed)
        report = world.engine.sync_weights(model, bucket_bytes=60_000)
        new = world.expected()
        found.append({
            "equal": world.generated() == new, "changed": new != old, "by_plan": report.num_replayed == report.num_tensors,
            "verified": report.num_verified == report.num_tensors, "warnings": report.warnings, "bytes": report.num_bytes,
            "staged": [r.staged_bytes for r in report.ranks], "commands": report.num_buckets,
        })  # fmt: skip
    return found


def masters_in_other_dtypes(world):
    """The engine's copy rounds; parts are rounded before they are sent, and verified afterwards."""
    import copy

    kept = world.model
    found = []
    for dtype in (torch.float64, torch.float32):
        world.model = copy.deepcopy(kept).to(dtype)
        world.perturb(40)
        for _ in range(2):
            report = world.engine.sync_weights(world.model)
        world.model = world.model.float()
        found.append(
            (world.generated() == world.expected(), report.num_verified == report.num_tensors, report.num_replayed)
        )
    world.model = kept
    world.engine.sync_weights(world.model)
    return found


def a_slice_whose_engine_forgot(world):
    """They share collectives: if one has to see whether samples confirm what its workers traced, both send these."""
    model = world.sharded()
    world.engine.sync_weights(model)
    if world.colo.slice_index == 0:
        world.engine._sync.state.loader_map.is_current(("another engine",))
    step_of_sharded(world, model, 50)
    first = world.engine.sync_weights(model)
    step_of_sharded(world, model, 51)
    second = world.engine.sync_weights(model)
    # Samples are staged as full tensors, beside the slices.
    sampled = [one.staged_bytes > other.staged_bytes for one, other in zip(first.ranks, second.ranks)]
    by_parts = [report.num_replayed == report.num_tensors for report in (first, second)]
    return {"equal": world.generated() == world.expected(), "sampled": sampled, "by_parts": by_parts}


def a_slice_that_fails_on_the_way(world):
    """In the middle of the transfer of one slice; the other one must not wait for it, and both can go on."""
    from tpcolocate.weights.transport.staging import Transfer

    model = world.sharded()
    world.engine.sync_weights(model)
    fill_stage, calls = Transfer.fill_stage, []

    def failing(self, number):
        half = fill_stage(self, number)
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("planted")
        return half

    if world.rank == 1:
        Transfer.fill_stage = failing
    message = None
    begun = time.monotonic()
    try:
        world.engine.sync_weights(model, bucket_bytes=60_000)
    except errors.TpColocateError as error:
        message = f"{type(error).__name__}: {error}"
    finally:
        Transfer.fill_stage = fill_stage
    seconds = time.monotonic() - begun
    step_of_sharded(world, model, 52)
    world.engine.sync_weights(model)
    return {"message": message, "seconds": seconds, "healed": world.generated() == world.expected()}


def generate_forms(world):
    engine = world.engine
    text = engine.generate("the quick", GREEDY)
    batch = engine.generate(["the quick", "brown fox"], GREEDY)
    several = engine.generate([PROMPTS[0], PROMPTS[1]], {"temperature": 1.0, "n": 3, "max_new_tokens": 4})
    logprobs = engine.generate([PROMPTS[1]], GREEDY, return_logprob=True)[0]["meta_info"]["output_token_logprobs"]
    events = list(engine.generate("the quick", GREEDY, stream=True))

    async def concurrently():
        answers = await asyncio.gather(*(engine.generate_async(prompt, GREEDY) for prompt in PROMPTS * 4))
        stream = await engine.generate_async("the quick", GREEDY, stream=True)
        return [a["output_ids"] for a in answers], [event async for event in stream]

    many, async_events = asyncio.run(concurrently())
    return {
        "dict": isinstance(text, dict) and isinstance(text["text"], str),
        "batch_first_is_single": batch[0]["output_ids"] == text["output_ids"],
        "n": len(several),
        "logprobs": [(lp, token) for lp, token, *_ in logprobs],
        "empty": engine.generate([]),
        "stream_ends_as_single": events[-1]["text"] == text["text"] == async_events[-1]["text"],
        "streamed": len(events) > 1,
        "many": many == world.generated() * 4,
    }


def trainer_logprobs(world):
    """The engine's log-probabilities of its own tokens against the trainer's, for the last sync's weights."""
    answers = world.engine.generate(PROMPTS, GREEDY, return_logprob=True)
    found = []
    for prompt, answer in zip(PROMPTS, answers):
        tokens = [pair[1] for pair in answer["meta_info"]["output_token_logprobs"]]
        with torch.no_grad():
            logits = world.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1))
    return {**tpcolocate.summarize(answers, prefix=""), **tpcolocate.logprob_gap(answers, found, prefix="")}


def logprobs_at_a_temperature(world):
    """As the guide compares them: against the trainer's logits over the temperature."""
    temperature, [prompt, *_] = 0.5, PROMPTS
    answer = world.engine.generate(prompt, {"temperature": temperature, "max_new_tokens": 8}, return_logprob=True)
    pairs = answer["meta_info"]["output_token_logprobs"]
    tokens = torch.tensor([token for _, token, *_ in pairs])
    with torch.no_grad():
        logits = world.model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
    engine = torch.tensor([logprob for logprob, *_ in pairs])
    scaled, plain = (
        (logits.float() / by).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1) for by in (temperature, 1.0)
    )
    return (engine - scaled).abs().max().item(), (engine - plain).abs().max().item()


def refused_requests(world):
    messages = {}
    for name, call in {
        "unknown_field": lambda e: e.generate("a", GREEDY, max_tokens=3),
        "nothing": lambda e: e.generate(),
        "too_long": lambda e: e.generate([[1] * 300], GREEDY),
        "too_long_text": lambda e: e.generate(["a", "1 2 3 " * 200], GREEDY),
        "bad_sampling": lambda e: e.generate("a", {"temperature": -1}),
    }.items():
        try:
            messages[name] = repr(call(world.engine))
        except errors.TpColocateError as error:
            messages[name] = (type(error).__name__, str(error))
    return messages


# Each ended the server, was answered as if nothing were wrong, or was a bare "500: Internal Server Error".
BAD_CALLS = {
    "empty ids": ([[]], GREEDY, {}),
    "empty text": (["a", ""], GREEDY, {}),
    "outside": ([[5, 6], [512]], GREEDY, {}),
    "far outside": ([2**40], GREEDY, {}),
    "negative": (torch.tensor([[5, -1]]), GREEDY, {}),
    "booleans": ([True, 2], GREEDY, {}),
    "half a token": ([5], {"max_new_tokens": 1.5}, {}),
    "many logprobs": ([5], GREEDY, {"return_logprob": True, "top_logprobs_num": 10**6}),
    "logprobs before": ([5], GREEDY, {"return_logprob": True, "logprob_start_len": -5}),
    "top_k": ([5], {"top_k": 2**31}, {}),
    "stop token": ([5], {"min_new_tokens": 2, "stop_token_ids": [5000]}, {}),
    "penalty": ([5], {"repetition_penalty": 1e-300}, {}),
    "no samples": ([5], {"n": 0}, {}),
    "max_tokens": ([5], {"max_tokens": 4}, {}),
    "seed": ([5], {"seed": 4}, {}),
    "stop": ([5], {"stop": 5}, {}),
    "stop_regex": ([5], {"stop_regex": "("}, {}),
    "too few parameters": ([[5], [6]], [GREEDY], {}),
    "image": ([5], GREEDY, {"image_data": "a.png"}),
    "surrogate": ("\ud800", GREEDY, {}),
    "chat": ([{"role": "user", "content": "a"}], GREEDY, {}),
}  # fmt: skip


def calls_that_ended_servers(world):
    """Outcome of each at every entry, and whether the server answers right after it as it did before."""
    engine, found = world.engine, {}
    expected = engine.generate(PROMPTS[0], GREEDY)["output_ids"]

    client = tpcolocate.connect(world.colo.job, slice_index=world.colo.slice_index)
    entries = (
        engine.generate,
        lambda *args, **fields: asyncio.run(engine.generate_async(*args, **fields)),
        lambda *args, **fields: list(engine.generate(*args, stream=True, **fields)),
        client.generate,
    )

    def outcome(entry, prompts, params, fields):
        try:
            return repr(entry(prompts, params, **fields))
        except errors.ConfigError as error:
            return error.message

    for name, call in BAD_CALLS.items():
        outcomes = {outcome(entry, *call) for entry in entries}
        found[name] = (outcomes, engine.generate(PROMPTS[0], GREEDY)["output_ids"] == expected)
    client.close()
    return found


def forms_of_prompts(world):
    """Tensors and arrays, numbers that a division leaves, and one bad prompt among good ones."""
    engine, two = world.engine, [[5, 6, 7], [17, 18, 19]]
    expected = [answer["output_ids"] for answer in engine.generate(two, GREEDY)]

    def same(prompts, params=GREEDY):
        return [answer["output_ids"] for answer in engine.generate(prompts, params)] == expected

    mixed = engine.generate([two[0], [512], two[1], [5] * 249], {**GREEDY, "max_new_tokens": 8.0}, on_error="return")
    texts = engine.generate(["the quick", "1 2 3 " * 200], GREEDY, on_error="return")

    async def of_async():
        return await engine.generate_async([two[0], []], {**GREEDY, "n": 2}, on_error="return")

    return {
        "tensor": same(torch.tensor(two)),
        "array": same(torch.tensor(two).numpy()),
        "list of tensors": same([torch.tensor(ids) for ids in two]),
        "tokenizer": same({"input_ids": [[0, *ids] for ids in two], "attention_mask": [[0, 1, 1, 1]] * 2}),
        "float": same(two, {**GREEDY, "max_new_tokens": 64 / 8}),
        "good ones": [mixed[0]["output_ids"], mixed[2]["output_ids"]] == expected,
        "bad ones": [type(mixed[1]).__name__, type(mixed[3]).__name__] == ["ConfigError", "ConfigError"],
        "refused by the server": isinstance(texts[0], dict) and isinstance(texts[1], errors.RequestError),
        "samples": [isinstance(each, errors.ConfigError) for each in asyncio.run(of_async())]
        == [False, False, True, True],
    }


def requests_after_a_500(world):
    """SGLang closes a connection after it, a little later; the next request must not meet that."""
    http, body, statuses = world.engine._client, {"input_ids": [5], "sampling_params": {"max_tokens": 4}}, []
    for _ in range(20):
        try:
            http.post("/generate", body, timeout_s=60)
        except errors.RequestError as error:
            statuses.append(error.status)
        world.engine.generate(PROMPTS[0], {"max_new_tokens": 1})

    async def of_async():
        for _ in range(20):
            try:
                await http.post_async("/generate", body, timeout_s=60)
            except errors.RequestError as error:
                statuses.append(error.status)
            await world.engine.generate_async(PROMPTS[0], {"max_new_tokens": 1})

    asyncio.run(of_async())
    return statuses


def refused_weights(world):
    """Everything SGLang would swallow; afterwards the server must still use the weights of before."""
    engine, before = world.engine, world.generated()
    weights = dict(world.model.state_dict())
    name = "model.layers.0.self_attn.q_proj.weight"
    messages = {}
    for case, source, options in [
        ("unknown_name", {**weights, "model.layers.9.mlp.up_proj.weight": torch.zeros(4, 4)}, {}),
        ("too_few_rows", {**weights, name: weights[name][:-1]}, {}),
        ("too_many_rows", {**weights, name: torch.cat([weights[name], weights[name][:1]])}, {}),
        ("missing", {k: v for k, v in weights.items() if k != name}, {}),
        ("twice", [*weights.items(), (name, weights[name])], {}),
        ("empty", [], {}),
        ("no_tensor", [("a", 3)], {}),
        (
            "ranks_differ",
            [(f"rank.{world.rank}" if world.colo.tp_size > 1 else "x", torch.zeros(1))],
            {"partial": True},
        ),
        ("one_rank_raises", _raises_on(world, weights), {}),
        ("bucket", weights, {"bucket_bytes": 0}),
        ("bucket_of_one_rank", weights, {"bucket_bytes": 0 if _is_last(world) else 400_000}),
        ("no_number_on_one_rank", weights, {"bucket_bytes": "many" if _is_last(world) else 400_000}),
    ]:
        try:
            engine.sync_weights(source, **options)
            messages[case] = "accepted"
        except errors.TpColocateError as error:
            messages[case] = (type(error).__name__, str(error))
    return {"messages": messages, "unchanged": before == world.generated()}


def _raises_on(world, weights):
    """A list whose reading fails on the last rank only."""
    return 3 if _is_last(world) else weights


def _is_last(world):
    return world.colo.tp_rank == world.colo.tp_size - 1


def lora_is_refused(world):
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.o_proj.lora_{side}.weight": torch.ones(shape)
        for i in range(2)
        for side, shape in (("A", (4, 128)), ("B", (128, 4)))
    }
    try:
        world.engine.set_lora_from_tensors("a", tensors, {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]})
        return "accepted"
    except errors.ConfigError as error:
        return error.message, error.hint


def partial_sync(world):
    name = "model.norm.weight"
    with torch.no_grad():
        dict(world.model.named_parameters())[name].mul_(1.5)
    report = world.engine.sync_weights([(name, world.model.state_dict()[name])], partial=True)
    return {"equal": world.generated() == world.expected(), "tensors": report.num_tensors}


def sleep_and_wake(world):
    engine = world.engine
    messages = [engine.health().value]
    engine.sleep(["kv_cache"])
    engine.sleep()  # what is released already stays so
    messages.append(engine.health().value)
    for call in (
        lambda: engine.generate("a", GREEDY),
        lambda: engine.sync_weights(world.model),
        lambda: engine.sleep(["kv"]),
    ):
        try:
            call()
            messages.append("accepted")
        except errors.TpColocateError as error:
            messages.append((type(error).__name__, error.hint))
    engine.wake(["weights"])
    engine.wake(["weights"])  # SGLang would die of it
    engine.sync_weights(world.model)
    engine.wake()
    messages.append(engine.health().value)
    return {"messages": messages, "equal": world.generated() == world.expected()}


def twenty_syncs(world):
    """Nothing may grow: /dev/shm, descriptors, memory of trainer and server."""

    def footprint():
        # A rank that begins its next sync already has staging memory in /dev/shm.
        world.colo._slice.all_gather(None, what="stand still", timeout_s=60)
        try:
            return measured()
        finally:
            world.colo._slice.all_gather(None, what="go on", timeout_s=60)

    def measured():
        # the owner sees the server's processes: they descend from it
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        # Of this rank and its server alone: other processes of this machine use /dev/shm, too.
        ours = tuple(f"torch_{process.pid}_" for process in processes)
        names = [name for name in os.listdir("/dev/shm") if name.startswith(ours)]
        shm = {name: (Path("/dev/shm") / name).stat().st_size for name in names}
        return {
            "shm_files": len(shm),
            "shm_bytes": sum(shm.values()),
            "fds": sum(p.num_fds() for p in processes),
            "rss": sum(p.memory_info().rss for p in processes),
        }

    model = world.sharded()
    for _ in range(3):
        world.engine.sync_weights(model, bucket_bytes=400_000)
    world.generated()
    before = footprint()
    reports = [world.engine.sync_weights(model, bucket_bytes=400_000) for _ in range(20)]
    world.generated()
    after = footprint()
    returned = all(r.num_exported == r.num_returned > 0 for report in reports for r in report.ranks)
    return {"before": before, "after": after, "returned": returned, "moved": sum(r.num_bytes for r in reports)}


def key_is_hidden(world):
    """The key protects the server and cannot be read from a process list."""
    import httpx

    lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    bare = httpx.post(f"{world.engine.url}/generate", json={"text": "a"}, trust_env=False, timeout=60).status_code
    found = {"in_ps": any(world.engine.api_key in line for line in lines), "without_key": bare}
    if world.colo.is_owner:
        runtime = world.engine._context.owned.process.spec.runtime
        log = runtime.log_path.read_text()
        assert "'***'" in log and world.engine.api_key not in log
        assert any(stat.S_ISSOCK(path.stat().st_mode) for path in runtime.server_temporary.iterdir())
        assert not any(runtime.shared.glob("*.yaml"))
    return found


def connect_from_outside(world):
    """Another process of the same user finds the server by its file."""
    client = tpcolocate.connect(world.colo.job, slice_index=world.colo.slice_index)
    with_client = [a["output_ids"] for a in client.generate(PROMPTS, GREEDY)]
    health = client.health().value
    client.close()
    return {"equal": with_client == world.generated(), "health": health, "url": client.url == world.engine.url}


ALL = [
    warm_up, tokens_before, generate_forms, refused_requests, forms_of_prompts, calls_that_ended_servers, requests_after_a_500, logprobs_at_a_temperature, tokens_after_fsdp2_sync, trainer_logprobs, tokens_after_plain_sync,
    tokens_after_ddp_sync, tokens_after_fan_out_sync, tokens_after_generator_sync, partial_sync, refused_weights, lora_is_refused, sleep_and_wake,
    twenty_syncs, dropped_weights, memory_when_free_memory_is_reported, tokens_by_parts, masters_in_other_dtypes, key_is_hidden, connect_from_outside,
]  # fmt: skip
TOKENS = [tokens_before, tokens_after_fsdp2_sync, trainer_logprobs, tokens_after_plain_sync, tokens_by_parts]
SLICES = [
    tokens_before, tokens_after_fsdp2_sync, tokens_by_parts, tokens_after_two_dimensional_sync, a_slice_whose_engine_forgot, a_slice_that_fails_on_the_way, connect_from_outside,
]  # fmt: skip
SETUPS = {
    # id: family, tied embeddings, tp_size, ranks, checks
    "qwen3-untied-tp2": ("qwen3", False, 2, 2, ALL),
    "two-slices-tp2": ("qwen3", True, 2, 4, SLICES),
    "llama-tied-tp2": ("llama", True, 2, 2, TOKENS),
    "qwen3-tied-tp1": (
        "qwen3",
        True,
        1,
        2,
        [*TOKENS, calls_that_ended_servers, refused_weights, lora_is_refused, key_is_hidden, connect_from_outside],
    ),
    "llama-untied-tp1": ("llama", False, 1, 1, [*TOKENS, twenty_syncs]),
}
# Its server's processes are started as users have them, not as forks: see forked_server/.
SPAWNED = "qwen3-untied-tp2"


def setups_with(*checks):
    """Runs a test on every set-up that includes all of `checks`; its server is started once for all its tests."""
    names = [name for name, (*_, included) in SETUPS.items() if all(check in included for check in checks)]
    assert names, "a check that no set-up includes is never run"
    return pytest.mark.parametrize("setup", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def setup(request, tiny_model_dir):
    """(tp_size, what every rank found, what the set-up left behind)."""
    family, tie, tp_size, world, checks = SETUPS[request.param]
    before = Footprint.now()
    model_dir = str(tiny_model_dir(family=family, tie=tie))
    env = {"TPC_TEST_START_METHOD": "spawn"} if request.param == SPAWNED else None
    found = run_ranks(drive, world, model_dir, tp_size, checks, env=env, timeout_s=1200)
    return tp_size, found, leftovers(before)


def results(setup, check):
    """What every rank's `check` returned; raises what it raised."""
    _, found, _ = setup
    for rank, of_rank in enumerate(found):
        value = of_rank.get(check.__name__, AssertionError("not reached: see the checks before it"))
        if isinstance(value, Exception):
            raise AssertionError(f"rank {rank}: {type(value).__name__}: {value}") from value
    return [of_rank[check.__name__] for of_rank in found]


@setups_with(tokens_by_parts)
def test_tokens_equal_transformers_after_syncs_of_parts(setup):
    tp_size = setup[0]
    for found in results(setup, tokens_by_parts):
        for one in found:
            assert one["equal"] and one["changed"] and one["verified"] and one["warnings"] == ()
        last = found[-1]
        assert last["by_plan"] and last["commands"] > 3, "in several steps"
        if tp_size == 2:
            assert all(staged < 0.6 * last["bytes"] for staged in last["staged"]), "half of it, and the norms"


@setups_with(masters_in_other_dtypes)
def test_masters_of_another_dtype_arrive_rounded(setup):
    for found in results(setup, masters_in_other_dtypes):
        assert found == [(True, True, 25), (True, True, 25)]


@setups_with(a_slice_whose_engine_forgot)
def test_slices_that_know_different_things_send_samples_together(setup):
    for found in results(setup, a_slice_whose_engine_forgot):
        assert found == {"equal": True, "sampled": [True, True], "by_parts": [True, True]}


@setups_with(a_slice_that_fails_on_the_way)
def test_one_slice_that_fails_on_the_way_does_not_hold_up_the_other(setup):
    found = results(setup, a_slice_that_fails_on_the_way)
    for one in found:
        assert "MemoryError: planted" in one["message"] and one["seconds"] < 60 and one["healed"]


@setups_with(warm_up)
def test_the_engine_is_warmed_up_at_launch_and_its_loader_known(setup):
    for is_owner, lines in results(setup, warm_up):
        if is_owner:
            [line] = lines
            assert line.startswith("the engine was warmed up in") and "TP rank" not in line
        else:
            assert lines == []


@setups_with(tokens_before)
def test_tokens_equal_transformers_before_any_sync(setup):
    assert all(results(setup, tokens_before))


@setups_with(tokens_after_fsdp2_sync, tokens_after_plain_sync)
@pytest.mark.parametrize("check", [tokens_after_fsdp2_sync, tokens_after_plain_sync], ids=["fsdp2", "plain"])
def test_tokens_equal_transformers_after_a_sync(setup, check):
    for found in results(setup, check):
        assert found["changed"], "the sync must have something to show"
        assert found["equal"]


@setups_with(tokens_after_fsdp2_sync)
def test_the_report_adds_up(setup):
    for rank, found in enumerate(results(setup, tokens_after_fsdp2_sync)):
        report = found["report"]
        assert report.rank == rank and report.num_tensors >= 20 and report.num_buckets > 1
        assert report.weight_version == found["version"] == "1"
        assert "safetensors" in report.checked_against
        mine = next(r for r in report.ranks if r.rank == rank)
        assert set(mine.seconds) == {
            "prepare", "open", "preflight", "trace", "verify", "map", "plan", "gather", "push", "finish",
        }  # fmt: skip
        assert sum(mine.seconds.values()) <= report.seconds
        # Of the preflight, the samples, and both halves of the staging memory.
        assert mine.num_exported == mine.num_returned > 3
        assert f"{report.num_tensors} tensors" in str(report)


@setups_with(tokens_after_fsdp2_sync)
def test_a_first_sync_leaves_the_trainings_random_numbers_alone(setup):
    assert all(found["undisturbed"] for found in results(setup, tokens_after_fsdp2_sync))


@setups_with(trainer_logprobs)
def test_log_probabilities_equal_the_trainers(setup):
    for figures in results(setup, trainer_logprobs):
        assert figures["gap/max"] < 1e-3 and figures["gap/ratio/ess"] > 0.999
        assert figures["gap/ratio/tokens"] == figures["rollout/tokens/sum"] == len(PROMPTS) * GREEDY["max_new_tokens"]
        assert figures["rollout/finish/length"] == figures["rollout/truncated_rate"] == 1.0
        assert figures["rollout/weight_versions"] == 1 and figures["rollout/mixed_rate"] == 0.0


@setups_with(dropped_weights)
def test_weights_that_the_trainer_drops_after_a_sync_are_freed_at_once(setup):
    for dropped, gone in results(setup, dropped_weights):
        assert dropped == gone > 0


@setups_with(memory_when_free_memory_is_reported)
def test_free_memory_is_reported_before_a_sync_takes_any(setup):
    for repeats, stages, allocated in results(setup, memory_when_free_memory_is_reported):
        assert repeats and stages and allocated == [0, 0, 0]


@setups_with(tokens_after_ddp_sync)
def test_tokens_after_a_ddp_sync(setup):
    assert all(results(setup, tokens_after_ddp_sync))


@setups_with(tokens_after_two_dimensional_sync)
def test_tokens_after_a_sync_from_a_mesh_of_two_dimensions(setup):
    assert all(results(setup, tokens_after_two_dimensional_sync))


@setups_with(tokens_after_fan_out_sync)
def test_fan_out_gives_every_tp_rank_a_handle_of_its_own_and_clients_none(setup):
    for found in results(setup, tokens_after_fan_out_sync):
        assert found["equal"]
        # one a bucket and TP rank, and as many for the preflight of this way
        assert found["exported"] == {0: (2 * (found["buckets"] + 1),) * 2, 1: (0, 0)}


@setups_with(tokens_after_generator_sync)
def test_a_generator_is_a_source_too_and_the_version_is_published(setup):
    for found in results(setup, tokens_after_generator_sync):
        assert found["equal"] and found["version"] == found["report"] == "five"


@setups_with(generate_forms)
def test_generate_takes_and_returns_what_sglang_does(setup):
    for found in results(setup, generate_forms):
        logprobs = found.pop("logprobs")
        assert len(logprobs) == GREEDY["max_new_tokens"] and all(lp <= 0 for lp, _ in logprobs)
        assert found.pop("n") == 6 and found.pop("empty") == []
        assert all(found.values()), found


@setups_with(refused_requests)
def test_bad_requests_are_refused_before_they_are_sent_or_in_the_servers_own_words(setup):
    for messages in results(setup, refused_requests):
        assert messages["unknown_field"][0] == "ConfigError" and "max_tokens" in messages["unknown_field"][1]
        assert messages["nothing"][0] == "ConfigError"
        assert messages["too_long"][0] == "ConfigError" and "prompt 0 has 300 tokens" in messages["too_long"][1]
        assert messages["too_long_text"][0] == "RequestError" and "longer than" in messages["too_long_text"][1]
        assert messages["bad_sampling"][0] == "ConfigError" and "temperature" in messages["bad_sampling"][1]


@setups_with(forms_of_prompts)
def test_prompts_are_taken_as_users_have_them_and_a_bad_one_leaves_the_others(setup):
    for found in results(setup, forms_of_prompts):
        assert all(found.values()), found


@setups_with(calls_that_ended_servers)
def test_no_call_ends_the_server(setup):
    for found in results(setup, calls_that_ended_servers):
        assert found.keys() == BAD_CALLS.keys()
        for name, (outcomes, answers_as_before) in found.items():
            assert len(outcomes) == 1 and "output_ids" not in str(outcomes), (name, outcomes)
            assert answers_as_before, name


@setups_with(requests_after_a_500)
def test_a_500_of_the_server_does_not_reach_the_next_request(setup):
    for statuses in results(setup, requests_after_a_500):
        assert statuses == [500] * 40


@setups_with(logprobs_at_a_temperature)
def test_log_probabilities_are_those_of_the_sampled_distribution(setup):
    for scaled, plain in results(setup, logprobs_at_a_temperature):
        assert scaled < 1e-4 < 1e-2 < plain


@setups_with(refused_weights)
def test_weights_that_sglang_would_swallow_are_refused_on_every_rank(setup):
    tp_size, _, _ = setup
    found = results(setup, refused_weights)
    for rank_found in found:
        messages = rank_found["messages"]
        assert {case: kind for case, (kind, _) in messages.items()} == {
            "unknown_name": "WeightsMismatchError",
            "too_few_rows": "WeightsMismatchError",
            "too_many_rows": "WeightsMismatchError",
            "missing": "WeightsMismatchError",
            "twice": "WeightsMismatchError",
            "empty": "ConfigError",
            "no_tensor": "ConfigError",
            "ranks_differ": "WeightsMismatchError",
            "one_rank_raises": "ConfigError",
            "bucket": "ConfigError",
            "bucket_of_one_rank": "ConfigError",
            "no_number_on_one_rank": "ConfigError",
        }
        assert "127, 128" in messages["too_few_rows"][1] and "128, 128" in messages["too_few_rows"][1]
        assert rank_found["unchanged"], "nothing of a refused sync may reach the engine"
    if tp_size > 1:
        assert found[0]["messages"] == found[1]["messages"], "the same error on every rank"


@setups_with(lora_is_refused)
def test_an_adapter_is_refused_where_the_server_was_not_started_for_it(setup):
    for found in results(setup, lora_is_refused):
        assert found[0] == "the server was not started for LoRA" and "enable_lora=True" in found[1]


@setups_with(partial_sync)
def test_a_partial_sync_leaves_the_rest_as_it_is(setup):
    for found in results(setup, partial_sync):
        assert found == {"equal": True, "tensors": 1}


@setups_with(sleep_and_wake)
def test_sleep_and_wake_are_a_state_machine_on_every_rank(setup):
    for found in results(setup, sleep_and_wake):
        assert found["messages"] == [
            "ready",
            "asleep",
            ("EngineStateError", "call engine.wake() on every rank first"),
            ("EngineStateError", 'call engine.wake(["weights"]) on every rank first'),
            ("ConfigError", "SGLang knows kv_cache, weights, cuda_graph"),
            "ready",
        ]
        assert found["equal"]


@setups_with(twenty_syncs)
def test_twenty_syncs_grow_nothing(setup):
    for found in results(setup, twenty_syncs):
        before, after = found["before"], found["after"]
        assert after["shm_files"] == before["shm_files"] and after["shm_bytes"] == before["shm_bytes"]
        assert after["fds"] <= before["fds"] + 2  # a connection that was open at one moment and not at the other
        # far below what one leaked model a sync would be
        assert after["rss"] - before["rss"] < max(found["moved"] / 4, 8 * 2**20)
        assert found["returned"]


@setups_with(key_is_hidden)
def test_the_key_is_needed_and_not_in_the_process_list(setup):
    for found in results(setup, key_is_hidden):
        assert found == {"in_ps": False, "without_key": 401}


@setups_with(connect_from_outside)
def test_a_process_outside_the_group_can_connect(setup):
    for found in results(setup, connect_from_outside):
        assert found == {"equal": True, "health": "ready", "url": True}


@setups_with()
def test_nothing_is_left_behind(setup):
    _, _, left = setup
    assert left == []


# --- failures --------------------------------------------------------------------------------------------------------


def launch_and_fail(rank, tp_size, kwargs):
    """What every rank is reported, and when, relative to the end of the server's process."""
    log = Path(kwargs["log_path"])
    with tpcolocate.init(tp_size, device="cpu", timeout_s=60.0) as colo:
        try:
            with colo.launch(**{**ARGS, "health_timeout_s": HEALTH_S, **kwargs}):
                return "it came up"
        except errors.TpColocateError as error:
            raised_at = time.time()
            died = log.stat().st_mtime if log.exists() else None
            return type(error).__name__, str(error), None if died is None else raised_at - died


def test_a_checkpoint_that_cannot_be_read_is_the_same_error_on_every_rank_within_seconds(tmp_path, no_leftovers):
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    kwargs = {"model_path": str(tmp_path), "log_path": str(tmp_path / "server.log")}
    found = run_ranks(launch_and_fail, 2, 2, kwargs, timeout_s=200)
    assert found[0][:2] == found[1][:2]
    kind, text, after_s = found[0]
    assert kind == "LaunchError" and "server.log" in text
    assert all(after < 60 for _, _, after in found), "soon after the last line of the log"


def test_a_folder_that_does_not_exist_is_refused_before_anything_starts(tmp_path, no_leftovers):
    kwargs = {"model_path": str(tmp_path / "nowhere"), "log_path": str(tmp_path / "server.log")}
    found = run_ranks(launch_and_fail, 2, 2, kwargs, timeout_s=60)
    assert found[0] == found[1] and found[0][0] == "ConfigError" and f"no folder '{tmp_path}/nowhere'" in found[0][1]


def test_a_taken_port_is_the_same_error_on_every_rank_at_once(tmp_path, tiny_model_dir, no_leftovers):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        kwargs = {"model_path": str(tiny_model_dir()), "port": port, "log_path": str(tmp_path / "server.log")}
        found = run_ranks(launch_and_fail, 2, 2, kwargs, timeout_s=60)
    assert found[0] == found[1]
    assert found[0][0] == "ConfigError" and f"port {port} is taken" in found[0][1]
    assert not (tmp_path / "server.log").exists(), "before anything is started"


@pytest.mark.parametrize("kwargs, words", [
    ({"tp_size": 3}, "contradicts init(tp_size=2)"),
    ({"pp_size": 2}, "pp_size=2 is not supported"),
    ({"api_key": "mine"}, "does not take api_key"),
    ({"enable_dp_attention": True}, "enable_dp_attention=True is not supported"),
    ({"mem_fraction": 0.4}, "has no argument mem_fraction"),
    ({"max_model_len": 256}, "this release has context_length"),
    ({"host": "203.0.113.7"}, "on which this machine cannot listen"),
])  # fmt: skip
def test_impossible_arguments_are_refused_before_anything_starts(kwargs, words, tmp_path, no_leftovers):
    kwargs = {"model_path": "anything", "log_path": str(tmp_path / "server.log"), **kwargs}
    found = run_ranks(launch_and_fail, 2, 2, kwargs, timeout_s=60)
    assert found[0] == found[1] and found[0][0] == "ConfigError" and words in found[0][1]


def test_a_quantised_checkpoint_is_refused_before_anything_starts(tmp_path, no_leftovers):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    kwargs = {"model_path": str(tmp_path), "log_path": str(tmp_path / "server.log")}
    found = run_ranks(launch_and_fail, 2, 2, kwargs, timeout_s=60)
    assert found[0] == found[1] and found[0][0] == "ConfigError" and "is a quantised checkpoint" in found[0][1]


def launch_differently(rank):
    with tpcolocate.init(2, device="cpu", timeout_s=60.0) as colo:
        try:
            colo.launch("model", mem_fraction_static=0.1 * (rank + 1))
        except errors.ConfigError as error:
            return str(error)


def test_ranks_that_want_different_servers_are_reported_the_difference():
    found = run_ranks(launch_differently, 2)
    assert found[0] == found[1] and "mem_fraction_static=0.1 and mem_fraction_static=0.2" in found[0]


def generate_while_stopped(engine):
    """What a request says while a process of the server is stopped."""
    started = time.monotonic()
    assert engine.health().value == "stopped"
    try:
        engine.generate(PROMPTS, GREEDY, timeout_s=4)
    except errors.TpColocateError as error:
        return type(error).__name__, error.message, time.monotonic() - started


def die(rank, model_dir):
    """A process of the server is stopped and then killed under a running engine; then the owner itself."""
    import signal

    tempfile.tempdir = None  # the fork server has looked at its own TMPDIR
    with tpcolocate.init(2, device="cpu", timeout_s=60.0) as colo:
        engine = colo.launch(model_dir, health_timeout_s=HEALTH_S, **ARGS)
        world = World(rank, model_dir, colo)
        engine.sync_weights(world.model)
        message = {"before": engine.health().value}
        victim = None
        if colo.is_owner:
            [victim] = [
                p for p in psutil.Process().children(recursive=True) if "sglang::detok" in " ".join(p.cmdline())
            ]
            victim.send_signal(signal.SIGSTOP)
            while victim.status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
        colo._slice.all_gather(None, what="go on once a process is stopped")
        message["stopped"] = generate_while_stopped(engine)
        colo._slice.all_gather(None, what="continue together", timeout_s=90)
        if victim is not None:
            # torch keeps its manager of shared files for the life of the process
            mine = [p for p in psutil.Process().children(recursive=True) if p.name() != "torch_shm_manager"]
            gone = [p for p in mine if "supervisor.py" not in " ".join(p.cmdline())]
            victim.send_signal(signal.SIGCONT)
            victim.kill()
            killed = time.monotonic()
            psutil.wait_procs(gone, timeout=60)
            assert time.monotonic() - killed < 30, "nobody waits for core dumps"
        colo._slice.all_gather(None, what="wait for the end of the server", timeout_s=90)
        message["after"] = engine.health().value
        try:
            engine.generate(PROMPTS, GREEDY, timeout_s=20)
        except errors.TpColocateError as error:
            message["generate"] = type(error).__name__, error.message, error.hint, error.details
        started = time.monotonic()
        try:
            engine.sync_weights(world.model, timeout_s=120)
        except errors.TpColocateError as error:
            message["sync"] = (type(error).__name__, str(error))
        message["seconds"] = time.monotonic() - started
        colo._slice.all_gather(None, what="meet once more")
        if colo.is_owner:
            Path(model_dir, "message").write_text(repr(message))
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            colo._slice.all_gather(None, what="hear of the owner's death")
        except errors.RankLostError as error:
            message["lost"] = str(error)
        return message


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_a_stopped_and_a_dead_process_and_a_dead_owner_are_reported_and_leave_nothing(
    tmp_path, no_leftovers, short_path
):
    from tiny_models import make_tiny_model

    model_dir = make_tiny_model(tmp_path / "model", family="qwen3", tie=True)
    env = {"TMPDIR": str(short_path)}
    owner, client = run_ranks(die, 2, str(model_dir), env=env, timeout_s=300, expect_errors=True)
    assert owner.exitcode == -9 and client.error is None, client
    message = client.value
    assert message["before"] == "ready" and message["after"] == "dead"
    kind, text, seconds = message["stopped"]
    assert seconds < 40
    assert kind == "DeadlineError" and "sglang::detokenizer (pid " in text and text.endswith("is stopped")
    [folder] = short_path.glob("tpcolocate-*")
    kind, text, hint, tail = message["generate"]
    assert (
        kind == "EngineDeadError" and text.startswith("sglang::detokenizer (pid ") and "was killed by SIGKILL" in text
    )
    assert str(folder / "server.log") in hint and "[tpcolocate] sglang::detokenizer" in tail
    wait_until(lambda: sorted(os.listdir(folder)) in (["server.log"], ["server.log", "supervisor.log"]))
    assert "[tpcolocate] sglang::detokenizer" in (folder / "server.log").read_text(), "the evidence outlives its owner"
    assert message["sync"][0] == "EngineDeadError" and message["seconds"] < 60
    assert "0 has exited" in message["lost"]
    assert f"'sync': {message['sync']!r}" in (model_dir / "message").read_text(), "the same error on both ranks"
