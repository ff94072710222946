"""Random models small enough to be served on a CPU, with tokenizers, made without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

VOCAB_SIZE = 512
MAX_POSITIONS = 16384
PAD, EOS = "<|pad|>", "<|eos|>"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    # Ten times the usual.  At 0.02 the layers hardly change the residual stream: whatever the prompt and the weights,
    # greedy decoding repeats the last token, and a test that compares tokens would not detect a sync that did nothing.
    # Decoding can still run into a cycle, and does after a prompt that is one token repeated.
    "initializer_range": 0.2,
    "dtype": "float32",
}
# For the families with experts.  Neither 5 experts nor their router can be cut into equal shards.
_NUM_EXPERTS = 5
_MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": _NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": _NUM_EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 64},
}


def make_tiny_model(
    path: str | Path,
    *,
    family: Literal["qwen3", "llama", "qwen3_moe", "mixtral"] = "qwen3",
    tie: bool = False,
    seed: int = 0,
    kv_heads: int = _SHAPE["num_key_value_heads"],
    vocab_size: int = VOCAB_SIZE,
) -> Path:
    """Write a random float32 model (safetensors) and a byte-level BPE tokenizer to a folder.

    The same arguments give the same weights; torch's global generator is not changed.

    Args:
        path: The folder; created if it does not exist.
        family: Architecture.
        tie: Whether the output layer shares the embedding.
        seed: Seed of the weights.
        kv_heads: Number of key-value heads; the server's tp_size must divide it.
        vocab_size: Vocabulary size of model and tokenizer.

    Returns:
        The folder.
    """
    import torch
    import transformers

    path = Path(path)
    prefix = {"qwen3": "Qwen3", "llama": "Llama", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"}[family]
    tokenizer = _make_tokenizer(vocab_size)
    config = getattr(transformers, f"{prefix}Config")(
        **{**_SHAPE, **_MOE.get(family, {}), "num_key_value_heads": kv_heads, "vocab_size": vocab_size},
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        # Norms are initialised to ones: a sync that skips one, or takes one for another, would not be detected.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _make_tokenizer(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Enough different numbers for more merges than the vocabulary can hold: every id of the model is a token.
    sentences = (f"what is {n} plus {n * 7 % 1000}? it is {n + n * 7 % 1000}." for n in range(1000))
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=MAX_POSITIONS
    )
