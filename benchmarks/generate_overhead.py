"""`engine.generate` against a bare HTTP client that posts the same body to the same server.

    python benchmarks/generate_overhead.py --record                                             # tp=1
    torchrun --standalone --nproc-per-node 2 benchmarks/generate_overhead.py --record           # tp=2, on a client rank

Every round sends the same request once through each client, in an order that changes from round to round; all answers of a
run must be equal.  Prompts repeat, so the server has them in its cache and answers as fast as it can: overhead shows
most.  The bare clients are `http.client` and `requests`, each with one connection that stays open, JSON on both
ends and nothing else; the faster one of the run is the baseline.
"""

from __future__ import annotations

import functools
import http.client
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
import served
import torch.distributed as dist
from record import publish, ratio_of_medians, record, summary
from tqdm import tqdm

import tpcolocate

TARGET = 1.03
TIMEOUT_S = 120.0
_IDLE_S = 2.0  # uvicorn closes a connection that was idle for 5 s
_WARM_UP = 5
_LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One kind of request."""

    name: str
    prompts: Any
    max_new_tokens: int
    fields: dict[str, Any] = field(default_factory=dict)
    rounds: int = 60

    @property
    def sampling_params(self) -> dict[str, Any]:
        return {"temperature": 0, "max_new_tokens": self.max_new_tokens, "ignore_eos": True}

    @property
    def body(self) -> dict[str, Any]:
        return {"input_ids": self.prompts, "sampling_params": self.sampling_params, **self.fields}


SIXTEEN = [[(17 * i + 3 * j + 2) % 500 for j in range(12)] for i in range(16)]
CASES = (
    Case("one_token", [5, 6, 7, 100, 200], 1, rounds=600),
    Case("batch", SIXTEEN, 16, rounds=200),
    Case("logprobs", SIXTEEN, 16, {"return_logprob": True}, rounds=200),
)


class Bare:
    """`http.client`, one connection."""

    def __init__(self, url: str, api_key: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
        self._used = time.monotonic()

    def __call__(self, body: dict[str, Any]) -> Any:
        if time.monotonic() - self._used > _IDLE_S:
            self._connection.close()  # the next request opens it again
        self._connection.request("POST", "/generate", json.dumps(body).encode(), self._headers)
        answer = json.loads(self._connection.getresponse().read())
        self._used = time.monotonic()
        return answer


class Requests:
    """`requests`, one session."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url = f"{url}/generate"
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["Authorization"] = f"Bearer {api_key}"

    def __call__(self, body: dict[str, Any]) -> Any:
        return self._session.post(self._url, json=body, timeout=TIMEOUT_S).json()


def main() -> None:
    parser = served.parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=None, help="of every case; default: 600 of the shortest, 200 of the others"
    )
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append", help="default: all")
    args = parser.parse_args()
    rank = served.join_ranks()
    tp_size = dist.get_world_size() if dist.is_initialized() else 1
    with (
        served.checkpoint(args.model) as (path, model),
        tpcolocate.init(tp_size, device=served.train_device(args.device)) as colo,
        colo.launch(path, **served.SERVER[args.device]) as engine,
    ):
        # A client where there is one: no rank is nearer to the server than another.
        clients = [r for r in colo.slice_ranks if r != colo.owner_rank]
        if rank == (clients[-1] if clients else colo.owner_rank):
            settings = model | {
                "device": args.device, "tp_size": tp_size, "measured_on": "client" if clients else "owner",
                "server_arguments": served.SERVER[args.device],
            }  # fmt: skip
            for case in CASES:
                if args.case is None or case.name in args.case:
                    publish(measured(engine, case, args.rounds, settings), write=args.record)
        served.gather_all(None)
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(engine: tpcolocate.Engine, case: Case, rounds: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of one case."""
    load = os.getloadavg()
    rounds = case.rounds if rounds is None else rounds
    assert engine.api_key is not None
    clients: dict[str, Callable[[], Any]] = {
        "engine.generate": lambda: engine.generate(case.prompts, case.sampling_params, **case.fields),
        "http.client": functools.partial(Bare(engine.url, engine.api_key), case.body),
        "requests": functools.partial(Requests(engine.url, engine.api_key), case.body),
    }
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    orders = itertools.cycle(itertools.permutations(clients))
    expected: Any = None
    equal = 0
    for number in tqdm(range(_WARM_UP + rounds), desc=case.name, disable=None):
        for name in next(orders):
            started = time.perf_counter()
            answer = clients[name]()
            elapsed = time.perf_counter() - started
            if number < _WARM_UP:
                expected = answer
                continue
            seconds[name].append(elapsed)
            equal += same(answer, expected)
    if equal != 3 * rounds:
        raise SystemExit(f"{case.name}: {3 * rounds - equal} of {3 * rounds} answers differ; the figures mean nothing")
    ours = seconds.pop("engine.generate")
    best, other = sorted(seconds, key=lambda name: statistics.median(seconds[name]))
    comparison = ratio_of_medians(ours, seconds[best])
    comparison["median_of_differences_s"] = float(
        f"{statistics.median(a - b for a, b in zip(ours, seconds[best])):.3g}"
    )
    return record(
        f"generate_overhead_{case.name}_tp{settings['tp_size']}",
        metric="one engine.generate, from the call to the parsed answer",
        unit="s",
        samples=ours,
        baseline={"what": best, **summary(seconds[best]), "slower": {"what": other, "median": summary(seconds[other])["median"]}},
        comparison=comparison,
        target=f"ratio of medians at most {TARGET}",
        target_met=comparison["ratio_of_medians"] <= TARGET,
        checks={"equal_answers": equal, "of": 3 * rounds},
        settings=settings | {
            "prompts": 1 if isinstance(case.prompts[0], int) else len(case.prompts), "max_new_tokens": case.max_new_tokens, "rounds": rounds,
            **case.fields,
        },
        load_before=load,
    )  # fmt: skip


def same(answer: Any, expected: Any) -> bool:
    """Tokens equal, and log-probabilities where there are any."""
    if isinstance(answer, list):
        return len(answer) == len(expected) and all(map(same, answer, expected))
    if (answer["output_ids"], answer["text"]) != (expected["output_ids"], expected["text"]):
        return False
    ours, theirs = (a["meta_info"].get("output_token_logprobs", []) for a in (answer, expected))
    return len(ours) == len(theirs) and all(abs(a[0] - b[0]) < _LOGPROB_TOLERANCE for a, b in zip(ours, theirs))


if __name__ == "__main__":
    main()
