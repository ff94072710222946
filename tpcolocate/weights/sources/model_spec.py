"""The names, shapes and dtypes that the served model expects, so that wrong ones are refused before they are sent.

SGLang answers 200 to an unknown name (with a warning in its log), to a projection with too few rows (padded with
zeros) and to one with too many (truncated): see /update_weights_from_tensor in releases 0.5.9 to 0.5.23.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open

from tpcolocate.errors import ConfigError, WeightsMismatchError, some
from tpcolocate.weights.sources.hf_names import to_checkpoint
from tpcolocate.weights.sources.rename_hint import is_of_larger_model, rename_hint

FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
"""Dtypes of weights; they are cast to each other as they are copied."""
_INCOMPLETE_HINT = "pass the whole model, or partial=True to leave the other weights as they are"
# In names of a PEFT model's state dict.  To leave these weights out would leave out what has been trained.
_OF_PEFT = re.compile(r"\.(lora_(embedding_)?[AB]|base_layer|modules_to_save)(\.|$)")
# In names of torch.nn.utils.parametrize.
_PARAMETRIZED = ".parametrizations."
# As safetensors names them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The contents of the served model's checkpoint.

    Attributes:
        shapes: Name -> full shape.
        origin: Where they were read, for messages.
        dtypes: Name -> dtype, as far as is known.
    """

    shapes: Mapping[str, tuple[int, ...]]
    origin: str
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def check(self, tensors: Iterable[tuple[str, torch.Size]], *, hint: bool = True) -> None:
        """Check names and shapes that are about to be sent.

        Args:
            tensors: Names and full shapes.
            hint: Whether the names are the source's own, so that the error may have the `rename` that mends them.

        Raises:
            WeightsMismatchError: An unknown name, or a wrong shape.
        """
        unknown, wrong = [], []
        tensors = list(tensors)
        for name, shape in tensors:
            expected = self.shapes.get(name)
            if expected is None:
                unknown.append(name)
            elif tuple(shape) != tuple(expected):
                wrong.append(f"{name} has shape {tuple(shape)}, the model expects {tuple(expected)}")
        if wrong:
            raise WeightsMismatchError(
                f"{some(wrong)} (according to {self.origin})",
                hint="pass launch() the checkpoint that the trainer's model was loaded from, saved again if its embedding was "
                "resized; SGLang would pad or truncate these without an error",
            )
        if unknown:
            rename = rename_hint([(name, tuple(shape)) for name, shape in tensors], self.shapes) if hint else None
            raise WeightsMismatchError(
                f"the served model has no {some(unknown)} (according to {self.origin})",
                hint=_hint_of(unknown, rename, self.shapes),
            )

    def check_dtypes(self, tensors: Iterable[tuple[str, torch.dtype]]) -> None:
        """Check dtypes that are about to be sent: `FLOATS` are cast to each other, and nothing else is.

        Args:
            tensors: Names that `check` has passed, and dtypes.

        Raises:
            WeightsMismatchError: A dtype that is another kind than the model's.
        """
        wrong = []
        for name, dtype in tensors:
            expected = self.dtypes.get(name)
            if expected is None:
                fits = not dtype.is_complex
            else:
                fits = dtype == expected or (dtype in FLOATS and expected in FLOATS)
            if not fits:
                wrong.append(f"{name} is {dtype}" + ("" if expected is None else f", the model expects {expected}"))
        if wrong:
            raise WeightsMismatchError(
                f"{some(wrong)} (according to {self.origin})",
                hint="send weights in float32, bfloat16, float16 or float64, and all else in the dtype of the checkpoint; "
                "SGLang would convert the numbers without an error",
            )

    def missing(self, names: Iterable[str], *, ignored: Collection[str] = ()) -> list[str]:
        """Return the names that are read from the checkpoint and are not among those given, sorted.

        What the checkpoint holds and what a full sync must bring are two things: files also hold what no loader reads.

        Args:
            names: That are sent.
            ignored: That the engine's loader reads nothing of, as far as is known; see `LoaderMap.ignored`.
        """
        return sorted(set(self.shapes).difference(names, ignored))

    def check_complete(
        self, names: Iterable[str], *, ignored: Collection[str] = (), hint: str = _INCOMPLETE_HINT
    ) -> None:
        """Check that no weight that the engine's loader reads is missing.

        Args:
            names, ignored: See `missing`.
            hint: Of the error.

        Raises:
            WeightsMismatchError: One is; the server would have new weights beside old ones.
        """
        missing = self.missing(names, ignored=ignored)
        if missing:
            self.refuse_incomplete(missing, hint=hint)

    def refuse_incomplete(self, missing: Sequence[str], *, hint: str = _INCOMPLETE_HINT) -> NoReturn:
        """Raise what `check_complete` raises."""
        raise WeightsMismatchError(f"weights are missing: {some(missing)} (according to {self.origin})", hint=hint)


