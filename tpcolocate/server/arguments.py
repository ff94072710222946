"""SGLang's server arguments for one slice: defaults, what is rejected, and what the installed release supports.

Pure.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from tpcolocate.checks import check_integer
from tpcolocate.errors import ConfigError, shown
from tpcolocate.server.installed import Installed
from tpcolocate.server.releases import OLDEST, check_draft_model, other_spelling, release

logger = logging.getLogger(__name__)

RECEIVER = "tpcolocate_receiver.receive"
"""Dotted name by which the server's workers import our weight loader."""

# Needed on a CPU without SGLang's own kernels; the user's arguments override them.
_CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
    "sleep_on_idle": True,
}
# Set by this library, or impossible with it; the value is the reason in the error.
_REFUSED = {
    "tp": "pass tp_size to tpcolocate.init()",
    "tensor_parallel_size": "pass tp_size to tpcolocate.init()",
    "tensor_model_parallel_size": "pass tp_size to tpcolocate.init()",
    "num_gpus": "pass tp_size to tpcolocate.init()",
    "nnodes": "a slice is on one host",
    "node_rank": "a slice is on one host",
    "dist_init_addr": "a slice is on one host",
    "api_key": "every launch has a random key; read it from engine.api_key",
    "admin_api_key": "every launch has a random key; read it from engine.api_key",
    "config": "pass SGLang's arguments as keywords",
    "model": "it is the first argument of launch()",
}
_MUST_BE_ONE = (
    "pp_size",
    "pipeline_parallel_size",
    "dp_size",
    "data_parallel_size",
    "moe_dp_size",
    "moe_data_parallel_size",
    "attn_cp_size",
    "attention_context_parallel_size",
    "dcp_size",
    "decode_context_parallel_size",
    "dwdp_size",
    "attn_dp_size",
    "attention_data_parallel_size",
)
_QUANTISED = "a sync would write the trainer's values into quantised parameters"
_NO_DRAFT = "the draft model's weights are not synced, and no speculative algorithm was tested with a sync"
_NOT_HTTP = "this library speaks plain HTTP with its server, on this host, and would wait for it until health_timeout_s"
_OFFLOADED = "a sync does not reach the copies of weights that the server makes while it generates"
_MOVED = "experts change their places while the server runs, and a sync would write them where they were"
_NO_SERVER = "such a server generates nothing by itself"
# Not tested, or known not to work, with changing weights or this library; False leaves them off.
_UNSUPPORTED = {
    "ssl_certfile": _NOT_HTTP,
    "ssl_keyfile": _NOT_HTTP,
    "grpc_mode": _NOT_HTTP,
    "smg_grpc_mode": _NOT_HTTP,
    "enable_dp_attention": "weights are addressed by tensor-parallel rank",
    "quantization": _QUANTISED,
    "torchao_config": _QUANTISED,
    "modelopt_quant": _QUANTISED,
    "quantize_and_serve": _QUANTISED,
    "rl_quant_profile": _QUANTISED,
    "speculative_algorithm": _NO_DRAFT,
    "speculative_draft_model_path": _NO_DRAFT,
    "weight_cache_mode": "SGLang shares cached weights between servers and refuses to change them",
    "cpu_offload_gb": _OFFLOADED,
    "offload_group_size": _OFFLOADED,
    "kt_weight_path": "a sync does not reach the experts that KTransformers keeps in host memory",
    "enable_eplb": _MOVED,
    "elastic_ep_backend": _MOVED,
    "enable_elastic_expert_backup": _MOVED,
    "enable_w4a4_mxfp4_megamoe": _QUANTISED,
    "modelopt_checkpoint_restore_path": _QUANTISED,
    "disaggregation_mode": _NO_SERVER,
    "encoder_only": _NO_SERVER,
    "checkpoint_engine_wait_weights_before_ready": 'its start would wait for weights; load_format="dummy" leaves them to a sync',
    "gated_launch_port": "its start would wait until health_timeout_s has passed",
    "delete_ckpt_after_loading": "a restart loads the checkpoint again",
    "use_ray": "its processes would outlive the trainer",
    "tokenizer_worker_num": "SGLang takes no key with several, and every launch has one",
}
# Values that leave them off, beside False.
_OFF = {
    "weight_cache_mode": "off",
    "tokenizer_worker_num": 1,
    "offload_group_size": -1,
    "elastic_ep_backend": "none",
    "disaggregation_mode": "null",
}
# Names of other engines, and SGLang's for the same.
_ELSEWHERE = {
    "max_model_len": "context_length",
    "max_seq_len": "context_length",
    "max_sequence_length": "context_length",
    "gpu_memory_utilization": "mem_fraction_static",
    "free_gpu_memory_fraction": "mem_fraction_static",
    "mem_fraction": "mem_fraction_static",
    "cache_max_entry_count": "mem_fraction_static",
    "max_num_seqs": "max_running_requests",
    "max_batch_size": "max_running_requests",
    "max_num_batched_tokens": "chunked_prefill_size",
    "max_num_tokens": "max_total_tokens",
    "enforce_eager": "disable_cuda_graph",
    "enable_sleep_mode": "enable_memory_saver",
    "block_size": "page_size",
    "seed": "random_seed",
    "tokenizer": "tokenizer_path",
    "max_loras": "max_loras_per_batch",
    "max_cpu_loras": "max_loaded_loras",
    "lora_modules": "lora_paths",
    "hf_overrides": "json_model_override_args",
    "guided_decoding_backend": "grammar_backend",
    "disable_custom_allreduce": "disable_custom_all_reduce",
    "compilation_config": "enable_torch_compile",
}
_PORTS = ("port", "nccl_port")
_QUANTISED_FORMATS = ("bitsandbytes", "gguf", "flash_rl")


