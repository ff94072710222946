"""SGLang's server arguments for one slice: defaults, what is rejected, and what the installed release supports.  Pure."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from tpcolocate.errors import ConfigError
from tpcolocate.server.installed import Installed
from tpcolocate.server.releases import check_draft_model, other_spelling, release

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
    "nnodes": "a slice is on one host",
    "node_rank": "a slice is on one host",
    "dist_init_addr": "a slice is on one host",
    "api_key": "every launch has a random key; read it from engine.api_key",
    "admin_api_key": "every launch has a random key; read it from engine.api_key",
    "config": "pass SGLang's arguments as keywords",
    "model": "it is the first argument of launch()",
    "model_path": "it is the first argument of launch()",
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
# Not tested, or known not to work, with changing weights; None and False leave them off.
_UNSUPPORTED = {
    "enable_dp_attention": "weights are addressed by tensor-parallel rank",
    "quantization": _QUANTISED,
    "torchao_config": _QUANTISED,
    "modelopt_quant": _QUANTISED,
    "quantize_and_serve": _QUANTISED,
    "rl_quant_profile": _QUANTISED,
    "speculative_algorithm": _NO_DRAFT,
    "speculative_draft_model_path": _NO_DRAFT,
}
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
    for name, value in user.items():
        if name in _REFUSED:
            raise ConfigError(f"launch() does not take {name}={value!r}: {_REFUSED[name]}")
        if name in _MUST_BE_ONE and value != 1:
            raise ConfigError(
                f"{name}={value!r} is not supported: weights are addressed by tensor-parallel rank",
                hint="use tp_size alone",
            )
        if name in _UNSUPPORTED and value is not None and value is not False:
            raise ConfigError(f"{name}={value!r} is not supported: {_UNSUPPORTED[name]}", hint=f"leave out {name}")
        if name == "load_format" and value in _QUANTISED_FORMATS:
            raise ConfigError(
                f"load_format={value!r} is not supported: {_QUANTISED}", hint="serve a checkpoint that is not quantised"
            )
    if user.get("tp_size", tp_size) != tp_size:
        raise ConfigError(
            f"launch(tp_size={user['tp_size']!r}) contradicts init(tp_size={tp_size})",
            hint="pass tp_size to init() only",
        )
    arguments: dict[str, Any] = {}
    if device_type == "cpu":
        arguments.update(_CPU_ARGUMENTS)
    if tp_size > 1:
        # Custom all-reduce fails on single ranks without peer access or in separate IPC namespaces, and conflicts with
        # the memory saver; users can enable it where it works.
        arguments["disable_custom_all_reduce"] = True
    if shared_device:
        arguments["gpu_id_step"] = 0
    arguments.update(user)
    arguments["tp_size"] = tp_size
    # Permits our loader; SGLang's other loaders are not affected.
    loaders = user.get("custom_weight_loader")
    loaders = [] if loaders is None else [loaders] if isinstance(loaders, str) else loaders
    arguments["custom_weight_loader"] = list(dict.fromkeys([*loaders, RECEIVER]))
    return arguments


def check_installed(arguments: Mapping[str, Any], installed: Installed | None) -> None:
    """Check that the installed SGLang supports the arguments, before anything is started.

    Args:
        arguments: From `server_arguments`.
        installed: From `find_installed`.  What cannot be read from it is left to the server.

    Raises:
        ConfigError: The release is too old, lacks an argument, or accepts and ignores it.
    """
    if installed is None:
        return
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

    True becomes a bare flag, False and None omit the argument, lists become several values, dicts JSON.
    """
    argv: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            argv.append(flag)
        elif isinstance(value, dict):
            argv += [flag, json.dumps(value)]
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        else:
            argv += [flag, str(value)]
    return argv


__all__ = ["RECEIVER", "check_installed", "server_arguments", "to_argv"]
