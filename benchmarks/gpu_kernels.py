"""SGLang arguments for kernels that need no compiler on the machine; without imports, for scripts whose start is measured."""

from __future__ import annotations

from typing import Any

WITHOUT_COMPILER: dict[str, Any] = {
    "attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none", "disable_cuda_graph": True,
    "skip_server_warmup": True,
}  # fmt: skip

__all__ = ["WITHOUT_COMPILER"]
