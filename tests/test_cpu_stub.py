"""The stub of the CUDA kernels: every name can be imported, none can be called, and pinned memory is not requested."""

import sys
from pathlib import Path

import pytest
import torch
from harness import run_ranks

import tpcolocate.server

pytestmark = pytest.mark.quick

STUB = Path(tpcolocate.server.__file__).parent / "cpu_stub"


def beside_stub(rank, script):
    sys.path.insert(0, str(STUB))
    exec(script, {})  # noqa: S102  a script of this file


def run_beside_stub(script):
    """Return the error of a script; in a process of its own, because the stub changes torch."""
    [outcome] = run_ranks(beside_stub, 1, script, init_group=False, expect_errors=True)
    return outcome.error


def test_any_kernel_can_be_imported_and_none_called():
    error = run_beside_stub(
        "from sgl_kernel import silu_and_mul, top_k_renorm_prob\n"
        "import sgl_kernel, importlib.util\n"
        "assert sgl_kernel.silu_and_mul is silu_and_mul\n"
        "assert not hasattr(sgl_kernel, '__path__')\n"
        "silu_and_mul(1, out=2)\n"
    )
    assert type(error) is NotImplementedError and str(error).startswith("sgl_kernel.silu_and_mul is not available")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinned memory works here and is left alone")
def test_asking_for_pinned_memory_gives_plain_memory():
    error = run_beside_stub(
        "import torch\n"
        "try: torch.zeros(2, pin_memory=True)\n"
        "except RuntimeError: pass\n"
        "else: raise AssertionError('torch pins without an accelerator: the repair is not needed any more')\n"
        "import sgl_kernel\n"
        "assert torch.equal(torch.tensor([1, 2], dtype=torch.int32, pin_memory=True), torch.tensor([1, 2]))\n"
        "for make in (torch.zeros, torch.ones, torch.empty): assert make((3,), pin_memory=True).shape == (3,)\n"
        "assert torch.arange(3, pin_memory=True).pin_memory().tolist() == [0, 1, 2]\n"
        "assert torch.full((2,), 7, pin_memory=True).tolist() == [7, 7]\n"
    )
    assert error is None, repr(error)
