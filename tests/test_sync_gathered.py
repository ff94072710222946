"""Syncs of FSDP1 trainers to real receivers, without a server: bit for bit what torch's own full state dict has.

As in test_sync_transcript.py, but without golden transcripts: what the ranks do must be the same on all of them.
"""

import tempfile

import pytest
import torch
from harness import run_ranks
from sync_harness import Engine, World, divergences, faults, record_everything, serve_worker, stop_worker
from sync_models import Layer, Policy, policy, served_weights
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tpcolocate.weights.sources.fsdp1 import WARNING

pytestmark = pytest.mark.timeout(300)

LAYOUTS = {"tp=2": (2, 2), "two slices of 2": (4, 2)}
MOST = 4
CASES = {
    "units": {"use_orig_params": True},
    "flat": {"use_orig_params": False},
    "one unit": {"use_orig_params": True, "auto_wrap_policy": None},
    "not sharded": {"use_orig_params": True, "sharding_strategy": ShardingStrategy.NO_SHARD},
}


class Trainer:
    """An FSDP1 policy, trained on its shards, which are gradients of no loss.

    Args:
        how: It is wrapped.
    """

    def __init__(self, how):
        model = policy().requires_grad_(True)
        self.model = FSDP(
            model, **{"auto_wrap_policy": ModuleWrapPolicy({Layer}), **how}, device_id=torch.device("cpu")
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        rank = torch.distributed.get_rank() if self.model.sharding_strategy is not ShardingStrategy.NO_SHARD else 0
        self.generator = torch.Generator().manual_seed(rank)

    def train(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=self.generator)
        self.optimizer.step()
        self.full = self._full()  # now: after a sync that failed only some ranks ask for it

    def given(self):
        return self.model

    def expected(self):
        return self.full

    def _full(self):
        with FSDP.state_dict_type(self.model, StateDictType.FULL_STATE_DICT):
            full = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        plain = Policy()
        plain.load_state_dict(full)
        return {name: tensor.detach().clone() for name, tensor in served_weights(plain).items()}


def synced(world, how):
    engine, trainer = Engine(world), Trainer(how)
    found = []
    for number in range(3):
        trainer.train()
        found.append(engine.run(trainer, **({"bucket_bytes": 512} if number == 2 else {})))
    left = engine.left()
    engine.close()
    return found, left


def after_a_failure(world):
    """An error on one rank before the first gather, and a good sync after it."""
    engine, trainer = Engine(world), Trainer(CASES["units"])
    trainer.train()
    records = world.gather(engine.run(trainer).record)
    planned = [one for one in faults(records, world.gather(world.owner_rank), on_every_rank=False) if one.rank == 1]
    fault = next(one for one in planned if one.seam == "agreement" and one.number >= 2)
    trainer.train()
    failed = engine.run(trainer, fault=(fault.seam, fault.number) if world.rank == 1 else None)
    trainer.train()
    healed = engine.run(trainer)
    engine.close()
    return failed.error, healed.error, healed.differing


def on_a_rank(rank, folder):
    if rank >= MOST:
        return serve_worker(folder, rank - MOST)
    try:
        record_everything(folder)
        found = {}
        for layout, (size, tp_size) in LAYOUTS.items():
            if rank < size:
                world = World(rank, size, folder)
                world.cut(tp_size)
                found[layout] = {name: synced(world, how) for name, how in CASES.items()}
                if layout == "two slices of 2":
                    found["failure"] = after_a_failure(world)
                world.close()
        return found
    finally:
        stop_worker(folder, rank)


@pytest.fixture(scope="module")
def found():
    with tempfile.TemporaryDirectory(prefix="tpcs-") as folder:  # a socket's path must be short
        return run_ranks(on_a_rank, 2 * MOST, folder, init_group=False, timeout_s=200)[:MOST]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_syncs_with_a_step_in_between(found, layout, name):
    size, tp_size = LAYOUTS[layout]
    of_ranks = [of_rank[layout][name] for of_rank in found[:size]]
    for number, *syncs in zip(range(3), *(syncs for syncs, _ in of_ranks)):
        assert [(one.error, one.differing) for one in syncs] == [(None, [])] * size
        assert divergences(syncs, tp_size) == []
        is_warned = number == 0 and name != "not sharded"
        assert [WARNING in one.facts["warnings"] for one in syncs] == [is_warned] * size
        assert all(one.facts["mapped"] == [0] * tp_size for one in syncs)
    assert [left for _, left in of_ranks] == [[]] * size


def test_a_failure_on_one_rank_leaves_no_rank_in_a_gather(found):
    for failed, healed, differing in (of_rank["failure"] for of_rank in found):
        assert failed is None or "planted" in failed[1]
        assert (healed, differing) == (None, [])
    assert [of_rank["failure"][0] is not None for of_rank in found] == [True, True, False, False]
