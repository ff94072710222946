"""Every kind of trainer against a real server: several syncs each, and after every one the engine must compute what the trainer would.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 benchmarks/gpu_trainers.py --tp-size 2 --record
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_trainers.py --device cpu --models dense --trainers plain peft

One server per model and slice, a dense Qwen3 and a Qwen3-MoE with 16 experts (small, random weights, made here), and on it one
trainer after the other, see `trainers.KINDS`.  Before every sync the trained parameters take a random step, the same on all ranks
that hold the same.  After it the log-probabilities of tokens that the engine samples are compared with those of a plain model
that holds the trainer's full weights (adapters merged) in the served dtype.  The first step of each trainer is also compared
before its sync: an engine that was not synced is far off.

A trainer that fails is a row with its error; the next one goes on, on a new server where the old one is gone.  A trainer that
hangs ends the processes after ``--row-timeout-s``; under ``--max-restarts`` the rest goes on from there.  `gpu_matrix.py` runs
this for every layout of ranks.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import math
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_common import FOR_EXPERTS, SERVER, SMALL, OutOfStep, bytes_by_way, first_of, left_in_shm, num_mapped
from record import RESULTS, commit, publish, record
from trainers import KINDS, copy_weights, inner, load, make_trainer, take_step

import tpcolocate
from tpcolocate import errors

MODELS = ("dense", "experts")
REFUSED = {("experts", "state_dict"): errors.WeightsMismatchError}
"""What is documented not to work: a state dict of fused experts has other names than the checkpoint."""
AS_EXPECTED = ("ok", "refused", "not run")
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "norm_topk_prob": True}
CPU_SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 256, "vocab_size": 512, "initializer_range": 0.2,
}  # fmt: skip
CPU_EXPERTS = {"moe_intermediate_size": 64}
LAUNCH: dict[str, dict[str, Any]] = {
    "cuda": SERVER | {"mem_fraction_static": 0.2, "enable_memory_saver": True, "context_length": 512},
    "cpu": {"skip_tokenizer_init": True, "context_length": 256, "max_total_tokens": 2048, "max_running_requests": 8},
}
LAUNCH_EXPERTS = {"cuda": FOR_EXPERTS, "cpu": {}}
STEP = {"cuda": 0.02, "cpu": 0.05}
# Of a log-probability.  In bfloat16 a router that chooses another expert makes the difference larger.
NOISE = {("cuda", "dense"): 0.5, ("cuda", "experts"): 1.5, ("cpu", "dense"): 0.01, ("cpu", "experts"): 0.01}
PROMPTS = [[5, 6, 7, 100, 200], [100, 200, 300, 400], [17, 3], [9, 8, 7, 6, 5, 4, 3, 2]]
SAMPLING = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
LEFT_MIB = 4.0
"""Memory that a trainer may leave: tables of the sync, not weights."""
HEALTH_S = 400.0
"""How long a server may take to start."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp-size", "--tp", type=int, default=2)
    parser.add_argument("--device", choices=sorted(LAUNCH), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--trainers", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--syncs", type=int, default=5)
    parser.add_argument("--shared-device", action="store_true", help="all ranks on one GPU (a test rig)")
    parser.add_argument("--server-args", type=json.loads, default={}, help="more SGLang arguments, as JSON")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="of a sync, and of a wait for another rank")
    parser.add_argument("--row-timeout-s", type=float, default=150.0, help="a trainer that takes longer hangs")
    parser.add_argument("--budget-s", type=float, default=3000.0, help="no trainer is begun after that")
    parser.add_argument(
        "--rows", type=Path, default=None, help="JSON, written anew with every row; its rows are not run again"
    )
    parser.add_argument("--record", action="store_true", help="write the result as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    return parser.parse_args()


# --- models ----------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, model: str, device: str) -> None:
    """A small model with random weights, its norms included, in the dtype that is served."""
    import transformers

    sizes = {**SMALL, **(CPU_SIZES if device == "cpu" else {})}
    name = "Qwen3"
    if model == "experts":
        name, sizes = "Qwen3Moe", {**sizes, **EXPERTS, **(CPU_EXPERTS if device == "cpu" else {})}
    config = getattr(transformers, f"{name}Config")(**sizes, dtype=str(dtype_of(device)).removeprefix("torch."))
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype_of(device))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    made.save_pretrained(folder)


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


