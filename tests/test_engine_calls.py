"""Everything beside the sync on a real SGLang server: adapters, update groups, pauses, checkpoints.

As in test_engine.py, each set-up is started once, its ranks run all checks in order, and every check is a test.
"""

import copy
import http.client
import json
import os
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from footprint import Footprint, leftovers
from harness import as_another_user, run_ranks
from rollout_checks import (
    LONG_ARGS,
    InFlight,
    abort_and_flush,
    another_process_asks_while_the_engine_sleeps,
    crossed_calls,
    follows,
    generates_as,
    in_flight,
    outcome_of,
    request_begun_during_a_sync,
    rollouts_beside_everything,
    sleep_beside_rollouts,
    sync_before_the_last_rank_has_its_tokens,
    sync_under_a_pause,
    sync_under_requests,
)
from test_engine import ARGS as PLAIN_ARGS
from test_engine import GREEDY, HEALTH_S, PROMPTS, World, checked

import tpcolocate
from tpcolocate.server.lifecycle import PAUSES
from tpcolocate.server.process import hold_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARGS = {
    **PLAIN_ARGS, **LONG_ARGS, "enable_lora": True, "lora_backend": "torch_native", "max_lora_rank": 8, "max_loras_per_batch": 3,
    "max_loaded_loras": 3, "lora_target_modules": MODULES,
}  # fmt: skip
SAVED_VERSION = "41"


def drive(rank, model_dir, folder, tp_size, checks):
    """One set-up on one rank: launch, all checks, the end."""
    with tpcolocate.init(tp_size, device="cpu", timeout_s=60.0) as colo:
        world = World(rank, model_dir, colo)
        world.folder = Path(folder)
        with colo.launch(model_dir, health_timeout_s=HEALTH_S, **ARGS) as world.engine:
            found = checked(world, checks)
        return found


# --- adapters -------------------------------------------------------------------------------------------------------


def adapted(model, seed, **config):
    """A PEFT model on a copy of `model` whose adapter does something, the same on every rank."""
    import peft

    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False, **config))


def merged(peft_model):
    return copy.deepcopy(peft_model).merge_and_unload()


def lora_beside_each_other(world):
    import peft

    engine, base = world.engine, world.model
    first, second = adapted(base, 1), adapted(base, 2, target_modules=MODULES, r=8, lora_alpha=4, use_rslora=True)
    engine.set_lora("first", first)
    engine.set_lora_from_tensors("second", peft.get_peft_model_state_dict(second), second.peft_config["default"])
    models = {"first": merged(first), "second": merged(second), None: base}
    found = {
        f"{name} as {other}": generates_as(world, model, name) for other, model in models.items() for name in models
    }
    names = ["second", None, "first", "second"]
    mixed = engine.generate(PROMPTS, GREEDY, lora_path=names)
    found["mixed"] = all(
        follows(models[name], prompt, answer["output_ids"]) for name, prompt, answer in zip(names, PROMPTS, mixed)
    )
    again = adapted(base, 3)
    engine.set_lora("first", again)
    found["replaced"] = generates_as(world, merged(again), "first") and not generates_as(
        world, models["first"], "first"
    )
    found["second after it"] = generates_as(world, models["second"], "second")
    engine.unload_lora("first")
    found["unloaded"] = outcome_of(lambda: generates_as(world, base, "first"))[0]
    found["unloaded twice"] = outcome_of(lambda: engine.unload_lora("first"))[0]
    found["second after all"] = generates_as(world, models["second"], "second")
    engine.unload_lora("second")
    return found


def lora_in_parts_of_fused_projections(world):
    """SGLang would fail, or leave these out without a word."""
    found = {}
    for targets in (["q_proj"], ["k_proj"], ["up_proj"], ["gate_proj", "o_proj"]):
        model = adapted(world.model, 4, target_modules=targets)
        world.engine.set_lora("part", model)
        found[targets[0]] = generates_as(world, merged(model), "part") and not generates_as(world, world.model, "part")
    world.engine.unload_lora("part")
    return found


