"""Differences between SGLang releases, as one table.

Keyed by the version that the running server reports, not by the one installed beside the trainer.  ``tests/contracts``
compares every entry with the source of the releases, in both directions: a field is there exactly if the table has it.

SGLang silently drops unknown fields.  So every request passes `Release.check` before it is sent, and a field that the
release lacks is an error that names the release.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.version import InvalidVersion, Version

from tpcolocate.errors import ConfigError

OLDEST = Version("0.5.9")


@dataclass(frozen=True, slots=True)
class Span:
    """A range of releases that support a feature.

    Attributes:
        since: The first one.
        until: The first one without it; None: still supported.
    """

    since: str = str(OLDEST)
    until: str | None = None

    def __contains__(self, version: Version) -> bool:
        return version >= Version(self.since) and (self.until is None or version < Version(self.until))

    def __str__(self) -> str:
        return f"{self.since} or newer" if self.until is None else f"{self.since} or newer, older than {self.until}"


_EVER = Span()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint of the server.

    Attributes:
        request: Class in SGLang's ``managers/io_struct.py``; None: it has query parameters only.
        fields: Of the body or the query.
        span: Releases that have it.
    """

    request: str | None
    fields: Mapping[str, Span] = field(default_factory=dict)
    span: Span = _EVER


def _fields(always: str = "", **sometimes: Span) -> dict[str, Span]:
    return {**dict.fromkeys(always.split(), _EVER), **sometimes}


_SELECTOR = Span("0.5.21")
ENDPOINTS: Mapping[str, Endpoint] = {
    "/update_weights_from_tensor": Endpoint(
        "UpdateWeightsFromTensorReqInput",
        _fields(
            "serialized_named_tensors load_format flush_cache abort_all_requests weight_version",
            disable_draft_model=Span("0.5.10", "0.5.21"),
            torch_empty_cache=Span("0.5.11"),
            selector=_SELECTOR,
        ),
    ),
    "/begin_weight_update": Endpoint("BeginWeightUpdateReqInput", _fields(selector=_SELECTOR), span=Span("0.5.21")),
    "/end_weight_update": Endpoint("EndWeightUpdateReqInput", span=Span("0.5.21")),
    "/update_weight_version": Endpoint("UpdateWeightVersionReqInput", _fields("new_version abort_all_requests")),
    "/update_weights_from_disk": Endpoint(
        "UpdateWeightFromDiskReqInput",
        _fields(
            "model_path load_format abort_all_requests weight_version is_async torch_empty_cache keep_pause "
            "recapture_cuda_graph token_step flush_cache manifest"
        ),
    ),
    "/init_weights_update_group": Endpoint(
        "InitWeightsUpdateGroupReqInput",
        _fields("master_address master_port rank_offset world_size group_name backend"),
    ),
    "/update_weights_from_distributed": Endpoint(
        "UpdateWeightsFromDistributedReqInput",
        _fields(
            "names dtypes shapes group_name flush_cache abort_all_requests weight_version load_format",
            torch_empty_cache=Span("0.5.11"),
            selector=_SELECTOR,
        ),
    ),
    "/destroy_weights_update_group": Endpoint("DestroyWeightsUpdateGroupReqInput", _fields("group_name")),
    "/load_lora_adapter": Endpoint("LoadLoRAAdapterReqInput", _fields("lora_name lora_path pinned lora_id")),
    "/load_lora_adapter_from_tensors": Endpoint(
        "LoadLoRAAdapterFromTensorsReqInput",
        _fields(
            "lora_name config_dict pinned added_tokens_config lora_id",
            load_format=Span("0.5.10"),
            serialized_tensors=Span(until="0.5.17"),  # one payload, read by all ranks
            serialized_named_tensors=Span("0.5.17"),  # one for each
            expected_checksums=Span("0.5.16"),
        ),
    ),
    "/unload_lora_adapter": Endpoint("UnloadLoRAAdapterReqInput", _fields("lora_name lora_id")),
    "/release_memory_occupation": Endpoint("ReleaseMemoryOccupationReqInput", _fields("tags")),
    "/resume_memory_occupation": Endpoint("ResumeMemoryOccupationReqInput", _fields("tags")),
    "/pause_generation": Endpoint("PauseGenerationReqInput", _fields("mode")),
    "/continue_generation": Endpoint("ContinueGenerationReqInput", _fields(torch_empty_cache=Span("0.5.12"))),
    "/abort_request": Endpoint(
        "AbortReq", _fields("rid abort_all finished_reason abort_message", weight_versions=Span("0.5.19"))
    ),
    "/weights_checker": Endpoint(
        "CheckWeightsReqInput",
        _fields(
            "action", allow_quant_error=Span("0.5.15"), skip_tensor_list=Span("0.5.21"), selector=_SELECTOR
        ),
    ),
    "/flush_cache": Endpoint(None, _fields(timeout=Span("0.5.10"))),
}  # fmt: skip
"""Endpoints that are posted to, with all fields of all releases, without ``/generate``: a running server describes its
many fields itself."""

