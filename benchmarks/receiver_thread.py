"""What a receiver that stays in the TP workers would save, and cost, beside the one that each sync calls anew.

    torchrun --standalone --nproc-per-node 2 benchmarks/receiver_thread.py --record
    torchrun --standalone --nproc-per-node 1 benchmarks/receiver_thread.py --rounds 60 --record     # each takes seconds

Ranks are one slice.  The owner starts a thread in every TP worker, by a custom weight loader of this script, which answers
what it gets over a socket.  Round trips to all workers:

* *thread*: over the sockets, while the server idles, while generation is held as it is in a sync, and while it generates;
* *request*: an update of the weights whose loader returns at once, while generation is held.  This is how a sync
  reaches the workers today.

And the time that a worker needs for 200 small copies, which a sync of many tensors launches from Python: in the thread, while
generation is held, and inside the update.  A thread shares Python's lock with SGLang's event loop, which does not sleep while
generation is held; the loader of an update is in the event loop, which waits for it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

_CONNECT_S, _ANSWER_S = 60.0, 30.0
_MESSAGE_BYTES = 512
_ECHO, _WORK = b"x" * _MESSAGE_BYTES, b"w" * _MESSAGE_BYTES
_NUM_COPIES = 200


# --- in the worker ----------------------------------------------------------------------------------------------------


def receive(model: Any, named_tensors: Any) -> None:
    """SGLang's custom weight loader hook: connects a thread to a socket, works and writes how long, or returns at once."""
    [(command, _)] = named_tensors
    words = json.loads(command)
    if words["do"] == "connect":
        threading.Thread(target=_answer, args=(words["path"], model), daemon=True).start()
    elif words["do"] == "work":
        Path(words["path"]).write_text(str(_work(model)))


def _answer(path: str, model: Any) -> None:
    _work(model)  # once for all that a thread prepares at its first use of the device
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        while message := connection.recv(_MESSAGE_BYTES, socket.MSG_WAITALL):
            if message == _WORK:
                message = str(_work(model)).encode().ljust(_MESSAGE_BYTES)
            connection.sendall(message)


def _work(model: Any) -> float:
    """Copy memory of a few bytes, often, and return the seconds that it took."""
    import torch

    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tensors = torch.zeros(2, _NUM_COPIES, 8, device=device)
    targets, sources = tensors[0].unbind(), tensors[1].unbind()
    started = time.perf_counter()
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


# --- on the owner -----------------------------------------------------------------------------------------------------


def main() -> None:
    import served
    import torch.distributed as dist
    from record import publish, record, summary

    import tpcolocate
    from tpcolocate.server.api import ServerApi
    from tpcolocate.server.http import ServerClient

    parser = served.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    args = parser.parse_args()
    load = os.getloadavg()
    # Before the server starts, which imports this file as a module.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    rank = served.join_ranks()
    tp_size = dist.get_world_size() if dist.is_initialized() else 1
    server = {**served.SERVER[args.device], "custom_weight_loader": ["receiver_thread.receive"]}
    found: dict[str, list[float]] = {}
    with (
        served.checkpoint(args.model, kv_heads=max(tp_size, 2)) as (path, model),
        tpcolocate.init(tp_size, device=served.train_device(args.device)) as colo,
        colo.launch(path, **server) as engine,
    ):
        if colo.is_owner:
            with closing(ServerClient(engine.url, api_key=engine.api_key)) as client:
                found = measured(ServerApi(client), engine, tp_size, args.rounds)
        served.gather_all(None)
    if rank == 0:
        by_request = found.pop("request, held")
        result = record(
            f"receiver_thread_tp{tp_size}_{args.device}",
            metric="round trip from the owner to all TP workers, to a thread in them, while generation is held",
            unit="s",
            samples=found["thread, held"],
            baseline={"what": "an update of the weights whose loader returns at once", **summary(by_request)},
            settings=model
            | {"device": args.device, "tp_size": tp_size, "rounds": args.rounds, "server_arguments": server},
            checks={name: summary(values) for name, values in found.items()},
            load_before=load,
        )
        publish(result, write=args.record)
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(api: Any, engine: Any, tp_size: int, rounds: int) -> dict[str, list[float]]:
    """Return what was measured -> seconds of every round trip."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="tpcolocate-") as folder, ExitStack() as stack:
        with held(api):
            connections = connected(api, Path(folder), tp_size, stack)
            found["thread, held"] = timed(lambda: echo(connections), rounds)
            found["request, held"] = timed(lambda: push(api, [{"do": "nothing"}] * tp_size), rounds)
            found["copies in the thread, held"] = [work(connections) for _ in range(rounds)]
            found["copies in the update"] = [work_inside(api, Path(folder), tp_size) for _ in range(rounds)]
        time.sleep(1.0)
        found["thread, idle"] = timed(lambda: echo(connections), rounds)
        busy = threading.Thread(
            target=engine.generate, args=([[5, 6, 7]] * 4, {"max_new_tokens": 200, "ignore_eos": True})
        )
        busy.start()
        time.sleep(0.5)
        answers = []
        while busy.is_alive() and len(answers) < rounds:
            answers += timed(lambda: echo(connections), 1)
        busy.join()
        found["thread, generating"] = answers
    return found


@contextmanager
def held(api: Any) -> Iterator[None]:
    """As a sync holds generation."""
    api.pause_generation("retract", timeout_s=_ANSWER_S)
    if api.release.weight_session:
        api.begin_weight_update(timeout_s=_ANSWER_S)
    yield
    if api.release.weight_session:
        api.end_weight_update(timeout_s=_ANSWER_S)
    api.continue_generation(timeout_s=_ANSWER_S)


def push(api: Any, commands: list[dict[str, str]]) -> None:
    from tpcolocate import ipc_payload

    payloads = [ipc_payload.command(command) for command in commands]
    api.push(payloads, load_format="receiver_thread.receive", timeout_s=_ANSWER_S)


def connected(api: Any, folder: Path, tp_size: int, stack: ExitStack) -> list[socket.socket]:
    """Start the thread in every worker and return the owner's ends of its connections."""
    listeners = []
    for tp_rank in range(tp_size):
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(folder / str(tp_rank)))
        listener.listen()
        listener.settimeout(_CONNECT_S)
        listeners.append(listener)
    push(api, [{"do": "connect", "path": str(folder / str(tp_rank))} for tp_rank in range(tp_size)])
    connections = [stack.enter_context(listener.accept()[0]) for listener in listeners]
    for connection in connections:
        connection.settimeout(_ANSWER_S)
    return connections


def echo(connections: list[socket.socket]) -> None:
    if any(answer != _ECHO for answer in answers(connections, _ECHO)):
        raise AssertionError("a worker's thread is gone")


def work(connections: list[socket.socket]) -> float:
    """Return the seconds that the slowest worker's thread needed."""
    return max(float(answer) for answer in answers(connections, _WORK))


def work_inside(api: Any, folder: Path, tp_size: int) -> float:
    """Return the seconds that the slowest worker needed inside an update."""
    paths = [folder / f"seconds{tp_rank}" for tp_rank in range(tp_size)]
    push(api, [{"do": "work", "path": str(path)} for path in paths])
    return max(float(path.read_text()) for path in paths)


def answers(connections: list[socket.socket], message: bytes) -> list[bytes]:
    for connection in connections:
        connection.sendall(message)
    return [connection.recv(_MESSAGE_BYTES, socket.MSG_WAITALL) for connection in connections]


def timed(call: Callable[[], None], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
