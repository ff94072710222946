"""What the workers' replies mean, and which rank makes which commands."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from tpcolocate import agreement, ipc_payload
from tpcolocate.in_server.tpcolocate_receiver.checksums import checksum
from tpcolocate.in_server.tpcolocate_receiver.protocol import BucketResult, LoadBucket, Reply, WorkerError
from tpcolocate.weights.transport.bucket_sender import BucketFiles, BucketSender, judge
from tpcolocate.weights.transport.memory import PeakMemory

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def entries_of(**shapes):
    return ipc_payload.layout([(name, torch.Size(shape), torch.float32) for name, shape in shapes.items()])[0]


A_AND_B = entries_of(a=(4, 2), b=(6,))
ALL = {"a": 8, "b": 6}


def reply(read=ALL, **changes):
    result = {
        "differing": [], "unverified": [], "read": dict(read), "replayed": False, "traced": None, "deviating": None,
        "step_seconds": {}, **changes,
    }  # fmt: skip
    return Reply(0, 0, None, True, 0.1, BucketResult(**result))


def failed(message="bad", *, opened=True):
    return Reply(0, 0, WorkerError("ValueError", message, "Traceback ..."), opened, 0.1)


FAILED = failed()
UNREAD = "the engine took these tensors in part or not at all: "
EMPTY_FIRST = entries_of(e=(0, 3), a=(4, 2), f=(0,))
MANY = entries_of(**{f"w{i}": (2,) for i in range(8)})
JUDGED = [
    # what came, what the bucket held, the problem, what is unverified
    ("one rank took all", {0: reply()}, A_AND_B, None, ()),
    ("error", {0: FAILED}, A_AND_B, "TP rank 0: ValueError: bad", ()),
    ("error of one", {0: reply(), 1: FAILED}, A_AND_B, "TP rank 1: ValueError: bad", ()),
    ("error before opening", {0: failed(opened=False)}, A_AND_B, "TP rank 0: ValueError: bad", ()),
    ("an error without words", {0: failed("")}, A_AND_B, "TP rank 0: ValueError: ", ()),
    ("differing", {0: reply(differing=["b"])}, A_AND_B, "TP rank 0 holds other values than were sent: b", ()),
    ("differing on one", {0: reply(), 1: reply(differing=["a", "b"])}, A_AND_B, "TP rank 1 holds other values than were sent: a, b", ()),
    ("differing and read twice", {0: reply(differing=["a"]), 1: reply()}, A_AND_B, "TP rank 0 holds other values than were sent: a", ()),
    ("differing, many", {0: reply({}, differing=[e.name for e in MANY])}, MANY,
     "TP rank 0 holds other values than were sent: w0, w1, w2, w3, w4 and 3 more", ()),
    ("unread", {0: reply({"a": 8})}, A_AND_B, UNREAD + "b", ()),
    ("nothing read", {0: reply({}), 1: reply({})}, A_AND_B, UNREAD + "a, b", ()),
    ("unread, exactly as many as are shown", {0: reply({"w0": 2, "w1": 2, "w7": 2})}, MANY, UNREAD + "w2, w3, w4, w5, w6", ()),
    ("unread, one more than is shown", {0: reply({"w0": 2, "w1": 2})}, MANY, UNREAD + "w2, w3, w4, w5, w6 and 1 more", ()),
    ("partly read", {0: reply({"a": 7, "b": 6})}, A_AND_B, UNREAD + "a", ()),
    ("parts add up", {0: reply({"a": 4, "b": 3}), 1: reply({"a": 4, "b": 3})}, A_AND_B, None, ()),
    ("unequal parts add up", {0: reply({"a": 8, "b": 4}), 1: reply({"b": 2})}, A_AND_B, None, ()),
    ("parts do not add up", {0: reply({"a": 4, "b": 3}), 1: reply({"a": 4, "b": 2})}, A_AND_B, UNREAD + "b", ()),
    ("of four ranks one took nothing", {i: reply({"a": 2, "b": 6} if i else {"b": 6}) for i in range(4)}, A_AND_B, UNREAD + "a", ()),
    ("replicated", {0: reply(), 1: reply()}, A_AND_B, None, ()),
    ("replicated in part", {0: reply({"a": 8, "b": 3}), 1: reply({"a": 8, "b": 3})}, A_AND_B, None, ()),
    ("unverified need not be read", {0: reply({"b": 6}, unverified=["a"])}, A_AND_B, None, ("a",)),
    ("unverified on one rank", {0: reply({"a": 4, "b": 6}, unverified=["a"]), 1: reply({"b": 6})}, A_AND_B, None, ("a",)),
    ("unverified on all ranks", {0: reply({}, unverified=["b", "a"]), 1: reply({}, unverified=["a"])}, A_AND_B, None, ("a", "b")),
    ("one unverified, the other unread", {0: reply({}, unverified=["a"])}, A_AND_B, UNREAD + "b", ()),
    ("nothing to read in empty tensors", {0: reply({"a": 8})}, EMPTY_FIRST, None, ()),
    ("only empty tensors", {0: reply({}), 1: reply({})}, entries_of(e=(0, 3)), None, ()),
    ("an empty bucket", {0: reply({})}, [], None, ()),
    ("a scalar", {0: reply({"s": 1})}, entries_of(s=()), None, ()),
    ("a scalar unread", {0: reply({})}, entries_of(s=()), UNREAD + "s", ()),
    ("names beyond the bucket", {0: reply({**ALL, "c": 1})}, A_AND_B, None, ()),
]  # fmt: skip


@pytest.mark.parametrize(
    "replies, entries, problem, unverified", [case[1:] for case in JUDGED], ids=[case[0] for case in JUDGED]
)
def test_replies_are_judged(replies, entries, problem, unverified):
    verdict = judge(replies, entries)
    assert (verdict.problem, verdict.unverified) == (problem, unverified)
    has_failed = any(answer.error is not None for answer in replies.values())
    assert verdict.details == ("TP rank 0:\nTraceback ..." if has_failed else None)
    assert verdict.opened == {rank: answer.opened for rank, answer in replies.items()}


def test_what_the_engine_has_under_another_name_may_be_ignored_but_not_taken_in_part():
    verdict = judge({0: reply({"b": 6}), 1: reply({"b": 6})}, A_AND_B, {"a", "c"})
    assert (verdict.problem, verdict.ignored) == (None, ("a",))
    assert judge({0: reply({"b": 6}), 1: reply({"a": 1, "b": 6})}, A_AND_B, {"a"}).problem == UNREAD + "a"
    assert judge({0: reply(ALL)}, A_AND_B, {"a"}).ignored == ()


@pytest.mark.parametrize(
    "replayed, expected", [([True], True), ([True, True], True), ([True, False], False), ([False, False], False)]
)
def test_a_bucket_is_replayed_if_every_worker_did(replayed, expected):
    verdict = judge({rank: reply(replayed=value) for rank, value in enumerate(replayed)}, A_AND_B)
    assert verdict.replayed is expected and verdict.problem is None


def test_the_slowest_worker_is_reported_step_by_step():
    steps = [{"open": 0.1, "load": 0.5}, {"open": 0.3, "load": 0.2, "compare": 0.1}]
    verdict = judge({rank: reply(step_seconds=seconds) for rank, seconds in enumerate(steps)}, A_AND_B)
    assert verdict.step_seconds == {"open": 0.3, "load": 0.5, "compare": 0.1}


def test_a_workers_traceback_is_in_the_verdict():
    assert judge({0: reply(), 1: failed()}, A_AND_B).details.startswith("TP rank 0:\nTraceback")


def test_traced_copies_come_only_from_workers_whose_loader_was_traced():
    verdict = judge({0: reply(traced={"a": []}), 1: reply(replayed=True)}, A_AND_B)
    assert verdict.traced == {0: {"a": []}} and not verdict.replayed


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sender(tmp_path):
    """A function that makes one rank's sender; its exports are taken back."""
    made = []

    def make(tp_rank=0, tp_size=2, payloads="per_rank", transport="ipc"):
        (tmp_path / "files").mkdir(exist_ok=True)
        one = BucketSender(
            tp_rank=tp_rank, tp_size=tp_size, is_owner=tp_rank == 0, payloads=payloads, transport=transport, session="abc",
            files=BucketFiles(tmp_path / "files"), ledger=ipc_payload.Ledger(rank=7), peak=PeakMemory(torch.device("cpu")),
        )  # fmt: skip
        made.append(one)
        return one

    yield make
    for one in made:
        one.ledger.reclaim()
        one.files.remove()
    assert list(tmp_path.glob("files/*")) == []


