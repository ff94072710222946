"""What the calls beside the sync do on GPUs: sleep and wake by tag, weights that outlive a sleep, adapters, update groups.

    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_verbs.py --out result.json
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_verbs.py --shared-device ...   # both ranks on one GPU (rig)

A small random Qwen3 with real weights, so that the gap between the engine's log-probabilities and the trainer's shows whether the
right weights are served.  Two servers, one after the other:

* memory saver and LoRA: the training step's order, cycle after cycle (``cycles_parts``, ``cycles``): generate, sleep, weights
  change in place, wake the weights, sync, wake the KV cache, generate.  Every fifth cycle the weights stay awake.  Device memory freed
  and taken again, its slope over the cycles, the gap.  Then an adapter before and after a sleep (``lora_across_sleep``).
* an update group over nccl, twice in a row, to a server on the last rank's GPU alone, with the sender on another GPU (``group_apart``).
* memory saver and CPU backup: log-probabilities before a sleep and after the wake, without a sync (``backup``).  Then
  ``group_shared``: an update group to the server on all GPUs, which NCCL refuses unless several ranks may be on a GPU.

Both update groups need NCCL_CUMEM_ENABLE=0 in the environment, and are left out without it.

A part that fails is noted with its error, and the next one follows.  The last part can leave a stuck device behind, so it is the last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import gpu_common
import torch
import torch.distributed as dist
from gpu_common import PROMPTS, SERVER, gap, num_mapped, slope, summary, used_mib
from record import command

import tpcolocate
from tpcolocate.server.process import hold_port

PARTS = ("cycles_parts", "cycles", "lora_across_sleep", "group_apart", "backup", "group_shared")
SAVER: dict[str, Any] = {"enable_memory_saver": True}
LORA: dict[str, Any] = {
    "enable_lora": True, "max_lora_rank": 8, "max_loras_per_batch": 2, "max_loaded_loras": 2,
    "lora_target_modules": ["q_proj", "v_proj", "o_proj"],
}  # fmt: skip
BACKUP: dict[str, Any] = {"enable_weights_cpu_backup": True}
GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
BUCKET_BYTES = 64 * 2**20
LAUNCH_S = 240.0
CALL_S = 90.0
NOISE = 1.0
"""In bfloat16 the same random weights differ by some tenths, other weights by whole units."""


def parse_args() -> argparse.Namespace:
    parser = gpu_common.parser(__doc__)
    parser.add_argument("--cycles", type=int, default=50, help="with parts, and as many without")
    parser.add_argument(
        "--gaps", type=int, default=10, help="the gap is taken in every so-manieth cycle, and in the last"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    return parser.parse_args()


class Run:
    """What the parts share on one rank.

    Args:
        args: Of the command line.
        device: Of this rank.
        steps: Keeps the ranks together.
        folder: The checkpoint.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, steps: gpu_common.InStep, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.args, self.device, self.steps, self.folder = args, device, steps, folder
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=gpu_common.DTYPE).to(device).eval()
        self.base = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.seed = 0
        self.colo: Any = None
        self.engine: Any = None
        self.stuck = False

    def step(self) -> None:
        """New weights, in place, the same on every rank; always as far from the checkpoint's, or the gap would grow with them."""
        self.seed += 1
        generator = torch.Generator(self.device).manual_seed(self.seed)
        with torch.no_grad():
            for parameter, base in zip(self.model.parameters(), self.base):
                noise = torch.randn(base.shape, generator=generator, device=self.device, dtype=torch.float32)
                parameter.copy_(base + 0.05 * noise)
        torch.cuda.synchronize()

    def used(self, what: str) -> list[float]:
        """Memory used on the device of every rank, without what this trainer's allocator keeps for itself."""
        self.steps.gather(f"quiet: {what}")
        torch.cuda.empty_cache()
        self.steps.gather(f"empty: {what}")
        return self.steps.gather(f"used: {what}", round(used_mib(), 1))

    def gap(self, what: str) -> float:
        """The largest gap of all ranks."""
        return max(self.steps.gather(f"gap: {what}", gap(self.engine, self.model, self.device)))

    def answers(self, what: str, **fields: Any) -> list[tuple[list[int], list[float]]]:
        """Greedy tokens and their log-probabilities, asked for by rank 0 alone: in one batch with others they may round otherwise."""
        self.engine.flush_cache(timeout_s=CALL_S)
        found, problem = None, None
        if self.rank == 0:
            try:
                answers = self.engine.generate(PROMPTS, GREEDY, return_logprob=True, timeout_s=CALL_S, **fields)
                pairs = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
                found = [([pair[1] for pair in one], [pair[0] for pair in one]) for one in pairs]
            except tpcolocate.TpColocateError as error:
                problem = error
        found, problem = self.steps.gather(f"answers: {what}", (found, problem))[0]
        if problem is not None:
            raise problem
        return found

    # --- servers -------------------------------------------------------------------------------------------------

    def served(
        self, name: str, arguments: dict[str, Any], parts: dict[str, tuple[Callable[[dict[str, Any]], object], float]]
    ) -> bool:
        """Launch a server over all ranks, make the parts that were asked for, end it; whether it came up."""
        wanted = {part: act for part, act in parts.items() if part in self.args.parts}
        if not wanted:
            return True
        stack = contextlib.ExitStack()

        def up(found: dict[str, Any]) -> None:
            self.colo = stack.enter_context(
                tpcolocate.init(
                    self.args.tp_size,
                    device=self.device,
                    allow_shared_devices=self.args.shared_device,
                    timeout_s=CALL_S,
                )
            )
            self.engine = stack.enter_context(self.launched(self.colo, name, arguments))
            found["sglang"] = self.engine.sglang_version

        came = self.steps.part(f"launch_{name}", up, deadline_s=LAUNCH_S + 60)
        for part, (act, deadline_s) in wanted.items():
            if came and not any(self.steps.gather(f"before {part}", self.stuck)):
                self.steps.part(part, act, deadline_s=deadline_s)
        self.steps.part(f"shutdown_{name}", lambda found: stack.close(), deadline_s=180)
        self.engine = self.colo = None
        return came

    def launched(self, colo: tpcolocate.Colocation, name: str, arguments: dict[str, Any]) -> tpcolocate.Engine:
        log = self.args.server_log
        return colo.launch(
            self.folder,
            health_timeout_s=LAUNCH_S,
            log_path=None if log is None else log.with_name(f"{log.stem}-{name}{log.suffix}"),
            **SERVER,
            **arguments,
        )

    # --- sleep and wake ------------------------------------------------------------------------------------------

    def cycles(self, found: dict[str, Any], *, parts: bool) -> None:
        """The training step's order, again and again."""
        engine = self.engine
        engine.wake(timeout_s=CALL_S)  # an earlier part may have failed in the middle
        found["parts"] = parts
        self.step()
        found["gap_before_the_first_sync"] = self.gap("before")
        for _ in range(3):  # kernels, allocators, what is mapped and planned: all of it is there after these
            self.cycle(0, parts, {})
        awake = self.used("before the cycles")
        kept: dict[str, list[Any]] = {}
        gaps: dict[str, float] = {}
        for number in range(self.args.cycles):
            self.cycle(number, parts, kept)
            if number % self.args.gaps == 0 or number == self.args.cycles - 1:
                gaps[str(number)] = round(self.gap(f"cycle {number}"), 4)
                found.update(self.described(awake, kept, gaps))
                self.steps.note("cycles_parts" if parts else "cycles", found)  # what a run leaves that is cut off here
        report = engine.sync_weights(self.model, parts=parts, bucket_bytes=BUCKET_BYTES, timeout_s=CALL_S)
        found["last_sync"] = str(report)
        found["mapped"] = num_mapped(report)
        found["warnings"] = list(report.warnings)

    def cycle(self, number: int, parts: bool, kept: dict[str, list[Any]]) -> None:
        engine = self.engine
        tags = ["kv_cache"] if number % 5 == 4 else ["kv_cache", "weights"]
        seconds = {"generate": self.timed(lambda: engine.generate(PROMPTS, GREEDY, timeout_s=CALL_S))}
        seconds["sleep"] = self.timed(lambda: engine.sleep(tags, timeout_s=CALL_S))
        asleep = self.used(f"asleep {number}")
        self.step()
        seconds["wake_weights"] = self.timed(lambda: engine.wake(["weights"], timeout_s=CALL_S))
        if number == 0:
            kept.setdefault("generate_before_the_sync", []).append(self.refusal())
        half = self.used(f"half awake {number}")
        options = {"parts": parts, "bucket_bytes": BUCKET_BYTES, "timeout_s": CALL_S}
        seconds["sync"] = self.timed(lambda: engine.sync_weights(self.model, **options))
        seconds["wake_kv_cache"] = self.timed(lambda: engine.wake(["kv_cache"], timeout_s=CALL_S))
        seconds["generate_again"] = self.timed(lambda: engine.generate(PROMPTS, GREEDY, timeout_s=CALL_S))
        for key, value in {"tags": "+".join(tags), "asleep": asleep, "half": half, "after": self.used(f"after {number}"), "seconds": seconds}.items():  # fmt: skip
            kept.setdefault(key, []).append(value)

    @staticmethod
    def timed(act: Callable[[], object]) -> float:
        started = time.perf_counter()
        act()
        return time.perf_counter() - started

    def refusal(self) -> str:
        try:
            self.engine.generate(PROMPTS, GREEDY, timeout_s=CALL_S)
        except tpcolocate.TpColocateError as error:
            return type(error).__name__
        return "it was answered"

    def described(self, awake: list[float], kept: dict[str, list[Any]], gaps: dict[str, float]) -> dict[str, Any]:
        """Memory of each rank's device in MiB, against what was used before the first cycle."""
        ranks = range(self.world)
        freed: dict[str, list[list[float]]] = {}
        for tags, asleep in zip(kept["tags"], kept["asleep"]):
            freed.setdefault(tags, []).append([round(awake[r] - asleep[r], 1) for r in ranks])
        after = [[used[r] for used in kept["after"]] for r in ranks]
        names = kept["seconds"][0]
        return {
            "cycles": len(kept["after"]), "used_before_mib": awake,
            "freed_mib_min_max": {
                tags: [[min(one[r] for one in all_of), max(one[r] for one in all_of)] for r in ranks]
                for tags, all_of in freed.items()
            },
            "taken_again_by_the_weights_mib": [round(statistics.median(h[r] - a[r] for h, a in zip(kept["half"], kept["asleep"])), 1) for r in ranks],
            "used_after_mib": [one if len(one) <= 12 else [*one[:3], "...", *one[-3:]] for one in after],
            "used_after_mib_min_max": [[min(one), max(one)] for one in after],
            "slope_mib_per_cycle": [round(slope(one), 4) for one in after],
            "call_seconds": {name: summary([one[name] for one in kept["seconds"]]) for name in names},
            "generate_before_the_sync": kept["generate_before_the_sync"][0],
            "gaps": gaps, "gaps_are_noise": max(gaps.values()) < NOISE,
        }  # fmt: skip

    def backup(self, found: dict[str, Any]) -> None:
        """Weights that the server copies to the CPU's memory while it sleeps."""
        engine = self.engine
        self.step()  # weights that are in no file
        engine.sync_weights(self.model, bucket_bytes=BUCKET_BYTES, timeout_s=CALL_S)
        before = self.answers("before")
        found["gap_before"] = self.gap("before the sleep")
        awake = self.used("awake")
        rounds = []
        for number in range(3):
            slept = self.timed(lambda: engine.sleep(timeout_s=CALL_S))
            asleep = self.used(f"asleep {number}")
            woken = self.timed(lambda: engine.wake(timeout_s=CALL_S))
            again = self.used(f"awake {number}")
            rounds.append(
                compared(before, self.answers(f"after {number}"))
                | {
                    "sleep_s": slept, "wake_s": woken, "freed_mib": [round(a - b, 1) for a, b in zip(awake, asleep)],
                    "used_again_mib": [round(a - b, 1) for a, b in zip(again, awake)],
                }
            )  # fmt: skip
            found["sleeps"] = rounds
        found["gap_after"] = self.gap("after the sleeps")
        found["kept"] = all(one["tokens_equal"] for one in rounds) and found["gap_after"] < NOISE

    # --- adapters ------------------------------------------------------------------------------------------------

    def lora_across_sleep(self, found: dict[str, Any]) -> None:
        """An adapter before a sleep and after it; only the base weights are synced."""
        engine = self.engine
        engine.wake(timeout_s=CALL_S)
        tensors, config = adapter(self.model.config, seed=1)
        engine.sync_weights(self.model, bucket_bytes=BUCKET_BYTES, timeout_s=CALL_S)
        found["set_s"] = self.timed(lambda: engine.set_lora_from_tensors("policy", tensors, config, timeout_s=CALL_S))
        plain, before = self.answers("without"), self.answers("with", lora_path="policy")
        found["adapter_does_something"] = not compared(plain, before)["tokens_equal"]
        found["twice_without_a_sleep"] = compared(before, self.answers("again", lora_path="policy"))
        for tags in (["kv_cache"], ["kv_cache", "weights"], None):
            name = "all" if tags is None else "+".join(tags)
            engine.sleep(tags, timeout_s=CALL_S)
            engine.wake(["weights"], timeout_s=CALL_S)
            engine.sync_weights(self.model, bucket_bytes=BUCKET_BYTES, timeout_s=CALL_S)
            engine.wake(timeout_s=CALL_S)
            found[f"after_sleep_of_{name}"] = self.against(before, name, lora_path="policy")
            found[f"base_after_sleep_of_{name}"] = self.against(plain, f"base, {name}")
        engine.set_lora_from_tensors("policy", tensors, config, timeout_s=CALL_S)
        found["set_again"] = self.against(before, "set again", lora_path="policy")
        engine.unload_lora("policy", timeout_s=CALL_S)

    def against(self, expected: list[Any], what: str, **fields: Any) -> dict[str, Any]:
        """Compare the engine's answers with earlier ones; its own refusal is an answer too."""
        try:
            return compared(expected, self.answers(what, **fields))
        except tpcolocate.TpColocateError as error:
            return {"error": f"{type(error).__name__}: {error}"}

    # --- update groups -------------------------------------------------------------------------------------------

    def group_apart(self, found: dict[str, Any]) -> None:
        """As documented: the sender (rank 0) is on a GPU that no server of the group is on, the last rank's has it to itself."""
        if self.args.shared_device or self.world < 2:
            found["left_out"] = "there is no second GPU"
            return
        if self.cannot_send(found):
            return
        last = self.world - 1
        with tpcolocate.init(1, device=self.device, timeout_s=CALL_S) as colo, contextlib.ExitStack() as stack:
            problem = None
            if self.rank == last:
                try:
                    self.engine = stack.enter_context(self.launched(colo, "apart", {}))
                except tpcolocate.TpColocateError as error:
                    problem = error
            try:
                problem = self.steps.gather("launched apart", problem)[last]
                if problem is not None:
                    raise problem
                for number in range(2):
                    self.broadcast(found, number, tp_size=1, served=self.rank == last)
            finally:
                self.engine = None

    def group_shared(self, found: dict[str, Any]) -> None:
        """The sender (rank 0) is on the GPU of a TP worker, as it must be when the server is on all GPUs of the job."""
        found["NCCL_MULTI_RANK_GPU_ENABLE"] = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE")
        if self.cannot_send(found):
            return
        for number in range(2):
            self.broadcast(found, number, tp_size=self.args.tp_size, served=True)

    def cannot_send(self, found: dict[str, Any]) -> bool:
        """Whether the sender would be refused, for which the server would wait."""
        if self.device.type == "cuda" and "NCCL_CUMEM_ENABLE" not in os.environ:
            found["left_out"] = "NCCL_CUMEM_ENABLE is not set"
        return "left_out" in found

    def broadcast(self, found: dict[str, Any], number: int, *, tp_size: int, served: bool) -> None:
        """New weights through a group that is made for them and left again."""
        engine, backend = self.engine, "nccl" if self.device.type == "cuda" else "gloo"
        self.step()
        stale = self.asked(served, f"stale {number}")
        reserved = hold_port() if self.rank == 0 else None
        port = self.steps.gather(f"port {number}", None if reserved is None else reserved.getsockname()[1])[0]
        place = {"master_address": "127.0.0.1", "master_port": port, "world_size": 1 + tp_size, "backend": backend}
        weights = list(self.model.named_parameters())
        sender = Sender(self.device, [tensor.detach() for _, tensor in weights], place)
        seconds: dict[str, float] = {}
        described = {
            "dtypes": [tensor.dtype for _, tensor in weights], "shapes": [tensor.shape for _, tensor in weights],
        }  # fmt: skip
        try:
            if self.rank == 0:
                sender.start()
            self.steps.gather(f"sender {number}")
            if served:
                seconds["init"] = self.timed(
                    lambda: engine.init_weights_update_group(**place, rank_offset=1, timeout_s=CALL_S)
                )
            self.steps.gather(f"joined {number}")
            sender.order("send")
            if served:
                seconds["update"] = self.timed(
                    lambda: engine.update_weights_from_distributed(
                        [name for name, _ in weights], **described, bucket_bytes=BUCKET_BYTES, timeout_s=CALL_S
                    )
                )
            self.steps.gather(f"updated {number}")
        except Exception:
            sender.order("give up")
            found[f"group_{number}"] = {"call_seconds": seconds, "sender": sender.ended(5.0)}
            self.stuck |= sender.is_alive()
            raise
        finally:
            if reserved is not None:
                reserved.close()
        # Both sides leave at the same time: with NCCL each may wait for the other.
        if served:
            seconds["destroy"] = self.timed(lambda: engine.destroy_weights_update_group(timeout_s=CALL_S))
        state = sender.ended(CALL_S)
        self.stuck |= sender.is_alive()
        state = self.steps.gather(f"left {number}", state)[0]
        if state != "done":
            raise RuntimeError(f"the sender {state}")
        fresh = self.asked(served, f"fresh {number}")
        found[f"group_{number}"] = {
            "backend": backend, "call_seconds": self.steps.gather(f"seconds {number}", seconds)[-1],
            "gap_before": stale, "gap_after": fresh, "gap_is_noise": fresh < NOISE,
        }  # fmt: skip

    def asked(self, served: bool, what: str) -> float:
        """The largest gap of those ranks that have an engine."""
        return max(self.steps.gather(f"gap: {what}", gap(self.engine, self.model, self.device) if served else 0.0))


