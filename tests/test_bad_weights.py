"""Weights that are wrong in themselves: other kinds of dtype, forms without memory of their own, numbers that are not finite."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_lora import CONFIG
from test_lora import tensors as adapter_tensors
from torch import nn

from tpcolocate.errors import ConfigError, TpColocateError, WeightsMismatchError
from tpcolocate.in_server.tpcolocate_receiver.checksums import are_finite
from tpcolocate.in_server.tpcolocate_receiver.kernel_tables import finite_masks
from tpcolocate.weights.lora import check_adapter, make_adapter
from tpcolocate.weights.sources.lazy_tensor import full_tensor
from tpcolocate.weights.sources.model_spec import FLOATS, ModelSpec, read_spec
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sources.nonfinite import refuse_nonfinite
from tpcolocate.weights.sync import prepare
from tpcolocate.weights.sync.options import SyncOptions

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("expected", DTYPES, ids=str)
def test_floating_point_weights_are_cast_to_each_other_and_all_else_must_be_the_same(expected):
    spec = ModelSpec({"a": (2,)}, "the test", {"a": expected})
    for dtype in DTYPES:
        if dtype == expected or (dtype in FLOATS and expected in FLOATS):
            spec.check_dtypes([("a", dtype)])
        else:
            with pytest.raises(WeightsMismatchError, match=f"a is {dtype}, the model expects {expected}"):
                spec.check_dtypes([("a", dtype)])


def test_of_an_unknown_dtype_only_complex_numbers_are_refused():
    spec = ModelSpec({"a": (2,)}, "the test")
    spec.check_dtypes([("a", torch.int8)])
    with pytest.raises(WeightsMismatchError, match="a is torch.complex64"):
        spec.check_dtypes([("a", torch.complex64)])


def test_the_dtypes_of_a_checkpoint_are_read(tmp_path):
    tensors = {str(dtype): torch.zeros(3).to(dtype) for dtype in DTYPES if not dtype.is_complex}
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_spec(str(tmp_path)).dtypes == {name: tensor.dtype for name, tensor in tensors.items()}


class Wrapper(torch.Tensor):
    """As quantised tensors of libraries are: it has a shape and a dtype, and its memory is elsewhere."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("it is read")


class Plain(torch.Tensor):
    """A subclass that is a tensor in memory like any other."""


def without_memory(tensor, num_bytes=0):
    """As what moves weights away between steps leaves them."""
    tensor.untyped_storage().resize_(num_bytes)
    return tensor


REFUSED = {
    "quantised": (torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8), "quantised tensor"),
    "quantised per channel": (
        torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        "quantised tensor",
    ),
    "sparse": (torch.eye(2).to_sparse(), "only dense"),
    "sparse in rows": (torch.eye(2).to_sparse_csr(), "only dense"),
    "without data": (torch.ones(2, 2, device="meta"), "meta device"),
    "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(2)]), "a"),
    "a wrapper": (Wrapper(torch.ones(2, 2)), "a is a Wrapper"),
    "negated when it is read": (torch.ones(2, 2, dtype=torch.complex64).conj().imag, "holds other values"),
    "conjugated when it is read": (torch.ones(2, 2, dtype=torch.complex64).conj(), "holds other values"),
    "not initialised": (nn.LazyLinear(2).weight, "a is not initialised"),
    "empty": (torch.empty(0), "a is empty"),
    "freed": (without_memory(torch.ones(2, 2)), "a has no memory any more"),
    "a freed view": (without_memory(torch.ones(4, 4)[1:, ::2]), "a has no memory any more"),
    "freed in part": (without_memory(torch.ones(4, 4)[1:], 32), "a is larger than the 32 bytes of its memory"),
    "a number": (1.5, "is a float, not a tensor"),
}
VALUES = {
    "a view of one row": torch.arange(2.0).expand(2, 2),
    "transposed": torch.arange(4.0).view(2, 2).t(),
    "with a gradient": torch.arange(4.0).view(2, 2).requires_grad_(),
    "not a leaf": torch.arange(4.0).view(2, 2).requires_grad_() * 2,
    "a parameter": nn.Parameter(torch.arange(4.0).view(2, 2)),
    "a subclass": torch.arange(4.0).view(2, 2).as_subclass(Plain),
    "in inference mode": None,
}


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.parametrize("form", ["mapping", "pairs", "generator"])
def test_tensors_that_cannot_be_sent_are_refused_by_name(words, form):
    tensor, message = REFUSED[words]
    source = {"mapping": {"a": tensor}, "pairs": [("a", tensor)], "generator": iter([("a", tensor)])}[form]
    with pytest.raises(ConfigError, match=message):
        list(NamedWeights.of(source))


