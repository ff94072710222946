"""Both ends of a sync in miniature: a policy as trainers hold it, in every form, and what a TP worker serves of it.

`Served` has the parameters of an SGLang model and loads as one does: fused and cut by rows or columns, heads shared by
several ranks, a vocabulary with padding, experts one by one into fused tensors.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

LAYERS, VOCAB, HIDDEN, INNER = 1, 10, 8, 12
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4
EXPERTS, EXPERT_INNER = 3, 8
PADDED_VOCAB = 12  # a multiple of every tp_size
UNREAD = ("mtp.", "rotary_emb.")
"""How names begin that no loader reads."""
MEMORIES = ("staged", "mapped once", "kept mapped", "mixed")


# --- the trainer's side ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)


class FusedExperts(nn.Module):
    """As transformers 5 holds them: all experts of a layer in one tensor."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * EXPERT_INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, EXPERT_INNER))


class SparseMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = FusedExperts()


class Layer(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN, bias=False)
        self.self_attn = Attention()
        self.mlp = SparseMlp() if moe else Mlp()


def build(parent, moe):
    parent.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
    parent.layers = nn.ModuleList(Layer(moe) for _ in range(LAYERS))
    parent.norm = nn.LayerNorm(HIDDEN, bias=False)
    parent.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        build(self, moe=False)


def sparse_policy():
    """A transformers model, because only of those it is known that experts are fused."""
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    class SparsePolicy(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            build(self, moe=True)

    model = SparsePolicy(PretrainedConfig())
    model._weight_conversions = get_checkpoint_conversion_mapping("qwen2_moe")
    return model


def policy(moe=False, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = sparse_policy() if moe else Policy()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape)
    return model.requires_grad_(False)


def adapted(model):
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config).requires_grad_(False)


@functools.cache
def _twin(moe, with_adapters):
    return adapted(policy(moe)) if with_adapters else policy(moe)


def served_weights(model):
    """Name in the checkpoint -> full tensor, of a plain model that is held as a whole."""
    if hasattr(model, "get_base_model"):
        merged = {}
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                merged[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
            elif "lora_" not in name and "base_layer" not in name:
                merged |= {f"{name}.{key}": tensor for key, tensor in module._parameters.items() if tensor is not None}
        return merged
    found = {}
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition("experts.")
        for e in range(EXPERTS if path else 0):
            if last == "down_proj":
                found[f"{path}experts.{e}.down_proj.weight"] = tensor[e]
            else:
                gate, up = tensor[e].chunk(2)
                found |= {f"{path}experts.{e}.gate_proj.weight": gate, f"{path}experts.{e}.up_proj.weight": up}
        if not path:
            found[name] = tensor
    return found


def local_of(tensor):
    return getattr(tensor, "_local_tensor", tensor)


def local_part(full, tensor):
    """What this rank holds of a full tensor, laid out as `tensor` is."""
    if local_of(tensor) is tensor:
        return full
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(full.shape, tensor.device_mesh, tensor.placements)
    for dim, (start, length) in enumerate(zip(offset, shape)):
        full = full.narrow(dim, min(start, full.shape[dim]), length)
    return full


class Source:
    """One form in which a trainer holds its model, and a plain twin that has its full weights.

    Args:
        kind: One of `SOURCES`.
        memory: One of `MEMORIES`.
        tp_size: Of the layout.
    """

    def __init__(self, kind, memory, tp_size):
        self.kind, self.memory = kind, memory
        self.twin = copy.deepcopy(_twin("experts" in kind, "peft" in kind))
        self.model = SOURCES[kind](copy.deepcopy(self.twin), tp_size)
        self.parameters = [*self.model.parameters()]
        self._generator = torch.Generator().manual_seed(2)
        if memory != "mapped once":
            self._share()

    def _share(self):
        step = {"staged": 0, "mixed": 2}.get(self.memory, 1)
        for parameter in self.parameters[::step] if step else ():
            local = local_of(parameter)
            if local.numel():
                local.untyped_storage().share_memory_()

    def train(self):
        """A step of the optimiser; under "mapped once" the weights were moved away meanwhile, and back to another place."""
        with torch.no_grad():
            for twin, parameter in zip(self.twin.parameters(), self.parameters, strict=True):
                twin.add_(torch.randn(twin.shape, generator=self._generator))
                local = local_of(parameter)
                if self.memory == "mapped once":
                    local.data = local.data.clone()
                local.copy_(local_part(twin, parameter))
        if self.memory == "mapped once":
            self._share()

    def given(self):
        """What goes to the sync."""
        if self.kind == "state dict":
            return self.model.state_dict()
        if self.kind == "generator":
            return ((name, tensor) for name, tensor in self.model.state_dict().items())
        return self.model

    def expected(self):
        return {name: tensor.detach().clone() for name, tensor in served_weights(self.twin).items()}


def _plain(model, tp_size):
    return model


def _ddp(model, tp_size):
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model.requires_grad_(True))