def lora_of_wrapped_models(world):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for wrap in ("fsdp2", "ddp"):
        model = adapted(world.model, len(wrap), target_modules="all-linear")
        whole = merged(model)
        if wrap == "fsdp2":
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            model = fully_shard(model)
        else:
            model = DistributedDataParallel(model)
        world.engine.set_lora("wrapped", model)
        found[wrap] = generates_as(world, whole, "wrapped") and not generates_as(world, world.model, "wrapped")
    world.engine.unload_lora("wrapped")
    return found


def lora_refused(world):
    """What SGLang would serve as something else, or not at all; afterwards the adapter of that name is what it was."""
    import peft

    engine, model = world.engine, adapted(world.model, 5)
    good, config = peft.get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
    a_name, b_name = list(good)[:2]
    engine.set_lora("kept", model)
    last = world.colo.tp_rank == world.colo.tp_size - 1

    def tensors(name, tensors, **changes):
        return lambda: engine.set_lora_from_tensors(name, tensors, {**config, **changes})

    cases = {
        "wrong in": tensors("kept", {**good, a_name: good[a_name][:, 1:]}),
        "wrong out": tensors("kept", {**good, b_name: good[b_name][1:]}),
        "wrong r": tensors("kept", good, r=8),
        "half": tensors("kept", {k: v for k, v in good.items() if k != a_name}),
        "a layer less": tensors("kept", {k: v for k, v in good.items() if ".layers.1." not in k}),
        "unknown layer": tensors("kept", {k.replace("layers.1", "layers.7"): v for k, v in good.items()}),
        "no name of PEFT's": tensors("kept", {**good, "model.norm.weight": torch.zeros(1)}),
        "rank too high": lambda: engine.set_lora("kept", adapted(world.model, 6, r=16)),
        "dora": tensors("kept", good, use_dora=True),
        "no adapter": lambda: engine.set_lora("kept", world.model),
        "one rank": lambda: engine.set_lora("kept", world.model if last else model),
        "ranks differ": lambda: engine.set_lora(f"of rank {world.rank}" if world.colo.tp_size > 1 else "", model),
    }
    if world.colo.tp_size > 1:
        cases["weights differ"] = lambda: engine.set_lora("kept", adapted(world.model, 5 + world.colo.tp_rank))
    found = {case: outcome_of(call) for case, call in cases.items()}
    kept = generates_as(world, merged(model), "kept")
    for name in ("two", "three"):
        engine.set_lora(name, model)
    found["one too many"] = outcome_of(lambda: engine.set_lora("four", model))
    engine.set_lora("two", model)  # in place of one that is there
    for name in ("kept", "two", "three"):
        engine.unload_lora(name)
    return {"outcomes": found, "kept": kept}


def lora_on_synced_weights(world):
    """An adapter stays when the weights below it change."""
    model = adapted(world.model, 7, target_modules=MODULES)
    world.engine.set_lora("stays", model)
    world.perturb(30)
    world.engine.sync_weights(world.model)
    moved = adapted(world.model, 7, target_modules=MODULES)  # the same seed, the same adapter
    found = {
        "base": generates_as(world, world.model),
        "adapter": generates_as(world, merged(moved), "stays") and not generates_as(world, merged(model), "stays"),
    }
    world.engine.unload_lora("stays")
    return found


def lora_that_is_merged_as_well(world):
    """It would count twice."""
    engine, model = world.engine, adapted(world.model, 8)

    def synced(model):
        return [warning for warning in engine.sync_weights(model).warnings if "counts it twice" in warning]

    engine.set_lora("policy", model)
    found = {"other": synced(world.model), "same": synced(model)}
    found["set again"] = outcome_of(lambda: engine.set_lora("policy", model))
    with model.disable_adapter():
        found["disabled"] = synced(model)
    engine.set_lora("policy", model)
    found["served"] = generates_as(world, merged(model), "policy") and generates_as(world, world.model)
    engine.unload_lora("policy")
    engine.sync_weights(world.model)
    return found


