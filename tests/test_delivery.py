"""What the owner makes of the workers' replies, and who makes which payload for whom."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from tpcolocate import agreement, ipc_payload
from tpcolocate.in_server.tpcolocate_receiver.checksums import checksum
from tpcolocate.in_server.tpcolocate_receiver.protocol import BucketResult, LoadBucket, Reply, WorkerError
from tpcolocate.weights.transport.bucket_sender import BucketSender, Verdict, judge

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
    # what came, what the bucket held, the problem, what is unproven
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
    ("unproven need not be read", {0: reply({"b": 6}, unverified=["a"])}, A_AND_B, None, ("a",)),
    ("unproven on one rank", {0: reply({"a": 4, "b": 6}, unverified=["a"]), 1: reply({"b": 6})}, A_AND_B, None, ("a",)),
    ("unproven on all ranks", {0: reply({}, unverified=["b", "a"]), 1: reply({}, unverified=["a"])}, A_AND_B, None, ("a", "b")),
    ("one unproven, the other unread", {0: reply({}, unverified=["a"])}, A_AND_B, UNREAD + "b", ()),
    ("nothing to read in empty tensors", {0: reply({"a": 8})}, EMPTY_FIRST, None, ()),
    ("only empty tensors", {0: reply({}), 1: reply({})}, entries_of(e=(0, 3)), None, ()),
    ("an empty bucket", {0: reply({})}, [], None, ()),
    ("a scalar", {0: reply({"s": 1})}, entries_of(s=()), None, ()),
    ("a scalar unread", {0: reply({})}, entries_of(s=()), UNREAD + "s", ()),
    ("names beyond the bucket", {0: reply({**ALL, "c": 1})}, A_AND_B, None, ()),
]  # fmt: skip


@pytest.mark.parametrize(
    "replies, entries, problem, unproven", [case[1:] for case in JUDGED], ids=[case[0] for case in JUDGED]
)
def test_replies_are_judged(replies, entries, problem, unproven):
    verdict = judge(replies, entries)
    assert (verdict.problem, verdict.unproven) == (problem, unproven)
    has_failed = any(answer.error is not None for answer in replies.values())
    assert verdict.details == ("TP rank 0:\nTraceback ..." if has_failed else None)
    assert verdict.opened == {rank: answer.opened for rank, answer in replies.items()}


@pytest.mark.parametrize(
    "replayed, expected", [([True], True), ([True, True], True), ([True, False], False), ([False, False], False)]
)
def test_a_bucket_is_replayed_if_every_worker_did(replayed, expected):
    verdict = judge({rank: reply(replayed=value) for rank, value in enumerate(replayed)}, A_AND_B)
    assert verdict.replayed is expected and verdict.problem is None


def test_the_slowest_worker_is_reported_step_by_step():
    steps = [{"open": 0.1, "load": 0.5}, {"open": 0.3, "load": 0.2, "compare": 0.1}]
    verdict = judge({rank: reply(step_seconds=seconds) for rank, seconds in enumerate(steps)}, A_AND_B)
    assert verdict.worker_seconds == {"open": 0.3, "load": 0.5, "compare": 0.1}


def test_what_was_learned_is_told_only_by_workers_whose_loader_was_watched():
    verdict = judge({0: reply(traced={"a": []}), 1: reply(replayed=True)}, A_AND_B)
    assert verdict.learned == {0: {"a": []}} and not verdict.replayed


# --- payloads -------------------------------------------------------------------------------------------------------


class Workers:
    """Take what is posted, and answer what `answers` says."""

    def __init__(self, answers):
        self.answers, self.posted = answers, []

    def post(self, commands, number):
        self.posted.append((commands, number))

    def collect(self, number, *, timeout_s):
        assert number == self.posted[-1][1]
        return self.answers


@pytest.fixture
def delivery(tmp_path):
    """A function that makes one rank's delivery; whatever it exported is given back."""
    made = []

    def make(tp_rank=0, tp_size=2, payloads="per_rank", transport="ipc"):
        ledger = ipc_payload.Ledger(rank=7)
        (tmp_path / "files").mkdir(exist_ok=True)
        copies = []
        one = BucketSender(
            tp_rank=tp_rank, tp_size=tp_size, is_owner=tp_rank == 0, payloads=payloads, transport=transport,
            file_folder=tmp_path / "files", ledger=ledger, copied=lambda: copies.append(1), session="abc",
        )  # fmt: skip
        made.append((one, copies))
        return one

    make.copies = lambda: sum(len(copies) for _, copies in made)
    yield make
    for one, _ in made:
        one.ledger.reclaim()


def bucket(values=(1.0, 2.0)):
    entries, num_bytes = ipc_payload.layout([("a", torch.Size([len(values)]), torch.float32)])
    flat = ipc_payload.allocate(num_bytes, torch.device("cpu"))
    ipc_payload.view(flat, entries[0]).copy_(torch.tensor(values))
    return flat, entries