def test_a_state_dict_that_one_rank_has_gathered_is_explained_on_the_others():
    session = SimpleNamespace(context=SimpleNamespace(spec=None), options=SyncOptions())
    with pytest.raises(ConfigError, match=r"no weights to sync\n.*cpu_offload"):
        prepare._check(session, NamedWeights.of({}))


@pytest.mark.parametrize("words", VALUES)
def test_tensors_of_unusual_forms_are_their_values(words):
    tensor = VALUES[words]
    if tensor is None:
        with torch.inference_mode():
            tensor = torch.arange(4.0).view(2, 2)
    [(name, item)] = NamedWeights.of({"a": tensor})
    assert name == "a" and full_tensor(item).tolist() == tensor.tolist()
    refuse_nonfinite([(name, item)])


@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
def test_the_masks_find_every_number_that_is_not_finite_and_no_other(dtype):
    size = dtype.itemsize
    if size == 2:
        bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    else:
        edges = torch.tensor(
            [math.inf, -math.inf, math.nan, 0.0, 1.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype
        )
        words = torch.int32 if size == 4 else torch.int64
        bits = torch.cat([edges.view(words), torch.randint(-(2**31), 2**31 - 1, (4089,)).to(words) << (size - 4) * 8])
    numbers = bits.view(dtype)
    exponent, one = finite_masks(dtype)
    words = numbers.view(torch.int64)
    flagged = ((words & exponent) + one) & (torch.tensor(exponent) + one)
    expected = ~torch.isfinite(numbers).view(-1, 8 // size).all(1)
    assert torch.equal(flagged != 0, expected) and expected.any() and not expected.all()


def test_what_is_finite_is_seen_by_one_sum_and_confirmed():
    largest = torch.full((8,), torch.finfo(torch.float32).max)
    tensors = [
        torch.ones(3), torch.tensor([1.0, math.nan]), torch.tensor([math.inf, -math.inf]), largest, torch.tensor([2**31 - 1]),
        torch.empty(0), torch.tensor([True]), torch.tensor([-math.inf], dtype=torch.bfloat16), torch.tensor(math.nan).double(),
        torch.full((70_000,), 60_000.0, dtype=torch.float16),
    ]  # fmt: skip
    assert are_finite(tensors) == [True, False, False, True, True, True, True, False, False, True]


def test_a_sync_that_refuses_names_the_weights():
    items = [
        ("a", torch.ones(2)),
        ("b", torch.tensor([math.nan])),
        ("c", torch.tensor([[math.inf]])),
        ("d", torch.ones(1)),
    ]
    with pytest.raises(WeightsMismatchError, match="2 weights are NaN or infinite in part: b, c") as caught:
        refuse_nonfinite(items)
    assert isinstance(caught.value, TpColocateError) and 'nonfinite="warn"' in caught.value.hint


@pytest.mark.parametrize("r", [math.nan, math.inf, pytest.param(10**5000, id="large"), -1, True, "4"])
def test_adapters_of_no_rank_are_refused(r):
    with pytest.raises(ConfigError, match="configuration has r="):
        make_adapter(adapter_tensors("o_proj"), {**CONFIG, "r": r})


@pytest.mark.parametrize("words", ["sparse", "without data", "a wrapper", "freed", "freed in part"])
def test_adapters_that_cannot_be_read_are_refused_by_name(words):
    tensor, message = REFUSED[words]
    given = adapter_tensors("q_proj")
    name = next(iter(given))
    with pytest.raises(ConfigError, match=f"^{name} .*{message.removeprefix('a ')}"):
        make_adapter({**given, name: tensor}, CONFIG)


def test_adapters_in_float8_are_refused():
    spoiled = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in adapter_tensors("o_proj").items()}
    with pytest.raises(WeightsMismatchError, match="is torch.float8_e4m3fn"):
        check_adapter(make_adapter(spoiled, {**CONFIG, "target_modules": ["o_proj"]}), None)
