"""The demo on the model that an earlier run has left in its folder: run as examples/grpo.py, but it trains none first."""

import runpy
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[1] / "examples" / "grpo.py"

sys.path.insert(0, str(DEMO.parent))
import addition  # noqa: E402

addition.warm_start = lambda folder, **how: None
runpy.run_path(str(DEMO), run_name="__main__")