# --- update groups --------------------------------------------------------------------------------------------------


class Sender(threading.Thread):
    """Rank 0 of an update group: joins, broadcasts after `send`, leaves.  On the owner; elsewhere it does nothing."""

    def __init__(self, world, **place):
        super().__init__(daemon=True)
        self.world, self.place = world, place
        self.error = None
        self.tensors = None
        self.may_send = threading.Event()

    def run(self):
        if not self.world.colo.is_owner:
            return
        try:
            group = tpcolocate.join_update_group(**self.place, backend="gloo", timeout_s=60)
            assert self.may_send.wait(60)
            for tensor in self.tensors:
                dist.broadcast(tensor, src=0, group=group)
            dist.destroy_process_group(group)
        except BaseException as error:
            self.error = error

    def send(self, tensors):
        self.tensors = [tensor.detach().clone() for tensor in tensors]
        self.may_send.set()

    def end(self):
        self.join(60)
        assert not self.is_alive() and self.error is None, self.error


def meet(world, name="weight_update_group"):
    """The engine and a sender in one group."""
    held = hold_port() if world.colo.is_owner else None
    [port, *_] = world.colo._slice.all_gather(None if held is None else held.getsockname()[1], what="exchange the port")
    size = 1 + world.colo.tp_size
    sender = Sender(world, master_address="127.0.0.1", master_port=port, world_size=size, group_name=name)
    sender.start()
    world.engine.init_weights_update_group(
        master_address="127.0.0.1", master_port=port, rank_offset=1, world_size=size, group_name=name, backend="gloo"
    )
    if held is not None:
        held.close()
    return sender


def described(weights):
    return {
        "names": [name for name, _ in weights],
        "dtypes": [t.dtype for _, t in weights],
        "shapes": [t.shape for _, t in weights],
    }


def update_groups(world):
    """The whole cycle twice, then a part of the weights."""
    engine, found = world.engine, []
    for cycle in range(2):
        old = copy.deepcopy(world.model)
        world.perturb(10 + cycle)
        weights = list(world.model.named_parameters())
        sender = meet(world)
        sender.send(tensor for _, tensor in weights)
        engine.update_weights_from_distributed(
            **described(weights), weight_version=f"cycle {cycle}", bucket_bytes=300_000
        )
        sender.end()
        engine.destroy_weights_update_group()
        [answer] = engine.generate([PROMPTS[0]], GREEDY)
        found.append({
            "equal": generates_as(world, world.model) and not generates_as(world, old),
            "version": (answer["meta_info"]["weight_version"], engine.weight_version),
        })  # fmt: skip
    with torch.no_grad():
        world.model.model.norm.weight.mul_(1.5)
    part = [("model.norm.weight", world.model.model.norm.weight)]
    sender = meet(world, "another")
    sender.send(tensor for _, tensor in part)
    engine.update_weights_from_distributed(**described(part), group_name="another", partial=True)
    sender.end()
    engine.destroy_weights_update_group(group_name="another")
    found.append({"equal": generates_as(world, world.model), "version": engine.weight_version})
    return found


