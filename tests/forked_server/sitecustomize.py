"""Start a CPU server's processes as forks of its main process, which has imported what they need: tests only.

SGLang spawns its schedulers and its detokenizer, and each of them imports for ten seconds what the main process has
imported already: half a minute of CPU time for a start at tp=2.  What they run, and whose children they are, is the same.

They also import the modules of all models that SGLang knows, in each scheduler, to serve one of them.  Here they
import those that the checkpoint's config names.

This folder is on the PYTHONPATH of the tests' processes (conftest), so that Python runs this file in each of them; it acts
in the main process of a CPU server alone.  ``TPC_TEST_START_METHOD=spawn`` leaves the server as users have it.
"""

import os
import sys


def _fork_from_here():
    import gc
    import multiprocessing
    import signal

    set_start_method = multiprocessing.set_start_method

    def set_to_fork(method, force=False):
        # Once, for the processes of SGLang that are started next; what is there is not looked through again.
        gc.freeze()
        gc.enable()
        set_start_method("fork" if method == "spawn" else method, force)

    multiprocessing.set_start_method = multiprocessing.context._default_context.set_start_method = set_to_fork
    # SGLang's handler in the main process, which a spawned process does not have.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGQUIT, signal.SIG_DFL))
    gc.disable()  # a fifth of the time of the imports


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


if (
    "sglang.launch_server" in sys.orig_argv[1:4]
    and os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    and os.environ.get("TPC_TEST_START_METHOD") != "spawn"
):
    _fork_from_here()
    _know_the_served_model_alone()
