"""The task of the demo: addition with one token per character, and a Qwen3 model that is partly trained for it.

The right continuation of ``12+34=`` is ``46`` and a newline; the reward is 1 for it and 0 for anything else.
The model is created and warm-started in well under a minute.  Label smoothing gives part of every character's
probability to wrong ones, so that sampled answers are right about one time in four and leave something to
improve.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END = "\n"
# 64 characters, so that every id the model can sample is one the tokenizer can spell.
ALPHABET = "0123456789+=" + END + " .-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV?"
SMOOTHING = 0.3
Problem = tuple[int, int]


@dataclass(frozen=True)
class Size:
    """A model and how it is warm-started.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, head_dim: Of the model.
        init: Standard deviation of its first weights.
        peak_lr: Learning rate after the first steps.
        max_steps: Of the warm start.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    init: float
    peak_lr: float
    max_steps: int


# 0.4 million parameters.  Three times the usual width of the first weights: at 0.02 the loss stays on a plateau for
# hundreds of steps.
TINY = Size(128, 384, 2, 4, 2, 32, init=0.06, peak_lr=2e-3, max_steps=600)
# 126 million, the layers of Qwen3-0.6B: for a GPU.
SMALL = Size(1024, 3072, 8, 16, 8, 128, init=0.02, peak_lr=5e-4, max_steps=3000)


def sample_problems(count: int, *, digits: int, generator: torch.Generator) -> list[Problem]:
    """Draw pairs of numbers of ``digits`` digits each, uniformly."""
    drawn = torch.randint(10 ** (digits - 1), 10**digits, (count, 2), generator=generator)
    return [(a, b) for a, b in drawn.tolist()]


def prompt_text(problem: Problem, *, shots: list[Problem]) -> str:
    """Return the prompt: solved problems, one per line, then the open one."""
    solved = "".join(f"{a}+{b}={a + b}{END}" for a, b in shots)
    return f"{solved}{problem[0]}+{problem[1]}="


def reward(problem: Problem, output_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> float:
    """Return 1.0 for the exact sum and an end, else 0.0."""
    ended = bool(output_ids) and output_ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(output_ids, skip_special_tokens=True)
    ended = ended or END in text
    return float(ended and text.split(END)[0].strip() == str(sum(problem)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one id per character of ``ALPHABET``; the newline ends a text."""
    core = Tokenizer(models.WordLevel({char: i for i, char in enumerate(ALPHABET)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    end = AddedToken(END, special=True, normalized=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end, unk_token="?")


def build_model(size: Size, *, eos_token_id: int) -> Qwen3ForCausalLM:
    """Build a random Qwen3, whose heads can be split for tp = 1 and 2."""
    config = Qwen3Config(
        vocab_size=len(ALPHABET),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=256,
        initializer_range=size.init,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def warm_start(folder: Path, *, seed: int, target: float, size: Size = TINY, device: str = "cpu") -> float:
    """Create the model and its tokenizer, train it until it is right part of the time, and save both.

    Args:
        folder: Where the Hugging Face checkpoint goes.
        target: Expected reward at temperature 1 at which to stop; label smoothing bounds it at about 0.3.
        size: Of the model.
        device: To train it on; in bfloat16 on a GPU.

    Returns:
        The expected reward that was reached, computed as the mean probability of the right answer.

    Raises:
        RuntimeError: ``size.max_steps`` did not bring the model half way to ``target``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(size, eos_token_id=tokenizer.eos_token_id).to(device)
    texts = [f"{a}+{b}={a + b}{END}".ljust(10, END) for a in range(10, 100) for b in range(10, 100)]
    ids = torch.tensor([[ALPHABET.index(char) for char in text] for text in texts], device=device)
    answers = ids[:, 6:].clone()
    padding = (answers == tokenizer.eos_token_id).cumsum(1) > 1
    answers[padding] = -100
    held_out = torch.randperm(len(ids), generator=generator)[:512]

    def logits(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            return model(input_ids=ids[rows, :-1], logits_to_keep=4).logits.float()

    optimizer = torch.optim.AdamW(model.parameters(), lr=size.peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    reached = 0.0
    with tqdm(total=size.max_steps, desc="warm start", unit="step", dynamic_ncols=True) as progress:
        for step in range(size.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = size.peak_lr * min(1.0, (step + 1) / 30)
            rows = torch.randint(0, len(ids), (128,), generator=generator)
            loss = F.cross_entropy(logits(rows).flatten(0, 1), answers[rows].flatten(), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update()
            if step % 20 == 19:
                with torch.no_grad():
                    surprise = F.cross_entropy(logits(held_out).transpose(1, 2), answers[held_out], reduction="none")
                reached = surprise.sum(1).neg().exp().mean().item()
                progress.set_postfix(reward=f"{reached:.2f}")
                if reached >= target:
                    break
    if reached < target / 2:
        raise RuntimeError(
            f"warm start reached an expected reward of {reached:.2f} only; try another --seed than {seed}"
        )
    # As checkpoints for GPUs are; the trainers load it in float32.
    model.to(torch.bfloat16 if device.startswith("cuda") else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return reached
