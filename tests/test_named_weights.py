"""The sources that sync_weights accepts, and the names under which their weights are sent."""

import gc
import traceback
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tpcolocate.errors import ConfigError, WeightsMismatchError
from tpcolocate.weights.lora import check_adapter, make_adapter
from tpcolocate.weights.sources.lazy_tensor import full_tensor
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

NAMES = ["embed.weight", "layer.bias", "layer.weight", "scale"]


class Model(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 8)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        if tie:
            self.layer.weight = self.embed.weight


def names(source):
    return sorted(name for name, _ in NamedWeights.of(source))


def wrapped_inside(model):
    model.layer = checkpoint_wrapper(torch.compile(model.layer))
    return model


@pytest.mark.parametrize("wrap", [
    lambda model: model,
    torch.compile,
    wrapped_inside,
    lambda model: torch.compile(wrapped_inside(model)),
    lambda model: model.state_dict(),
    lambda model: list(model.state_dict().items()),
    lambda model: iter(model.state_dict().items()),
], ids=["plain", "compiled", "wrapped inside", "both", "state dict", "list", "iterator"])  # fmt: skip
def test_names_are_those_of_the_plain_model(wrap):
    model = Model()
    weights = dict(NamedWeights.of(wrap(model)))
    assert sorted(weights) == NAMES, "persistent buffers are part of a checkpoint, others are not"
    assert all(
        weights[name].data_ptr() == tensor.data_ptr()
        for name, tensor in Model.state_dict(model).items()
        if name in weights
    )


def ddp_names(rank):
    from torch.nn.parallel import DistributedDataParallel

    found = []
    for wrap in (
        DistributedDataParallel,
        lambda m: torch.compile(DistributedDataParallel(m)),
        lambda m: DistributedDataParallel(torch.compile(m)),
    ):
        found.append(names(wrap(Model())))
    return found


def test_ddp_is_unwrapped_in_any_nesting():
    assert run_ranks(ddp_names, 1) == [[NAMES] * 3]


GIVEN = pytest.mark.parametrize("give", [
    lambda m: m, lambda m: m.state_dict(), lambda m: list(m.state_dict().items()),
], ids=["module", "dict", "list"])  # fmt: skip
REST = ["layer.bias", "scale"]


@GIVEN
@pytest.mark.parametrize("served, sent, aliases", [
    (["embed.weight"], ["embed.weight"], {"layer.weight": "embed.weight"}),
    (["layer.weight"], ["layer.weight"], {"embed.weight": "layer.weight"}),
    (["embed.weight", "layer.weight"], ["embed.weight", "layer.weight"], {}),  # the served model does not tie them
    ([], ["embed.weight"], {"layer.weight": "embed.weight"}),  # an error, which the spec finds
])  # fmt: skip
def test_tied_weights_are_sent_under_the_names_that_are_served(give, served, sent, aliases):
    weights = NamedWeights.of(give(Model(tie=True)), expected={*served, *REST})
    assert sorted(name for name, _ in weights) == sorted(sent + REST)
    assert weights.aliases == aliases


def test_without_expected_names_a_module_sends_tied_weights_once_and_a_dict_all_its_names():
    assert names(Model(tie=True)) == ["embed.weight", *REST]
    assert names(Model(tie=True).state_dict()) == NAMES


def test_other_views_of_one_memory_are_not_tied():
    block = torch.randn(4, 4)
    parts = {
        "q": block[:2],
        "k": block[2:],
        "all": block,
        "t": block.t(),
        "e": torch.empty(0, 2),
        "f": torch.empty(0, 2),
    }
    weights = NamedWeights.of(parts, expected=())
    assert [name for name, _ in weights] == list(parts) and weights.aliases == {}


def test_the_items_of_a_state_dict_are_known_in_advance():
    state = torch.nn.Linear(2, 2).state_dict()
    weights = NamedWeights.of(state.items(), expected=state)
    assert not weights.is_streamed and [name for name, _ in weights] == list(state)


def test_pairs_may_be_lists():
    assert [name for name, _ in NamedWeights.of([["a", torch.zeros(1)], ["b", torch.zeros(2)]])] == ["a", "b"]


