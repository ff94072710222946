"""DeepSpeed ZeRO-3 as a source, by real gloo ranks: with DeepSpeed itself where it is installed, else with a double.

DeepSpeed is no requirement: its package builds on the machine, and compiles a kernel when it is first used on a CPU.  To
run these tests with it (seen with 0.19.8 and torch 2.13):

    DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation --target FOLDER deepspeed hjson msgpack ninja py-cpuinfo
    PYTHONPATH=FOLDER python -m pytest tests/test_zero3.py

The double, `Zero3Double`, has the attributes and the one context manager that tpcolocate relies on, no more.
"""

import importlib.util
import math
import sys
import types
from enum import Enum

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn

from tpcolocate.errors import ConfigError, WeightsMismatchError
from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.lazy_tensor import LazyTensor, full_bytes, full_tensor
from tpcolocate.weights.sources.model_spec import ModelSpec
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sources.zero3 import WARNING

pytestmark = [pytest.mark.quick, pytest.mark.timeout(300)]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
IDS = torch.arange(9)
MOST_KEPT = 10
"""Elements of a parameter that ZeRO-3 leaves gathered between steps."""


class Net(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.embed, self.up, self.norm = nn.Embedding(11, 5), nn.Linear(5, 7), nn.LayerNorm(7)
        self.down, self.head = nn.Linear(7, 5, bias=False), nn.Linear(5, 11, bias=False)
        self.register_buffer("scale", torch.ones(3))
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.norm(self.up(self.embed(ids)))))


def net(tie):
    torch.manual_seed(0)
    return Net(tie)


def loss_of(model):
    return model(IDS).square().mean()


# --- DeepSpeed itself ----------------------------------------------------------------------------------------------------


def engine(stage, tie):
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = net(tie)
    zero = {"stage": stage, "stage3_param_persistence_threshold": MOST_KEPT}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return made


def step(made):
    made.backward(loss_of(made))
    made.step()


def by_itself(made):
    """The full weights, by DeepSpeed's own means."""
    import deepspeed

    found = {}
    for name, parameter in made.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return {**found, **{name: buffer.clone() for name, buffer in made.module.named_buffers()}}


def read(source):
    weights = NamedWeights.of(source)
    shapes = {name: (item.shape, item.dtype) for name, item in weights}
    found = {name: full_tensor(item).clone() for name, item in weights}
    assert all((full.shape, full.dtype) == shapes[name] for name, full in found.items())
    return weights, {**found, **{name: found[of] for name, of in weights.aliases.items()}}


