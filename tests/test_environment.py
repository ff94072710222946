"""The server's environment: what is removed from the trainer's, what is added, and what overrides what."""

import importlib.machinery
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcolocate.in_server import tpcolocate_receiver
from tpcolocate.server import environment as module
from tpcolocate.server.arguments import RECEIVER
from tpcolocate.server.environment import child_environment

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

LOOPBACK = "localhost,127.0.0.1,::1"
IN_SERVER = str(Path(tpcolocate_receiver.__file__).parent.parent)
ALWAYS = {"NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK, "PYTHONPATH": IN_SERVER}
TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
    "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2", "ROLE_NAME": "default", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "OMP_NUM_THREADS": "1", "PET_NPROC_PER_NODE": "2",
}  # fmt: skip


# What every server on a CPU has.
CPU = {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu"}


@pytest.mark.parametrize("parent, more, expected", [
    ({"HOME": "/h"}, {}, {"HOME": "/h"}),
    (TORCHRUN | {"PATH": "/bin"}, {}, {"PATH": "/bin"}),
    ({"WEB_CONCURRENCY": "4"}, {}, {}),
    ({"CUDA_VISIBLE_DEVICES": "3"}, {"visibility": {"CUDA_VISIBLE_DEVICES": "3,1"}}, {"CUDA_VISIBLE_DEVICES": "3,1"}),
    ({"HIP_VISIBLE_DEVICES": "3"}, {"visibility": {"HIP_VISIBLE_DEVICES": None, "X": "1"}}, {"X": "1"}),
    ({"A": "1", "RANK": "0"}, {"user": {"A": "2", "RANK": "7", "NO_PROXY": "mine"}}, {"A": "2", "RANK": "7", "NO_PROXY": "mine"}),
    ({"CUDA_VISIBLE_DEVICES": "3"}, {"visibility": {"CUDA_VISIBLE_DEVICES": "3"}, "user": {"CUDA_VISIBLE_DEVICES": "0"}},
     {"CUDA_VISIBLE_DEVICES": "0"}),
    # a copy of the trainer's with something added is what is added
    (TORCHRUN | {"PATH": "/bin", "TMPDIR": "/x"},
     {"user": TORCHRUN | {"PATH": "/bin", "TMPDIR": "/x", "A": "1", "MASTER_PORT": "5"}, "temporary": "/private"},
     {"PATH": "/bin", "A": "1", "MASTER_PORT": "5", **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), "/private")}),
    ({"CUDA_VISIBLE_DEVICES": "3"}, {"visibility": {"CUDA_VISIBLE_DEVICES": "3,1"}, "user": {"CUDA_VISIBLE_DEVICES": "3"}},
     {"CUDA_VISIBLE_DEVICES": "3,1"}),
    ({"NO_PROXY": "corp.example,127.0.0.1"}, {}, {"NO_PROXY": "corp.example,127.0.0.1,localhost,::1"}),
    ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}),
    # CPU engine: a core group per rank
    ({}, {"device_type": "cpu", "tp_size": 1, "cores": [0, 1, 2]},
     {**CPU, "SGLANG_CPU_OMP_THREADS_BIND": "0,1,2", "OMP_NUM_THREADS": "3"}),
    ({}, {"device_type": "cpu", "tp_size": 2, "cores": [4, 5, 8, 9, 10]},
     {**CPU, "SGLANG_CPU_OMP_THREADS_BIND": "4,5|8,9", "OMP_NUM_THREADS": "2"}),
    ({}, {"device_type": "cpu", "tp_size": 3, "cores": [6, 7]},
     {**CPU, "SGLANG_CPU_OMP_THREADS_BIND": "6|7|6", "OMP_NUM_THREADS": "1"}),
    (TORCHRUN | {"OMP_NUM_THREADS": "1"}, {"device_type": "cpu", "cores": [0, 1], "user": {"OMP_NUM_THREADS": "7"}},
     {**CPU, "SGLANG_CPU_OMP_THREADS_BIND": "0,1", "OMP_NUM_THREADS": "7"}),
    ({"SGLANG_CPU_OMP_THREADS_BIND": "all"}, {"device_type": "cpu", "cores": [0]},
     {**CPU, "SGLANG_CPU_OMP_THREADS_BIND": "all", "OMP_NUM_THREADS": "1"}),
    ({"SGLANG_NCCL_SO_PATH": "/lib/libnccl.so"}, {"device_type": "cpu"}, CPU),
    ({}, {"device_type": "cpu", "user": {"SGLANG_NCCL_SO_PATH": "/x"}}, {**CPU, "SGLANG_NCCL_SO_PATH": "/x"}),
    ({"PYTHONPATH": "/mine"}, {"device_type": "cpu", "stub": "/stub"},
     {**CPU, "PYTHONPATH": f"{IN_SERVER}:/stub:/mine", "TORCHDYNAMO_DISABLE": "1"}),
    ({"TORCHDYNAMO_DISABLE": "0"}, {"device_type": "cpu", "stub": "/stub"},
     {**CPU, "PYTHONPATH": f"{IN_SERVER}:/stub", "TORCHDYNAMO_DISABLE": "0"}),
    ({"PYTHONPATH": "/old"}, {"device_type": "cpu", "stub": "/stub", "user": {"PYTHONPATH": "/new"}},
     {**CPU, "PYTHONPATH": f"{IN_SERVER}:/stub:/new", "TORCHDYNAMO_DISABLE": "1"}),
    ({"PYTHONPATH": "/mine"}, {"device_type": "cuda", "stub": "/stub"}, {"PYTHONPATH": f"{IN_SERVER}:/mine"}),
    ({"PYTHONPATH": "/old"}, {"user": {"PYTHONPATH": "/new"}}, {"PYTHONPATH": f"{IN_SERVER}:/new"}),
    # its own address, and its own temporary folder
    ({"HTTP_PROXY": "http://proxy"}, {"host": "10.0.0.7"},
     {"HTTP_PROXY": "http://proxy", "NO_PROXY": f"{LOOPBACK},10.0.0.7", "no_proxy": f"{LOOPBACK},10.0.0.7"}),
    ({}, {"host": "0.0.0.0"}, {}),
    ({"TMPDIR": "/scratch", "TMP": "/x"}, {"temporary": "/private", "compile_cache": "/scratch/cache"},
     {"TMPDIR": "/private", "TEMP": "/private", "TMP": "/private", "TORCHINDUCTOR_CACHE_DIR": "/scratch/cache"}),
    ({"TORCHINDUCTOR_CACHE_DIR": "/c"}, {"temporary": "/t", "compile_cache": "/d", "user": {"TMPDIR": "/u"}},
     {"TMPDIR": "/u", "TEMP": "/t", "TMP": "/t", "TORCHINDUCTOR_CACHE_DIR": "/c"}),
])  # fmt: skip
def test_the_servers_environment(parent, more, expected):
    before = dict(parent)
    environment, warnings = child_environment(parent, **{"visibility": {}, **more})
    assert environment == ALWAYS | expected
    assert warnings == []
    assert parent == before, "the trainer's own is not modified"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
