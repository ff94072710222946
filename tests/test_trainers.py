"""Trainers of every kind with a real server of Qwen3-MoE, and one of Mixtral: the tokens equal the trainer's model's.

The sizes are odd on purpose, so that shards are unequal: five experts, and a vocabulary of 509 tokens in one model.  The
experts are one tensor in the engine, many in a checkpoint, and one in transformers 5, in another layout.  SGLang ties the
embeddings of neither family; of a trainer that does, both are sent.  Each server is started once, as in test_engine.
"""

import copy

import peft
import pytest
import torch
from footprint import Footprint, leftovers
from harness import RanksFailed, run_ranks
from test_engine import drive, results
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from tpcolocate import errors

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

IDS = torch.arange(1, 33).view(2, 16)


def trainer(world, seed):
    """Return a copy of the served model with random changes, different for each seed."""
    model = copy.deepcopy(world.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def step(model):
    """Make one training step, the same on every rank, and a forward, which leaves FSDP2's root unsharded."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model(IDS)
    return loss.item()


def shard(model, mesh=None, **how):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False, **how)


def gathered(world, model):
    """Return a plain model with the weights of a sharded one, gathered by torch."""
    plain = copy.deepcopy(world.model)
    plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return plain


def synced(world, model, reference, **options):
    """Sync a trainer, and return what is asserted of every one."""
    before = world.generated()
    report = world.engine.sync_weights(model, **options)
    expected, found = world.expected(reference), world.generated()
    return {
        "equal": found == expected,
        "changed": sum(mine != theirs for mine, theirs in zip(before, found)) >= 2,
        "unverified": report.unverified,
        "tensors": report.num_tensors,
        "replayed": report.num_replayed,
        "warnings": report.warnings,
    }


def plain(world):
    model = trainer(world, 1)
    step(model)
    return synced(world, model, model)


def plain_again(world):
    """The workers have traced this layout: all of it is copied as planned, experts included."""
    model = trainer(world, 2)
    return synced(world, model, model)


def ddp(world):
    model = nn.parallel.DistributedDataParallel(trainer(world, 3))
    step(model)
    return synced(world, model, model.module)


def fsdp2_mixed_precision(world):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(trainer(world, 4), mp_policy=policy)
    step(model)
    dtype = model.model.norm.weight.dtype
    found = synced(world, model, gathered(world, model), bucket_bytes=200_000)
    return {**found, "dtype": str(dtype)}


def fsdp2_cpu_offload(world):
    model = shard(trainer(world, 5), offload_policy=CPUOffloadPolicy(pin_memory=False))
    step(model)
    return synced(world, model, gathered(world, model))


def fsdp2_frozen_and_tied(world):
    """The tied embedding and the first layer are frozen, the rest is trained."""
    model = trainer(world, 6)
    model.lm_head.weight = model.model.embed_tokens.weight
    frozen = [model.model.embed_tokens.weight, *model.model.layers[0].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    start = model.model.layers[0].mlp.experts.down_proj.clone(), model.model.layers[1].mlp.experts.down_proj.clone()
    model = shard(model)
    step(model)
    reference = gathered(world, model)
    tied = torch.equal(reference.lm_head.weight, reference.model.embed_tokens.weight)
    layers = reference.model.layers
    stayed = torch.equal(layers[0].mlp.experts.down_proj, start[0])
    trained = not torch.equal(layers[1].mlp.experts.down_proj, start[1])
    rows = {len(model.model.embed_tokens.weight.to_local()), len(model.model.layers[0].mlp.gate.weight.to_local())}
    found = synced(world, model, reference, payloads="fan_out")
    return {**found, "froze": stayed and trained and tied, "rows": sorted(rows)}


def tensor_parallel(world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = trainer(world, 7)
    attention = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {**attention, "self_attn.o_proj": RowwiseParallel()})
        # Each rank would train them on its own heads alone, and the ranks would diverge.
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.requires_grad_(False)
    step(model)
    return synced(world, model, gathered(world, model))


LORA = {
    "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}  # fmt: skip


def adapted(world, seed, **kwargs):
    model = peft.get_peft_model(trainer(world, seed), peft.LoraConfig(**{**LORA, **kwargs}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # the second factor starts at zero: the adapter would have no effect
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def peft_lora(world):
    model = adapted(world, 8)
    step(model)
    with torch.no_grad():
        logits = model(IDS).logits
        with model.disable_adapter():
            effect = (logits - model(IDS).logits).abs().max().item()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = synced(world, model, model)
    unchanged = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return {**found, "effect": effect > 0.1, "unchanged": unchanged}


def peft_lora_fsdp2(world):
    model = adapted(world, 9)
    reference = copy.deepcopy(model).merge_and_unload()
    inner = model.get_base_model()
    for layer in inner.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return synced(world, model, reference, bucket_bytes=200_000)


def peft_refused(world):
    before = world.generated()
    try:
        world.engine.sync_weights(adapted(world, 10, use_dora=True, target_parameters=None))
    except errors.ConfigError as error:
        return {"message": error.message, "hint": error.hint, "unchanged": world.generated() == before}


class Actor(nn.Module):
    """A policy beside a value head, as trainers have them."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(policy.config.hidden_size, 1)


def renamed(world):
    actor = Actor(trainer(world, 11))
    names = lambda name: name.removeprefix("policy.") if name.startswith("policy.") else None  # noqa: E731
    found = synced(world, actor, actor.policy, rename=names)
    try:
        world.engine.sync_weights(actor)
    except errors.WeightsMismatchError as error:
        return {**found, "without": error.message}


def before_any_sync(world):
    return {"equal": world.generated() == world.expected()}


SYNCS = [
    plain, plain_again, ddp, fsdp2_mixed_precision, fsdp2_cpu_offload, fsdp2_frozen_and_tied, tensor_parallel, peft_lora,
    peft_lora_fsdp2, renamed,
]  # fmt: skip
SETUPS = {
    # family: how the model is made, tp_size and number of ranks, checks
    "qwen3_moe": ({"vocab_size": 509}, 2, [before_any_sync, *SYNCS, peft_refused]),
    "mixtral": ({}, 1, [before_any_sync, plain, plain_again]),
}


@pytest.fixture(scope="module")
def found(tiny_model_dir):
    """Family -> (tp_size, what every rank found, what the set-up left behind); the first use starts its server."""
    done = {}

    def of(family):
        if family not in done:
            how, tp_size, checks = SETUPS[family]
            before = Footprint.now()
            try:
                model_dir = str(tiny_model_dir(family=family, **how))
                ranks = run_ranks(drive, tp_size, model_dir, tp_size, checks, timeout_s=1200)
                done[family] = tp_size, ranks, leftovers(before)
            except RanksFailed as error:  # once is enough
                done[family] = error
        if isinstance(done[family], Exception):
            raise done[family]
        return done[family]

    return of


def every(*checks):
    """Run a test for each family and each of these checks."""
    pairs = [(family, check) for family, (_, _, included) in SETUPS.items() for check in checks if check in included]
    return pytest.mark.parametrize("family, check", pairs, ids=[f"{f}-{c.__name__}" for f, c in pairs])


@every(before_any_sync)
def test_a_mixture_of_experts_is_served_on_the_cpu(found, family, check):
    assert all(seen["equal"] for seen in results(found(family), check))


@every(*SYNCS)
def test_tokens_equal_the_trainers_model_after_a_sync_from(found, family, check):
    for seen in results(found(family), check):
        assert seen["changed"], "the sync must change tokens"
        assert seen["equal"] and seen["unverified"] == ()


@every(plain)
def test_a_first_sync_plans_experts_too(found, family, check):
    for seen in results(found(family), check):
        assert seen["replayed"] == seen["tensors"] and seen["warnings"] == ()


@every(plain_again)
def test_experts_are_copied_as_planned(found, family, check):
    for seen in results(found(family), check):
        # five experts of three tensors in each of two layers, and the dense rest
        assert seen["replayed"] == seen["tensors"] > 2 * 5 * 3


@every(fsdp2_mixed_precision)
def test_master_weights_are_sent_not_the_parameters_that_a_forward_left_in_the_module(found, family, check):
    assert [seen["dtype"] for seen in results(found(family), check)] == ["torch.bfloat16"] * 2


@every(fsdp2_frozen_and_tied)
def test_frozen_and_trained_weights_come_from_shards_of_unequal_size(found, family, check):
    seen = results(found(family), check)
    assert all(of_rank["froze"] for of_rank in seen)
    assert [of_rank["rows"] for of_rank in seen] == [[3, 255], [2, 254]]


@every(peft_lora)
def test_an_adapter_is_merged_in_the_engine_only(found, family, check):
    for seen in results(found(family), check):
        assert seen["effect"] and seen["unchanged"]


@every(peft_refused)
def test_an_adapter_that_cannot_be_merged_is_refused_before_anything_is_sent(found, family, check):
    seen = results(found(family), check)
    assert seen[0] == seen[1] and seen[0]["unchanged"]
    assert "DoRA" in seen[0]["message"] and "merge_and_unload()" in seen[0]["hint"]


@every(renamed)
def test_names_are_mapped_and_other_weights_left_out(found, family, check):
    for seen in results(found(family), check):
        assert "the served model has no policy.model.embed_tokens.weight" in seen["without"]


@pytest.mark.parametrize("family", SETUPS)
def test_nothing_is_left_behind(found, family):
    assert found(family)[2] == []
