"""The kinds of trainer that are synced by `gpu_trainers.py` and `gpu_matrix.py`: their modules, a step, their full weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TP_DEGREE = 2
"""Of a trainer that is sharded twice."""
ATTENTION_PLAN = {"self_attn.q_proj": "column", "self_attn.k_proj": "column", "self_attn.v_proj": "column", "self_attn.o_proj": "row"}  # fmt: skip
MLP_PLAN = {"mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row"}


@dataclass(frozen=True)
class Kind:
    """A kind of trainer.

    Attributes:
        what: In words.
        min_ranks: Fewer make no sense.
        even: The number of ranks has to be even, since the mesh has two rows.
        masters: Weights are float32 where a shorter type is served.
        adapter: Trained is a LoRA.
    """

    what: str
    min_ranks: int = 1
    even: bool = False
    masters: bool = False
    adapter: bool = False

    def cannot_run(self, num_ranks: int) -> str | None:
        """Why it cannot be made on so many ranks; None where it can."""
        if num_ranks < self.min_ranks:
            return f"needs {self.min_ranks} ranks, has {num_ranks}"
        if self.even and num_ranks % 2:
            return f"needs an even number of ranks, has {num_ranks}"
        return None


KINDS: dict[str, Kind] = {
    "plain": Kind("a plain module in the served dtype"),
    "plain_fp32": Kind("a plain module in float32", masters=True),
    "ddp": Kind("DistributedDataParallel"),
    "fsdp2": Kind("FSDP2 over all ranks, in the served dtype"),
    "fsdp2_fp32": Kind("FSDP2 with float32 masters and mixed precision", masters=True),
    "fsdp2_offload": Kind("FSDP2 with its shards on the CPU"),
    "fsdp1": Kind("FSDP1 with use_orig_params", min_ranks=2),
    "hsdp": Kind("FSDP2 over a mesh of 2 replicas x ranks / 2 shards", min_ranks=2, even=True),
    "fsdp2_tp": Kind("FSDP2 x tensor parallelism, a mesh of ranks / 2 x 2", min_ranks=2, even=True),
    "peft": Kind("a LoRA on a plain module", adapter=True),
    "peft_fsdp2": Kind("a LoRA under FSDP2", adapter=True),
    "state_dict": Kind("the state dict of a plain module"),
}


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The checkpoint as a plain module."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)


def make_trainer(kind: str, folder: Path, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A trainer's module; the same weights on every rank, whatever its kind.  Collective where it is sharded.

    Args:
        kind: Of `KINDS`.
        folder: A checkpoint.
        device: Of this rank.
        dtype: That is served.
    """
    model = load(folder, torch.float32 if KINDS[kind].masters else dtype, device)
    if KINDS[kind].adapter:
        model = with_adapter(model, cast=kind == "peft")
    if "fsdp2" in kind or kind == "hsdp":
        shard(model, device, kind, dtype)
    elif device.type == "cpu":
        model.share_memory()  # which the server maps, like a GPU's
    if kind == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)
    return fsdp1(model, device) if kind == "fsdp1" else model


def with_adapter(model: torch.nn.Module, *, cast: bool, rank: int = 8) -> torch.nn.Module:
    """A LoRA for every linear layer, with the same initial values on every rank.

    Args:
        model: To be adapted.
        cast: Keep the adapter in float32 beside a bfloat16 model, as peft does by default.
        rank: Of the LoRA.
    """
    import peft

    torch.manual_seed(1)
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is torch.nn.Linear})
    targets = [name for name in linear if name.endswith("_proj")]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=cast)


def shard(model: torch.nn.Module, device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """FSDP2, layer by layer, over the mesh of a kind of trainer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    world = dist.get_world_size()
    if kind == "hsdp":
        mesh = init_device_mesh(device.type, (2, world // 2), mesh_dim_names=("replicas", "shards"))
    elif kind == "fsdp2_tp":
        both = init_device_mesh(device.type, (world // TP_DEGREE, TP_DEGREE), mesh_dim_names=("shards", "tp"))
        parallelize(model, both["tp"])
        mesh = both["shards"]
    else:
        mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype) if KINDS[kind].masters else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if kind == "fsdp2_offload" else OffloadPolicy()
    for layer in inner(model).model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)


def parallelize(model: torch.nn.Module, mesh: Any) -> None:
    """Tensor parallelism of the projections; fused experts stay whole on every rank of the mesh."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {"column": ColwiseParallel, "row": RowwiseParallel}
    for layer in inner(model).model.layers:
        plan = ATTENTION_PLAN | (MLP_PLAN if hasattr(layer.mlp, "gate_proj") else {})
        parallelize_module(layer, mesh, {name: styles[style]() for name, style in plan.items()})


def fsdp1(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """FSDP1, layer by layer, with the parameters' own names."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(layer) for layer in inner(model).model.layers})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def inner(model: torch.nn.Module) -> Any:
    """The transformers model inside of DDP, FSDP1 or peft."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def readable(model: torch.nn.Module, *, writeback: bool) -> Iterator[None]:
    """Parameters are tensors of their own while it lasts: FSDP1's are views of flat shards, most of them empty.  Collective.

    Args:
        model: Of any kind.
        writeback: Keep what is written to them.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=writeback):
            yield
    else:
        yield


def take_step(model: torch.nn.Module, seed: int, scale: float) -> None:
    """Add noise to the trained parameters in place, as an optimiser would; ranks that hold the same get the same."""
    with torch.no_grad(), readable(model, writeback=True):
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            seeds = 1009 * (1009 * seed + number) + place_in_mesh(parameter)
            generator = torch.Generator(local.device).manual_seed(seeds)
            local.add_(torch.randn(local.shape, generator=generator, device=local.device, dtype=local.dtype), alpha=scale)  # fmt: skip


def place_in_mesh(parameter: torch.Tensor) -> int:
    """A number that differs between the shards of a tensor, and not between replicas; 0 for a plain tensor."""
    if not hasattr(parameter, "placements"):
        return 0
    mesh: Any = parameter.device_mesh
    place = 0
    for size, coordinate, placement in zip(mesh.shape, mesh.get_coordinate(), parameter.placements):
        place = place * size + (0 if placement.is_replicate() else coordinate)
    return place


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor as a plain one on the device of its mesh.  Collective."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    mesh: Any = tensor.device_mesh
    if tensor.to_local().device.type != mesh.device_type:
        tensor = tensor.to(mesh.device_type)  # offloaded; the gather is the GPUs'
    return tensor.full_tensor()  # type: ignore[operator]


def copy_weights(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Give a plain model the trainer's full weights, adapters merged.  Collective where they are sharded."""
    weights: dict[str, torch.Tensor] = {}
    adapted = {name: layer for name, layer in inner(model).named_modules() if hasattr(layer, "lora_A")}
    with torch.no_grad(), readable(model, writeback=False):
        for name, parameter in inner(model).named_parameters():
            if ".lora_" in name:
                continue
            weight = full(parameter.detach())
            path = name.removesuffix(".base_layer.weight")
            if path in adapted:
                layer = adapted[path]
                a, b = (full(part["default"].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
                weight = weight.float() + b @ a * layer.scaling["default"]
            weights[name.replace(".base_layer", "").replace("_fsdp_wrapped_module.", "")] = weight
        reference.load_state_dict(weights, strict=True)


__all__ = [
    "KINDS",
    "Kind",
    "copy_weights",
    "full",
    "inner",
    "load",
    "make_trainer",
    "place_in_mesh",
    "take_step",
    "with_adapter",
]
