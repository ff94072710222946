"""How a stream of weights is cut into buckets, and the options of a sync."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcolocate import ipc_payload
from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sync.buckets import buckets
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.transport.bucket_sender import PAYLOADS, TRANSPORTS

pytestmark = pytest.mark.quick

streams = st.lists(
    # Not (0,), which is what FSDP1 and ZeRO-3 leave of a tensor, and refused.
    st.tuples(
        st.lists(st.integers(0, 12), max_size=3).filter(lambda shape: shape != [0]),
        st.sampled_from([torch.int8, torch.bfloat16, torch.float64]),
    ),
    max_size=25,
)


@given(streams, st.integers(1, 5000), st.booleans())
def test_nothing_is_lost_or_moved_and_buckets_keep_their_size(shapes, bucket_bytes, known):
    pairs = [(str(i), torch.zeros(shape, dtype=dtype)) for i, (shape, dtype) in enumerate(shapes)]
    cut = list(buckets(NamedWeights.of(pairs if known else iter(pairs)), bucket_bytes))
    assert [name for bucket in cut for name, _ in bucket] == [name for name, _ in pairs]
    for bucket in cut:
        entries, num_bytes = ipc_payload.layout([(name, tensor.shape, tensor.dtype) for name, tensor in bucket])
        assert bucket and (num_bytes <= bucket_bytes or len([e for e in entries if e.num_bytes]) == 1), (
            "only a single tensor may be larger"
        )
    for one, following in itertools.pairwise(cut):
        _, num_bytes = ipc_payload.layout([(name, tensor.shape, tensor.dtype) for name, tensor in [*one, following[0]]])
        assert num_bytes > bucket_bytes, "no bucket is closed early"


def test_no_weights_make_no_bucket():
    assert list(buckets(NamedWeights.of([]), 10)) == []


def test_a_generator_is_read_one_tensor_ahead_at_most():
    read = []

    def pairs():
        for i in range(6):
            read.append(i)
            yield str(i), torch.zeros(256, dtype=torch.uint8)

    stream = buckets(NamedWeights.of(pairs()), 512)
    assert [name for name, _ in next(stream)] == ["0", "1"] and read == [0, 1, 2]


@pytest.mark.parametrize("options, words", [
    ({"bucket_bytes": 0}, "bucket_bytes must be positive, got 0"),
    ({"bucket_bytes": -1}, "bucket_bytes must be positive, got -1"),
    ({"payloads": "each"}, "payloads='each' is unknown"),
    ({"transport": "disk"}, "transport='disk' is unknown"),
    ({"transport": "stock"}, "transport='stock' is unknown"),
])  # fmt: skip
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        SyncOptions(**options)


@pytest.mark.parametrize("payloads, transport", list(itertools.product(PAYLOADS, TRANSPORTS)))
def test_options_that_can_work(payloads, transport):
    options = SyncOptions(bucket_bytes=1, payloads=payloads, transport=transport)
    assert (options.payloads, options.transport) == (payloads, transport)


def test_a_mapping_that_is_changed_afterwards_is_another_option():
    names = {"first": "second"}
    before = SyncOptions(rename=names)
    assert before == SyncOptions(rename=dict(names))
    names["second"] = "first"
    assert before != SyncOptions(rename=names)
