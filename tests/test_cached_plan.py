"""Which syncs may use the plan of an earlier one."""

from types import SimpleNamespace

import pytest
import torch

from tpcolocate.in_server.tpcolocate_receiver.regions import whole
from tpcolocate.weights.plan.sharding import LocalShard
from tpcolocate.weights.sync.mapping import STAGED, _places

pytestmark = pytest.mark.quick


def places(*, local, compute=None):
    shard = LocalShard(torch.Size([2, 3]), local, (whole((2, 3)),), 0, None, compute)
    return _places(SimpleNamespace(shards={"a": shard}), [STAGED])


def test_a_weight_that_is_computed_is_not_where_one_lies():
    """The plan of a plain model, used for a model with adapters, copied out of memory that is not there."""
    lies, computed = torch.zeros(2, 3), torch.empty(0)
    assert places(local=lies) == places(local=lies.clone()), "staged weights may move"
    assert places(local=lies) != places(local=computed, compute=lambda region, out=None: lies)
