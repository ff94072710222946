"""FSDP1 as a source: full tensors are what torch's own full state dict has, one parameter is gathered at a time, and the
module trains on as if it had never been read.  Real gloo ranks; sizes are odd, so that shards end inside of parameters."""

import functools

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, MixedPrecision, ShardingStrategy, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.fsdp1 import WARNING
from tpcolocate.weights.sources.lazy_tensor import full_bytes, full_tensor, is_collective
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = pytest.mark.timeout(400)

IDS = torch.arange(9)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(5, 7), nn.LayerNorm(7)
        self.down = nn.Parameter(torch.randn(5, 7).t())  # not contiguous

    def forward(self, x):
        return x + self.norm(self.up(x)) @ self.down


class Net(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.gate = nn.Linear(5, 1, bias=False)
        self.head = nn.Linear(5, 11, bias=False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.gate(x).sigmoid())


def units(model):
    return ModuleWrapPolicy({Block})


def checkpointed(model):
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


BF16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16)
# How it is wrapped, what is done to the model before, and what is done after.
CASES = {
    "units": {},
    "one unit": {"auto_wrap_policy": None},
    "kept after the forward": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
    "not sharded": {"sharding_strategy": ShardingStrategy.NO_SHARD},
    "mixed precision": {"mixed_precision": BF16},
    "mixed precision, not sharded": {"mixed_precision": BF16, "sharding_strategy": ShardingStrategy.NO_SHARD},
    "tied": {"tie": True},
    "checkpointed": {"prepare": checkpointed},
    "compiled": {"wrap": torch.compile},
    "ignored": {"ignore": True},
}


def wrapped(*, use_orig_params, tie=False, prepare=lambda model: model, wrap=lambda model: model, ignore=False, **how):
    torch.manual_seed(0)
    model = prepare(Net(tie))
    how = {"auto_wrap_policy": units(model), **({"ignored_modules": [model.gate]} if ignore else {}), **how}
    return wrap(FSDP(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params, **how))


def reference(model):
    """By torch's own means."""
    inner = getattr(model, "_orig_mod", model)
    with FSDP.state_dict_type(inner, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        state = {name.replace("_checkpoint_wrapped_module.", ""): t.clone() for name, t in inner.state_dict().items()}
    return state


def step(model, optimizer, also_forward=False):
    inner = getattr(model, "_orig_mod", model)  # to compile is not what is tested
    loss = inner(IDS).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if also_forward:
        inner(IDS)  # without a backward, after which FSDP1 with mixed precision cannot train on


def read(model):
    weights = NamedWeights.of(model)
    found = {}
    for name, item in weights:
        full = full_tensor(item)
        assert (full.shape, full.dtype) == (item.shape, item.dtype) and not full.requires_grad, name
        found[name] = full.clone()
    return weights, found


def differences(found, expected, aliases):
    found = {**found, **{name: found[of] for name, of in aliases.items()}}
    if "scale" in found and found["scale"].dtype == torch.bfloat16:
        found["scale"] = found[
            "scale"
        ].float()  # FSDP1 has rounded the buffer for good, and its state dict casts it back
    names = sorted(set(found) ^ set(expected))
    return names + [
        name
        for name in expected
        if name in found
        and not (found[name].dtype, found[name].shape) == (expected[name].dtype, expected[name].shape)
        or not torch.equal(found[name], expected[name])
    ]


def case(use_orig_params, **how):
    """What is wrong, in words."""
    model, other = (wrapped(use_orig_params=use_orig_params, **how) for _ in range(2))
    optimizer, its = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, other))
    wrong, before = [], None
    for number in range(4):
        if number:
            step(model, optimizer, also_forward=number == 3)
            step(other, its, also_forward=number == 3)
        sizes, forbidden = [], []
        with recorded(sizes, forbidden):
            weights, found = read(model)
        wrong += [f"{number}: {name}" for name in differences(found, reference(other), weights.aliases)]
        wrong += [f"{number}: gathers by {name}" for name in forbidden]
        lazy = [item for _, item in weights if is_collective(item)]
        if sum(sizes) != sum(map(full_bytes, lazy)) or weights.reading_bytes != max(map(full_bytes, lazy), default=0):
            wrong.append(f"{number}: {sizes} were moved for {len(lazy)} parameters")
        if weights.is_sharded != (weights.warnings == (WARNING,)) or Fingerprint.of(model, weights) and lazy:
            wrong.append(f"{number}: sharded {weights.is_sharded}, {weights.warnings}")
        if before is not None and torch.equal(before["embed.weight"], found["embed.weight"]):
            wrong.append(f"{number}: not trained")
        before = found
    wrong += [f"trained apart: {name}" for name in differences(reference(model), reference(other), {})]
    return wrong, weights.is_sharded, weights.aliases


