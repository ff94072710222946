"""Training ranks and a tensor-parallel SGLang server on the same GPUs.

See `init`, `Colocation.launch` and `Engine`.
"""

from tpcolocate._version import __version__
from tpcolocate.discovery import connect
from tpcolocate.engine.client import Client, Health
from tpcolocate.engine.engine import Engine
from tpcolocate.errors import (
    ConfigError,
    DeadlineError,
    DeviceError,
    EngineDeadError,
    EngineError,
    EngineStateError,
    LaunchError,
    LayoutError,
    RankFailedError,
    RankLostError,
    RendezvousError,
    RequestError,
    SyncError,
    TpColocateError,
    WeightsMismatchError,
)
from tpcolocate.metrics import (
    engine_logprobs,
    importance_ratios,
    logprob_gap,
    summarize,
    write_prometheus_targets,
)
from tpcolocate.recorder import Recorder, Recording
from tpcolocate.report import RankReport, SyncReport
from tpcolocate.session import Colocation, init
from tpcolocate.weights.sources.checkpoint import Checkpoint
from tpcolocate.weights.update_group import join_update_group

__all__ = [
    "Checkpoint",
    "Client",
    "Colocation",
    "ConfigError",
    "DeadlineError",
    "DeviceError",
    "Engine",
    "EngineDeadError",
    "EngineError",
    "EngineStateError",
    "Health",
    "LaunchError",
    "LayoutError",
    "RankFailedError",
    "RankLostError",
    "RankReport",
    "Recorder",
    "Recording",
    "RendezvousError",
    "RequestError",
    "SyncError",
    "SyncReport",
    "TpColocateError",
    "WeightsMismatchError",
    "__version__",
    "connect",
    "engine_logprobs",
    "importance_ratios",
    "init",
    "join_update_group",
    "logprob_gap",
    "summarize",
    "write_prometheus_targets",
]