def server_arguments(
    user: Mapping[str, Any], *, tp_size: int, device_type: str, shared_device: bool = False
) -> dict[str, Any]:
    """Return SGLang's arguments for one slice: defaults, overridden by the user's.  Pure.

    At tp=1 on a GPU only the size of the slice and the permission for our weight loader are added.

    Args:
        user: By SGLang's names (``mem_fraction_static=0.4``).
        tp_size: Size of the slice.
        device_type: ``"cuda"``, ``"cpu"``, ...
        shared_device: All TP ranks share one device (a test rig).

    Raises:
        ConfigError: An argument is set by this library, or cannot work with it.
    """
    user = {name: _plain(name, value) for name, value in user.items()}
    for name, value in user.items():
        if value is None:  # leaves the argument out
            continue
        if name in _PORTS:
            user[name] = _port(name, value)
        if name in _REFUSED:
            raise ConfigError(f"launch() does not take {name}={value!r}: {_REFUSED[name]}")
        if name in _MUST_BE_ONE and value != 1:
            raise ConfigError(
                f"{name}={value!r} is not supported: weights are addressed by tensor-parallel rank",
                hint="use tp_size alone",
            )
        if name in _UNSUPPORTED and value not in (False, _OFF.get(name)):
            raise ConfigError(f"{name}={value!r} is not supported: {_UNSUPPORTED[name]}", hint=f"leave out {name}")
        if name == "load_format" and value in _QUANTISED_FORMATS:
            raise ConfigError(
                f"load_format={value!r} is not supported: {_QUANTISED}", hint="serve a checkpoint that is not quantised"
            )
    if user.get("tp_size") not in (None, tp_size):
        raise ConfigError(
            f"launch(tp_size={user['tp_size']!r}) contradicts init(tp_size={tp_size})",
            hint="pass tp_size to init() only",
        )
    arguments: dict[str, Any] = {}
    if device_type == "cpu":
        arguments.update(_CPU_ARGUMENTS)
        if user.pop("enable_memory_saver", None):
            # SGLang has no memory saver there and exits; `sleep` works without.
            logger.warning("enable_memory_saver=True is left out: there is none on a CPU, and sleep() needs none there")
        if user.get("enable_lora") or user.get("lora_paths"):
            arguments["lora_backend"] = "torch_native"  # the default needs a GPU
    if tp_size > 1:
        # Custom all-reduce fails on single ranks without peer access or in separate IPC namespaces, and conflicts with
        # the memory saver; users can enable it where it works.
        arguments["disable_custom_all_reduce"] = True
    if shared_device:
        arguments["gpu_id_step"] = 0
    arguments.update(user)
    if isinstance(adapters := user.get("lora_paths"), dict) and "lora_path" not in adapters:
        # As SGLang's Engine takes them: name -> path.  Its command line has no such form.
        arguments["lora_paths"] = [{"lora_name": name, "lora_path": path} for name, path in adapters.items()]
    arguments["tp_size"] = tp_size
    # Permits our loader; SGLang's other loaders are not affected.
    loaders = user.get("custom_weight_loader")
    loaders = [] if loaders is None else loaders if isinstance(loaders, list) else [loaders]
    if not all(isinstance(loader, str) for loader in loaders):
        raise ConfigError(f"custom_weight_loader must be a list of dotted names, got {shown(loaders)}")
    arguments["custom_weight_loader"] = list(dict.fromkeys([*loaders, RECEIVER]))
    return {name: value for name, value in arguments.items() if value is not None}


