"""Checkpoints that hold more than the engine's loader reads, on a real SGLang server."""

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file, save_file
from test_engine import ARGS, HEALTH_S, World, checked
from test_engine_calls import described, meet
from tiny_models import make_tiny_model

import tpcolocate
from tpcolocate import errors

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

STRAYS = ("model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.fc.weight")


def tied_model_with_strays(path):
    """A tied model as many fine-tunes store it: both names, a head that no loader reads, an old buffer."""
    folder = make_tiny_model(path, tie=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    tensors[STRAYS[0]] = torch.ones(4)
    tensors[STRAYS[1]] = torch.ones(4, 4)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def syncs(world):
    found = []
    for seed in range(3):
        world.perturb(seed)
        report = world.engine.sync_weights(world.model)
        found.append((report.ignored, report.num_tensors, world.generated() == world.expected()))
    return found


def missing_and_untied(world):
    """What is read stays required, and ties must agree; the engine goes on with the weights that it has."""
    found = []
    weights = dict(world.model.state_dict())
    part = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    apart = weights | {"lm_head.weight": weights["lm_head.weight"] + 1}
    for source in (part, apart):
        try:
            world.engine.sync_weights(source)
        except errors.WeightsMismatchError as error:
            found.append(error.message)
    return found, world.generated() == world.expected()


def before_the_first_sync(world):
    """The model as transformers has it can be saved and broadcast, and what is read stays required there, too."""
    folder = f"{world.model_dir}-saved"
    weights = list(world.model.named_parameters())
    refused = []
    sender = meet(world)
    for call in (
        lambda: world.engine.save_weights(dict(weights[1:]), folder=f"{folder}-refused"),
        lambda: world.engine.update_weights_from_distributed(**described(weights[1:])),
    ):
        try:
            call()
        except errors.WeightsMismatchError as error:
            refused.append((error.message, error.hint))
    world.engine.save_weights(world.model, folder=folder)
    world.perturb(50)
    sender.send(tensor for _, tensor in weights)
    world.engine.update_weights_from_distributed(**described(weights))
    sender.end()
    world.engine.destroy_weights_update_group()
    return (
        weights[0][0],
        refused,
        sorted(load_file(f"{folder}/model.safetensors")),
        world.generated() == world.expected(),
    )


def drive(rank, model_dir):
    with tpcolocate.init(2, device="cpu", timeout_s=60.0) as colo:
        world = World(rank, model_dir, colo)
        with colo.launch(model_dir, health_timeout_s=HEALTH_S, **ARGS) as world.engine:
            return checked(world, [before_the_first_sync, missing_and_untied, syncs])


def test_what_the_loader_does_not_read_is_neither_missed_nor_sent(tmp_path):
    for found in run_ranks(drive, 2, str(tied_model_with_strays(tmp_path / "model")), timeout_s=800):
        for value in found.values():
            if isinstance(value, Exception):
                raise value
        missing, refused, saved, is_new = found["before_the_first_sync"]
        assert [message.partition(" (")[0] for message, _ in refused] == [f"weights are missing: {missing}"] * 2
        assert ["partial=True" in hint for _, hint in refused] == [False, True]
        assert missing in saved and is_new and not set(STRAYS).intersection(saved)
        messages, is_as_before = found["missing_and_untied"]
        assert messages[0].startswith("weights are missing: model.norm.weight (")
        assert "lm_head.weight" in messages[1] and "model.embed_tokens.weight" in messages[1]
        assert is_as_before
        expected = tuple(sorted(("lm_head.weight", *STRAYS)))
        assert [(ignored, equal) for ignored, _, equal in found["syncs"]] == [(expected, True)] * 3
        assert len({num for _, num, _ in found["syncs"]}) == 1