READERS = [
    # payloads, transport, readers of TP ranks 0 and 1
    ("per_rank", "ipc", [0], [1]),
    ("per_rank", "stock", [0], [1]),
    ("per_rank", "file", [0, 1], []),
    ("fan_out", "ipc", [0, 1], []),
    ("fan_out", "file", [0, 1], []),
]


@pytest.mark.parametrize("payloads, transport, first, second", READERS)
def test_every_tp_rank_is_served_once_and_in_order(delivery, payloads, transport, first, second):
    ranks = [delivery(tp_rank, payloads=payloads, transport=transport) for tp_rank in (0, 1)]
    assert [one.readers for one in ranks] == [first, second]
    flat, entries = bucket()
    made = [one.make(flat if one.exports else None, entries, 3) for one in ranks]
    assert [len(of_rank) for of_rank in made] == [len(first), len(second)]
    exported = [one.ledger.num_exported for one in ranks]
    assert exported == ([0, 0] if transport == "file" else [len(first), len(second)])
    if transport != "stock":
        told = [command for of_rank in made for command in of_rank]
        assert [command.for_tp_rank for command in told] == [0, 1]
        jobs = [command.command for command in told]
        assert {type(job) for job in jobs} == {LoadBucket}
        assert all(job.checksum == checksum(flat) and job.entries == ipc_payload.described(entries) for job in jobs)
        handles = [json.dumps(job.handle) for job in jobs]
        assert len(set(handles)) == (1 if transport == "file" else len(first) or 2)


def test_what_is_told_of_a_bucket_of_many_tensors_fits_into_one_round_of_the_ranks(delivery):
    shapes = {f"model.layers.{i // 7}.self_attn.{'abcdefg'[i % 7]}_proj.weight": (4096, 4096) for i in range(28)}
    entries = ipc_payload.layout([(name, torch.Size(shape), torch.bfloat16) for name, shape in shapes.items()])[0]
    learned = {name: [[2048 * 4096, [2048, 4096], [4096, 1], "bfloat16"]] for name in shapes}
    read = {name: 2048 * 4096 for name in shapes}
    verdict = judge({rank: reply(read, traced=learned) for rank in (0, 1)}, entries)
    assert verdict.problem is None
    command = delivery().make(bucket()[0], entries, 0)
    assert all(
        len(pickle.dumps((None, told))) < agreement._FRAME_BYTES - agreement._HEAD_BYTES for told in (verdict, command)
    )


def test_fan_out_on_a_cpu_copies_once_per_further_reader(delivery):
    flat, entries = bucket()
    made = delivery(tp_size=3, payloads="fan_out").make(flat, entries, 0)
    assert len({job.command.handle["name"] for job in made}) == 3, "one counter would not tell the readers apart"
    assert delivery.copies() == 2


def test_a_file_holds_the_bucket_and_goes_once_it_was_loaded(delivery, tmp_path):
    one = delivery(tp_size=1, transport="file")
    flat, entries = bucket()
    [command] = commands = one.make(flat, entries, 4)
    assert torch.equal(load_file(command.command.handle["path"])["bucket"], flat)
    one.workers = Workers({0: reply({"a": 2})})
    assert one.load(None, commands, entries, 4, 5.0).problem is None
    assert list((tmp_path / "files").iterdir()) == []


def test_a_file_goes_though_the_push_failed(delivery, tmp_path):
    class Broken:
        def post(self, *args):
            raise ConnectionError("gone")

    one = delivery(transport="file")
    flat, entries = bucket()
    commands = one.make(flat, entries, 4)
    one.workers = Broken()
    with pytest.raises(ConnectionError):
        one.load(None, commands, entries, 4, 5.0)
    assert list((tmp_path / "files").iterdir()) == []


def test_every_worker_gets_its_own_command(delivery):
    one = delivery(payloads="fan_out")
    flat, entries = bucket()
    commands = one.make(flat, entries, 2)
    one.workers = Workers({0: reply({"a": 2}), 1: failed(opened=False)})
    verdict = one.load(None, commands, entries, 2, 5.0)
    assert (verdict.problem, verdict.opened) == ("TP rank 1: ValueError: bad", {0: True, 1: False})
    assert one.workers.posted == [({0: commands[0], 1: commands[1]}, 2)]


def test_sglangs_own_way_proves_nothing(delivery):
    class Stock:
        def push(self, payloads, *, load_format, timeout_s):
            self.load_format = load_format

    one, server = delivery(transport="stock"), Stock()
    flat, entries = bucket()
    verdict = one.load(server, one.make(flat, entries, 0), entries, 0, 5.0)
    assert verdict == Verdict(unproven=("a",)) and server.load_format == "flattened_bucket"