def _port(name: str, value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return check_integer(name, number, at_least=0, at_most=2**16 - 1)


def _plain(name: str, value: Any) -> Any:
    """Return a value as it is written on a command line: ``torch.bfloat16`` as ``"bfloat16"``, a path as text.

    Raises:
        ConfigError: It is of a type that no argument of SGLang has.
    """
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Enum):
        return _plain(name, value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):  # such as PEFT's target_modules: in the same order in every process
        return sorted((_plain(name, item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        return {_written(name, key): _plain(name, item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return _written(name, value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy's or torch's
        return _plain(name, value.item())
    if isinstance(value, torch.device):
        return value.type
    raise _no_value(name, value)


def _written(name: str, value: Any) -> Any:
    """Return a number or a text that a command line can have, and JSON as the key of a dict."""
    if isinstance(value, str):
        try:
            is_possible = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            is_possible = False
    elif value is None or isinstance(value, (bool, int, float)):
        is_possible = not isinstance(value, float) or math.isfinite(value)
    else:
        raise _no_value(name, value)
    if not is_possible:
        raise ConfigError(f"{name}={shown(value)} cannot be written on a command line", hint=f"pass another {name}")
    return value


def _no_value(name: str, value: object) -> ConfigError:
    return ConfigError(
        f"{name}={shown(value)} is a {type(value).__name__}, which is no value of a server argument",
        hint="pass a number, a text, a list or a dict",
    )


def check_installed(arguments: Mapping[str, Any], installed: Installed | None) -> None:
    """Check that the installed SGLang supports the arguments, before anything is started.

    Args:
        arguments: From `server_arguments`.
        installed: From `find_installed`.  What cannot be read from it is left to the server.

    Raises:
        ConfigError: There is no SGLang, it is too old, lacks an argument, or accepts and ignores it; or the memory saver
            is not installed.
    """
    if installed is None:
        raise ConfigError(
            f"SGLang is not installed for {sys.executable}", hint=f"{sys.executable} -m pip install 'sglang>={OLDEST}'"
        )
    if arguments.get("enable_memory_saver") and arguments.get("device") != "cpu" and not installed.has_memory_saver:
        raise ConfigError(
            f"enable_memory_saver=True needs the package torch_memory_saver, which {sys.executable} does not have",
            hint=f"{sys.executable} -m pip install torch-memory-saver; without enable_memory_saver there is no sleep()",
        )
    row = None if installed.version is None else release(installed.version)
    if (algorithm := arguments.get("speculative_algorithm")) is not None:
        fields = installed.request_fields("UpdateWeightsFromTensorReqInput")
        if fields is None and row is not None:
            fields = frozenset(row.target_only())
        if fields is not None:
            check_draft_model(installed.name, algorithm, fields)
    supported = installed.arguments()
    if supported is None:
        return
    for name, value in arguments.items():
        plain = name.replace("_", "-")
        if plain not in supported:
            spelling = other_spelling(name, supported)
            elsewhere = _ELSEWHERE.get(name)
            if spelling is None and elsewhere is not None and elsewhere.replace("_", "-") in supported:
                spelling = elsewhere
            if spelling is None:
                close = difflib.get_close_matches(plain, supported, n=3)
                spelling = " or ".join(word.replace("-", "_") for word in close) if close else None
            raise ConfigError(
                f"{installed.name} has no argument {name} (launch got {name}={value!r})",
                hint="see python -m sglang.launch_server --help"
                if spelling is None
                else f"this release has {spelling}",
            )
        if (unused := supported[plain]) is not None:
            spelling = other_spelling(name, supported)
            raise ConfigError(
                f"{installed.name} accepts {name} and ignores it: {unused}",
                hint="leave it out" if spelling is None else f"use {spelling}",
            )
        if value is False and f"no-{plain}" in supported:
            raise ConfigError(
                f"{name}=False would leave {installed.name} at its default",
                hint=f"pass no_{name}=True to switch it off",
            )


def to_argv(arguments: Mapping[str, Any]) -> list[str]:
    """Return ``["--mem-fraction-static", "0.4", "--enable-lora"]`` for ``mem_fraction_static=0.4, enable_lora=True``.

    True becomes a bare flag, False and None omit the argument, lists become several values, dicts (in lists, too) JSON.
    """
    argv: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            argv.append(flag)
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            argv += [flag, *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return argv


__all__ = ["RECEIVER", "check_installed", "server_arguments", "to_argv"]
