"""Puts something else in the place of TRL's ``VLLMGeneration`` for a while."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

from tpcolocate.errors import ConfigError
from tpcolocate.trl.arguments import check_constructor

_HOME = "trl.generation.vllm_generation"
_CLASS = "VLLMGeneration"
_CHECK = "is_vllm_available"


def trl_release() -> str:
    """Return the version of the installed TRL.

    Raises:
        ConfigError: There is none.
    """
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ConfigError("TRL is not installed", hint="pip install 'trl>=1.8'") from None


@contextmanager
def replaced(generation: Callable[..., Any]) -> Iterator[None]:
    """Have TRL's trainers build `generation` instead of ``VLLMGeneration``, and not look for vLLM.

    Modules hold the class under their own names, and some trainers import it when they are built.  So it is replaced
    in every module of TRL that has it, and afterwards put back wherever the replacement has got to.

    Args:
        generation: Called with the keywords of ``VLLMGeneration``.

    Raises:
        ConfigError: No TRL, or a release with another ``VLLMGeneration``; the message names it.
    """
    release = trl_release()
    try:
        home = importlib.import_module(_HOME)
        original = getattr(home, _CLASS)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(
            f"TRL {release} has no {_HOME}.{_CLASS}: {error}", hint="pip install --upgrade 'trl>=1.8'"
        ) from error
    check_constructor(original.__init__, release=release)
    imports = importlib.import_module("trl.import_utils")
    is_available = getattr(imports, _CHECK)

    def is_vllm_available(*args: Any, **kwargs: Any) -> bool:
        # Only for who builds the class: others would go on to import vLLM.
        return _CLASS in sys._getframe(1).f_globals or is_available(*args, **kwargs)

    _exchange(_CLASS, original, generation)
    _exchange(_CHECK, is_available, is_vllm_available, but=home)
    try:
        yield
    finally:
        _exchange(_CHECK, is_vllm_available, is_available)
        _exchange(_CLASS, generation, original)


def _exchange(name: str, old: object, new: object, *, but: ModuleType | None = None) -> None:
    """Replace a global in every loaded module of TRL that has it."""
    for module_name, module in list(sys.modules.items()):
        # Read from the dict: attributes of TRL's packages import what they name.
        if module_name.partition(".")[0] == "trl" and module is not but and vars(module).get(name) is old:
            setattr(module, name, new)


__all__ = ["replaced", "trl_release"]