def update_group_guards(world):
    engine = world.engine
    place = {"master_address": "127.0.0.1", "master_port": 1234, "rank_offset": 1, "world_size": 9}
    weights = list(world.model.named_parameters())
    good = described(weights)
    wrong = [torch.Size([3]), *good["shapes"][1:]]
    found = {
        "update without init": outcome_of(lambda: engine.update_weights_from_distributed(**good)),
        "destroy without init": outcome_of(lambda: engine.destroy_weights_update_group()),
        "too small": outcome_of(lambda: engine.init_weights_update_group(**{**place, "world_size": 1})),
        "no sender": outcome_of(lambda: engine.init_weights_update_group(**{**place, "rank_offset": 0})),
        "ranks differ": outcome_of(
            lambda: engine.init_weights_update_group(**{**place, "master_port": 1234 + world.rank}, backend="gloo")
        )
        if world.colo.tp_size > 1
        else None,
    }
    sender = meet(world)
    found |= {
        "init twice": outcome_of(lambda: engine.init_weights_update_group(**place)),
        "wrong shape": outcome_of(lambda: engine.update_weights_from_distributed(**{**good, "shapes": wrong})),
        "unknown name": outcome_of(
            lambda: engine.update_weights_from_distributed(["x"], dtypes=["float32"], shapes=[[1]], partial=True)
        ),
        "missing": outcome_of(lambda: engine.update_weights_from_distributed(**described(weights[1:]))),
        "no dtype": outcome_of(lambda: engine.update_weights_from_distributed(["x"], dtypes=["float33"], shapes=[[1]])),
        "lengths": outcome_of(lambda: engine.update_weights_from_distributed(["x"], dtypes=[], shapes=[])),
        "versions differ": outcome_of(
            lambda: engine.update_weights_from_distributed(**good, weight_version=f"of rank {world.rank}")
        )
        if world.colo.tp_size > 1
        else None,
    }
    unchanged = generates_as(world, world.model)
    sender.send(tensor for _, tensor in weights)  # the group is still good
    engine.update_weights_from_distributed(**good)
    sender.end()
    engine.destroy_weights_update_group()
    return {"outcomes": found, "unchanged": unchanged, "equal": generates_as(world, world.model)}


def sender_that_leaves(world):
    """In the middle of an update: the weights are unknown, and a full sync mends them."""
    engine = world.engine
    weights = list(world.model.named_parameters())
    sender = meet(world)
    sender.send(tensor for _, tensor in weights[:5])
    found = {
        "update": outcome_of(lambda: engine.update_weights_from_distributed(**described(weights), timeout_s=30)),
        "generate": outcome_of(lambda: engine.generate(PROMPTS, GREEDY)),
        "health": engine.health().value,
        "go on": outcome_of(engine.continue_generation),
    }
    sender.end()
    engine.destroy_weights_update_group()
    world.perturb(12)
    version = engine.sync_weights(world.model).weight_version
    return {**found, "version": version == engine.weight_version, "equal": generates_as(world, world.model)}


def shut_down_while_requests_are_held(world):
    """As when training fails under a pause; the other requests are those of rollouts that go on."""
    engine, owned, before = world.engine, world.engine._context.owned, in_flight(world)
    engine.pause_generation()
    begun = InFlight(world)
    begun.start()
    while engine._context.client.num_in_flight < 2:
        time.sleep(0.001)
    engine.shutdown()
    for request in (before, begun):
        request.join(60)
    # The log of a server that had to be killed stays.
    log_stays = owned is not None and owned.process.spec.log_path.exists()
    return {
        "error": (type(before.error).__name__, str(before.error)),
        "begun": type(begun.error).__name__,
        "log stays": log_stays,
    }


# --- checkpoints ----------------------------------------------------------------------------------------------------


def launched_from_a_checkpoint(world):
    [answer] = world.engine.generate([PROMPTS[0]], GREEDY)
    return world.engine.weight_version, answer["meta_info"]["weight_version"], generates_as(world, world.model)