@pytest.mark.parametrize("value, left", [
    ("expandable_segments:True", None),
    ("Expandable_Segments: true", None),
    ("max_split_size_mb:128,expandable_segments:True", "max_split_size_mb:128"),
    ("roundup_power2_divisions:[256:1,>:4], expandable_segments:True,garbage_collection_threshold:0.8",
     "roundup_power2_divisions:[256:1,>:4],garbage_collection_threshold:0.8"),
])  # fmt: skip
def test_only_expandable_segments_are_removed_with_a_warning(name, value, left):
    environment, warnings = child_environment({name: value}, visibility={})
    assert environment.get(name) == left
    assert len(warnings) == 1 and name in warnings[0] and value in warnings[0]


def test_the_permitted_loader_is_found_on_the_servers_path(tmp_path):
    """In a folder of its own: this package need not be installed in the server's environment."""
    environment, _ = child_environment({"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}, visibility={})
    module, _, function = RECEIVER.rpartition(".")
    (tmp_path / f"{module}.py").write_text("raise SystemExit('another module of this name came first')")
    [folder, *_] = environment["PYTHONPATH"].split(os.pathsep)
    spec = importlib.machinery.PathFinder.find_spec(module, environment["PYTHONPATH"].split(os.pathsep))
    assert spec.origin == str(Path(folder) / module / "__init__.py") == tpcolocate_receiver.__file__
    assert callable(getattr(tpcolocate_receiver, function))
    assert os.listdir(folder) and not (Path(folder) / "tpcolocate").exists()


def test_compiled_code_stays_where_torch_keeps_it_by_default(tmp_path, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert module.compile_cache(str(tmp_path)) == default_cache_dir()


@given(cores=st.lists(st.integers(0, 500), min_size=1, max_size=40, unique=True), tp_size=st.integers(1, 8))
def test_cores_are_divided_evenly_and_not_shared_if_there_are_enough(cores, tp_size):
    groups = [[int(core) for core in group.split(",")] for group in module._bind(cores, tp_size).split("|")]
    assert len(groups) == tp_size
    assert len({len(group) for group in groups}) == 1
    dealt = [core for group in groups for core in group]
    assert set(dealt) <= set(cores)
    if len(cores) >= tp_size:
        assert len(set(dealt)) == len(dealt) > len(cores) - tp_size


@pytest.mark.parametrize(
    "library, is_needed",
    [(None, True), ("sm90/common_ops.abi3.so", True), ("common_ops.cpython-311-x86_64-linux-gnu.so", False)],
    ids=["not-installed", "for-cuda", "for-cpus"],
)
def test_a_cpu_server_gets_the_stub_unless_the_kernels_for_cpus_are_installed(
    tmp_path, monkeypatch, library, is_needed
):
    if library is not None:
        path = tmp_path / "sgl_kernel" / library
        path.parent.mkdir(parents=True)
        path.touch()
        (tmp_path / "sgl_kernel" / "__init__.py").write_text(
            "raise ImportError('could not load any common_ops library')"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (module.sglang_stub_needed() is not None) is is_needed