# --- one trainer -----------------------------------------------------------------------------------------------------


def forget_frames(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: the trainer, whose memory is looked at."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def judge(row: dict[str, Any], device: str) -> str:
    """One word on a trainer: ok, or what is wrong with it.

    Args:
        row: See `Bench.row`.
        device: Type of device, for what is noise.
    """
    if row["error"] is not None:
        refusal = REFUSED.get((row["model"], row["trainer"]))
        return "refused" if refusal is not None and row["error"].startswith(refusal.__name__) else "FAILED"
    at_noise = all(gap <= NOISE[device, row["model"]] for gap in row["gap"])
    if not (at_noise and all(gap < row["stale"][1] / 4 for gap in row["mean_gap"])):
        return "WRONG"
    if any(row["outstanding"]) or row["left_mib"] > LEFT_MIB:
        return "LEAKS"
    return "unverified" if row["unverified"] else "ok"


class Bench:
    """The ranks, and the server of one model at a time.

    Args:
        args: Of the command line.
        device: Of this rank.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        # Apart from the default group, whose GPU collectives a failed trainer may leave unfinished.
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=1800))
        self.warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda one: self.warnings.append(one.getMessage())  # type: ignore[method-assign]
        logging.getLogger("tpcolocate").addHandler(handler)
        self.colo: tpcolocate.Colocation | None = None
        self.engine: tpcolocate.Engine | None = None
        self.jobs: list[str] = []
        self.launches: list[float] = []

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """The value of every rank.

        Args:
            what: What the value is; ranks that left a trainer at different places notice by it.
            value: Of this rank.

        Raises:
            OutOfStep: Some rank is somewhere else.
        """
        views: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(views, (what, value), group=self.control)
        if any(view[0] != what for view in views):
            raise OutOfStep(f"at {what!r}, others are at {[view[0] for view in views]}")
        return [view[1] for view in views]

    def gather_at_end(self, value: Any) -> list[Any]:
        """The value of every rank, once all of them have left the trainer."""
        while True:
            try:
                return self.gather("end of the trainer", value)
            except OutOfStep:
                continue

    def launch(self, folder: Path, model: str) -> None:
        args, kind = self.args, self.device.type
        server = {**LAUNCH[kind], **(LAUNCH_EXPERTS[kind] if model == "experts" else {}), **args.server_args}
        started = time.monotonic()
        faulthandler.dump_traceback_later(HEALTH_S + 2 * args.timeout_s, exit=True)
        self.colo = tpcolocate.init(
            args.tp_size, device=self.device, timeout_s=args.timeout_s, allow_shared_devices=args.shared_device
        )
        self.jobs.append(self.colo.job)
        self.engine = self.colo.launch(folder, health_timeout_s=HEALTH_S, **server)
        self.launches.append(round(time.monotonic() - started, 1))

    def close(self) -> None:
        """End the server, whatever state it is in."""
        colo, self.colo, self.engine = self.colo, None, None
        if colo is not None:
            colo.close()
        self.gather("server is gone")

    def gap(self, reference: torch.nn.Module) -> tuple[float, float]:
        """Largest and mean difference of a sampled token's log-probability, over all ranks."""
        assert self.engine is not None
        found = []
        answers = self.engine.generate(PROMPTS, SAMPLING, return_logprob=True, timeout_s=self.args.timeout_s)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            pairs = answer["meta_info"]["output_token_logprobs"]
            ids = torch.tensor([prompt + [pair[1] for pair in pairs]], device=self.device)
            with torch.no_grad():
                expected = reference(ids).logits[0].float().log_softmax(-1)
            found += [abs(pair[0] - expected[len(prompt) - 1 + i, pair[1]].item()) for i, pair in enumerate(pairs)]
        of_ranks = [one for values in self.gather("log-probabilities", found) for one in values]
        return max(of_ranks), sum(of_ranks) / len(of_ranks)

    def run(self, row: dict[str, Any], folder: Path, reference: torch.nn.Module) -> None:
        """Sync one trainer several times; what is found until it fails is left in `row`."""
        assert self.engine is not None
        kind = row["trainer"]
        model = make_trainer(kind, folder, self.device, dtype_of(self.device.type))
        for number in range(self.args.syncs):
            take_step(model, number, STEP[self.device.type])
            copy_weights(model, reference)
            if number == 0:
                row["stale"] = list(self.gap(reference))
            source = inner(model).state_dict() if kind == "state_dict" else model
            started = time.perf_counter()
            report = self.engine.sync_weights(source, timeout_s=self.args.timeout_s)
            seconds = time.perf_counter() - started
            largest, mean = self.gap(reference)
            # Of this rank's slice, in which all ranks have the same report.
            slices = self.gather("report", (seconds, self.facts(report)))
            facts = [found for _, found in slices]
            for name, value in {
                "seconds": round(max(took for took, _ in slices), 4),
                "gap": float(f"{largest:.3g}"),
                "mean_gap": float(f"{mean:.3g}"),
                **{name: max(found[name] for found in facts) for name in facts[0]},
            }.items():
                row.setdefault(name, []).append(value)
            row["tensors"] = report.num_tensors
            unverified = self.gather("unverified", first_of(report, "unverified", "unproven"))
            row["unverified"] = sorted({*row.get("unverified", ()), *(name for names in unverified for name in names)})
            row["transport"] = report.transport

    @staticmethod
    def facts(report: tpcolocate.SyncReport) -> dict[str, float]:
        """What a slice's report counts; MiB are those of its rank that has most."""
        by_way = [bytes_by_way(rank) for rank in report.ranks]
        return {
            "mapped": max(num_mapped(report)),
            **{f"{way}_mib": round(max(one[way] for one in by_way) / 2**20, 1) for way in by_way[0]},
            "outstanding": sum(rank.num_exported - rank.num_returned for rank in report.ranks),
            "commands": report.num_buckets,
        }

    def row(self, model: str, trainer: str, folder: Path, reference: torch.nn.Module) -> dict[str, Any]:
        """One trainer from its module to its judgement, the same on every rank."""
        row: dict[str, Any] = {"model": model, "trainer": trainer, "error": None}
        before, num_warnings = self.allocated_mib(), len(self.warnings)
        started = time.monotonic()
        error: BaseException | None = None
        try:
            if self.engine is None:
                self.launch(folder, model)
            with torch.no_grad():
                reference(torch.tensor(PROMPTS[:1], device=self.device))  # which takes cuBLAS its workspace
            before = self.allocated_mib()
            faulthandler.dump_traceback_later(self.args.row_timeout_s, exit=True)
            self.run(row, folder, reference)
        except Exception as caught:
            error = caught
            traceback.print_exc()
            forget_frames(caught)
        gc.collect()  # the trainer, whose memory the engine may still map
        usable = not isinstance(error, errors.EngineDeadError | errors.RankLostError | errors.LaunchError)
        outcomes = self.gather_at_end((None if error is None else f"{type(error).__name__}: {error}", usable))
        texts = [text[:400] for text, _ in outcomes if text is not None]
        texts.sort(key=lambda text: text.startswith(OutOfStep.__name__))  # the cause first
        row["error"] = texts[0] if texts else None
        usable = all(is_usable for _, is_usable in outcomes)
        try:
            if usable and self.engine is not None:
                if dist.get_world_size() > self.args.tp_size:
                    self.engine.sync_weights(reference)  # what workers of other slices map comes back with a sync
                self.engine.wake()  # which takes back what the trainer has dropped
        except errors.TpColocateError as caught:
            usable = False
            row["error"] = row["error"] or f"taking back its memory: {type(caught).__name__}: {caught}"[:400]
        health = "none" if self.engine is None else self.engine.health().value
        states = self.gather("health", (usable, health, row["error"]))
        row["error"] = row["error"] or next((text for *_, text in states if text is not None), None)
        if not all(is_usable and state in ("ready", "paused") for is_usable, state, _ in states):
            row["relaunch"] = True
            self.close()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
        row["left_mib"] = max(self.gather("memory", round(self.allocated_mib() - before, 1)))
        new = self.gather("warnings", self.warnings[num_warnings:])
        row["warnings"] = sorted({text[:200] for texts in new for text in texts})
        faulthandler.cancel_dump_traceback_later()
        row["took_s"] = round(time.monotonic() - started, 1)
        row["verdict"] = judge(row, self.device.type)
        return row

    def allocated_mib(self) -> float:
        return torch.cuda.memory_allocated() / 2**20 if self.device.type == "cuda" else 0.0


# --- the run ---------------------------------------------------------------------------------------------------------


class Progress:
    """The rows so far, which outlive a restart of the ranks by torchrun.

    Args:
        rank: Of this process; rank 0 writes.
        path: To keep them in from run to run; None: until the end of this one.
    """

    def __init__(self, rank: int, path: Path | None = None) -> None:
        self.rank, self.kept = rank, path is not None
        run = os.environ.get("TORCHELASTIC_RUN_ID", "alone")
        self.path = path or Path(tempfile.gettempdir()) / f"tpcolocate-trainers-{run}-{os.getppid()}.json"
        self.code = commit()
        self.rows: list[dict[str, Any]] = []
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if (self.kept or restarted) and self.path.exists():
            rows = json.loads(self.path.read_text())
            self.rows = [row for row in rows if row["commit"] == self.code and (restarted or "verdict" in row)]
            for row in self.rows:
                if "verdict" not in row:
                    row |= {"error": "the ranks hung or died, and were started anew", "verdict": "FAILED"}

    def has(self, model: str, trainer: str) -> bool:
        return any(row["model"] == model and row["trainer"] == trainer for row in self.rows)

    def begin(self, model: str, trainer: str) -> None:
        self._write([*self.rows, {"model": model, "trainer": trainer, "commit": self.code}])

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row | {"commit": self.code})
        self._write(self.rows)
        if self.rank == 0:
            print(line_of(row), flush=True)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self.rank == 0:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(rows))
            part.replace(self.path)

    def remove(self) -> None:
        if self.rank == 0 and not self.kept:
            self.path.unlink(missing_ok=True)


