"""Kernels in Triton on a CPU."""

import contextlib
import importlib
import sys

import pytest

_OURS = ("tpcolocate.in_server.tpcolocate_receiver.triton_kernel", "tpcolocate.weights.sources.low_rank_kernel")


@contextlib.contextmanager
def interpreted(name):
    """Import the module of a kernel so that Triton interprets it, while this lasts.

    Triton decides when it is imported, and may have been imported for other tests: here it is once more.
    """

    def taken_out():
        names = [n for n in sys.modules if n in _OURS or (n.partition(".")[0] == "triton" and "._C" not in n)]
        return {name: sys.modules.pop(name) for name in names}

    before = taken_out()
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("TRITON_INTERPRET", "1")
            yield importlib.import_module(name)
    finally:
        taken_out()
        sys.modules.update(before)
