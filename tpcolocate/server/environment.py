"""The server's environment: the trainer's, cleaned and extended.  Pure except for `compile_cache`,
`hides_standard_modules` and `sglang_stub_needed`."""

from __future__ import annotations

import getpass
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

_CPU_STUB = Path(__file__).with_name("cpu_stub")
_IN_SERVER = Path(__file__).parent.parent / "in_server"
LOOPBACK = "127.0.0.1"

# With torchrun's variables a child takes itself for a training rank; TORCHELASTIC_USE_AGENT_STORE alone makes the
# server's internal rendezvous hang.
# WEB_CONCURRENCY, which images for web servers have, is uvicorn's number of workers: SGLang's server ends with several.
_SCRUBBED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
             "NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "WEB_CONCURRENCY")  # fmt: skip
_SCRUBBED_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "PET_")
# At tp_size 2 and above SGLang uses NCCL wherever it finds its library, on a CPU, too: a CUDA build of torch brings it.
# What cannot be loaded it does without.
_NO_NCCL = "no-nccl-on-a-cpu"
_ALL_ADDRESSES = ("0.0.0.0", "::")
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def child_environment(
    parent: Mapping[str, str],
    *,
    visibility: Mapping[str, str | None],
    user: Mapping[str, str] | None = None,
    device_type: str = "cuda",
    tp_size: int = 1,
    cores: Sequence[int] = (),
    stub: str | None = None,
    host: str = "",
    temporary: str | None = None,
    compile_cache: str | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Return the server's environment, derived from the trainer's.  Pure.

    Args:
        parent: The trainer's environment.
        visibility: Variables that select the slice's devices; None removes one.
        user: Overrides all others; its PYTHONPATH comes after the receiver's and the stub's folders.  What it merely repeats of
            `parent` changes nothing: a copy of that with something added must not bring back what is removed here.
        device_type: ``"cpu"`` adds what SGLang's CPU engine reads.
        tp_size: Number of CPU core groups to bind.
        cores: Usable CPU cores, for the CPU engine.
        stub: Folder that replaces the CUDA kernel package on a CPU, on PYTHONPATH after our receiver's; nothing is compiled
            by torch.compile there.
        host: Address that the server listens on; requests to it must not go to a proxy either.
        temporary: The server's temporary folder, removed after its end.
        compile_cache: Folder that torch.compile keeps its results in, which would be in the temporary folder.

    Returns:
        The environment, and warnings for the user about variables that were removed.
    """
    warnings = []
    environment = {
        name: value
        for name, value in parent.items()
        if name not in _SCRUBBED and not name.startswith(_SCRUBBED_PREFIXES)
    }
    for name in _ALLOCATOR_VARIABLES:
        if "expandable_segments:true" in environment.get(name, "").lower().replace(" ", ""):
            kept = [
                part
                for part in environment[name].split(",")
                if not part.strip().lower().startswith("expandable_segments")
            ]
            warnings.append(
                f"{name}={environment[name]!r}: expandable_segments breaks SGLang's memory saver; removed for the server"
            )
            environment.pop(name)
            if kept:
                environment[name] = ",".join(kept)
    for name, value in visibility.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    for name in ("NO_PROXY", "no_proxy"):
        # The server sends requests to itself over loopback while it warms up; they must not go to a proxy.
        entries = [entry for entry in environment.get(name, "").split(",") if entry]
        own = ["localhost", LOOPBACK, "::1", *([host] if host and host not in _ALL_ADDRESSES else [])]
        environment[name] = ",".join(dict.fromkeys([*entries, *own]))
    if temporary is not None:
        # Python takes the first of these that is set.
        environment.update(dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temporary))
        if compile_cache is not None:
            environment.setdefault("TORCHINDUCTOR_CACHE_DIR", compile_cache)
    if device_type == "cpu":
        if stub is not None:
            # Compiling a few small functions of SGLang took nine seconds of a start of 22, with a full cache, too.
            environment.setdefault("TORCHDYNAMO_DISABLE", "1")
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["SGLANG_NCCL_SO_PATH"] = _NO_NCCL
        if cores:
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _bind(cores, tp_size))
            # SGLang binds where it has its kernels for CPUs.  Without them each rank would have a thread for every core, and
            # threads that wait for each other spin: on shared cores a decoding step takes several times as long.
            environment.setdefault("OMP_NUM_THREADS", str(max(len(cores) // tp_size, 1)))
    environment.update({name: value for name, value in (user or {}).items() if parent.get(name) != value})
    # Before the user's: without the receiver there is no weight sync, and without the stub no CPU server.
    folders = [
        str(_IN_SERVER),
        *([stub] if device_type == "cpu" and stub is not None else []),
        environment.get("PYTHONPATH", ""),
    ]
    environment["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder)
    return environment, warnings


def _bind(cores: Sequence[int], tp_size: int) -> str:
    """Return one group of cores per TP rank: ``0,1|2,3``.  With fewer cores than ranks, ranks share cores."""
    if len(cores) < tp_size:
        return "|".join(str(cores[i % len(cores)]) for i in range(tp_size))
    size = len(cores) // tp_size
    return "|".join(",".join(map(str, cores[i * size : (i + 1) * size])) for i in range(tp_size))


def hides_standard_modules(folder: str) -> bool:
    """Return whether a folder has modules that are named as some of Python's own, such as ``queue.py``.

    ``python -m``, and what SGLang and torch start by it, would import them instead if it is the working directory.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(
        name.removesuffix(".py") in sys.stdlib_module_names - {"test"}  # of no use but to Python itself
        and (name.endswith(".py") or os.path.isfile(os.path.join(folder, name, "__init__.py")))
        for name in names
    )


def compile_cache(temporary: str) -> str | None:
    """Return where torch.compile keeps its results by default, in a temporary folder; None for a user without a name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        return None
    return os.path.join(temporary, "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def sglang_stub_needed() -> str | None:
    """Return the folder of the stub for SGLang's kernels that a CPU server needs; None if those for CPUs are installed.

    Those for CUDA cannot be imported without a visible GPU, and have none of the names that the CPU's path imports.
    Both builds are ``sgl_kernel``; only that for CPUs has its library beside the package's modules
    (``sgl_kernel/load_utils.py``, and ``sgl-kernel/csrc/cpu/CMakeLists.txt``).
    """
    spec = find_spec("sgl_kernel")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return None if any(list(Path(folder).glob("common_ops.*")) for folder in folders) else str(_CPU_STUB)


__all__ = ["LOOPBACK", "child_environment", "compile_cache", "hides_standard_modules", "sglang_stub_needed"]