TARGET_ONLY: Mapping[str, Any] = {"selector": "target", "disable_draft_model": True}
"""Fields that keep a weight update from a draft model; no release has both."""

EXACT_UNPICKLER = Span("0.5.21")
"""Releases whose unpickler allows only listed (module, name) pairs; older ones allow whole modules.  Our payloads pass
both."""

HEALTH_RUNS_RELEASED = Span("0.5.10")
"""Releases whose ``/health`` runs a forward even while memory is released, which crashes the server.  So the health of a
sleeping server is never requested."""

IGNORED_FIELDS: Mapping[str, Span] = {"return_entropy": Span(until="0.5.24")}
"""Fields of ``/generate`` that nothing in these releases reads, if they have them.  Of newer ones it is not established."""

SERVER_INFO = (
    "version", "weight_version", "enable_memory_saver", "enable_weights_cpu_backup", "speculative_algorithm", "enable_lora",
    "max_lora_rank", "lora_target_modules", "max_loaded_loras", "lora_paths",
)  # fmt: skip
"""Keys of ``/server_info`` that this library reads."""

RENAMED = (
    ("stream_output", "incremental_streaming_output"),
    ("nsa_prefill_backend", "dsa_prefill_backend"),
    ("nsa_decode_backend", "dsa_decode_backend"),
    ("speculative_dflash_draft_window_size", "speculative_draft_window_size"),
    ("mamba_scheduler_strategy", "mamba_radix_cache_strategy"),
    ("cuda_graph_max_bs", "cuda_graph_max_bs_decode"),
    ("cuda_graph_bs", "cuda_graph_bs_decode"),
    ("disable_cuda_graph", "cuda_graph_backend_decode='disabled'"),
    ("disable_piecewise_cuda_graph", "cuda_graph_backend_prefill='disabled'"),
    ("enforce_piecewise_cuda_graph", "cuda_graph_backend_prefill='tc_piecewise'"),
    ("piecewise_cuda_graph_tokens", "cuda_graph_bs_prefill"),
    ("piecewise_cuda_graph_max_tokens", "cuda_graph_max_bs_prefill"),
    ("enable_prefill_context_parallel", "enable_prefill_cp"),
    ("enable_dsa_prefill_context_parallel", "enable_prefill_cp"),
    ("enable_nsa_prefill_context_parallel", "enable_prefill_cp"),
    ("prefill_cp_mode", "cp_strategy"),
    ("dsa_prefill_cp_mode", "cp_strategy"),
    ("nsa_prefill_cp_mode", "cp_strategy"),
    ("enable_gdn_replayssm_spec", "enable_linear_replayssm_spec"),
    ("hybrid_kvcache_ratio", "swa_full_tokens_ratio"),
    ("enable_expert_distribution_metrics", "expert_balancedness_report_mode='server_log'"),
    ("elastic_ep_rejoin", "elastic_ep_join_mode='recover'"),
    ("keep_mm_feature_on_device", "mm_feature_transport='cuda_ipc'"),
    ("multi_item_scoring_delimiter", "enable_mis"),
    ("enable_flashinfer_allreduce_fusion", "flashinfer_allreduce_fusion_backend='auto'"),
    ("disable_fast_image_processor", "image_processor_backend='pil'"),
    ("enable_dp_attention", "attn_dp_size"),
    ("monokernel_backend", "enable_amd_monokernel"),
)  # fmt: skip
"""Renamed server arguments: (old, new), by SGLang's deprecation warnings."""