def saved_and_resumed(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    engine, folder = world.engine, world.folder / "step"
    world.perturb(40)
    engine.sync_weights(world.model, weight_version="700")
    want = copy.deepcopy(world.model)
    source = world.sharded() if world.colo.tp_size > 1 else world.model
    named = {f"actor.{name}": tensor for name, tensor in source.state_dict().items()}
    engine.save_weights(named, folder=folder, rename=lambda name: name.removeprefix("actor."))
    again = outcome_of(lambda: engine.save_weights(source, folder=folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)("what is 3 plus 4?")["input_ids"]
    world.perturb(41)
    engine.sync_weights(world.model)
    moved = not generates_as(world, want)
    checkpoint = tpcolocate.Checkpoint(folder)
    report = engine.sync_weights(checkpoint)
    [answer] = engine.generate([PROMPTS[0]], GREEDY)
    found = {
        "moved": moved,
        "equal": generates_as(world, want) and generates_as(world, loaded),
        "versions": (checkpoint.weight_version, report.weight_version, answer["meta_info"]["weight_version"]),
        "tokens": len(tokens),
        "again": again[0],
        "left": sorted(path.name for path in world.folder.iterdir()),
        "missing": outcome_of(lambda: engine.save_weights([], folder=world.folder / "none"))[0],
        "generator": outcome_of(lambda: engine.save_weights(iter(checkpoint.items()), folder=world.folder / "none"))[0],
    }
    found["next"] = engine.sync_weights(world.model).weight_version
    return found


def another_user_intrudes(world):
    """What another user of the machine gets of a running server, with everything known but the key."""
    if os.getuid() != 0:
        return None
    found = {}
    if world.colo.is_owner:
        context = world.engine._context
        runtime, key = context.owned.process.spec.runtime, context.client.api_key
        folders = (runtime.shared, runtime.temporary)
        listed = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
        sockets = [path for path in listed if any(path.startswith(str(folder)) for folder in folders)]
        processes = [
            psutil.Process(context.owned.process.pid),
            *psutil.Process(context.owned.process.pid).children(True),
        ]

        def status_of(path):
            connection = http.client.HTTPConnection("127.0.0.1", int(world.engine.url.rpartition(":")[2]), timeout=20)
            body = json.dumps({"input_ids": [5, 6], "text": None, "abort_all": True})
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            return connection.getresponse().status

        def connect_to(path):
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(path)

        def command_lines():
            return [Path(f"/proc/{process.pid}/cmdline").read_text() for process in processes]

        found = {
            "folders": [as_another_user(lambda one=one: os.listdir(one)) for one in folders],
            "log": as_another_user(lambda: runtime.log_path.read_text()),
            "signals": {as_another_user(lambda one=one: one.terminate()) for one in processes},
            "environments": {as_another_user(lambda one=one: Path(f"/proc/{one.pid}/environ").read_text()) for one in processes},
            "sockets": {as_another_user(lambda one=one: connect_to(one)) for one in sockets},
            "num": (len(processes), len(sockets)),
            "key in a command line": any(key in line for line in as_another_user(command_lines)),
            "requests": {as_another_user(lambda one=one: status_of(one))
                         for one in ("/generate", "/abort_request", "/flush_cache", "/update_weights_from_tensor", "/pause_generation")},
            "connect": as_another_user(lambda: tpcolocate.connect(world.colo.job)),
        }  # fmt: skip
    generates = generates_as(world, world.model)
    return {**found, "generates": generates}


CHECKS = [
    launched_from_a_checkpoint, lora_beside_each_other, lora_in_parts_of_fused_projections, lora_of_wrapped_models, lora_refused,
    lora_on_synced_weights, lora_that_is_merged_as_well, update_group_guards, update_groups, sync_under_requests,
    request_begun_during_a_sync, crossed_calls, sync_before_the_last_rank_has_its_tokens, rollouts_beside_everything, sleep_beside_rollouts, another_process_asks_while_the_engine_sleeps,
    sync_under_a_pause, abort_and_flush, another_user_intrudes,
    saved_and_resumed, sender_that_leaves, shut_down_while_requests_are_held,
]  # fmt: skip


@pytest.fixture(scope="module", params=[2, 1], ids=["tp2", "tp1"])
def setup(request, tiny_model_dir, tmp_path_factory):
    """(tp_size, what every rank found, what the set-up left behind); served from a checkpoint of our own."""
    from safetensors.torch import load_file

    from tpcolocate.weights.sources.checkpoint import CheckpointWriter

    tp_size = request.param
    folder = tmp_path_factory.mktemp("calls")
    model = tiny_model_dir(family="qwen3", tie=tp_size == 1)
    writer = CheckpointWriter(folder / "model", weight_version=SAVED_VERSION, num_shards=1, like=model)
    writer.add(load_file(model / "model.safetensors"))
    writer.finish()
    (folder / "out").mkdir()
    before = Footprint.now()
    found = run_ranks(drive, tp_size, str(folder / "model"), str(folder / "out"), tp_size, CHECKS, timeout_s=1200)
    return tp_size, found, leftovers(before)


def results(setup, check):
    """What every rank's `check` returned; raises what it raised."""
    _, found, _ = setup
    for rank, of_rank in enumerate(found):
        value = of_rank.get(check.__name__, AssertionError("not reached: see the checks before it"))
        if isinstance(value, Exception):
            raise AssertionError(f"rank {rank}: {type(value).__name__}: {value}") from value
    return [of_rank[check.__name__] for of_rank in found]


# --- what came of it ------------------------------------------------------------------------------------------------


def test_a_server_reports_the_version_of_the_checkpoint_that_it_was_launched_from(setup):
    for found in results(setup, launched_from_a_checkpoint):
        assert found == (SAVED_VERSION, SAVED_VERSION, True)


def test_adapters_equal_merged_weights_beside_each_other_and_are_replaced_and_removed(setup):
    names = ("first", "second", None)
    for found in results(setup, lora_beside_each_other):
        assert found.pop("unloaded") == "RequestError" == found.pop("unloaded twice")
        for name in names:
            for other in names:
                assert found.pop(f"{name} as {other}") is (name == other)
        assert found == dict.fromkeys(found, True)


def test_an_adapter_on_a_part_of_a_fused_projection_equals_merged_weights(setup):
    for found in results(setup, lora_in_parts_of_fused_projections):
        assert found == dict.fromkeys(["q_proj", "k_proj", "up_proj", "gate_proj"], True)


def test_the_adapters_of_sharded_and_wrapped_models_equal_merged_weights(setup):
    for found in results(setup, lora_of_wrapped_models):
        assert found == {"fsdp2": True, "ddp": True}


def test_adapters_that_do_not_fit_are_refused_on_every_rank_and_change_nothing(setup):
    found = results(setup, lora_refused)
    for of_rank in found:
        assert {case: kind for case, (kind, _) in of_rank["outcomes"].items()} == {
            **dict.fromkeys(["wrong in", "wrong out", "wrong r", "half", "a layer less", "unknown layer"], "WeightsMismatchError"),
            "no name of PEFT's": "WeightsMismatchError",
            **dict.fromkeys(["rank too high", "dora", "no adapter", "one rank", "ranks differ"], "ConfigError"),
            "one too many": "EngineStateError",
            **({"weights differ": "WeightsMismatchError"} if setup[0] > 1 else {}),
        }  # fmt: skip
        assert of_rank["kept"]
    assert all(of_rank["outcomes"] == found[0]["outcomes"] for of_rank in found), "the same error on every rank"


def test_an_adapter_stays_when_the_weights_below_it_change(setup):
    for found in results(setup, lora_on_synced_weights):
        assert found == {"base": True, "adapter": True}


def test_an_adapter_is_not_served_on_weights_that_it_is_merged_into(setup):
    for found in results(setup, lora_that_is_merged_as_well):
        [warning] = found["same"]
        assert "served as well (policy)" in warning and "model.disable_adapter()" in warning
        kind, message = found["set again"]
        assert kind == "ConfigError" and "adapter 'default' of this model is in the engine's weights" in message
        assert found["other"] == found["disabled"] == [] and found["served"]


def test_weights_come_through_an_update_group_twice_in_a_row_and_in_part(setup):
    for found in results(setup, update_groups):
        assert found == [
            {"equal": True, "version": ("cycle 0", "cycle 0")},
            {"equal": True, "version": ("cycle 1", "cycle 1")},
            {"equal": True, "version": found[-1]["version"]},
        ]
        assert found[-1]["version"].isdecimal()


def test_an_update_that_breaks_off_leaves_the_weights_unknown_until_a_full_sync(setup):
    found = results(setup, sender_that_leaves)
    for of_rank in found:
        assert of_rank["update"][0] == "SyncError" and "did not take the broadcast weights" in of_rank["update"][1]
        assert of_rank["generate"][0] == "EngineStateError" == of_rank["go on"][0] and of_rank["health"] == "paused"
        assert of_rank["version"] and of_rank["equal"]
    assert all(of_rank["update"] == found[0]["update"] for of_rank in found)


def test_update_groups_are_guarded_on_every_rank(setup):
    tp_size, _, _ = setup
    found = results(setup, update_group_guards)
    for of_rank in found:
        outcomes = of_rank["outcomes"]
        assert {case: what[0] for case, what in outcomes.items() if what is not None} == {
            **dict.fromkeys(["update without init", "destroy without init", "init twice"], "EngineStateError"),
            **dict.fromkeys(["too small", "no sender", "no dtype", "lengths"], "ConfigError"),
            **dict.fromkeys(["wrong shape", "unknown name", "missing"], "WeightsMismatchError"),
            **(dict.fromkeys(["ranks differ", "versions differ"], "ConfigError") if tp_size > 1 else {}),
        }
        assert of_rank["unchanged"] and of_rank["equal"]
        if tp_size > 1:
            assert "ranks 0 and 1 pass different master_port: 1234 and 1235" in outcomes["ranks differ"][1]
            assert "different weight_version: 'of rank 0' and 'of rank 1'" in outcomes["versions differ"][1]
    assert all(of_rank["outcomes"] == found[0]["outcomes"] for of_rank in found), "the same error on every rank"


def test_a_sync_retracts_requests_in_flight_and_they_go_on_with_the_new_weights(setup):
    for found in results(setup, sync_under_requests):
        assert found == {"handed over": True, "equal": True}


def test_a_shutdown_does_not_wait_for_requests_that_the_server_holds(setup):
    for found in results(setup, shut_down_while_requests_are_held):
        name, message = found["error"]
        assert name == "EngineDeadError" and message.startswith("the server was ")
        assert "there is no log;" in message and not found["log stays"]
        assert found["begun"] in ("EngineDeadError", "EngineStateError"), (
            "the second if the shutdown came before it was sent"
        )


def test_a_request_that_is_begun_during_a_sync_waits_for_the_new_weights(setup):
    for found in results(setup, request_begun_during_a_sync):
        assert found == {"of new": True, "health": ["paused"], "equal": True}


def test_ranks_that_make_different_calls_get_the_same_error_and_nothing_happens(setup):
    tp_size, _, _ = setup
    found = results(setup, crossed_calls)
    differ = "cannot {}: ranks 0 and 1 pass different {}"
    words = {
        "call": (
            "RankLostError",
            "the ranks make different calls: rank 0: pause generation; rank 1: sync weights",
        ),
        "mode": ("ConfigError", differ.format("pause generation", "mode: 'retract' and 'abort'")),
        "tags": ("ConfigError", differ.format("sleep", "tags: ['kv_cache', 'weights'] and ['kv_cache']")),
        "bucket_bytes": ("ConfigError", differ.format("sync weights", "bucket_bytes: 400000 and 400001")),
        "weight_version": ("ConfigError", differ.format("sync weights", "weight_version: 'of rank 0' and 'of rank 1'")),
    }
    for of_rank in found:
        assert of_rank["outcomes"] == (words if tp_size > 1 else {})
        assert of_rank["unchanged"] and of_rank["equal"]
    assert len({of_rank["version"] for of_rank in found}) == 1


def test_a_sync_waits_for_a_rank_that_is_still_waiting_for_tokens(setup):
    for found in results(setup, sync_before_the_last_rank_has_its_tokens):
        assert found == [{"of old": True, "in time": True, "equal": True}] * 2


def test_rollouts_go_on_beside_syncs_and_pauses_whenever_ranks_come_to_them(setup):
    assert all(results(setup, rollouts_beside_everything))


def test_sleeping_beside_rollouts_neither_lets_a_request_through_nor_ends_the_server(setup):
    words = "cannot generate while asleep (cuda_graph, kv_cache, weights released)"
    for found in results(setup, sleep_beside_rollouts):
        assert found == {"often": 10, "refused": [words], "stream": ("EngineStateError", words), "equal": True}


def test_requests_from_elsewhere_wait_while_the_engine_sleeps(setup):
    for found in results(setup, another_process_asks_while_the_engine_sleeps):
        assert found == {"waited": [True] * 3, "of new": True, "equal": True}


@pytest.mark.parametrize("mode", PAUSES)
def test_a_sync_leaves_the_users_pause_as_it_is(setup, mode):
    other = "abort" if mode == "retract" else "retract"
    for found in results(setup, sync_under_a_pause):
        found = found[mode]
        words = f"cannot pause with mode {other!r}: generation is paused with {mode!r}"
        assert found["other"] == ("EngineStateError", words)
        assert found["health"] == "paused" and found["held"] and found["equal"]


def test_what_a_pause_makes_of_requests_in_flight(setup):
    for found in results(setup, sync_under_a_pause):
        retract, abort, in_place = (found[mode] for mode in PAUSES)
        assert abort["ended"] == "abort" and abort["of old"]
        assert retract["ended"] is None and not retract["of old"]
        assert retract["handed over"] is not None and retract["handed over with its cache"] is None
        assert in_place["ended"] is None and not in_place["of old"]
        assert in_place["handed over with its cache"] is not None and in_place["handed over"] is None
        assert retract["later of new"] and abort["later of new"]
        assert not in_place["later of new"], "it met the old cache, and that is what the warning says"
        assert len(in_place["warned"]) == 1 and retract["warned"] == abort["warned"] == []


def test_requests_are_aborted_by_name_or_all_and_the_cache_is_dropped(setup):
    for found in results(setup, abort_and_flush):
        assert found == {
            "refused": ("EngineStateError", "cannot flush the cache: requests are in flight"),
            "ended": "abort",
            "cached": 0,
            "empty": ("ConfigError", "rid is empty"),
            "mode": ("ConfigError", "unknown mode 'stop'"),
        }


@pytest.mark.skipif(os.getuid() != 0, reason="two users: only root can become another one")
def test_another_user_can_neither_read_nor_stop_nor_use_a_running_server(setup):
    for found in results(setup, another_user_intrudes):
        assert found.pop("generates")
        if not found:
            continue  # a client
        num_processes, num_sockets = found.pop("num")
        # its main process, the schedulers, the detokenizer
        assert num_processes >= 2 + setup[0] and num_sockets >= 1
        assert found == {
            "folders": ["PermissionError"] * 2, "log": "PermissionError", "signals": {"AccessDenied"},
            "environments": {"PermissionError"}, "sockets": {"PermissionError"}, "key in a command line": False,
            "requests": {401}, "connect": "RendezvousError",
        }  # fmt: skip


def test_a_run_is_saved_and_resumed_with_its_version(setup):
    for found in results(setup, saved_and_resumed):
        assert found == {
            "moved": True, "equal": True, "versions": ("700",) * 3, "tokens": found["tokens"], "again": "ConfigError",
            "left": ["step"], "missing": "WeightsMismatchError", "generator": "ConfigError", "next": "701",
        }  # fmt: skip
        assert found["tokens"] > 3


def test_nothing_is_left_behind(setup):
    _, _, left = setup
    assert left == []