def series(row: dict[str, Any], name: str) -> str:
    return " ".join(f"{value:g}" for value in row.get(name, ()))


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["verdict"] == "not run":
        result = row["error"]
    elif row["error"] is not None:
        result = f"after {len(row.get('gap', ()))} syncs: {row['error'].splitlines()[0]}"
    else:
        result = " | ".join(
            f"{name} {series(row, name)}" for name in ("seconds", "gap", "mapped", "own_mib", "peer_mib", "staged_mib")
        )
        result += f" | unverified {len(row['unverified'])} of {row['tensors']}"
    stale = f" (unsynced {row['stale'][0]:.2g})" if "stale" in row else ""
    return f"{row['model']:8} {row['trainer']:13} {row['verdict']:10} {row.get('took_s', 0):5.0f} s  {result}{stale}"


@contextmanager
def checkpoint(model: str, device: str, bench: Bench) -> Iterator[Path]:
    """The folder to serve, the same on all ranks of this host."""
    with tempfile.TemporaryDirectory(prefix="tpcolocate-trainers-") as own:
        if dist.get_rank() == 0:
            write_checkpoint(Path(own), model, device)
        yield Path(bench.gather("folder", own)[0])
        bench.gather("end of the model")  # rank 0 removes the folder


def join_ranks(backend: str) -> int:
    """This process's rank in the default group, also where torchrun has started the ranks anew."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    # The store is the one of the attempt before, with its addresses.
    store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=1800))
    return rank


def started_at() -> float:
    """When the run began, by `time.time`; torchrun's start, where it has started the ranks anew."""
    import psutil

    return psutil.Process(os.getppid()).create_time() if "TORCHELASTIC_RUN_ID" in os.environ else time.time()