class recorded:
    """Notes the bytes of broadcasts, and other collectives by their names."""

    NAMES = ("all_gather_into_tensor", "all_gather_single", "all_gather", "all_reduce")

    def __init__(self, sizes, others):
        self.sizes, self.others = sizes, others

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        broadcast = dist.broadcast

        def noted(tensor, *args, **kwargs):
            self.sizes.append(tensor.numel() * tensor.element_size())
            return broadcast(tensor, *args, **kwargs)

        self.patch.setattr(dist, "broadcast", noted)
        for name in self.NAMES:
            if hasattr(dist, name):
                self.patch.setattr(dist, name, functools.partial(self._other, name, getattr(dist, name)))

    def _other(self, name, function, *args, **kwargs):
        self.others.append(name)
        return function(*args, **kwargs)

    def __exit__(self, *_):
        self.patch.undo()


def replaced_parameter():
    """As FSDP1 itself takes it over in its next forward."""
    model = wrapped(use_orig_params=True)
    step(model, torch.optim.SGD(model.parameters(), lr=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel():
                parameter.data = parameter.data * 2
    _, found = read(model)
    return differences(found, reference(model), {})


def refusals():
    model = wrapped(use_orig_params=True)
    flat = wrapped(use_orig_params=False)
    messages = []
    small = FSDP(nn.Linear(3, 3), device_id=torch.device("cpu"))
    with FSDP.state_dict_type(small, StateDictType.SHARDED_STATE_DICT):
        state = small.state_dict()
    for source in (dict(model.named_parameters()), [*model.named_parameters()], state):
        try:
            NamedWeights.of(source)
            messages.append(None)
        except ConfigError as error:
            messages.append(error.message)
    with FSDP.summon_full_params(model):
        NamedWeights.of(dict(model.named_parameters()))
    NamedWeights.of(reference(model))
    flat._handle.flat_param._numels_with_padding = (1, *flat._handle.flat_param._numels_with_padding[1:])
    try:
        NamedWeights.of(flat)
    except ConfigError as error:
        messages.append(error.message)
    return messages


def two(rank):
    found = {(name, orig): case(orig, **how) for name, how in CASES.items() for orig in (True, False)}
    return found, replaced_parameter(), refusals()


@pytest.fixture(scope="module")
def found():
    return run_ranks(two, 2, timeout_s=150)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_full_tensors_are_those_of_torchs_own_state_dict(found, name, use_orig_params):
    aliases = {"head.weight": "embed.weight"} if name == "tied" else {}
    expected = [], "not sharded" not in name, aliases
    assert [of_rank[0][name, use_orig_params] for of_rank in found] == [expected] * 2


def test_a_parameter_that_was_given_other_memory(found):
    assert [of_rank[1] for of_rank in found] == [[], []]


def test_what_fsdp1_leaves_on_a_rank_is_refused(found):
    for of_rank in found:
        mapping, pairs, sharded, layout = of_rank[2]
        # A rank may hold nothing of the first parameter.
        assert all("FSDP1 has left on this rank" in text or "is empty" in text for text in (mapping, pairs))
        assert "ShardedTensor" in sharded
        assert "in a way that is not known here" in layout


def hybrid(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    how = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}
    return [case(orig, **how)[:2] for orig in (True, False)]


def test_hybrid_shards_are_gathered_among_those_that_share_them():
    assert run_ranks(hybrid, 4, timeout_s=120) == [[([], True)] * 2] * 4


def alone(rank):
    return case(True)[:2], Fingerprint.of(model := wrapped(use_orig_params=False), NamedWeights.of(model)) is not None


def test_a_single_rank_has_live_memory():
    assert run_ranks(alone, 1) == [(([], False), True)]
