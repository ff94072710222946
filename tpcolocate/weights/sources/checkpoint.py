"""Checkpoints in the layout of Hugging Face, with the weight version in their headers."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tpcolocate.checks import check_path
from tpcolocate.errors import ConfigError
from tpcolocate.modes import usual_modes
from tpcolocate.processes import start_of
from tpcolocate.weights.buckets import split_into_buckets
from tpcolocate.weights.sources.lazy_tensor import Items, full_bytes, full_tensor
from tpcolocate.weights.sources.model_spec import safetensors_files
from tpcolocate.weights.sources.named_weights import NamedWeights, check_unique

VERSION_KEY = "weight_version"
_PARTIAL = ".partial"
_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
# The default of transformers' save_pretrained.
SHARD_BYTES = 5 * 2**30


class Checkpoint(Mapping[str, torch.Tensor]):
    """The weights in a folder of safetensors files, for `Engine.sync_weights`.

    The files are memory-mapped: a tensor takes no memory until it is copied.

    Args:
        folder: With ``model.safetensors``, or several files and ``model.safetensors.index.json``.

    Attributes:
        folder: The same.
        weight_version: As `Engine.save_weights` wrote it; None for a checkpoint from elsewhere.

    Raises:
        ConfigError: There are no safetensors files, one is missing or broken, or a name is in two of them.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = check_path("folder", folder)
        self.weight_version: str | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        files = safetensors_files(self.folder) if self.folder.is_dir() else []
        if not files:
            raise ConfigError(f"{folder} has no safetensors files", hint="pass the folder of a checkpoint")
        versions: set[str | None] = set()
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    versions.add((opened.metadata() or {}).get(VERSION_KEY))
                    for name in opened.keys():
                        if name in self._tensors:
                            raise ConfigError(f"{name} is in more than one file of {folder}", hint="write it again")
                        self._tensors[name] = opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file} cannot be read: {error}", hint="copy or write it again") from error
        if len(versions) > 1:
            raise ConfigError(
                f"the files of {folder} have different weight versions: {', '.join(sorted(map(str, versions)))}",
                hint="write it again",
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


def _partial_prefix(folder: Path) -> str:
    return f".{folder.name}.{os.uname().nodename}-"


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes of this host have written of a checkpoint that were killed before it was complete."""
    prefix = _partial_prefix(folder)
    for path in folder.parent.glob(f"{glob.escape(prefix)}*{_PARTIAL}"):
        pid = path.name.removeprefix(prefix).removesuffix(_PARTIAL)
        if pid == str(os.getpid()) or (pid.isdecimal() and start_of(int(pid)) is None):
            shutil.rmtree(path, ignore_errors=True)


def saved_version(model_path: str) -> str | None:
    """Return the version that `Engine.save_weights` wrote into a folder; None for any other model."""
    files = safetensors_files(Path(model_path)) if Path(model_path).is_dir() else []
    if not files:
        return None
    try:
        with safe_open(files[0], framework="pt") as opened:
            return (opened.metadata() or {}).get(VERSION_KEY)
    except (SafetensorError, OSError):
        return None  # SGLang reports what is wrong with it


class CheckpointWriter:
    """Writes one checkpoint, shard by shard; it gets its name only when it is complete.

    Args:
        folder: Must not exist, or be empty.
        weight_version: Written into the header of every file.
        num_shards: Number of files.
        like: Folder of the served model; its configuration and tokenizer are copied, so that the result can be served.

    Raises:
        ConfigError: The folder is not empty, or it is no folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, weight_version: str, num_shards: int, like: Path | None
    ) -> None:
        self.folder = Path(os.path.realpath(folder))  # the end of a link to an empty folder
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            problem = "exists and is not empty" if self.folder.is_dir() else "is not a folder"
            raise ConfigError(f"{folder} {problem}", hint="choose a new or empty folder for the checkpoint")
        self.weight_version = weight_version
        self._num_shards = num_shards
        self._file_of: dict[str, str] = {}
        self._num_bytes = 0
        self._num_written = 0
        self._like = like
        self._partial = self.folder.with_name(f"{_partial_prefix(self.folder)}{os.getpid()}{_PARTIAL}")
        _remove_abandoned(self.folder)
        self._partial.mkdir(parents=True)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next shard: full, contiguous tensors on the CPU that share no memory."""
        self._num_written += 1
        part = f"-{self._num_written:05d}-of-{self._num_shards:05d}" if self._num_shards > 1 else ""
        name = f"model{part}.safetensors"
        save_file(dict(tensors), self._partial / name, metadata={"format": "pt", VERSION_KEY: self.weight_version})
        self._file_of.update(dict.fromkeys(tensors, name))
        self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """Write the index, copy the served model's other files, and give the checkpoint its name."""
        if self._num_shards > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._file_of}
            (self._partial / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file in sorted(self._like.iterdir()) if self._like is not None else ():
            if file.is_file() and not file.name.endswith(_NOT_COPIED):
                shutil.copyfile(file, self._partial / file.name)
        if self.folder.exists():
            self.folder.rmdir()
        os.rename(self._partial, self.folder)

    def abandon(self) -> None:
        """Remove what was written, unless it is finished."""
        shutil.rmtree(self._partial, ignore_errors=True)


@usual_modes()
def save(weights: NamedWeights, writer: CheckpointWriter | None, *, shard_bytes: int = SHARD_BYTES) -> Exception | None:
    """Gather all weights, shard by shard, and write them on the rank that has a writer.

    Collective: over the meshes of the weights.  A rank that fails goes on gathering, so that the others do not wait for
    it, and returns its first error.
    """
    try:
        return _save(weights, writer, shard_bytes)
    except BaseException:  # an interrupt
        if writer is not None:
            writer.abandon()
        raise


def _save(weights: NamedWeights, writer: CheckpointWriter | None, shard_bytes: int) -> Exception | None:
    errors: list[Exception] = []
    for shard in _shards(weights, shard_bytes):
        tensors = {}
        for name, item in shard:
            with _collected(errors):
                full = full_tensor(item)
                if writer is not None and not errors:
                    # A copy in any case: tied weights share memory, which safetensors does not write.
                    tensors[name] = full.to("cpu", copy=True).contiguous()
        with _collected(errors):
            if writer is not None and not errors:
                writer.add(tensors)
    with _collected(errors):
        if writer is not None and not errors:
            writer.finish()
    if writer is not None and errors:
        writer.abandon()
    return errors[0] if errors else None


@contextmanager
def _collected(errors: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        errors.append(error)


def outline(items: Items) -> str:
    """Return what must be alike on all ranks that gather these weights together: their names, shapes and dtypes, in order.

    Raises:
        WeightsMismatchError: A name is given twice.
    """
    check_unique(name for name, _ in items)
    written = repr([(name, tuple(item.shape), item.dtype) for name, item in items])
    digest = hashlib.sha256(written.encode()).hexdigest()[:12]
    return f"{len(items)} tensors ({digest}: names, shapes and dtypes, in order)"


def count_shards(weights: NamedWeights, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Return the number of files that `save` writes."""
    return sum(1 for _ in _shards(weights, shard_bytes))


def _shards(weights: NamedWeights, shard_bytes: int) -> Iterator[Items]:
    return split_into_buckets(weights, shard_bytes, num_bytes=lambda named: full_bytes(named[1]))


__all__ = ["Checkpoint", "CheckpointWriter", "count_shards", "outline", "save", "saved_version"]