def test_a_generator_is_read_as_it_is_sent():
    taken = []

    def pairs():
        for i in range(3):
            taken.append(i)
            yield str(i), torch.zeros(1)

    weights = NamedWeights.of(pairs())
    assert weights.is_streamed and taken == []
    assert weights.items is None and not weights.is_sharded and weights.reading_bytes == 0
    stream = iter(weights)
    assert next(stream)[0] == "0" and taken == [0]
    assert [name for name, _ in stream] == ["1", "2"]


@pytest.mark.parametrize("source, words", [
    ({"w": torch.empty(2, device="meta")}, "w is on the meta device"),
    (nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
    ({"w": torch.eye(2).to_sparse()}, "w has layout torch.sparse_coo"),
    ([("w", 1.0)], "w is a float, not a tensor"),
    ([torch.zeros(1)], "got Tensor"),
    ([("w", torch.zeros(1), 1)], r"expected \(name, tensor\), got \(str, Tensor, int\)"),
    ([nn.Linear(2, 2)], r"got Linear\n.*pass the module itself"),
    ({1: torch.zeros(1)}, r"got \(int, Tensor\)"),
    (7, "cannot take weights from int"),
    (None, "cannot take weights from NoneType"),
    ("path", r"a path: 'path'\n.*tpcolocate.Checkpoint\('path'\)"),
    (Path("path"), r"tpcolocate.Checkpoint\('path'\)"),
    ({"w": torch.zeros(1).numpy()}, r"w is a ndarray, not a tensor\n.*torch.from_numpy"),
    ({"model": {"w": torch.zeros(1)}, "step": 7}, r"model is a dict, not a tensor\n.*pass what is under 'model'"),
    ({"w": torch.zeros(1), "_extra_state": None}, r"_extra_state is a NoneType, not a tensor\n.*leave it out"),
])  # fmt: skip
def test_sources_without_dense_named_data_are_refused(source, words):
    with pytest.raises(ConfigError, match=words):
        NamedWeights.of(source)


def test_a_generator_is_checked_as_it_is_read():
    stream = iter(NamedWeights.of(item for item in [("a", torch.zeros(1)), ("b", torch.empty(1, device="meta"))]))
    assert next(stream)[0] == "a"
    with pytest.raises(ConfigError, match="b is on the meta device"):
        next(stream)


def test_a_generator_may_give_a_name_once():
    pairs = [("a", torch.zeros(1)), ("b", torch.zeros(1)), ("a", torch.ones(1))]
    for expected in (None, ["a", "b"]):
        stream = iter(NamedWeights.of(iter(pairs), expected=expected))
        assert [next(stream)[0], next(stream)[0]] == ["a", "b"]
        with pytest.raises(WeightsMismatchError, match="a is given twice"):
            next(stream)


class Elsewhere(torch.Tensor):
    """A tensor around another one, as torchao's of float8 training under FSDP2."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls(args[0])


def refused_shards(mesh):
    from torch.distributed.tensor import DTensor, Shard

    shard = DTensor.from_local(Elsewhere(torch.ones(2, 2)), mesh, [Shard(0)], run_check=False)
    rows = 3 if mesh.get_rank() == 0 else 1  # as frameworks cut that fill their buffers
    uneven = DTensor.from_local(torch.ones(rows, 2), mesh, [Shard(0)], run_check=False, shape=(4, 2), stride=(2, 1))
    found = []
    for source in ({"a": shard}, {"a": uneven}, iter([("a", uneven)]), reordered()):
        try:
            list(NamedWeights.of(source))
            found.append(None)
        except ConfigError as error:
            found.append(error.message)
    return found


def reordered():
    """As FSDP2 shards over a mesh that has the ranks in another order: by their places in the process group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(nn.Linear(2, 3), mesh=DeviceMesh("cpu", [1, 0]))


def fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = Model(tie=True)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharded = fully_shard(model, mesh=mesh)
    weights = NamedWeights.of(sharded)
    full = {name: full_tensor(tensor) for name, tensor in weights}
    from_dict = {name: full_tensor(tensor) for name, tensor in NamedWeights.of(sharded.state_dict(), expected=[*full])}
    return (
        weights.is_sharded,
        weights.aliases,
        sorted(full),
        all(torch.equal(expected[name], tensor) and not tensor.requires_grad for name, tensor in full.items()),
        sorted(from_dict) == sorted(full)
        and all(torch.equal(expected[name], tensor) for name, tensor in from_dict.items()),
        weights.warnings,
        refused_shards(mesh),
    )


def test_fsdp2_is_gathered_and_shards_without_memory_are_refused():
    refused = [
        [
            "a is a Elsewhere, which has no memory of its own that could be sent",
            *[f"a has a shard of shape ({rows}, 2) on this rank, where (Shard(dim=0),) gives one of shape (2, 2)"] * 2,
            None,
        ]
        for rows in (3, 1)
    ]
    expected = (
        True,
        {"layer.weight": "embed.weight"},
        ["embed.weight", "layer.bias", "scale"],
        True,
        True,
        (),
    )
    assert run_ranks(fsdp, 2) == [(*expected, of_rank) for of_rank in refused]


def strip_actor(name):
    return None if name.startswith("value_head.") else name.removeprefix("actor.")


class Actor(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor = Model(tie=True)
        self.value_head = nn.Linear(4, 1)


@pytest.mark.parametrize("rename", [
    strip_actor,
    {"actor.embed.weight": "embed.weight", "actor.layer.weight": "layer.weight", "actor.layer.bias": "layer.bias",
     "actor.scale": "scale", "value_head.weight": None, "value_head.bias": None},
], ids=["function", "mapping"])  # fmt: skip
@pytest.mark.parametrize("give", [
    lambda m: m, lambda m: m.state_dict(), lambda m: list(m.state_dict().items()), lambda m: iter(m.state_dict().items()),
], ids=["module", "dict", "list", "iterator"])  # fmt: skip
def test_names_are_mapped_before_ties_are_found_and_none_leaves_a_weight_out(give, rename):
    model = Actor()
    weights = NamedWeights.of(give(model), expected=["embed.weight", *REST], rename=rename)
    given = dict(weights)
    assert sorted(given) == ["embed.weight", *REST]
    assert weights.aliases == ({} if weights.items is None else {"layer.weight": "embed.weight"})
    assert given["scale"].data_ptr() == model.actor.scale.data_ptr()


def test_names_that_a_mapping_lacks_are_kept():
    assert names_renamed({"scale": "factor"}) == ["embed.weight", "factor", "layer.bias", "layer.weight"]


def names_renamed(rename):
    return sorted(name for name, _ in NamedWeights.of(Model(), rename=rename))


def test_a_name_is_a_string_or_none():
    with pytest.raises(ConfigError, match="rename returned int for scale"):
        names_renamed(lambda name: 3)


class HalfOnMeta(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.register_buffer("a", tensor)
        self.b = nn.Linear(2, 2, device="meta")


SPARSE = torch.eye(2).to_sparse()


@pytest.mark.parametrize("refused", [
    lambda tensor: NamedWeights.of([("a", tensor), ("b", SPARSE)]),
    lambda tensor: NamedWeights.of({"a": tensor, "b": 1}),
    lambda tensor: NamedWeights.of([(tensor, "a")]),
    lambda tensor: NamedWeights.of({"a": tensor}, rename=lambda name: 3),
    lambda tensor: NamedWeights.of(HalfOnMeta(tensor)),
    lambda tensor: list(NamedWeights.of(pair for pair in [("a", tensor), ("b", SPARSE)])),
    lambda tensor: make_adapter({"a": tensor}, {"r": 1, "lora_alpha": 1}),
    lambda tensor: check_adapter(make_adapter({"a.lora_A.weight": tensor}, {"r": 1, "lora_alpha": 1}), None),
], ids=["list", "dict", "swapped", "rename", "module", "generator", "names of an adapter", "half an adapter"])  # fmt: skip
def test_a_kept_error_holds_no_tensors(refused):
    """Beyond the frames of its traceback, which can be cleared."""
    tensor = torch.ones(3)
    storage = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
    with pytest.raises(ConfigError) as caught:
        refused(tensor)
    error = caught.value
    del tensor, caught
    assert not storage.expired()
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    assert storage.expired() and error.message