def bucket(values=(1.0, 2.0)):
    entries, num_bytes = ipc_payload.layout([("a", torch.Size([len(values)]), torch.float32)])
    flat = ipc_payload.allocate(num_bytes, torch.device("cpu"))
    ipc_payload.view(flat, entries[0]).copy_(torch.tensor(values))
    return flat, entries


def commands(one, flat, entries, number=3):
    contents = ipc_payload.described(entries)
    return one.commands(flat, number, lambda handle, total: LoadBucket(handle, total, contents))


READERS = [
    # payloads, transport, readers of TP ranks 0 and 1
    ("per_rank", "ipc", [0], [1]),
    ("per_rank", "file", [0, 1], []),
    ("fan_out", "ipc", [0, 1], []),
    ("fan_out", "file", [0, 1], []),
]


@pytest.mark.parametrize("payloads, transport, first, second", READERS)
def test_every_tp_rank_is_served_once_and_in_order(sender, payloads, transport, first, second):
    ranks = [sender(tp_rank, payloads=payloads, transport=transport) for tp_rank in (0, 1)]
    assert [one.readers for one in ranks] == [first, second]
    flat, entries = bucket()
    made = [commands(one, flat if one.exports else None, entries) for one in ranks]
    assert [len(of_rank) for of_rank in made] == [len(first), len(second)]
    exported = [one.ledger.num_exported for one in ranks]
    assert exported == ([0, 0] if transport == "file" else [len(first), len(second)])
    addressed = [command for of_rank in made for command in of_rank]
    assert [command.for_tp_rank for command in addressed] == [0, 1]
    jobs = [command.command for command in addressed]
    total = list(checksum(flat))
    assert all(job.checksum == total and job.entries == ipc_payload.described(entries) for job in jobs)
    handles = [json.dumps(job.handle) for job in jobs]
    assert len(set(handles)) == (1 if transport == "file" else len(first) or 2)