def same(found, expected):
    return sorted(found) == sorted(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def statuses(made):
    return [getattr(parameter, "ds_status", None) for parameter in made.module.parameters()]


def trained(stage, tie):
    """Read at every step; another engine is not, and must come to the same weights."""
    made, other = engine(stage, tie), engine(stage, tie)
    seen, states = [], set()
    for number in range(4):
        if number:
            step(made)
            step(other)
        before = statuses(made)
        states |= {str(status) for status in before}
        weights, found = read(made)
        seen.append((same(found, by_itself(other)), statuses(made) == before))
    moved = not torch.equal(found["embed.weight"], net(tie).embed.weight)
    lazy = [name for name, item in weights if isinstance(item, LazyTensor)]
    of_parameters = dict(made.module.named_parameters())
    return {
        "seen": set(seen),
        "moved": moved,
        "trains on": same(by_itself(made), by_itself(other)),
        "lazy": len(lazy),
        "states": len(states),
        "aliases": weights.aliases,
        "warnings": weights.warnings,
        "cached": Fingerprint.of(made, weights) is not None,
        "by name": same(read(of_parameters)[1], {name: by_itself(made)[name] for name in of_parameters}),
        "refused": refusals(made.module.state_dict()) if stage == 3 else [],
    }


def read_stream(module, served):
    """Names that a generator's pairs have, with those of tied parameters, and those that it sends twice."""
    names = [
        [name for name in served if name != "scale"],
        [name for name in served if name not in ("scale", "head.weight")],
    ]
    found = []
    for expected in names:
        weights = NamedWeights.of(iter(module.named_parameters(remove_duplicate=False)), expected=expected)
        found.append(([name for name, _ in weights] == expected, weights.doubles))
    return found


def refusals(state):
    """A state dict of ZeRO-3 passed as a mapping, with and without a spec, and as a generator."""
    messages = []
    for form in (dict, lambda pairs: [*pairs], iter):
        for expected in (None, [*state]):
            try:
                list(NamedWeights.of(form(state.items()), expected=expected))
                messages.append("nothing")
            except ConfigError as error:
                messages.append(error.message.partition(";")[0])
    return sorted(set(messages))


def with_deepspeed(rank):
    return [trained(3, False), trained(3, True), trained(2, False)]


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed; the head of this file says how")
def test_deepspeed_itself():
    env = {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    of_ranks = run_ranks(with_deepspeed, 2, env=env, timeout_s=200)
    sharded = {
        "seen": {(True, True)}, "moved": True, "trains on": True, "lazy": 7, "states": 2, "aliases": {},
        "warnings": (WARNING,), "cached": False, "by name": True, "refused": ["embed.weight is empty"],
    }  # fmt: skip
    tied = {**sharded, "lazy": 6, "aliases": {"head.weight": "embed.weight"}}
    whole = {**sharded, "lazy": 0, "states": 1, "warnings": (), "cached": True, "refused": []}
    assert of_ranks == [[sharded, tied, whole]] * 2


# --- The double ----------------------------------------------------------------------------------------------------------


class Status(Enum):
    """As `ZeroParamStatus`."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


class Gathered:
    """As `GatheredParameters`: collective, and no block in a block."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        for p in self.parameters:
            assert p.ds_status is Status.NOT_AVAILABLE
            shards = [torch.empty_like(p.ds_tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(shards, p.ds_tensor)
            p.data = torch.cat(shards)[: p.ds_numel].view(p.ds_shape)
            p.ds_status = Status.AVAILABLE
            Zero3Double.sizes.append(p.ds_numel)

    def __exit__(self, *_):
        for p in self.parameters:
            p.data.fill_(float("nan"))  # memory that is freed
            p.data, p.ds_status = torch.empty(0, dtype=p.dtype), Status.NOT_AVAILABLE


class Zero3Double(nn.Module):
    """As `DeepSpeedEngine` of stage 3: the parameters of the module inside are empty, but for small ones."""

    sizes: list[int] = []
    """Elements that were gathered."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        for number, p in enumerate(module.parameters()):
            p.ds_id, p.ds_shape, p.ds_numel, p.ds_process_group = number, p.shape, p.numel(), dist.group.WORLD
            size = math.ceil(p.numel() / dist.get_world_size())
            flat = torch.zeros(size * dist.get_world_size()).index_copy_(0, torch.arange(p.numel()), p.data.flatten())
            p.ds_tensor = flat[size * dist.get_rank() :][:size].clone()
            p.ds_status = Status.AVAILABLE if p.numel() <= MOST_KEPT else Status.NOT_AVAILABLE
            if p.ds_status is Status.NOT_AVAILABLE:
                p.data = torch.empty(0, dtype=p.dtype)


def zero3_double():
    """What stands in for the module ``deepspeed``."""
    return types.SimpleNamespace(DeepSpeedEngine=Zero3Double, zero=types.SimpleNamespace(GatheredParameters=Gathered))


def with_a_double(rank):
    sys.modules["deepspeed"] = zero3_double()
    found = []
    for tie in (False, True):
        Zero3Double.sizes.clear()
        expected = net(tie).state_dict()
        made = Zero3Double(net(tie))
        weights, full = read(made)
        lazy = [item for _, item in weights if isinstance(item, LazyTensor)]
        largest = max(map(full_bytes, lazy))
        with torch.no_grad():
            for p in made.module.parameters():
                p.ds_tensor.mul_(2)
                p.data.mul_(2)
        again = {name: full_tensor(item).clone() for name, item in weights}
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        empty = {name: tensor.detach() for name, tensor in made.module.state_dict().items()}
        try:
            ModelSpec(shapes, "the test").check([(name, tensor.shape) for name, tensor in empty.items()])
            message = None
        except WeightsMismatchError as error:
            message = error.message
        found.append({
            "equal": same(full, expected),
            "fresh": all(torch.equal(again[name], 2 * expected[name]) for name in again if name != "scale"),
            "one by one": len(Zero3Double.sizes) == 2 * sum(p.numel() == 0 for p in made.module.parameters()),
            "bytes": weights.reading_bytes == 2 * largest,
            "lazy": len(lazy),
            "aliases": weights.aliases,
            "warnings": weights.warnings,
            "by name": same(read(dict(made.module.named_parameters()))[1], {n: 2 * expected[n] for n, _ in made.module.named_parameters()}),
            "generator": read_stream(made.module, expected),
            "refused": refusals(empty),
            "by the spec": "embed.weight has shape (0,)" in (message or ""),
        })  # fmt: skip
    del sys.modules["deepspeed"]
    return found


def test_a_double_of_zero3():
    plain = {
        "equal": True, "fresh": True, "one by one": True, "bytes": True, "lazy": 7, "aliases": {}, "warnings": (WARNING,),
        "by name": True, "refused": ["embed.weight is empty"], "by the spec": True, "generator": [(True, set()), (False, set())],
    }  # fmt: skip
    tied = {
        **plain, "lazy": 6, "aliases": {"head.weight": "embed.weight"},
        "generator": [(True, {"head.weight"}), (True, set())],
    }  # fmt: skip
    assert run_ranks(with_a_double, 2) == [[plain, tied]] * 2
