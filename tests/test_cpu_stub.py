"""The stand-in for the CUDA kernels: every name is there, none can be called, and pinned memory is let be."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tpcolocate.engine

pytestmark = pytest.mark.quick

STUB = Path(tpcolocate.engine.__file__).parent / "cpu_stub"


def run_beside_stub(script):
    """In a process of its own, for the stub changes torch."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(STUB)!r})\n{script}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_any_kernel_can_be_imported_and_none_called():
    done = run_beside_stub(
        "from sgl_kernel import silu_and_mul, top_k_renorm_prob\n"
        "import sgl_kernel, importlib.util\n"
        "assert sgl_kernel.silu_and_mul is silu_and_mul\n"
        "assert not hasattr(sgl_kernel, '__path__')\n"
        "silu_and_mul(1, out=2)\n"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("NotImplementedError: sgl_kernel.silu_and_mul was called")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinned memory works here and is left alone")
def test_asking_for_pinned_memory_gives_plain_memory():
    done = run_beside_stub(
        "import torch\n"
        "try: torch.zeros(2, pin_memory=True)\n"
        "except RuntimeError: pass\n"
        "else: raise SystemExit('torch pins without an accelerator: the repair is not needed any more')\n"
        "import sgl_kernel\n"
        "assert torch.equal(torch.tensor([1, 2], dtype=torch.int32, pin_memory=True), torch.tensor([1, 2]))\n"
        "for make in (torch.zeros, torch.ones, torch.empty): assert make((3,), pin_memory=True).shape == (3,)\n"
        "assert torch.arange(3, pin_memory=True).pin_memory().tolist() == [0, 1, 2]\n"
        "assert torch.full((2,), 7, pin_memory=True).tolist() == [7, 7]\n"
    )
    assert done.returncode == 0, done.stderr
