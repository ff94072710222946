"""Tp order and owner of a slice, from tables; that TP ranks run on the devices of their training ranks, as a property."""

import json
import pickle
from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcolocate.devices import Inventory, PhysicalDevice, resolve, server_environment
from tpcolocate.errors import DeviceError, LayoutError
from tpcolocate.roles import RankDevice, Roles, assign, check_exclusive, same_device

pytestmark = pytest.mark.quick

A = "GPU-8f2a1c00-0000-0000-0000-00000000000a"
B = "GPU-8f2b1c00-0000-0000-0000-00000000000b"
C = "GPU-00c1aaaa-0000-0000-0000-00000000000c"
D = "GPU-fd000000-0000-0000-0000-00000000000d"
MIG_1 = "MIG-11111111-2222-3333-4444-555555555501"
MIG_2 = "MIG-12111111-2222-3333-4444-555555555502"
HOST = Inventory(uuids=(A, B, C, D), names=("H100",) * 4)
UNLIKE = Inventory(uuids=(A, B, C, D), names=("H100", "H100", "T4", "T4"))
CVD = "CUDA_VISIBLE_DEVICES"


def integer(index, uuid=None):
    return PhysicalDevice(str(index), index, uuid)


def uuid(token, index=None, full=None):
    return PhysicalDevice(token, index, full)


def members(used, host="h"):
    """{rank: device or None} on one host."""
    return [RankDevice(rank, host, device) for rank, device in used.items()]


def listed(text, ranks, inventory=None):
    """Ranks that share one CUDA_VISIBLE_DEVICES and index it by LOCAL_RANK."""
    return {rank: resolve(local, {CVD: text}, inventory=inventory) for local, rank in enumerate(ranks)}


def some(used, *ranks):
    return {rank: used[rank] for rank in ranks}


def own(texts, inventory=None):
    """One entry per rank: every rank is device 0 of its own list."""
    return {rank: resolve(0, {CVD: text}, inventory=inventory) for rank, text in texts.items()}


@pytest.mark.parametrize(
    "used, owner, tokens",
    [
        pytest.param(listed("0", [0]), 0, ("0",), id="tp1"),
        pytest.param(listed("0,1", [0, 1]), 0, ("0", "1"), id="in-order"),
        pytest.param(listed("3,1", [0, 1]), 1, ("3", "1"), id="3,1"),
        pytest.param(listed("6,4,5,7", [0, 1, 2, 3]), 1, ("6", "4", "5", "7"), id="6,4,5,7"),
        pytest.param(some(listed("6,4,5,7", [0, 1, 2, 3]), 0, 1), 1, ("6", "4"), id="6,4,5,7-first-slice"),
        pytest.param(some(listed("6,4,5,7", [0, 1, 2, 3]), 2, 3), 2, ("5", "7"), id="6,4,5,7-second-slice"),
        pytest.param(own({4: "3", 5: "1"}), 5, ("3", "1"), id="one-entry-per-rank"),
        pytest.param(own({0: "10", 1: "9"}), 1, ("10", "9"), id="numbers-not-strings"),
        pytest.param(listed("1,0", [0, 1], HOST), 1, ("1", "0"), id="integers-stay-integers"),
        pytest.param(listed(f"{D},{A}", [0, 1], HOST), 1, (D, A), id="uuids-by-inventory"),
        pytest.param(listed(f"{C},{B}", [0, 1], HOST), 1, (C, B), id="inventory-beats-text"),
        pytest.param(listed(f"{C},{B}", [0, 1], UNLIKE), 1, (C, B), id="uuids-on-unlike-gpus"),
        pytest.param(listed(f"{C},{B}", [0, 1]), 0, (C, B), id="uuids-by-text"),
        pytest.param(listed("GPU-fd,GPU-8f2b", [0, 1], HOST), 1, (D, B), id="abbreviations-come-out-in-full"),
        pytest.param(listed("GPU-fd,GPU-8f2b", [0, 1]), 1, ("GPU-fd", "GPU-8f2b"), id="abbreviations-unplaced"),
        pytest.param(own({0: D, 1: "GPU-8f2b"}), 1, (D, "GPU-8f2b"), id="abbreviated-and-full-unplaced"),
        pytest.param(own({0: D, 1: "0"}, HOST), 1, (D, A), id="mixed-forms-with-inventory"),
        pytest.param(own({0: MIG_2, 1: MIG_1}), 1, (MIG_2, MIG_1), id="mig"),
        pytest.param(
            own({0: MIG_1, 1: MIG_2}, Inventory((A, B), mig_uuids=((MIG_2,), (MIG_1,)))),
            1,
            (MIG_1, MIG_2),
            id="mig-by-inventory",
        ),
        pytest.param(
            own({0: MIG_2, 1: MIG_1}, Inventory((A,), mig_uuids=((MIG_1, MIG_2),))),
            1,
            (MIG_2, MIG_1),
            id="mig-of-one-gpu",
        ),
        pytest.param({0: None}, 0, (), id="cpu-tp1"),
        pytest.param({3: None, 2: None}, 2, (), id="cpu"),
    ],
)
def test_assign(used, owner, tokens):
    ranks = tuple(sorted(used))
    assert assign(members(used)) == Roles(ranks=ranks, owner_rank=owner, visible_devices=tokens, shared=False)


