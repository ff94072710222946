"""A real server that is killed, idle, under requests and in a sync, and another one in its place."""

import os
import signal

import pytest
import torch
from footprint import Footprint, leftovers
from harness import run_ranks
from rollout_checks import InFlight, generates_as, outcome_of
from test_engine import HEALTH_S, World, checked
from test_engine_calls import ARGS, adapted, merged

import tpcolocate
from tpcolocate import errors
from tpcolocate.weights.sync import pipeline

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

# Functions of the pipeline before which the server is killed.  Each costs the start of a server: by default there is one.
PHASES = [phase for phase in os.environ.get("TPCOLOCATE_TEST_PHASES", "transfer").split(",") if phase]


def kill(world):
    """End the server's main process, on the owner, without a warning."""
    if world.colo.is_owner:
        os.kill(world.engine._context.owned.process.pid, signal.SIGKILL)


def works(world):
    """Whether the engine has the trainer's weights and its adapter; and what changes from server to server."""
    engine = world.engine
    urls = world.colo._slice.all_gather((engine.url, engine.api_key, engine.weight_version), what="compare URLs")
    equal = world.generated() == world.expected()
    adapter = generates_as(world, merged(world.adapter), "first")
    engine.pause_generation()
    engine.continue_generation()
    return {"equal": equal, "adapter": adapter, "same": len(set(urls)) == 1, "of": urls[0]}


def at_first(world):
    world.adapter = adapted(world.model, 1)
    world.engine.set_lora("first", world.adapter)
    world.engine.sync_weights(world.model)
    return works(world)


def step(world, seed):
    """The trainer's weights change, and so does what its adapter makes of them."""
    world.perturb(seed)
    with torch.no_grad():
        for name, parameter in world.model.named_parameters():
            inner = world.adapter.base_model.model.get_parameter(place_of(world.adapter, name))
            inner.copy_(parameter)


def place_of(adapter, name):
    module, _, kind = name.rpartition(".")
    inside = adapter.base_model.model.get_submodule(module)
    return f"{module}.base_layer.{kind}" if hasattr(inside, "base_layer") else name


def killed_while_idle(world):
    """The next sync finds it dead, and restarts it by itself."""
    step(world, 1)
    world.colo._slice.all_gather(None, what="see the engine idle")
    kill(world)
    dead = outcome_of(lambda: world.engine.generate([1], timeout_s=60))
    report = world.engine.sync_weights(world.model)
    return {"dead": dead[0], "verified": report.num_verified == report.num_tensors, **works(world)}


def killed_under_requests(world):
    request = InFlight(world)
    request.start()
    request.grow(4)
    world.colo._slice.all_gather(None, what="see both requests run")
    kill(world)
    request.join(60)
    refused = outcome_of(lambda: world.engine.flush_cache())
    world.engine.restart()
    unsynced = outcome_of(world.generated)
    step(world, 2)
    world.engine.sync_weights(world.model)
    return {"error": type(request.error).__name__, "refused": refused[0], "unsynced": unsynced[1], **works(world)}


def killed_in_a_sync(world):
    found = {}
    for phase in PHASES:
        original = getattr(pipeline, phase)

        def then_kill(*args, original=original, **kwargs):
            kill(world)
            return original(*args, **kwargs)

        step(world, 3)
        world.engine._sync.state.clear_cache()
        setattr(pipeline, phase, then_kill)
        try:
            error = outcome_of(lambda: world.engine.sync_weights(world.model, timeout_s=120))
        finally:
            setattr(pipeline, phase, original)
        step(world, 4)
        world.engine.restart(world.model)
        found[phase] = {"error": error[0], **works(world)}
    return found


def restarted_alive(world):
    world.engine.restart(world.model)
    return works(world)


CHECKS = [at_first, killed_while_idle, killed_under_requests, killed_in_a_sync]
if "TPCOLOCATE_TEST_PHASES" in os.environ:
    CHECKS.append(restarted_alive)


def drive(rank, model_dir):
    with tpcolocate.init(2, device="cpu", timeout_s=60.0) as colo:
        world = World(rank, model_dir, colo)
        with colo.launch(model_dir, health_timeout_s=HEALTH_S, restart=1, **ARGS) as world.engine:
            return checked(world, CHECKS)


@pytest.fixture(scope="module")
def ran(tiny_model_dir):
    before = Footprint.now()
    found = run_ranks(drive, 2, str(tiny_model_dir(family="qwen3", tie=True)), timeout_s=900)
    return found, leftovers(before)


def results(ran, check):
    for rank, of_rank in enumerate(ran[0]):
        value = of_rank.get(check.__name__, AssertionError("not reached: see the checks before it"))
        if isinstance(value, Exception):
            raise AssertionError(f"rank {rank}: {type(value).__name__}: {value}") from value
    return [of_rank[check.__name__] for of_rank in ran[0]]


def is_as_before(found, version):
    assert found["equal"] and found["adapter"] and found["same"], found
    assert found["of"][2] == version
    return found["of"][:2]


def test_a_server_that_was_killed_while_idle_is_restarted_by_the_next_sync(ran):
    for first, found in zip(results(ran, at_first), results(ran, killed_while_idle)):
        assert found["dead"] == "EngineDeadError" and found["verified"]
        before, after = is_as_before(first, "1"), is_as_before(found, "2")
        assert not set(before) & set(after), "another URL and another key"


def test_a_server_that_was_killed_under_requests_is_restarted_on_request(ran):
    for found in results(ran, killed_under_requests):
        assert found["error"] == found["refused"] == "EngineDeadError", found
        assert "no full sync has brought the trainer's weights" in found["unsynced"]
        is_as_before(found, "3")


def test_a_server_that_was_killed_in_a_sync_is_restarted_with_a_full_sync(ran):
    for of_rank in results(ran, killed_in_a_sync):
        for number, (phase, found) in enumerate(of_rank.items()):
            assert issubclass(getattr(errors, found["error"]), errors.EngineError), (phase, found)
            is_as_before(found, found["of"][2])
            assert int(found["of"][2]) > 3 + number, "versions go on"


def test_nothing_is_left_behind(ran):
    assert ran[1] == []
