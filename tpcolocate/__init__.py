"""Training ranks and a tensor-parallel SGLang server on the same GPUs."""
