"""Adapters are added by a kernel, rounded once; where one rounds twice or does not compile, in several steps."""

import sys
import threading

import pytest
import torch
from interpreted import interpreted

from tpcolocate.in_server.tpcolocate_receiver.regions import Region
from tpcolocate.weights.sources import low_rank
from tpcolocate.weights.sources.addition import RANK_MULTIPLE, Addition

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KERNEL = "tpcolocate.weights.sources.low_rank_kernel"


@pytest.fixture(scope="module")
def kernel():
    with interpreted(KERNEL) as module:
        yield module


def twice(additions):
    """Rounds the product before it is added."""
    for one in additions:
        one.out.copy_(one.base + (one.left.float() @ one.right.float()).to(one.base.dtype))


def once(additions):
    for one in additions:
        one.out.copy_(one.base.double() + one.left.double() @ one.right.double())


def test_a_second_rounding_shows_in_the_trial():
    assert low_rank.wrongly_rounded(once, CPU, 192) == 0.0
    assert low_rank.wrongly_rounded(twice, CPU, 192) > 2 * low_rank._MOST_WRONGLY_ROUNDED


def forget_trials(monkeypatch):
    monkeypatch.setattr(low_rank, "_adders", {})
    monkeypatch.setattr(low_rank, "_threads", {})


def unsupported(*_):
    raise RuntimeError("not supported")


@pytest.mark.parametrize(
    ("trial", "works"),
    [(lambda *_: 0.001, True), (lambda *_: 0.1, False), (unsupported, False)],
    ids=["once", "twice", "an error"],
)
def test_a_gpu_is_tried_before_it_is_used_and_only_once(monkeypatch, caplog, trial, works):
    tried = []
    monkeypatch.setattr(low_rank, "wrongly_rounded", lambda *args: tried.append(args[2]) or trial())
    forget_trials(monkeypatch)
    for _ in range(2):
        assert (low_rank.adder_for(GPU) is not None) is works
    assert tried in ([192, 101], [192])
    assert ("several steps" in caplog.text) is not works


def test_without_triton_adapters_are_merged_in_several_steps(monkeypatch, caplog):
    forget_trials(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    assert low_rank.adder_for(GPU) is None
    assert "several steps" in caplog.text


def test_a_cpu_keeps_to_several_steps():
    assert low_rank.adder_for(CPU) is None
    assert low_rank.prepare(CPU) is None


def test_the_kernel_is_compiled_ahead(monkeypatch):
    forget_trials(monkeypatch)
    tried = []
    monkeypatch.setattr(low_rank, "_tried", lambda device: tried.append(device) or once)
    low_rank.prepare(GPU).join(10)
    assert tried == [GPU]
    assert low_rank.adder_for(GPU) is once and tried == [GPU]


def test_a_compiler_that_hangs_is_waited_for_once(monkeypatch, caplog):
    forget_trials(monkeypatch)
    goes_on = threading.Event()
    monkeypatch.setattr(low_rank, "_COMPILE_S", 0.05)
    monkeypatch.setattr(low_rank, "_tried", lambda device: goes_on.wait(30) and once)
    assert low_rank.adder_for(GPU) is None and low_rank.adder_for(GPU) is None
    goes_on.set()
    low_rank.prepare(GPU).join(10)
    assert low_rank.adder_for(GPU) is None, "weights of one sync would be merged in two ways"
    assert caplog.text.count("several steps") == 1


# The interpreter has no bfloat16 in products of matrices: there its factors are float32, which hold the same numbers.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernel_adds_all_products_at_once_rounds_once_and_writes_nothing_else(kernel, dtype):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)

    additions, memories = [], []
    # Whole tiles, less than one, several that are not full, one row, one column, more ranks than one step.
    for rows, columns, ranks, first in [
        (128, 128, 1, 0), (24, 40, 3, 8), (150, 264, 1, 0), (130, 131, 2, 3), (1, 144, 1, 0), (140, 1, 1, 1), (16, 16, 5, 0),
    ]:  # fmt: skip
        rank = ranks * RANK_MULTIPLE
        wide = randn(rows + 2, columns + 24, dtype=dtype)
        memory = torch.full((rows * columns + 32,), 7.0, dtype=dtype)
        right = randn(rank, columns + 16)[:, 8 : 8 + columns] if first else randn(rank, columns)
        out = memory[16:-16].view(rows, columns)
        additions.append(Addition(wide[1:-1, first : first + columns], randn(rows, rank), right, out))
        memories.append(memory)
    kernel.launch(additions)
    for one, memory in zip(additions, memories):
        assert memory[:16].eq(7).all() and memory[-16:].eq(7).all()
        exact = one.base.double() + one.left.double() @ one.right.double()
        if dtype == torch.bfloat16:
            assert (one.out != exact.to(dtype)).double().mean() < 0.002
        torch.testing.assert_close(one.out.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)


def test_a_base_whose_rows_are_not_dense_is_copied_first(kernel):
    base, (left, right) = torch.randn(8, 6).T, (torch.randn(6, 16), torch.randn(16, 8))
    one = low_rank.addition(base[1:4, 2:7], Region((1, 2), (3, 5)), (left, right), None)
    kernel.launch([one])
    torch.testing.assert_close(one.out, base[1:4, 2:7] + left[1:4] @ right[:, 2:7])
