"""Adapters are added by one multiplication only where that is rounded once."""

import pytest
import torch

from tpcolocate.weights.sources import low_rank

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def twice(base, region, pair, out):
    """Rounds the product before it is added."""
    left, right = (one.float() for one in pair)
    rows = left.narrow(0, region.starts[0], region.lengths[0])
    columns = right.narrow(1, region.starts[1], region.lengths[1])
    return out.copy_(base + (rows @ columns).to(base.dtype))


def once(base, region, pair, out):
    left, right = (one.double() for one in pair)
    rows = left.narrow(0, region.starts[0], region.lengths[0])
    columns = right.narrow(1, region.starts[1], region.lengths[1])
    return out.copy_(base.double() + rows @ columns)


def test_a_second_rounding_shows_in_the_trial(monkeypatch):
    monkeypatch.setattr(low_rank, "add_product", once)
    assert low_rank.wrongly_rounded(CPU) == 0.0
    monkeypatch.setattr(low_rank, "add_product", twice)
    assert low_rank.wrongly_rounded(CPU) > 2 * low_rank._MOST_WRONGLY_ROUNDED


def unsupported(device):
    raise RuntimeError("not supported")


@pytest.mark.parametrize(
    ("trial", "expected"),
    [(lambda device: 0.001, True), (lambda device: 0.1, False), (unsupported, False)],
    ids=["once", "twice", "an error"],
)
def test_a_gpu_is_tried_before_it_is_used(monkeypatch, caplog, trial, expected):
    monkeypatch.setattr(low_rank, "wrongly_rounded", trial)
    low_rank.rounds_once.cache_clear()
    try:
        assert low_rank.rounds_once(GPU) is expected
        assert ("several steps" in caplog.text) is not expected
    finally:
        low_rank.rounds_once.cache_clear()


def test_a_cpu_keeps_to_several_steps():
    assert low_rank.rounds_once(CPU) is False