def run_all(args: argparse.Namespace, bench: Bench, progress: Progress) -> None:
    ends = started_at() + args.budget_s
    for model in args.models:
        todo = [trainer for trainer in args.trainers if not progress.has(model, trainer)]
        if not todo:
            continue
        with checkpoint(model, args.device, bench) as folder:
            reference = load(folder, dtype_of(args.device), bench.device)
            for trainer in todo:
                reason = KINDS[trainer].cannot_run(dist.get_world_size())
                if reason is None and not bench.gather("time", time.time() < ends)[0]:
                    if progress.rank == 0:
                        print(f"{model} {trainer}: left out, no time", flush=True)
                    continue
                if reason is not None:
                    progress.add({"model": model, "trainer": trainer, "error": reason, "verdict": "not run"})
                    continue
                progress.begin(model, trainer)
                progress.add(bench.row(model, trainer, folder, reference))
            if bench.engine is not None:
                bench.engine.shutdown()
            bench.close()


def recorded(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a record need not repeat."""
    lists = ("seconds", "gap", "mean_gap", "mapped", "own_mib", "peer_mib", "staged_mib", "commands")
    kept = {"verdict": row["verdict"], **{name: series(row, name) for name in lists if row.get(name)}}
    kept |= {name: row[name] for name in ("tensors", "transport") if name in row}
    kept |= {"unverified": row["unverified"][:5]} if row.get("unverified") else {}
    kept |= {"unsynced_gap": f"{row['stale'][0]:.3g}"} if "stale" in row else {}
    return kept | ({} if row["error"] is None else {"error": row["error"].splitlines()[0]})


def main() -> None:
    args = parse_args()
    load_before = os.getloadavg()
    if args.device == "cuda":
        device = torch.device("cuda", 0 if args.shared_device else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    rank = join_ranks("nccl" if args.device == "cuda" else "gloo")
    shm_before = set(left_in_shm())
    bench, progress = Bench(args, device), Progress(rank, args.rows)
    run_all(args, bench, progress)
    rows = progress.rows
    left = [name for name in left_in_shm() if name not in shm_before and any(job in name for job in bench.jobs)]
    never_back = [
        text for texts in bench.gather("all warnings", bench.warnings) for text in texts if "never gave back" in text
    ]
    outstanding = {
        "handles": sum(sum(row.get("outstanding", ())) for row in rows),
        "handles_reclaimed_at_the_end": len(never_back),
        "files_in_shared_memory": len(left),
        "most_mib_left_by_a_trainer": max((row.get("left_mib", 0.0) for row in rows), default=0.0),
    }
    if rank == 0:
        print("\n".join(["", *map(line_of, rows), ""]))
        for text in sorted({text for row in rows for text in row.get("warnings", ())}):
            print("warning:", text)
        print("outstanding:", json.dumps(outstanding), flush=True)
        samples = [value for row in rows for value in row.get("gap", ()) if math.isfinite(value)]
        if samples:
            result = record(
                f"gpu_trainers_tp{args.tp_size}" if args.device == "cuda" else f"cpu_trainers_tp{args.tp_size}",
                metric="largest difference of a sampled token's log-probability between engine and trainer after a sync",
                unit="nats",
                samples=samples,
                settings={
                    "tp_size": args.tp_size, "ranks": dist.get_world_size(), "syncs": args.syncs, "served_dtype": str(dtype_of(args.device)),
                    "step": STEP[args.device], "noise": {model: NOISE[args.device, model] for model in args.models},
                    "launches_s": bench.launches,
                },
                checks={
                    "as_expected": sum(row["verdict"] in AS_EXPECTED for row in rows), "of": len(rows), "outstanding": outstanding,
                    **{f"{row['model']} {row['trainer']}": recorded(row) for row in rows},
                },
                load_before=load_before,
            )  # fmt: skip
            publish(result, write=args.record, folder=args.results)
    progress.remove()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