class Sender(threading.Thread):
    """Rank 0 of an update group: joins, broadcasts, leaves.

    Args:
        device: Of the tensors.
        tensors: In the order in which they are announced.
        place: Of the group.
    """

    def __init__(self, device: torch.device, tensors: list[torch.Tensor], place: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.device, self.tensors, self.place = device, tensors, place
        self.ordered = threading.Event()
        self.first_order = ""
        self.state = "was not needed here"

    def order(self, what: str) -> None:
        """Have it ``send``, or ``give up``; the first order counts."""
        self.first_order = self.first_order or what
        self.ordered.set()

    def run(self) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # every thread has a current device of its own
            self.state = "is joining"
            # Later than everything here, since torch ends a process whose collective on a device takes longer.
            group = tpcolocate.join_update_group(**self.place, timeout_s=5 * CALL_S)
            self.state = "waits for the engine to join"
            if not self.ordered.wait(CALL_S) or self.first_order != "send":
                raise TimeoutError("the engine did not join")
            self.state = "is sending"
            works = [dist.broadcast(tensor, src=0, group=group, async_op=True) for tensor in self.tensors]
            ends = time.monotonic() + CALL_S
            while not all(work.is_completed() for work in works):
                # Waiting for the device itself could not be given up.
                if time.monotonic() > ends:
                    raise TimeoutError(f"not sent within {CALL_S:g} s")
                time.sleep(0.01)
            self.state = "is leaving"
            dist.destroy_process_group(group)
            self.state = "done"
        except BaseException as error:
            self.state = f"{self.state}: {type(error).__name__}: {error}"

    def ended(self, timeout_s: float) -> str:
        """What became of it."""
        if self.ident is not None:
            self.join(timeout_s)
        return self.state


def adapter(config: Any, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A LoRA adapter that changes the tokens, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {"q_proj": (config.hidden_size, heads), "v_proj": (config.hidden_size, kv_heads), "o_proj": (heads, config.hidden_size)}  # fmt: skip
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, (inputs, outputs) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, inputs, generator=generator) * 0.2
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.2
    return tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(sizes), "bias": "none"}


