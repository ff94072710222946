"""Start a CPU server's processes as forks of its main process, which has imported what they need: tests only.

SGLang spawns its schedulers and its detokenizer, and each of them imports for ten seconds what the main process has
imported already: half a minute of CPU time for a start at tp=2.  What they run, and whose children they are, is the same.

They also import the modules of all models that SGLang knows, in each scheduler, to serve one of them.  Here they
import those that the checkpoint's config names.  And they import a compiler that they are not to use.

A scheduler that is paused takes a core for nothing.  Here it rests for a millisecond at a time.

This folder is on the PYTHONPATH of the tests' processes (conftest), so that Python runs this file in each of them; it acts
in the main process of a CPU server alone.  ``TPC_TEST_START_METHOD=spawn`` leaves the server as users have it.
"""

import os
import sys

_REST_S = 0.001


def _fork_from_here():
    import contextlib
    import gc
    import multiprocessing
    import signal

    set_start_method = multiprocessing.set_start_method

    def set_to_fork(method, force=False):
        with contextlib.suppress(ImportError):
            import sglang.srt.model_executor.model_runner  # noqa: F401  that of each scheduler

            _rest_while_paused()
        # Once, for the processes of SGLang that are started next; what is there is not looked through again.
        gc.freeze()
        gc.enable()
        set_start_method("fork" if method == "spawn" else method, force)

    multiprocessing.set_start_method = multiprocessing.context._default_context.set_start_method = set_to_fork
    # SGLang's handler in the main process, which a spawned process does not have.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGQUIT, signal.SIG_DFL))
    gc.disable()  # a fifth of the time of the imports


def _rest_while_paused():
    """Let a scheduler that is paused wait a little before it looks for requests again.

    It asks without a pause, with a collective call each time: two cores for as long as a sync takes, which those who sync need.
    """
    import time

    from sglang.srt.managers.scheduler import Scheduler

    name = "ingest_requests" if hasattr(Scheduler, "ingest_requests") else "recv_requests"
    look = getattr(Scheduler, name)

    def look_after_a_rest(self):
        if getattr(self, "_engine_paused", False):
            time.sleep(_REST_S)
        return look(self)

    setattr(Scheduler, name, look_after_a_rest)


def _know_the_served_model_alone():
    """Let SGLang's registry leave out the modules that define none of the checkpoint's architectures."""
    import importlib.util
    import json
    import re
    from pathlib import Path

    config = Path(sys.orig_argv[sys.orig_argv.index("--model-path") + 1]) / "config.json"
    if not config.exists():
        return
    names = json.loads(config.read_text())["architectures"]
    served = re.compile(rf"^class (?:{'|'.join(map(re.escape, names))})\b", re.MULTILINE)
    package = importlib.util.find_spec("sglang").submodule_search_locations[0]
    others = [one.stem for one in Path(package, "srt", "models").glob("*.py") if not served.search(one.read_text())]
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(others)


def _compile_nothing():
    """Have ``torch.compile`` return what it is given, and leave out the compiler: two seconds of imports.

    It is what TORCHDYNAMO_DISABLE=1 has it do, which the library sets where there is no ``sgl_kernel`` for CPUs.
    """
    from importlib.abc import Loader, MetaPathFinder
    from importlib.machinery import ModuleSpec

    def unchanged(function=None, *args, **kwargs):
        return function if callable(function) else unchanged

    unchanged.clear_lru_cache = lambda: None  # of trace_rules, by init_process_group

    class NoCompiler(MetaPathFinder, Loader):
        def find_spec(self, name, path=None, target=None):
            if name != "torch._dynamo" and not name.startswith("torch._dynamo."):
                return None
            sys.modules["torch"].compile = unchanged
            return ModuleSpec(name, self, is_package=True)

        def exec_module(self, module):
            def attribute(name):
                if name.startswith("__"):
                    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
                return type(name, (), {}) if name[0].isupper() else unchanged

            module.__getattr__ = attribute

    sys.meta_path.insert(0, NoCompiler())


if (
    "sglang.launch_server" in sys.orig_argv[1:4]
    and os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    and os.environ.get("TPC_TEST_START_METHOD") != "spawn"
):
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # as the ranks have, whatever the machine: threads that spin cost the others' time
    )
    _fork_from_here()
    _know_the_served_model_alone()
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        _compile_nothing()