@dataclass(frozen=True, slots=True)
class Release:
    """What a server that reports `version` supports.

    Attributes:
        version: As the server reports it.
    """

    version: str

    @property
    def _base(self) -> Version:
        # a development build behaves as the release that it precedes
        return Version(Version(self.version).base_version)

    def has(self, path: str, name: str | None = None) -> bool:
        """Return whether the release has an endpoint of `ENDPOINTS`, and if `name` is given, that field of it."""
        endpoint = ENDPOINTS[path]
        return self._base in endpoint.span and (name is None or name in self._fields_of(endpoint))

    @property
    def weight_session(self) -> bool:
        """Whether weights are sent between ``/begin_weight_update`` and ``/end_weight_update``."""
        return self.has("/begin_weight_update")

    @property
    def lora_payload_per_rank(self) -> bool:
        """Whether ``/load_lora_adapter_from_tensors`` takes one payload per TP rank, not one that all ranks read."""
        return self.has("/load_lora_adapter_from_tensors", "serialized_named_tensors")

    def target_only(self, path: str = "/update_weights_from_tensor") -> Mapping[str, Any]:
        """Return the fields that keep a weight update from a draft model, which would open each payload again.

        Empty if the release has none.
        """
        return {name: value for name, value in TARGET_ONLY.items() if self.has(path, name)}

    def check(self, path: str, names: Mapping[str, Any]) -> None:
        """Check that this release supports all of a request.  Paths that are not in the table pass.

        Args:
            path: As posted.
            names: Fields of the body and of the query.

        Raises:
            ConfigError: The release lacks the endpoint or a field, which it would silently drop.
        """
        endpoint = ENDPOINTS.get(path)
        if endpoint is None:
            return
        if self._base not in endpoint.span:
            raise ConfigError(f"SGLang {self.version} has no {path}", hint=f"use SGLang {endpoint.span}")
        for name in names:
            span = endpoint.fields.get(name)
            if span is None or self._base not in span:
                raise ConfigError(
                    f"{path} of SGLang {self.version} has no field {name!r} and would ignore it",
                    hint=f"its fields: {', '.join(sorted(self._fields_of(endpoint))) or 'none'}"
                    if span is None
                    else f"SGLang {span} has it",
                )

    def _fields_of(self, endpoint: Endpoint) -> list[str]:
        return [name for name, span in endpoint.fields.items() if self._base in span]


def check_draft_model(name: str, algorithm: Any, fields: Container[str]) -> None:
    """Reject speculative decoding if weight updates cannot be kept from the draft model.

    Args:
        name: Of the release, for messages.
        algorithm: The server's ``speculative_algorithm``; None without one.
        fields: Of its ``/update_weights_from_tensor``.

    Raises:
        ConfigError: The draft model would open each payload again, and the trainer's memory would leak.
    """
    if algorithm is not None and not any(field in fields for field in TARGET_ONLY):
        raise ConfigError(
            f"speculative_algorithm={algorithm!r} cannot be used with {name}: the draft model would open every weight "
            "payload again, which leaks memory",
            hint=f"use SGLang {ENDPOINTS['/update_weights_from_tensor'].fields['disable_draft_model'].since} or newer",
        )


def release(version: str) -> Release:
    """Return the release that reports `version`.

    Raises:
        ConfigError: It is older than the oldest supported one, or not a version.
    """
    try:
        parsed = Version(version)
    except InvalidVersion as error:
        raise ConfigError(
            f"the server reports an invalid version: {version!r}", hint=f"use SGLang {OLDEST} or newer"
        ) from error
    if parsed < OLDEST:
        raise ConfigError(f"SGLang {version} is not supported", hint=f"use {OLDEST} or newer")
    return Release(version)


def other_spelling(name: str, known: Mapping[str, Any]) -> str | None:
    """Return the name of a renamed server argument in another release.

    Args:
        name: With underscores.
        known: Arguments of that release, with dashes.

    Returns:
        One name or several, for messages; None if `RENAMED` has none.
    """
    found: list[str] = []
    for old, new in RENAMED:
        plain = new.partition("=")[0]
        if name == old and plain.replace("_", "-") in known:
            found.append(new)
        elif name == plain and old.replace("_", "-") in known:
            found.append(old if new == plain else f"{old} (for {new})")
    return " or ".join(found) if found else None


__all__ = [
    "IGNORED_FIELDS",
    "ENDPOINTS",
    "EXACT_UNPICKLER",
    "HEALTH_RUNS_RELEASED",
    "OLDEST",
    "RENAMED",
    "SERVER_INFO",
    "TARGET_ONLY",
    "Endpoint",
    "Release",
    "Span",
    "check_draft_model",
    "other_spelling",
    "release",
]
