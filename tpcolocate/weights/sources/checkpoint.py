"""Checkpoints as Hugging Face lays them out, with the weight version in their headers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.lazy_tensor import full_tensor
from tpcolocate.weights.sources.model_spec import safetensors_files
from tpcolocate.weights.sources.named_weights import Weights
from tpcolocate.weights.sync.run import buckets

VERSION_KEY = "weight_version"
_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
# As transformers' save_pretrained cuts them.
SHARD_BYTES = 5 * 2**30


class Checkpoint(Mapping[str, torch.Tensor]):
    """The weights of a folder of safetensors files, to be handed to `Engine.sync_weights`.

    Tensors are mapped from the files, not read: what is not copied costs no memory of the process.

    Args:
        folder: With ``model.safetensors``, or several files and ``model.safetensors.index.json``.

    Attributes:
        folder: The same.
        weight_version: As `Engine.save_weights` wrote it; None if the folder was written by something else.

    Raises:
        ConfigError: No safetensors files, one that is missing or broken, or a name that is in two of them.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.weight_version: str | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        files = safetensors_files(self.folder) if self.folder.is_dir() else []
        if not files:
            raise ConfigError(f"{folder} holds no safetensors files", hint="pass the folder of a checkpoint")
        versions: set[str | None] = set()
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    versions.add((opened.metadata() or {}).get(VERSION_KEY))
                    for name in opened.keys():
                        if name in self._tensors:
                            raise ConfigError(f"{name} is in more than one file of {folder}", hint="write it anew")
                        self._tensors[name] = opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file} cannot be read: {error}", hint="copy or write it anew") from error
        if len(versions) > 1:
            raise ConfigError(
                f"the files of {folder} are of different weight versions: {', '.join(sorted(map(str, versions)))}",
                hint="write it anew",
            )
        [self.weight_version] = versions

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {len(self)} tensors, weight_version={self.weight_version!r})"


def saved_version(model_path: str) -> str | None:
    """The version that `Engine.save_weights` wrote into a folder; None for any other model."""
    files = safetensors_files(Path(model_path)) if Path(model_path).is_dir() else []
    if not files:
        return None
    try:
        with safe_open(files[0], framework="pt") as opened:
            return (opened.metadata() or {}).get(VERSION_KEY)
    except (SafetensorError, OSError):
        return None  # SGLang will say what is wrong with it


class CheckpointWriter:
    """Writes one checkpoint, shard by shard, and lets it appear under its name only when it is complete.

    Args:
        folder: Must not exist, or be empty.
        weight_version: Written into the header of every file.
        num_shards: How many files there will be.
        like: Folder of the served model; its configuration and tokenizer are copied, so that the result can be served.

    Raises:
        ConfigError: Something is in the folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, weight_version: str, num_shards: int, like: Path | None
    ) -> None:
        self.folder = Path(os.path.abspath(folder))
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(
                f"{folder} exists and is not empty", hint="a checkpoint is written into a folder of its own"
            )
        self.weight_version = weight_version
        self._num_shards = num_shards
        self._places: dict[str, str] = {}
        self._num_bytes = 0
        self._written = 0
        self._like = like
        self._partial = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        self._partial.mkdir(parents=True)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next shard: full, contiguous tensors on the CPU, no two in one memory."""
        self._written += 1
        name = (
            "model.safetensors"
            if self._num_shards == 1
            else f"model-{self._written:05d}-of-{self._num_shards:05d}.safetensors"
        )
        save_file(dict(tensors), self._partial / name, metadata={"format": "pt", VERSION_KEY: self.weight_version})
        self._places.update(dict.fromkeys(tensors, name))
        self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """The index, what else a served model needs, and the name."""
        if self._num_shards > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._places}
            (self._partial / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file in sorted(self._like.iterdir()) if self._like is not None else ():
            if file.is_file() and not file.name.endswith(_NOT_COPIED):
                shutil.copyfile(file, self._partial / file.name)
        if self.folder.exists():
            self.folder.rmdir()
        os.rename(self._partial, self.folder)

    def abandon(self) -> None:
        """Remove what was written; nothing after `finish`."""
        shutil.rmtree(self._partial, ignore_errors=True)


def save(weights: Weights, writer: CheckpointWriter | None, *, shard_bytes: int = SHARD_BYTES) -> BaseException | None:
    """Gather all weights, shard by shard, and write them on the rank that has a writer.

    Collective: over the meshes of the weights.  A rank that cannot write goes on gathering, so that the others do not
    wait for it; what stopped it is returned.
    """
    problem: BaseException | None = None
    for shard in buckets(weights, shard_bytes):
        tensors = {}
        for name, tensor in shard:
            full = full_tensor(tensor)
            if writer is not None and problem is None:
                # A copy in any case: tied weights share memory, which safetensors does not write.
                tensors[name] = full.to("cpu", copy=True).contiguous()
        if writer is not None and problem is None:
            try:
                writer.add(tensors)
            except Exception as error:
                problem = error
    if writer is not None and problem is None:
        try:
            writer.finish()
        except Exception as error:
            problem = error
    if writer is not None and problem is not None:
        writer.abandon()
    return problem


def count_shards(weights: Weights, *, shard_bytes: int = SHARD_BYTES) -> int:
    return sum(1 for _ in buckets(weights, shard_bytes))


__all__ = ["Checkpoint", "CheckpointWriter", "count_shards", "save", "saved_version"]