def _sharded(model, mesh):
    from torch.distributed.fsdp import fully_shard

    layers = model.get_base_model().layers if hasattr(model, "get_base_model") else model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@functools.cache
def _mesh(*shape):
    """One for each shape: torch remembers specs of DTensors beyond the process groups that they were made with."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def _world():
    return torch.distributed.get_world_size()


def _fsdp(model, tp_size):
    return _sharded(model, _mesh(_world()))


def _hsdp(model, tp_size):
    return _sharded(model, _mesh(2, _world() // 2))


def _tensor_parallel(model, tp_size):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = _mesh(_world() // tp_size, tp_size)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            row = any(module is layer for of in model.layers for layer in (of.self_attn.o_proj, of.mlp.down_proj))
            placed = Replicate() if parameter.dim() == 1 else Shard(1 if row else 0)
            whole = parameter.detach()
            # from_local, not distribute_tensor: nothing is sent, every rank has the whole.
            like = DTensor.from_local(
                whole[:0] if placed.is_shard() else whole, mesh, [Replicate(), placed], run_check=False,
                shape=whole.shape, stride=whole.stride(),
            )  # fmt: skip
            local = local_part(whole, like).clone()
            made = DTensor.from_local(
                local, mesh, [Replicate(), placed], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            module._parameters[name] = nn.Parameter(made, requires_grad=False)
    return model


SOURCES = {
    "plain": _plain,
    "DDP": _ddp,
    "FSDP2": _fsdp,
    "FSDP2 experts": _fsdp,
    "peft": _plain,
    "peft FSDP2": _fsdp,
    "state dict": _plain,
    "generator": _plain,
    "DTensor TP": _tensor_parallel,
    "HSDP": _hsdp,
}


# --- the engine's side -------------------------------------------------------------------------------------------------


class Served(nn.Module):
    """The model of one TP worker, in bf16.

    Args:
        tp_rank: Which worker.
        tp_size: How many there are.
        moe: Whether layers have experts.
        habit: What its loader does beside: None; "needs values"; "does otherwise" than in a dry run; "ties": it has one
            parameter for the embedding and the output layer, and skips the latter's name; "joins": it loads keys and values
            once both have come, put together; "waits": likewise, by a copy of each; "spreads experts": each TP rank has
            some of them, whole.  It skips the names in `UNREAD` always.
    """

    def __init__(self, tp_rank, tp_size, *, moe=False, habit=None):
        super().__init__()
        self.k, self.n, self.habit = tp_rank, tp_size, habit
        self.kv_heads = max(1, KV_HEADS // tp_size)
        rows = PADDED_VOCAB // tp_size
        sizes = {"embed_tokens": (rows, HIDDEN), "lm_head": (rows, HIDDEN), "norm": (HIDDEN,)}
        for i in range(LAYERS):
            heads = HEADS // tp_size + 2 * self.kv_heads
            sizes |= {
                f"{i}_norm": (HIDDEN,),
                f"{i}_qkv": (heads * HEAD_DIM, HIDDEN),
                f"{i}_o": (HIDDEN, HEADS * HEAD_DIM // tp_size),
            }
            if moe:
                num, inner = EXPERTS, EXPERT_INNER // tp_size
                if habit == "spreads experts":
                    num, inner = len(range(tp_rank, EXPERTS, tp_size)), EXPERT_INNER
                sizes |= {
                    f"{i}_gate": (EXPERTS, HIDDEN),
                    f"{i}_w13": (num, 2 * inner, HIDDEN),
                    f"{i}_w2": (num, HIDDEN, inner),
                }
            else:
                sizes |= {f"{i}_gate_up": (2 * INNER // tp_size, HIDDEN), f"{i}_down": (HIDDEN, INNER // tp_size)}
        if habit == "ties":
            del sizes["lm_head"]
        for name, size in sizes.items():
            blank = torch.full(size, -1.0, dtype=torch.bfloat16)
            self.register_parameter(name, nn.Parameter(blank, requires_grad=False))
        self.num_loads = 0

    def load_weights(self, weights):
        held = {}
        for name, tensor in weights:
            if name.startswith(UNREAD) or (self.habit == "ties" and name.startswith("lm_head")):
                continue
            if self.habit in ("joins", "waits") and name.endswith(("k_proj.weight", "v_proj.weight")):
                held[name] = tensor
                k, v = (name.replace(name[-13], which) for which in "kv")
                if k in held and v in held:
                    self._load_joined(k, held.pop(k), held.pop(v))
                continue
            if self.habit == "needs values":
                tensor.sum().item()
            self._load(name, tensor)
        if self.habit == "does otherwise":
            # What a dry run sees is undone afterwards in parameters alone; this is kept.
            self.num_loads += 1

    def _load(self, name, tensor):
        parts = name.removesuffix(".weight").split(".")
        if parts[0] != "layers":
            target = getattr(self, parts[0]).data
            if parts[0] == "norm":
                target.copy_(tensor)
                return
            start = self.k * len(target)
            rows = max(0, min(len(target), VOCAB - start))
            if rows:
                target[:rows].copy_(tensor.narrow(0, start, rows))
            target[rows:].fill_(0)
            return
        layer, last = parts[1], parts[-1]
        if last == "input_layernorm":
            getattr(self, f"{layer}_norm").data.copy_(tensor)
        elif last == "gate":
            getattr(self, f"{layer}_gate").data.copy_(tensor)
        elif last in ("q_proj", "k_proj", "v_proj"):
            self._load_qkv(getattr(self, f"{layer}_qkv").data, last[0], tensor)
        elif last == "o_proj":
            self._by_columns(getattr(self, f"{layer}_o").data, tensor)
        elif parts[-3] == "experts":
            expert = int(parts[-2])
            if self.habit == "spreads experts":
                self._load_own_expert(layer, last, expert, tensor)
            elif last == "down_proj":
                self._by_columns(getattr(self, f"{layer}_w2").data[expert], tensor)
            else:
                self._load_half(getattr(self, f"{layer}_w13").data[expert], last, tensor)
        elif last == "down_proj":
            self._by_columns(getattr(self, f"{layer}_down").data, tensor)
        else:
            self._load_half(getattr(self, f"{layer}_gate_up").data, last, tensor)

    def _load_own_expert(self, layer, last, expert, tensor):
        """Expert parallelism: of the others this rank reads nothing."""
        here, of = divmod(expert, self.n)
        if of != self.k:
            return
        if last == "down_proj":
            getattr(self, f"{layer}_w2").data[here].copy_(tensor)
        else:
            half = getattr(self, f"{layer}_w13").data[here].view(2, EXPERT_INNER, HIDDEN)
            half[0 if last == "gate_proj" else 1].copy_(tensor)

    def _load_joined(self, name, k, v):
        if self.habit == "waits":
            self._load(name, k)
            self._load(name.replace("k_proj", "v_proj"), v)
            return
        rows = self.kv_heads * HEAD_DIM
        start = self.k * KV_HEADS // self.n * HEAD_DIM
        target = getattr(self, f"{name.split('.')[1]}_qkv").data[HEADS // self.n * HEAD_DIM :]
        target.copy_(torch.cat([one.narrow(0, start, rows) for one in (k, v)]))

    def _by_columns(self, target, tensor):
        columns = target.shape[1]
        target.copy_(tensor.narrow(1, self.k * columns, columns))

    def _load_half(self, target, name, tensor):
        """gate above, up below."""
        rows = target.shape[0] // 2
        flipped = self.habit == "does otherwise" and self.num_loads
        first = 0 if (name == "gate_proj") != bool(flipped) else rows
        target.narrow(0, first, rows).copy_(tensor.narrow(0, self.k * rows, rows))

    def _load_qkv(self, target, name, tensor):
        q_rows, kv_rows = HEADS // self.n * HEAD_DIM, self.kv_heads * HEAD_DIM
        first, rows = {"q": (0, q_rows), "k": (q_rows, kv_rows), "v": (q_rows + kv_rows, kv_rows)}[name]
        # With more ranks than heads, several ranks have the same head.
        start = self.k * q_rows if name == "q" else self.k * KV_HEADS // self.n * HEAD_DIM
        target.narrow(0, first, rows).copy_(tensor.narrow(0, start, rows))


def differing(model, weights):
    """Parameters that are not what the model's own loader makes of these full weights, bit for bit."""
    moe = any("experts" in name for name in weights)
    kept = model.habit if model.habit in ("ties", "spreads experts") else None
    reference = Served(model.k, model.n, moe=moe, habit=kept)
    if model.habit == "does otherwise":
        reference.habit, reference.num_loads = model.habit, 1
    reference.load_weights(weights.items())
    own = dict(model.named_parameters())
    return [name for name, tensor in reference.named_parameters() if not torch.equal(tensor, own[name])]