def compared(expected: list[Any], found: list[Any]) -> dict[str, Any]:
    """Tokens equal, and the largest difference of a log-probability up to the first that is not."""
    worst = 0.0
    for (tokens, logprobs), (others, theirs) in zip(expected, found):
        for token, mine, other, its in zip(tokens, logprobs, others, theirs):
            if token != other:
                break
            worst = max(worst, abs(mine - its))
    equal = [tokens for tokens, _ in expected] == [tokens for tokens, _ in found]
    return {"tokens_equal": equal, "largest_difference": worst}


def main() -> None:
    args = parse_args()
    # Gloo for the script's own exchanges: they must work when a device does not.
    rank, device = gpu_common.join_ranks(shared_device=args.shared_device, backend="gloo")
    note = gpu_common.Notes(args.out, rank, {
        "command": command(sys.argv, os.environ), "gpu": torch.cuda.get_device_name(device), "torch": torch.__version__,
        "tp_size": args.tp_size, "ranks": dist.get_world_size(), "shared_device": args.shared_device,
    })  # fmt: skip
    steps = gpu_common.InStep(note)
    folder = steps.gather("folder", tempfile.mkdtemp(prefix="tpcolocate-calls-") if rank == 0 else None)[0]
    if rank == 0:
        gpu_common.write_checkpoint(folder)
    steps.gather("checkpoint")
    run = Run(args, device, steps, folder)
    first = {
        "cycles_parts": (lambda found: run.cycles(found, parts=True), 210.0),
        "cycles": (lambda found: run.cycles(found, parts=False), 210.0),
    }
    lora = {"lora_across_sleep": (run.lora_across_sleep, 120.0)}
    if not run.served("saver_lora", SAVER | LORA, first | lora):
        run.served("saver", SAVER, first)
    last = {
        "backup": (run.backup, 120.0),
        "group_shared": (run.group_shared, 240.0),
    }
    if "group_apart" in args.parts:
        steps.part("group_apart", run.group_apart, deadline_s=LAUNCH_S + 200)
    run.served("saver_backup", SAVER | BACKUP, last)
    note("shm_left", gpu_common.left_in_shm())
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    stuck = any(steps.gather("stuck", run.stuck))
    if stuck:
        os._exit(0)  # a thread inside of NCCL would keep the interpreter from ending
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