def _hint_of(unknown: Sequence[str], rename: str | None, served: Iterable[str]) -> str:
    """Return what to do about names that the served model lacks.

    Args:
        unknown: The names.
        rename: The argument that mends them, if it can be seen.
        served: The names that it has.
    """
    if any(_OF_PEFT.search(name) for name in unknown):
        return (
            "these are PEFT's names: pass the PEFT model itself, whose adapters are merged on the way, or serve an adapter beside its "
            "base with set_lora() or set_lora_from_tensors()"
        )
    if rename is not None:
        return f"pass {rename}"
    if is_of_larger_model(unknown, served):
        return "the trainer's model has more layers, experts or biases: pass launch() the checkpoint that it was loaded from"
    if any(_PARAMETRIZED in name for name in unknown):
        return (
            "a parametrization computes these weights: pass pairs of what is computed, (name, layer.weight), or remove it with "
            "torch.nn.utils.parametrize.remove_parametrizations()"
        )
    return (
        "map your names to those of the served checkpoint with `rename` of sync_weights(), and what it lacks to None; SGLang "
        "would ignore unknown names without an error"
    )


def read_spec(model_path: str) -> ModelSpec | None:
    """Return the names and shapes that a served model expects; None if they cannot be found out.

    They come from the headers of the checkpoint's safetensors files (a folder, or a hub id in the local cache), else
    from the architecture in its config.json, built on the meta device with transformers.

    Args:
        model_path: As passed to SGLang.
    """
    folder = local_folder(model_path)
    if folder is None:
        return None
    files = safetensors_files(folder)
    if files:
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    header = tensors.get_slice(name)
                    shapes[name] = tuple(header.get_shape())
                    if (dtype := _DTYPES.get(header.get_dtype())) is not None:
                        dtypes[name] = dtype
        return ModelSpec(shapes, f"{len(files)} safetensors files in {folder}", dtypes)
    return _from_architecture(folder)


def check_not_quantised(model_path: str) -> None:
    """Check that a checkpoint's weights are not quantised: a sync would write plain values into quantised parameters.

    A hub id that is not in the local cache passes.

    Args:
        model_path: As passed to SGLang.

    Raises:
        ConfigError: Its config.json has a ``quantization_config`` (``compression_config`` in older ones), at the top or
            for the text model, or there is a ``hf_quant_config.json`` of ModelOpt.
    """
    folder = local_folder(model_path)
    if folder is None:
        return
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        config = {}
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    found = [
        f"{key} ({part[key].get('quant_method', 'no method') if isinstance(part[key], dict) else part[key]})"
        for part in parts
        if isinstance(part, dict)
        for key in ("quantization_config", "compression_config")
        if part.get(key)
    ]
    if (folder / "hf_quant_config.json").exists():
        found.append("hf_quant_config.json")
    if found:
        raise ConfigError(
            f"{folder} is a quantised checkpoint: it has {', '.join(found)}",
            hint="serve a checkpoint in the dtype that you train; a sync would write the trainer's values into quantised "
            "parameters",
        )


def local_folder(model_path: str) -> Path | None:
    """Return the folder of a checkpoint on this machine, or None."""
    if Path(model_path).is_dir():
        return Path(model_path)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(model_path, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def safetensors_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: those in its index if it has one, else all in the folder.

    Raises:
        ConfigError: The index is broken.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} cannot be read: {error!r}", hint="copy or write it again") from error


def _from_architecture(folder: Path) -> ModelSpec | None:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError):
        return None  # an architecture that transformers does not know; SGLang may
    weights: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        weights.setdefault(id(tensor), (name, tensor))
    served = to_checkpoint(model, list(weights.values()), is_served=lambda name: False)
    shapes = {name: tuple(item.shape) for name, item in served}
    dtypes = {name: item.dtype for name, item in served}
    return ModelSpec(shapes, f"the architecture {type(model).__name__} of {folder / 'config.json'}", dtypes)


__all__ = ["FLOATS", "ModelSpec", "check_not_quantised", "local_folder", "read_spec", "safetensors_files"]
