"""The main job on a real server of other SGLang releases than the one installed: the one before, and the oldest.

Each lies in a folder of its own inside the environment (see scripts/make_venv.py) and comes first on the server's path,
as a user would choose between two.  They run on the same torch, the oldest on transformers 4, which it pins.
"""

import copy
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import FORKED_SERVER
from footprint import Footprint, leftovers
from harness import run_ranks
from rollout_checks import LONG_ARGS, another_process_asks_while_the_engine_sleeps, follows, in_flight, outcome_of
from test_engine import (
    ARGS,
    HEALTH_S,
    World,
    checked,
    refused_weights,
    tokens_after_fsdp2_sync,
    tokens_after_plain_sync,
    tokens_before,
    trainer_logprobs,
    twenty_syncs,
)

import tpcolocate
from tpcolocate import errors

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Release:
    """Another release.

    Attributes:
        version: Of SGLang.
        keeps_cache: Whether a sync is refused while requests wait, as it cannot drop the cache then.
        arguments: That its server needs.
    """

    version: str
    keeps_cache: bool
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self):
        return Path(sys.prefix) / f"sglang-{self.version}"


RELEASES = (
    Release("0.5.20", keeps_cache=True),
    # transformers 4 does not read the tokenizers that transformers 5 has written.
    Release("0.5.9", keeps_cache=False, arguments={"skip_tokenizer_init": True}),
)
# The session, which it lacks, and its own field are what a sync needs to get right on it.
LACKS = {"enable_amd_monokernel": True}


def version(world):
    return world.engine.sglang_version


def sync_while_requests_wait(world):
    """From 0.5.10 on a release counts those that a sync retracts among the ones that run, and keeps the cache."""
    old = copy.deepcopy(world.model)
    world.perturb(8)
    request = in_flight(world)
    first = outcome_of(lambda: int(world.engine.sync_weights(world.model).weight_version))
    request.grow(16)
    found = {"first": first, "of old": follows(old, request.prompt, request.end())}
    world.colo._slice.all_gather(None, what="see all requests end")
    world.engine.sync_weights(world.model)
    return {**found, "equal": world.generated() == world.expected()}


CHECKS = (version, tokens_before, tokens_after_fsdp2_sync, trainer_logprobs, tokens_after_plain_sync, refused_weights,
          sync_while_requests_wait, another_process_asks_while_the_engine_sleeps, twenty_syncs)  # fmt: skip


def drive(rank, model_dir, release):
    with tpcolocate.init(2, device="cpu", timeout_s=60.0) as colo:
        arguments = {
            **ARGS,
            **LONG_ARGS,
            **release.arguments,
            "env": {"PYTHONPATH": f"{release.folder}{os.pathsep}{FORKED_SERVER}"},
            "health_timeout_s": HEALTH_S,
        }
        found = {}
        try:
            colo.launch(model_dir, **arguments, **LACKS)
        except errors.ConfigError as error:
            found["lacks"] = str(error)
        world = World(rank, model_dir, colo)
        with colo.launch(model_dir, **arguments) as world.engine:
            found |= checked(world, CHECKS)
        return found


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.version)
def release(request):
    return request.param


@pytest.fixture(scope="module")
def job(release, tiny_model_dir):
    """(what every rank found, what was left behind); one server of a release for all tests."""
    assert (release.folder / "sglang").is_dir(), f"{release.folder} is not there: make venv installs it"
    before = Footprint.now()
    found = run_ranks(drive, 2, str(tiny_model_dir(family="qwen3", tie=False)), release, timeout_s=1000)
    return found, leftovers(before)


def of(job, name):
    """What every rank found; raises what it raised."""
    for rank, found in enumerate(job[0]):
        value = found.get(name, AssertionError("not reached: see the checks before it"))
        if isinstance(value, Exception):
            raise AssertionError(f"rank {rank}: {type(value).__name__}: {value}") from value
    return [found[name] for found in job[0]]


def test_it_is_the_other_release(job, release):
    assert of(job, "version") == [release.version] * 2


def test_an_argument_that_it_lacks_is_refused_by_its_name_on_every_rank(job, release):
    messages = of(job, "lacks")
    assert (
        messages[0] == messages[1] and f"SGLang {release.version} has no argument enable_amd_monokernel" in messages[0]
    )


def test_tokens_equal_transformers_before_any_sync(job):
    assert all(of(job, "tokens_before"))


@pytest.mark.parametrize("check", ["tokens_after_fsdp2_sync", "tokens_after_plain_sync"])
def test_tokens_equal_transformers_after_a_sync(job, check):
    for found in of(job, check):
        assert found["changed"], "the sync must have something to show"
        assert found["equal"]


def test_the_version_is_published_and_every_handle_came_back(job):
    for found in of(job, "tokens_after_fsdp2_sync"):
        report = found["report"]
        assert report.weight_version == found["version"] == "1"
        assert all(r.num_exported == r.num_returned > 0 for r in report.ranks)
        assert report.unverified == ()


def test_log_probabilities_equal_the_trainers(job):
    assert max(figures["gap/max"] for figures in of(job, "trainer_logprobs")) < 1e-3


def test_weights_that_sglang_would_swallow_are_refused(job):
    for found in of(job, "refused_weights"):
        messages = found["messages"]
        assert "accepted" not in messages.values() and found["unchanged"]
        assert (
            messages["unknown_name"][0]
            == messages["too_few_rows"][0]
            == messages["missing"][0]
            == "WeightsMismatchError"
        )


def test_requests_from_elsewhere_wait_while_the_engine_sleeps(job):
    for found in of(job, "another_process_asks_while_the_engine_sleeps"):
        assert found == {"waited": [True] * 3, "of new": True, "equal": True}


def test_a_sync_while_requests_wait_is_refused_or_reaches_them(job, release):
    for found in of(job, "sync_while_requests_wait"):
        if release.keeps_cache:
            error, words = found["first"]
            assert error == "EngineStateError" and f"SGLang {release.version} keeps the cache of the old ones" in words
        else:
            assert found["first"] == "3", "the version"
        assert found["of old"] == release.keeps_cache and found["equal"]


def test_twenty_syncs_grow_nothing(job):
    for found in of(job, "twenty_syncs"):
        before, after = found["before"], found["after"]
        assert after["shm_files"] == before["shm_files"] and after["shm_bytes"] == before["shm_bytes"]
        assert after["fds"] <= before["fds"] + 2 and found["returned"]


def test_nothing_is_left_behind(job):
    assert job[1] == []
