"""The demo from a model that is right one time in ten, not in four: run as examples/grpo.py, it takes half a minute less.

One that an earlier run has left in its folder is taken as it is.
"""

import runpy
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[1] / "examples" / "grpo.py"

sys.path.insert(0, str(DEMO.parent))
import addition  # noqa: E402

_warm_start = addition.warm_start


def _short_warm_start(folder, **how):
    return None if (folder / "config.json").exists() else _warm_start(folder, **how | {"target": 0.1})


addition.warm_start = _short_warm_start
runpy.run_path(str(DEMO), run_name="__main__")