def test_a_verdict_on_many_tensors_fits_into_one_round_of_the_ranks(sender):
    shapes = {f"model.layers.{i // 7}.self_attn.{'abcdefg'[i % 7]}_proj.weight": (4096, 4096) for i in range(28)}
    entries = ipc_payload.layout([(name, torch.Size(shape), torch.bfloat16) for name, shape in shapes.items()])[0]
    traced = {name: [[2048 * 4096, [2048, 4096], [4096, 1], "bfloat16"]] for name in shapes}
    read = {name: 2048 * 4096 for name in shapes}
    verdict = judge({rank: reply(read, traced=traced) for rank in (0, 1)}, entries)
    assert verdict.problem is None
    made = commands(sender(), bucket()[0], entries)
    sizes = [len(pickle.dumps((None, exchanged))) for exchanged in (verdict, made)]
    assert all(size < agreement._FRAME_BYTES - agreement._HEAD.size for size in sizes), sizes


def test_fan_out_on_a_cpu_copies_once_per_further_reader(sender):
    flat, entries = bucket()
    one = sender(tp_size=3, payloads="fan_out")
    made = commands(one, flat, entries)
    assert len({job.command.handle["name"] for job in made}) == 3, "one counter would not tell the readers apart"
    assert one.peak.extra_bytes >= 2 * flat.numel(), "both copies"


def test_a_file_contains_the_bucket_and_is_removed_by_its_number(sender, tmp_path):
    one = sender(tp_size=1, transport="file")
    flat, entries = bucket()
    [command] = commands(one, flat, entries, number=4)
    assert torch.equal(load_file(command.command.handle["path"])["bucket"], flat)
    one.files.remove(3)
    assert len(list((tmp_path / "files").iterdir())) == 1, "another bucket's"
    one.files.remove(4)
    assert list((tmp_path / "files").iterdir()) == []


def test_all_files_that_are_left_can_be_removed(sender, tmp_path):
    one = sender(transport="file")
    flat, entries = bucket()
    for number in (1, 2):
        commands(one, flat, entries, number)
    next((tmp_path / "files").iterdir()).unlink()  # removed by someone else
    one.files.remove()
    assert list((tmp_path / "files").iterdir()) == []
