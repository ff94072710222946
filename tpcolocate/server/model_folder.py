"""Whether a model path leads to what a server can load, asked before a server is started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tpcolocate.errors import ConfigError

# Of transformers, and of Mistral's own checkpoints.
_CONFIGURATIONS = ("config.json", "params.json")
# What transformers and SGLang look for in a folder.
_TOKENIZERS = ("*tokeniz*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.vocab", "spiece*", "tekken.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def check_model_path(model_path: str) -> None:
    """Check that a model path which can only be a folder is one, and that a folder has a model.

    Raises:
        ConfigError: There is no such folder, or none with a configuration.
    """
    path = Path(model_path)
    is_hub_id = not path.is_absolute() and model_path.count("/") <= 1 and not model_path.startswith(".")
    if model_path and path.is_dir() and not any((path / name).exists() for name in _CONFIGURATIONS):
        raise ConfigError(f"the folder {model_path!r} has no config.json", hint=_instead_of(path))
    if model_path and (path.exists() or "://" in model_path or is_hub_id):
        return
    raise ConfigError(
        f"there is no folder {model_path!r}" + ("" if path.is_absolute() else f" in {os.getcwd()}"),
        hint="launch() takes a checkpoint folder or a hub id (organisation/name)",
    )


def check_model_files(model_path: str, arguments: Mapping[str, Any]) -> None:
    """Check that a folder has the tokenizer and the weights that a server with these arguments loads.

    SGLang looks for the tokenizer last, once all TP ranks have loaded the weights.

    Raises:
        ConfigError: It has none.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        return

    def has(patterns: Iterable[str]) -> bool:
        return any(True for pattern in patterns for _ in folder.glob(pattern))

    reads_tokenizer = not arguments.get("skip_tokenizer_init") and arguments.get("tokenizer_path") is None
    if reads_tokenizer and not has(_TOKENIZERS) and not _names_a_tokenizer(folder):
        raise ConfigError(
            f"the folder {model_path!r} has no tokenizer",
            hint=f"tokenizer.save_pretrained({model_path!r}) saves it with the model; tokenizer_path=... names another folder, and "
            "with skip_tokenizer_init=True the server takes and gives tokens alone",
        )
    if arguments.get("load_format") in (None, "auto") and not has(_WEIGHTS):
        raise ConfigError(
            f"the folder {model_path!r} has no weights (none of {', '.join(_WEIGHTS)})",
            hint='pass the folder of a saved model, or load_format="dummy", which leaves all weights to the first sync',
        )


def _names_a_tokenizer(folder: Path) -> bool:
    """Return whether the configuration refers to a tokenizer of remote code, which may come from elsewhere."""
    try:
        return '"AutoTokenizer"' in (folder / "config.json").read_text(errors="replace")
    except OSError:
        return False


def _instead_of(folder: Path) -> str:
    """Return what to pass in place of a folder without a model."""
    if (folder / "adapter_config.json").exists():
        return "it is a PEFT adapter: launch its base model, with enable_lora=True, and pass the adapter to set_lora() or as lora_paths"
    if inside := [config.parent for config in folder.glob("*/config.json")]:
        newest = max(inside, key=lambda path: path.stat().st_mtime)
        return f"pass the folder of a model, such as {str(newest)!r}"
    return "pass a folder that save_pretrained() or save_weights() has written, or a hub id (organisation/name)"


__all__ = ["check_model_files", "check_model_path"]