@pytest.mark.parametrize(
    "used, token",
    [
        pytest.param({1: integer(0), 0: integer(0)}, "0", id="integers"),
        pytest.param({0: uuid("GPU-8f2a", 0, A), 1: uuid(A, 0, A)}, A, id="abbreviation"),
        pytest.param({0: uuid("GPU-8f2a"), 1: uuid(A, None, A)}, "GPU-8f2a", id="abbreviation-unplaced"),
        pytest.param({0: integer(2, C), 1: uuid(C, 2, C), 5: uuid(C, 2, C)}, "2", id="mixed-forms"),
    ],
)
def test_assign_on_one_shared_device(used, token):
    ranks = tuple(sorted(used))
    roles = assign(members(used), allow_shared_devices=True)
    assert roles == Roles(ranks=ranks, owner_rank=ranks[0], visible_devices=(token,), shared=True)


@pytest.mark.parametrize(
    "used, shared",
    [
        pytest.param(listed("3,1", [0, 1]), False, id="distinct-devices"),
        pytest.param({0: None, 1: None}, False, id="cpu"),
        pytest.param({0: integer(0)}, False, id="tp1"),
    ],
)
def test_allowing_shared_devices_changes_nothing_if_none_is_shared(used, shared):
    assert assign(members(used), allow_shared_devices=True) == assign(members(used))
    assert assign(members(used), allow_shared_devices=True).shared is shared


@pytest.mark.parametrize(
    "used, allow, words",
    [
        pytest.param({0: integer(1), 1: None}, False, ("mix CPU and GPU", "on the CPU 1", "GPUs 0"), id="cpu-and-gpu"),
        pytest.param({4: integer(1), 7: integer(1)}, False, ("'1'", "rank 4", "rank 7", "'h'"), id="used-twice"),
        pytest.param(
            {0: uuid("GPU-8f2a"), 1: uuid(A, None, A)}, False, ("GPU-8f2a", "rank 0", "rank 1"), id="abbreviated"
        ),
        pytest.param({0: integer(0, A), 1: uuid(A, 0, A)}, False, ("rank 0", "rank 1"), id="used-twice-mixed-forms"),
        pytest.param(
            {0: integer(0), 1: integer(0), 2: integer(1), 3: integer(1)},
            True,
            ("share a GPU and others do not", "rank 3 on 1"),
            id="two-and-two",
        ),
        pytest.param(
            {0: integer(0), 1: integer(0), 2: integer(1)}, True, ("share a GPU and others do not",), id="two-and-one"
        ),
        pytest.param(
            own({0: "0", 1: A}), False, ("cannot be ordered", "rank 0 on 0", f"rank 1 on {A}"), id="unplaced-mix"
        ),
        pytest.param({0: uuid(A, 0, A), 1: uuid(B, None, B)}, False, ("cannot be ordered",), id="partly-placed"),
        pytest.param(
            own({0: "0", 1: D}, UNLIKE), False, ("cannot be in one list", "PCI_BUS_ID"), id="mix-on-unlike-gpus"
        ),
        pytest.param({0: uuid(A, 0, A), 1: uuid(MIG_1, 1, MIG_1)}, False, ("cannot be in one list",), id="gpu-and-mig"),
    ],
)
def test_devices_that_cannot_form_a_slice(used, allow, words):
    with pytest.raises(DeviceError) as caught:
        assign(members(used), allow_shared_devices=allow)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.slice_ranks == tuple(sorted(used))


@pytest.mark.parametrize(
    "slice_, word",
    [
        pytest.param([], "no ranks", id="empty"),
        pytest.param([RankDevice(0, "h", integer(0)), RankDevice(0, "h", integer(1))], "twice", id="rank-twice"),
        pytest.param([RankDevice(0, "h", integer(0)), RankDevice(1, "g", integer(1))], "rank 1 on g", id="two-hosts"),
    ],
)
def test_members_that_cannot_form_a_slice(slice_, word):
    with pytest.raises(LayoutError, match=word):
        assign(slice_)


@pytest.mark.parametrize(
    "a, b, same",
    [
        pytest.param(integer(0), integer(0), True, id="index"),
        pytest.param(integer(0), integer(1), False, id="other-index"),
        pytest.param(integer(1), integer(10), False, id="no-prefix-among-integers"),
        pytest.param(integer(0, A), uuid(A, 3, A), True, id="uuid-beats-index"),
        pytest.param(uuid(MIG_1, 0, MIG_1), uuid(MIG_2, 0, MIG_2), False, id="mig-instances-of-one-gpu"),
        pytest.param(integer(0), uuid(A, 0, A), True, id="index-where-one-uuid-is-unknown"),
        pytest.param(integer(1), uuid(A, 0, A), False, id="other-index-where-one-uuid-is-unknown"),
        pytest.param(uuid(A, None, A), uuid(A.upper(), None, A.upper()), True, id="case"),
        pytest.param(uuid("GPU-8f2a"), uuid(A, None, A), True, id="abbreviation"),
        pytest.param(uuid("GPU-8F2A"), uuid(A, 0, A), True, id="abbreviation-in-another-case"),
        pytest.param(uuid("GPU-8f2a"), uuid("GPU-8f"), True, id="abbreviations"),
        pytest.param(uuid("GPU-8f2b"), uuid(A, None, A), False, id="other-abbreviation"),
        pytest.param(integer(0), uuid("GPU-8f2a"), False, id="integer-and-unplaced-uuid"),
    ],
)
def test_same_device(a, b, same):
    assert same_device(a, b) is same
    assert same_device(b, a) is same


