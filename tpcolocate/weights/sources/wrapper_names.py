"""Names without what torch's wrappers add to them."""

from __future__ import annotations

# Each puts a segment of its own into every name below it.
_WRAPPER_SEGMENTS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def without_wrappers(name: str) -> str:
    """The name of a weight, or the path of a module, in the model before it was wrapped."""
    name += "."  # a path may end with a wrapper
    for segment in _WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name.removesuffix(".")


__all__ = ["without_wrappers"]
