"""What differs between SGLang releases, as one table.

Keyed by the version that the running server reports, never by what is installed beside the trainer.  Every entry is
checked against the source of the releases themselves by ``tests/contracts``, in both directions: what the table says
is there must be there, and what it says is not must not.

SGLang drops a field that it does not know without a word.  So nothing is sent before `Release.check` has let it
through, and what a release lacks is an error that names the release.
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
    """Releases that have something.

    Attributes:
        since: The first one.
        until: The first one without it again; None: still there.
    """

    since: str = str(OLDEST)
    until: str | None = None

    def __contains__(self, version: Version) -> bool:
        return version >= Version(self.since) and (self.until is None or version < Version(self.until))

    def __str__(self) -> str:
        return f"{self.since} and newer" if self.until is None else f"{self.since} up to before {self.until}"


_EVER = Span()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint that takes JSON.

    Attributes:
        request: Its structure in SGLang's ``managers/io_struct.py``; None: it takes query parameters only.
        fields: Of the body, or of the query.
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
"""What is posted, with all that the releases take.  ``/generate`` is not here: its fields are many, and a running
server describes them itself."""

TARGET_ONLY: Mapping[str, Any] = {"selector": "target", "disable_draft_model": True}
"""Fields that keep a weight update from a draft model; no release has both."""

EXACT_UNPICKLER = Span("0.5.21")
"""Payloads may name only listed (module, name) pairs.  Before, whole modules were allowed, and their names with them.
What we send passes both."""

HEALTH_RUNS_RELEASED = Span("0.5.10")
"""``/health`` runs a forward even while memory is released, and dies of it.  0.5.9 answered without one.  So no
release is asked for its health while it sleeps."""

SERVER_INFO = (
    "version", "weight_version", "enable_memory_saver", "enable_weights_cpu_backup", "speculative_algorithm", "enable_lora",
    "max_lora_rank", "lora_target_modules", "max_loaded_loras", "lora_paths",
)  # fmt: skip
"""Keys of ``/server_info`` that may decide what is asked of a server."""

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
"""Server arguments that changed their name: (old, new), as SGLang's own deprecation warnings pair them."""


@dataclass(frozen=True, slots=True)
class Release:
    """One row of the table: what the server that reports `version` takes.

    Attributes:
        version: As the server reports it.
    """

    version: str

    @property
    def _base(self) -> Version:
        # a development build of a release already behaves as that release
        return Version(Version(self.version).base_version)

    def has(self, path: str, name: str | None = None) -> bool:
        """Whether the release has an endpoint of `ENDPOINTS`, and if `name` is given, that field of it."""
        endpoint = ENDPOINTS[path]
        here = self._base in endpoint.span
        return here if name is None else here and name in endpoint.fields and self._base in endpoint.fields[name]

    @property
    def weight_session(self) -> bool:
        """Weights must be sent between ``/begin_weight_update`` and ``/end_weight_update``."""
        return self.has("/begin_weight_update")

    @property
    def lora_payload_per_rank(self) -> bool:
        """``/load_lora_adapter_from_tensors`` takes one payload per TP rank; otherwise one that all ranks read."""
        return self.has("/load_lora_adapter_from_tensors", "serialized_named_tensors")

    def target_only(self, path: str = "/update_weights_from_tensor") -> Mapping[str, Any]:
        """Fields that keep a weight update from a draft model, whose runner would open each payload a second time.

        Empty where the release knows no way to do that.
        """
        return {name: value for name, value in TARGET_ONLY.items() if self.has(path, name)}

    def check(self, path: str, names: Mapping[str, Any]) -> None:
        """Lets a request through that this release carries out in full.  Paths outside the table pass.

        Args:
            path: As posted.
            names: Fields of the body and of the query.

        Raises:
            ConfigError: The release lacks the endpoint or a field, and would drop it without a word.
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
                    hint=f"it takes {', '.join(sorted(self._fields_of(endpoint))) or 'nothing'}"
                    if span is None
                    else f"SGLang {span} has it",
                )

    def _fields_of(self, endpoint: Endpoint) -> list[str]:
        return [name for name, span in endpoint.fields.items() if self._base in span]


def check_draft_model(name: str, algorithm: Any, fields: Container[str]) -> None:
    """Refuses speculative decoding where a weight update cannot be kept from the draft model.

    Args:
        name: Of the release, for people.
        algorithm: The server's ``speculative_algorithm``; None without one.
        fields: What its ``/update_weights_from_tensor`` takes.

    Raises:
        ConfigError: The draft model would open each payload a second time, and the trainer's memory would leak.
    """
    if algorithm is not None and not any(field in fields for field in TARGET_ONLY):
        raise ConfigError(
            f"speculative_algorithm={algorithm!r} cannot be used with {name}: the draft model would open every weight "
            "payload a second time",
            hint=f"use SGLang {ENDPOINTS['/update_weights_from_tensor'].fields['disable_draft_model'].since} or newer",
        )


def release(version: str) -> Release:
    """The row of the release that reports `version`.

    Raises:
        ConfigError: Older than the oldest supported one, or no version at all.
    """
    try:
        parsed = Version(version)
    except InvalidVersion as error:
        raise ConfigError(
            f"the server reports version {version!r}, which is no version", hint=f"use SGLang {OLDEST} or newer"
        ) from error
    if parsed < OLDEST:
        raise ConfigError(f"SGLang {version} is not supported", hint=f"use {OLDEST} or newer")
    return Release(version)


def other_spelling(name: str, known: Mapping[str, Any]) -> str | None:
    """How a server argument is spelled where `known` (with dashes) are the ones that exist.

    Returns:
        For people: one spelling or several, None if there is none in `RENAMED`.
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
