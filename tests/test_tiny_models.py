"""The tiny models must be able to show a difference: between prompts, and between weights."""

import hashlib

import pytest
import torch
from tiny_models import VOCAB_SIZE, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.quick

PROMPTS = ("hello", "what is 12 plus 30?", "\N{SNOWMAN} bytes", "the quick brown fox jumps")
KINDS = [(family, tie) for family in ("qwen3", "llama") for tie in (True, False)]
KINDS += [("qwen3_moe", True), ("mixtral", False)]


def greedy_tokens(model, tokenizer, num_tokens=12):
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
        )
        rows.append(tuple(out[0, ids.shape[1] :].tolist()))
    return rows


def digest(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("family, tie", KINDS)
def test_greedy_tokens_tell_prompts_and_weights_apart(tmp_path, family, tie):
    first, second = (make_tiny_model(tmp_path / str(seed), family=family, tie=tie, seed=seed) for seed in (0, 1))
    tokenizer = AutoTokenizer.from_pretrained(first)
    model, other = AutoModelForCausalLM.from_pretrained(first), AutoModelForCausalLM.from_pretrained(second)
    assert next(model.parameters()).dtype == torch.float32
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tie

    rows = greedy_tokens(model, tokenizer)
    assert len(set(rows)) == len(PROMPTS)
    assert len({token for row in rows for token in row}) >= 24, f"repeats itself: {rows}"  # of 48
    assert all(mine != theirs for mine, theirs in zip(rows, greedy_tokens(other, tokenizer), strict=True))

    # A small change must show as well: a training step is one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    assert sum(mine != changed for mine, changed in zip(rows, greedy_tokens(model, tokenizer), strict=True)) >= 3


def test_the_same_arguments_write_the_same_files_and_leave_the_generator_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = make_tiny_model(tmp_path / "a", seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert digest(first) == digest(make_tiny_model(tmp_path / "b", seed=3))
    assert (first / "model.safetensors").is_file()


def test_every_id_is_a_token_and_text_survives(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path))
    assert len(tokenizer) == VOCAB_SIZE == len(set(tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE))))
    for text in PROMPTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
