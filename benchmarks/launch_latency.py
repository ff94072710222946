"""From the owner's first healthy answer until every client of the slice has the URL.

    torchrun --standalone --nproc-per-node 2 benchmarks/launch_latency.py --record
    torchrun --standalone --nproc-per-node 4 benchmarks/launch_latency.py --record

All ranks are one slice.  Two results:

``launch_latency_tp*``
    Whole launches of real servers.  From the moment in which the owner's health check succeeded (the library's log
    line "SGLang is ready") until `launch` has returned on the slowest client: an upper bound, it also holds what a client
    does with the URL.
``announce_latency_tp*``
    The same path many times: `Colocation.launch` itself, heartbeats, health check, server information, rendezvous file
    and agreement included, on the last of those servers; only the start of another server is left out.

Times of different ranks are compared by CLOCK_MONOTONIC, which a host's processes share; a slice lies on one host.  The
baseline is torch's own broadcast of the same URL over the slice's group, to clients that already wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import served
import torch.distributed as dist
from record import publish, record, summary

import tpcolocate
from tpcolocate.server.http import ServerClient

TARGET_S = 0.1
HEALTH_TIMEOUT_S = 600.0
HEALTHY_LINE = "SGLang is ready"


class HealthyAt(logging.Handler):
    """Reads the clock when the library logs that the server is healthy."""

    def __init__(self) -> None:
        super().__init__()
        self.time: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith(HEALTHY_LINE):
            self.time = time.monotonic()


class RunningServer:
    """Stands in for `ServerProcess` on the owner: what it starts is there already."""

    def __init__(self, engine: tpcolocate.Engine, on_healthy: Callable[[], None]) -> None:
        self.url, self.api_key = engine.url, engine.api_key
        self.client: ServerClient | None = None
        self.evidence = None
        self._on_healthy = on_healthy
        self._random = random.Random(0)

    def start(self, spec: Any, *, health_timeout_s: float, heartbeat: Callable[[str, float], None]) -> RunningServer:
        """As `ServerProcess.start` from the moment on in which the server listens."""
        self.client = ServerClient(self.url, api_key=self.api_key)
        assert self.client.is_listening(timeout_s=30.0)
        for _ in range(2):
            heartbeat("", 0.0)
            time.sleep(self._random.uniform(0.02, 0.1))  # the clients wait for the next beat, as they do in a launch
        assert self.client.is_healthy(timeout_s=30.0)
        self._on_healthy()
        return self

    def exited(self) -> bool:
        return False

    def stop(self) -> None:
        assert self.client is not None
        self.client.close()


def main() -> None:
    parser = served.parser(__doc__)
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--announcements", type=int, default=100)
    args = parser.parse_args()
    load = os.getloadavg()
    rank = served.join_ranks()
    tp_size = dist.get_world_size() if dist.is_initialized() else 1
    if tp_size == 1:
        parser.error("a slice of one rank has no clients; use torchrun with 2 ranks or more")
    healthy = HealthyAt()
    logging.getLogger("tpcolocate").addHandler(healthy)
    logging.getLogger("tpcolocate").setLevel(logging.INFO)

    launches: list[float] = []
    checks = []
    with (
        served.checkpoint(args.model, kv_heads=max(tp_size, 2)) as (path, model),
        tpcolocate.init(tp_size, device=served.train_device(args.device)) as colo,
    ):
        for number in range(args.launches):
            with timed_launch(colo, path, healthy, served.SERVER[args.device], launches) as engine:
                checks.append(agreement(engine))
                if number == args.launches - 1:
                    announcements, announced_equal = announce_again(colo, path, engine, healthy, args)
                    bare = bare_broadcasts(colo, engine, args.announcements)
    if rank != 0:
        dist.destroy_process_group()
        return
    settings = model | {
        "device": args.device,
        "tp_size": tp_size,
        "ranks": tp_size,
        "server_arguments": served.SERVER[args.device],
    }
    baseline = {"what": "torch.distributed.broadcast_object_list of the URL over the slice's group", **summary(bare)}
    common: dict[str, Any] = {
        "unit": "s",
        "baseline": baseline,
        "target": f"under {TARGET_S} s on every client, every time",
        "load_before": load,
    }
    publish(
        record(
            f"launch_latency_tp{tp_size}",
            metric="a whole launch: from the owner's healthy server to launch() returned on the slowest client",
            samples=launches,
            target_met=max(launches) < TARGET_S,
            checks={"same_url_key_and_tokens_on_every_rank": checks.count(True), "of": len(checks)},
            settings=settings,
            **common,
        ),
        write=args.record,
    )
    publish(
        record(
            f"announce_latency_tp{tp_size}",
            metric="launch() on a server that runs already: from the owner's health check to launch() returned on the slowest client",
            samples=announcements,
            target_met=max(announcements) < TARGET_S,
            checks={"same_url_and_key_on_every_rank": announced_equal, "of": len(announcements)},
            settings=settings,
            **common,
        ),
        write=args.record,
    )
    dist.destroy_process_group()


@contextlib.contextmanager
def timed_launch(
    colo: tpcolocate.Colocation, path: str, healthy: HealthyAt, arguments: Mapping[str, Any], latencies: list[float]
) -> Iterator[tpcolocate.Engine]:
    """Launch, and add the time to the slowest client."""
    with colo.launch(path, health_timeout_s=HEALTH_TIMEOUT_S, **arguments) as engine:
        returned = time.monotonic()
        latencies.append(slowest(colo, healthy.time if colo.is_owner else returned))
        yield engine


def slowest(colo: tpcolocate.Colocation, mine: float | None) -> float:
    """Seconds from the owner's time to the latest of the clients'."""
    times = served.gather_all(mine)
    return max(t for rank, t in enumerate(times) if rank != colo.owner_rank) - times[colo.owner_rank]


def agreement(engine: tpcolocate.Engine) -> bool:
    """Whether every rank holds the same URL and key and is answered with the same tokens."""
    tokens = engine.generate([5, 6, 7], {"temperature": 0, "max_new_tokens": 4})["output_ids"]
    seen = served.gather_all((engine.url, engine.api_key, tokens))
    return all(other == seen[0] for other in seen) and len(tokens) > 0


def announce_again(
    colo: tpcolocate.Colocation, path: str, engine: tpcolocate.Engine, healthy: HealthyAt, args: Any
) -> tuple[list[float], int]:
    """Launch again and again on the running server; latencies, and how often all ranks had its URL and key."""

    def now() -> None:
        healthy.time = time.monotonic()

    latencies: list[float] = []
    equal = 0
    # only the owner of a slice starts a server
    with mock.patch("tpcolocate.launch.ServerProcess", RunningServer(engine, now)):
        for _ in range(args.announcements):
            with timed_launch(colo, path, healthy, served.SERVER[args.device], latencies) as again:
                same = (again.url, again.api_key) == (engine.url, engine.api_key)
                equal += all(served.gather_all(same))
    return latencies, equal


def bare_broadcasts(colo: tpcolocate.Colocation, engine: tpcolocate.Engine, times: int) -> list[float]:
    latencies = []
    for _ in range(times):
        dist.barrier(group=colo.group)
        box = [engine.url if colo.is_owner else None]
        if colo.is_owner:
            time.sleep(0.02)  # the clients wait already
        started = time.monotonic()
        dist.broadcast_object_list(box, src=colo.owner_rank, group=colo.group)
        returned = time.monotonic()
        latencies.append(slowest(colo, started if colo.is_owner else returned))
        assert box == [engine.url]
    return latencies


if __name__ == "__main__":
    main()