def test_check_exclusive_accepts_the_same_index_on_other_hosts_and_cpu_ranks():
    job = members({0: integer(0), 1: integer(1), 4: None, 5: None}) + members({2: integer(0), 3: integer(1)}, host="g")
    check_exclusive(job)
    check_exclusive([])


@pytest.mark.parametrize(
    "job, words",
    [
        pytest.param(
            members({0: integer(3), 1: integer(1), 2: integer(3)}), ("rank 0", "rank 2", "'3'", "'h'"), id="index"
        ),
        pytest.param(
            members({0: integer(3)}) + members({6: integer(2), 1: integer(2)}, host="g"),
            ("rank 1", "rank 6", "'2'", "'g'"),
            id="on-the-second-host",
        ),
        pytest.param(
            members({0: uuid("GPU-8f2a"), 1: uuid(A, None, A)}), ("rank 0", "rank 1", "GPU-8f2a"), id="abbreviation"
        ),
        pytest.param(
            members(own({0: "GPU-8f2a", 1: "0"}, HOST)), ("rank 0", "rank 1", A), id="integer-and-abbreviation"
        ),
    ],
)
def test_check_exclusive_names_ranks_device_and_host(job, words):
    with pytest.raises(DeviceError) as caught:
        check_exclusive(list(reversed(job)))
    for word in words:
        assert word in str(caught.value)


def test_values_are_frozen_hashable_and_serialisable():
    member = RankDevice(1, "h", integer(3))
    roles = assign([member])
    assert len({member, RankDevice(1, "h", integer(3))}) == 1
    hash(roles)
    assert pickle.loads(pickle.dumps((member, roles))) == (member, roles)
    assert PhysicalDevice(**json.loads(json.dumps(asdict(member)))["device"]) == member.device
    for value, field in ((member, "rank"), (roles, "owner_rank")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, 9)


# --- properties ---


@st.composite
def slices(draw):
    """Members of a slice whose ranks use distinct devices, in one of the forms that users write."""
    indices = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
    first = draw(st.integers(0, 64))
    uuids = tuple(f"GPU-{draw(st.integers(0, 15)):x}{index}000000-0000-0000-0000-000000000000" for index in range(8))
    inventory = draw(st.sampled_from([None, Inventory(uuids=uuids, names=("H100",) * 8)]))
    form = draw(st.sampled_from(["integers", "uuids", "short", *(["mixed"] if inventory is not None else [])]))
    spell = {"integers": str, "uuids": uuids.__getitem__, "short": lambda index: uuids[index][:6]}
    entries = [
        spell[draw(st.sampled_from(["integers", "uuids"])) if form == "mixed" else form](index) for index in indices
    ]
    if form != "mixed" and draw(st.booleans()):
        used = [resolve(local, {CVD: ",".join(entries)}, inventory=inventory) for local in range(len(entries))]
    else:
        used = [resolve(0, {CVD: entry}, inventory=inventory) for entry in entries]
    return members({first + local: device for local, device in enumerate(used)}), inventory


@given(slices())
def test_tp_rank_k_runs_on_the_device_of_its_training_rank(drawn):
    slice_, inventory = drawn
    roles = assign(slice_)
    check_exclusive(slice_)
    used = {member.rank: member.device for member in slice_}
    assert list(roles.ranks) == sorted(used)
    child = server_environment(roles.visible_devices)
    for tp_rank, rank in enumerate(roles.ranks):
        seen = resolve(tp_rank, child, inventory=inventory)
        assert same_device(seen, used[rank])
        assert [other for other in used if same_device(seen, used[other])] == [rank]
    with pytest.raises(DeviceError):
        resolve(len(roles.ranks), child, inventory=inventory)
    if all(device.index is not None for device in used.values()):
        assert used[roles.owner_rank].index == min(device.index for device in used.values())


@given(slices(), st.data(), st.booleans())
def test_assign_does_not_depend_on_the_order_of_its_input(drawn, data, allow):
    slice_, _ = drawn
    shuffled = data.draw(st.permutations(slice_))
    assert assign(shuffled, allow_shared_devices=allow) == assign(slice_)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_exclusive_means_distinct(indices):
    job = members({rank: integer(index) for rank, index in enumerate(indices)})
    if len(set(indices)) == len(indices):
        check_exclusive(job)
        assign(job)
    else:
        for call in (check_exclusive, assign):
            with pytest.raises(DeviceError, match="used by rank"):
                call(job)
