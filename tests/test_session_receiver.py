"""The session inside the engine's workers: commands, replies and errors, and handles opened in another process."""

import json
import multiprocessing
import os
import threading
import time

import pytest
import torch
import zmq
from harness import PRELOADED
from loaders import (
    W,
    asked_for_a_value,
    bits,
    bucket_of,
    cast_first,
    fused,
    model_of,
    plain,
    sent,
)
from test_receiver_checksums import random_bytes

from tpcolocate import ipc_payload
from tpcolocate.in_server.tpcolocate_receiver import receive
from tpcolocate.in_server.tpcolocate_receiver import session as receiver_session
from tpcolocate.in_server.tpcolocate_receiver.checksums import checksum, word_sum
from tpcolocate.in_server.tpcolocate_receiver.handles import device_uuid, open_handle
from tpcolocate.in_server.tpcolocate_receiver.protocol import (
    Addressed,
    DryRun,
    FindUnwritten,
    LoadBucket,
    OpenSession,
    Probe,
    ReleaseStaging,
    Reply,
    RunProgram,
    WarmUp,
    to_json,
)
from tpcolocate.processes import start_of, this_process
from tpcolocate.server.channel import Channel

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

CPU = torch.device("cpu")


def opening(path, **changes):
    """What SGLang hands to the hook for a session of one TP worker."""
    job = {
        "session": ipc_payload.new_session(), "endpoint": f"ipc://{path}", "peer": this_process(),
        "tp_rank": 0, "tp_size": 1, "timeout_s": 30.0, **changes,
    }  # fmt: skip
    return [(json.dumps(to_json(OpenSession(**job))), torch.empty(0))]


class Session:
    """The trainer's end of a session with a model in this process."""

    def __init__(self, model, tmp_path, **changes):
        path = tmp_path / "s.sock"
        self.channel = Channel(path, tp_size=1)
        self.channel.call(lambda: receive(model, opening(path, **changes)))
        self.numbers = iter(range(1000))
        self.rank = changes.get("tp_rank", 0)

    def __enter__(self):
        self.greeting = self.channel.greet(timeout_s=20)[self.rank]
        return self

    def __exit__(self, *exc):
        self.channel.finish(timeout_s=20)

    def ask(self, command):
        number = next(self.numbers)
        self.channel.post({self.rank: Addressed(self.rank, command)}, number)
        return self.channel.collect(number, timeout_s=20)[self.rank]

    def ask_json(self, command, *, for_tp_rank=0):
        """The same with a command that no trainer would send."""
        number = next(self.numbers)
        self.channel._due[number] = {self.rank}
        envelope = {"number": number, "for_tp_rank": for_tp_rank, "command": command}
        self.channel._socket.send_multipart([str(self.rank).encode(), json.dumps(envelope).encode()])
        return self.channel.collect(number, timeout_s=20)[self.rank]


def load_command(tmp_path, tensors, kind=LoadBucket, **changes):
    """A bucket in a file, which any number of loads may read."""
    flat, entries = bucket_of(tensors)
    handle = ipc_payload.write_file(flat, tmp_path / "bucket.safetensors")
    fields = {"handle": handle, "checksum": list(checksum(flat)), **changes}
    return kind(**fields) if kind is Probe else kind(**{"entries": entries, **fields})


def test_a_session_greets_and_keeps_its_plan_for_the_next_one(tmp_path):
    model = model_of(plain, W)
    seen = []
    for seed in range(3):
        with Session(model, tmp_path) as session:
            assert session.greeting.error is None and session.greeting.result.device_uuid == device_uuid()
            replayed = session.ask(load_command(tmp_path, sent(W, seed))).result.replayed
            seen.append((session.greeting.result.plan_id, replayed))
        if seed == 1:
            model.w.data = model.w.data.clone()
    assert [replayed for _, replayed in seen] == [False, True, False], "the parameter has moved"
    assert seen[0][0] == seen[1][0] != seen[2][0]
    assert os.listdir(tmp_path) == ["bucket.safetensors"], "the socket is gone"


@pytest.mark.parametrize("succeeds", [True, False])
def test_after_the_last_command_a_worker_answers_and_leaves(tmp_path, succeeds):
    model = model_of(plain, W)
    path = tmp_path / "s.sock"
    channel = Channel(path, tp_size=1)
    worker = threading.Thread(target=receive, args=(model, opening(path)))
    channel.call(lambda: (worker.start(), worker.join()))
    channel.greet(timeout_s=20)
    channel.post({0: Addressed(0, RunProgram(program=None if succeeds else "none of this name", is_last=True))}, 0)
    worker.join(20)
    assert not worker.is_alive(), "it leaves without another command"
    assert (channel.collect(0, timeout_s=20)[0].error is None) == succeeds
    channel.finish(timeout_s=20)


def test_a_reply_to_a_load_is_complete(tmp_path):
    model = model_of(plain, {"a": (3, 5), "b": (7,)})
    for seed in range(2):
        tensors = sent({"a": (3, 5), "b": (7,)}, seed)
        with Session(model, tmp_path) as session:
            reply = session.ask(load_command(tmp_path, tensors))
            again = session.ask(load_command(tmp_path, tensors, report_trace=True)).result
        assert again.replayed and again.traced.keys() == {"a", "b"}, "also what was planned before, where asked for"
        found = reply.result
        assert reply == Reply(0, 0, None, True, reply.seconds, found) and reply.seconds > 0
        assert set(found.step_seconds) == {"open", "check", "load", "compare"}
        assert (found.differing, found.unverified, found.deviating) == ([], [], None)
        assert found.read == {"a": 15, "b": 7} and found.replayed == (seed == 1)
        traced = {"a": [[0, [3, 5], [5, 1], "float32"]], "b": [[0, [7], [1], "float32"]]}
        assert found.traced == (traced if seed == 0 else None)
        assert all(torch.equal(getattr(model, name), tensor) for name, tensor in tensors.items())


def test_only_copies_that_can_be_repeated_are_planned(tmp_path):
    def load(model, name, tensor):
        (cast_first if name == "w" else plain)(model, name, tensor)

    with Session(model_of(load, {**W, "a": (2,)}), tmp_path) as session:
        found = session.ask(load_command(tmp_path, sent({**W, "a": (2,)}))).result
        assert set(found.traced) == {"a"} and found.unverified == ["w"]
        assert session.ask(FindUnwritten()).result.names == ["w"]


def test_what_cannot_be_verified_and_what_is_skipped_are_in_the_reply(tmp_path):
    def load(model, name, tensor):
        if name == "w":
            cast_first(model, name, tensor)

    with Session(model_of(load, W), tmp_path) as session:
        reply = session.ask(load_command(tmp_path, sent({"w": (4, 4), "gone": (3,)})))
    assert (reply.error, reply.result.unverified, reply.result.read) == (None, ["w"], {})


def test_a_parameter_that_is_changed_by_the_loaders_end_is_in_the_reply(tmp_path):
    """By something that the trace cannot see: another thread, a kernel of its own."""
    model = model_of(plain, W)
    load_weights = model.load_weights

    def load_and_spoil(weights):
        load_weights(weights)
        model.w.data.numpy()[0, 0] += 1

    model.load_weights = load_and_spoil
    with Session(model, tmp_path) as session:
        reply = session.ask(load_command(tmp_path, sent(W)))
    assert (reply.error, reply.result.differing) == (None, ["w"])


@pytest.mark.parametrize("kind", [LoadBucket, Probe])
def test_memory_that_is_not_the_trainers_is_refused_before_a_parameter_is_touched(tmp_path, kind):
    model = model_of(plain, W)
    before = bits(model)
    with Session(model, tmp_path) as session:
        reply = session.ask(load_command(tmp_path, sent(W), kind, checksum=[1, 2]))
    assert reply.opened and reply.error.type == "RuntimeError" and reply.result is None
    assert bits(model) == before


def test_a_dry_run_is_reported_and_samples_confirm_it(tmp_path):
    shapes, send = {"qkv": (8, 3)}, {"q": (4, 3), "k": (2, 3), "v": (2, 3)}
    model = model_of(fused, shapes)
    before = bits(model)
    entries = [[name, "float32", list(shape)] for name, shape in send.items()]
    with Session(model, tmp_path) as session:
        traced = session.ask(DryRun(entries)).result.traced
        assert session.ask(DryRun(entries)).result.traced == traced
        assert {name: copies[0][1] for name, copies in traced.items()} == {n: list(s) for n, s in send.items()}
        assert bits(model) == before
        sample = session.ask(load_command(tmp_path, {"k": sent(send)["k"]}, watch=True))
        assert sample.error is None and sample.result.deviating == [] and not sample.result.replayed
        assert sample.result.traced == {"k": traced["k"]}
        rest = session.ask(load_command(tmp_path, sent(send))).result
        assert rest.replayed and rest.deviating is None


def test_programs_of_a_plan_that_a_sample_disproves_are_gone(tmp_path):
    def load(model, name, tensor):
        model.w.data.copy_(tensor if tensor.is_meta else tensor * 1)

    with Session(model_of(load, W), tmp_path) as session:
        session.ask(DryRun([["w", "float32", [4, 4]]]))
        assert session.ask(RunProgram(define=[["p", 2, []]], program="p")).result.checksums == [0, 0]
        sample = session.ask(load_command(tmp_path, sent(W), watch=True)).result
        assert sample.deviating == sample.unverified == ["w"] and sample.traced == {}
        assert session.ask(RunProgram(program="p")).error.type == "KeyError"


def test_an_engine_that_was_warmed_up_has_its_plan_before_the_trainers_first_sync(tmp_path):
    loads = []

    def load(model, name, tensor):
        loads.append(name)
        plain(model, name, tensor)

    model = model_of(load, {**W, "a": (2,)})
    before = bits(model)
    with Session(model, tmp_path) as session:
        traced = session.ask(WarmUp([["w", [4, 4]], ["a", [2]]])).result.traced
        assert set(traced) == {"w", "a"}
    assert bits(model) == before and sorted(loads) == ["a", "w"], "traced, with nothing loaded"
    with Session(model, tmp_path) as session:
        again = session.ask(DryRun([["w", "float32", [4, 4]], ["a", "float32", [2]]]))
        assert again.result.traced == traced and len(loads) == 2, "the loader is not run again"
        other = session.ask(DryRun([["w", "bfloat16", [4, 4]]]))
        assert set(other.result.traced) == {"w"} and len(loads) == 3, "except for weights of another dtype"


def test_a_warm_up_may_fail_where_a_dry_run_does(tmp_path):
    with Session(model_of(asked_for_a_value, W), tmp_path) as session:
        assert session.ask(WarmUp([["w", [4, 4]]])).error is not None
        assert session.ask(load_command(tmp_path, sent(W))).error is None, "the first sync traces it"


def test_a_session_reports_why_a_dry_run_failed(tmp_path):
    model = model_of(asked_for_a_value, W)
    before = bits(model)
    with Session(model, tmp_path) as session:
        reply = session.ask(DryRun([["w", "float32", [4, 4]]]))
        assert reply.result is None and "meta" in reply.error.message
        assert bits(model) == before
        assert session.ask(load_command(tmp_path, sent(W))).error is None


def test_staging_regions_are_released_before_the_session_ends(tmp_path):
    tensor = sent(W)["w"]
    handle = ipc_payload.write_file(tensor.view(-1).view(torch.uint8), tmp_path / "staged.safetensors")
    model = model_of(plain, W)
    with Session(model, tmp_path) as session:
        assert session.ask(RunProgram(map=[["r0/stage/0", handle], ["r0/kept", handle]])).opened
        regions = receiver_session._RECEIVER.states[model].regions
        assert list(regions) == ["r0/stage/0", "r0/kept"]
        assert session.ask(ReleaseStaging()).error is None
        assert list(regions) == ["r0/kept"]
        session.ask(RunProgram(release=["r0/kept"]))
        assert not regions


def test_a_probe_opens_and_loads_nothing(tmp_path):
    model = model_of(plain, W)
    before = bits(model)
    with Session(model, tmp_path) as session:
        reply = session.ask(load_command(tmp_path, sent(W), Probe))
    assert (reply.error, reply.opened, reply.result.device_uuid) == (None, True, device_uuid())
    assert bits(model) == before


def test_regions_are_mapped_run_and_released(tmp_path):
    model = model_of(plain, W)
    ledger = ipc_payload.Ledger(rank=0)
    kept, staged_one = staged(torch.zeros(64, dtype=torch.uint8)), staged(torch.zeros(64, dtype=torch.uint8))
    handles = {
        "r0/kept0": ledger.export(kept, tp_rank=0, bucket=0),
        "r0/stage0": ledger.export(staged_one, tp_rank=0, bucket=1),
    }
    with Session(model, tmp_path) as session:
        session.ask(load_command(tmp_path, sent(W)))
        programs = [
            [key, 1, [["w", 0, None, None, region, 0, "float32", [4, 1], 0, 1]]]
            for key, region in (("k/direct", "r0/kept0"), ("k/0", "r0/stage0"))
        ]
        reply = session.ask(RunProgram(map=[[n, h.describe()] for n, h in handles.items()], define=programs))
        assert reply.error is None and reply.opened and reply.result.checksums is None
        for key, memory in (("k/direct", kept), ("k/0", staged_one)):
            new = sent(W, 3)["w"] if key == "k/0" else sent(W, 4)["w"]
            memory.copy_(new.view(-1).view(torch.uint8))
            reply = session.ask(RunProgram(program=key, keep_views=key == "k/direct"))
            assert reply.error is None and torch.equal(model.w, new)
            assert reply.result.checksums == [int(word_sum(new))]
    assert (handles["r0/kept0"].count(), handles["r0/stage0"].count()) == (1, 0), (
        "persistent mappings stay, staging goes"
    )
    with Session(model, tmp_path) as session:
        kept.copy_(sent(W, 5)["w"].view(-1).view(torch.uint8))
        assert session.ask(RunProgram(program="k/direct")).error is None
        assert torch.equal(model.w, sent(W, 5)["w"])
        assert session.ask(RunProgram(release=["r0/kept0", "never"])).error is None
        assert handles["r0/kept0"].count() == 0
        assert session.ask(RunProgram(program="k/direct")).error.type == "KeyError"
    assert ledger.reclaim() == []


def test_parameters_that_move_inside_a_session_are_not_written_through(tmp_path):
    model = model_of(plain, W)
    with Session(model, tmp_path) as session:
        session.ask(load_command(tmp_path, sent(W)))
        session.ask(RunProgram(define=[["k", 1, [["w", 0, None, None, "r", 0, "float32", [4, 1], 0, 1]]]]))
        model.w.data = torch.zeros(4, 4)
        assert "moved" in session.ask(RunProgram(program="k")).error.message
    assert not model.w.any()


def raising(error):
    def load(model, name, tensor):
        raise error

    return load


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("shape"), AssertionError("x"), KeyError("name"), SystemExit(3), KeyboardInterrupt()],
                         ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_loader_that_fails_does_not_take_the_worker_down(tmp_path, error):
    with Session(model_of(raising(error), W), tmp_path) as session:
        for _ in range(2):  # a failed load is not traced
            reply = session.ask(load_command(tmp_path, sent(W)))
            assert str(reply.error) == f"{type(error).__name__}: {error}" and "in load" in reply.error.traceback
            assert reply.opened


JUNK = [
    None, 0, -1, 1.5, "x", "", [], {}, [None], {"kind": "cpu"}, {"kind": "file", "path": "/nowhere"}, {"kind": "unheard-of"},
]  # fmt: skip


@pytest.mark.parametrize("field", ["kind", "for_tp_rank", "handle", "entries", "checksum", "unheard-of"])
def test_junk_in_any_field_is_reported_and_never_raised(tmp_path, field):
    model = model_of(plain, W)
    before = bits(model)
    with Session(model, tmp_path) as session:
        for junk in JUNK:
            command = to_json(load_command(tmp_path, sent(W)))
            if field == "for_tp_rank":
                reply = session.ask_json(command, for_tp_rank=junk)
            else:
                reply = session.ask_json({**command, field: junk})
            if field == "entries" and junk in ("", [], {}):
                assert reply.error is None and reply.result.read == {}, "an empty bucket is one"
            elif field == "for_tp_rank" and junk == 0:
                assert reply.error is None
                before = bits(model)
            else:
                assert reply.error.message and reply.error.traceback, junk
            assert bits(model) == before


@pytest.mark.parametrize("field", ["handle", "entries", "checksum"])
def test_a_missing_field_is_reported(tmp_path, field):
    command = to_json(load_command(tmp_path, sent(W)))
    del command[field]
    with Session(model_of(plain, W), tmp_path) as session:
        error = session.ask_json(command).error
    assert str(error) == f"ProtocolError: LoadBucket needs a field '{field}'"


@pytest.mark.parametrize("job", ["", "{", "\x00\udcff", "null", "[]", "3", '"x"', "{}", '{"session": 3}'])
def test_a_command_that_is_none_is_not_raised(job):
    receive(model_of(plain, W), [(job, torch.empty(0))])


@pytest.mark.parametrize("named_tensors", [[], [("other", torch.zeros(3))], None, [("{", None)], [(3, None)]])
def test_no_command_at_all_is_not_raised(named_tensors):
    receive(model_of(plain, W), named_tensors)


def test_a_second_model_in_the_worker_does_not_take_part(tmp_path):
    """A draft model's runner gets the same request: it must not open what the target's has opened."""
    draft = model_of(plain, W)
    before = bits(draft)
    with Session(model_of(plain, W), tmp_path, session="once") as session:
        receive(draft, opening(tmp_path / "s.sock", session="once"))
        session.ask(load_command(tmp_path, sent(W)))
    assert bits(draft) == before


@pytest.mark.parametrize("gone", ["the socket", "the process", "the process, which was not waited for", "the time"])
def test_a_trainer_that_is_gone_does_not_keep_the_worker(tmp_path, gone):
    path = tmp_path / "s.sock"
    changes = {"timeout_s": 0.3} if gone == "the time" else {}
    child = None
    if gone.startswith("the process"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        changes = {"peer": (child.pid, start_of(child.pid))}
    worker = threading.Thread(target=receive, args=(model_of(plain, W), opening(path, **changes)))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"ipc://{path}")
        worker.start()
        assert socket.poll(20_000), "it has connected"
        if gone == "the socket":
            path.unlink()
        if child is not None:
            child.kill()
        if gone == "the process":
            child.join()
        worker.join(20)
        assert not worker.is_alive()
    if child is not None:
        child.join()


@pytest.mark.parametrize(
    "rank, tp_size, tp_rank, right",
    [(0, 2, 0, True), (1, 2, 1, True), (3, 2, 1, True), (0, 2, 1, False), (2, 2, 1, False)],
)
def test_a_payload_that_reached_another_worker_is_refused(tmp_path, monkeypatch, rank, tp_size, tp_rank, right):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    model = model_of(plain, W)
    before = bits(model)
    with Session(model, tmp_path, tp_rank=tp_rank, tp_size=tp_size) as session:
        reply = session.ask(load_command(tmp_path, sent(W)))
    if right:
        assert session.greeting.error is reply.error is None
    else:
        expected = f"RuntimeError: the payload of TP rank {tp_rank} reached TP rank {rank % tp_size}"
        assert str(session.greeting.error) == str(reply.error) == expected
        assert not reply.opened and bits(model) == before, "the handle is not even opened"


def test_a_command_for_another_worker_is_refused(tmp_path):
    model = model_of(plain, W)
    with Session(model, tmp_path) as session:
        reply = session.ask_json(to_json(load_command(tmp_path, sent(W))), for_tp_rank=1)
    assert str(reply.error) == "RuntimeError: the payload of TP rank 1 reached TP rank 0" and not reply.opened


# --- handles, opened in another process -----------------------------------------------------------------------------


def worker_main(pipe):
    """A TP worker: opens handles and takes sessions with the receiver alone."""
    model = model_of(plain, W)
    while (job := pipe.recv()) is not None:
        if "endpoint" in job:
            receive(model, opening(**job))
            pipe.send(model.w.tolist())
            continue
        try:
            flat = open_handle(job, CPU)
            reply = bytes(flat.tolist()), str(flat.dtype), list(flat.shape)
            del flat  # before the reply, or the handle is still out when it is read
        except Exception as error:
            reply = error
        pipe.send(reply)


@pytest.fixture(scope="module")
def worker():
    """A function that hands one job to a process of its own and returns its reply."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))  # as for ranks: there is one such server for all
    pipe, theirs = context.Pipe()
    process = context.Process(target=worker_main, args=(theirs,), daemon=True)
    process.start()
    theirs.close()

    def ask(job):
        pipe.send(job)
        assert pipe.poll(50), "the worker hangs"
        return pipe.recv()

    yield ask
    pipe.send(None)
    process.join(30)
    process.kill()
    process.join()


def staged(content):
    flat = ipc_payload.allocate(content.numel(), CPU)
    return flat.copy_(content)


@pytest.mark.parametrize("size", [1, 7, 256, 5000])
def test_shared_memory_is_opened_and_released(worker, size):
    content = random_bytes(size)
    ledger = ipc_payload.Ledger(rank=0)
    handle = ledger.export(staged(content), tp_rank=0, bucket=0)
    job = json.loads(json.dumps(handle.describe()))
    assert job["kind"] == "cpu" and handle.count() == 1
    assert worker(job) == (bytes(content.tolist()), "torch.uint8", [size])
    assert handle.count() == 0, "released as soon as it was dropped"
    assert len(ledger.reclaim()) == 0


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_a_file_is_opened(worker, tmp_path, size):
    content = random_bytes(size)
    job = json.loads(json.dumps(ipc_payload.write_file(content, tmp_path / "bucket.safetensors")))
    assert worker(job) == (bytes(content.tolist()), "torch.uint8", [size])
    assert os.listdir(tmp_path) == ["bucket.safetensors"], "its writer removes it"


@pytest.mark.parametrize(
    "changes",
    [{"kind": "file", "path": "/nowhere"}, {"name": "AAAA"}, {"manager": None}, {"kind": "cuda", "uuid": "GPU-1"}],
)
def test_what_does_not_open_is_an_error_in_the_worker_and_leaves_the_handle_alone(worker, changes):
    ledger = ipc_payload.Ledger(rank=0)
    handle = ledger.export(staged(random_bytes(100)), tp_rank=0, bucket=0)
    assert isinstance(worker({**handle.describe(), **changes}), Exception)
    assert handle.count() == 1
    ledger.reclaim()


def session_with(worker, tmp_path, command):
    """One command in a session with a worker in another process: its reply, and what its parameter holds after it."""
    path = tmp_path / "s.sock"
    held = []
    channel = Channel(path, tp_size=1)
    channel.call(lambda: held.append(worker({"path": str(path), "endpoint": channel.endpoint})))
    channel.greet(timeout_s=30)
    channel.post({0: Addressed(0, command)}, 0)
    reply = channel.collect(0, timeout_s=30)[0]
    channel.finish(timeout_s=20)
    return reply, held[0]


def test_a_load_over_shared_memory_gives_the_handle_back_before_it_is_acknowledged(worker, tmp_path):
    for seed in range(3):
        tensors = sent(W, seed)
        flat, entries = bucket_of(tensors)
        ledger = ipc_payload.Ledger(rank=0)
        handle = ledger.export(staged(flat), tp_rank=0, bucket=0)
        command = load_command(tmp_path, tensors, handle=handle.describe(), entries=entries)
        reply, weights = session_with(worker, tmp_path, command)
        assert weights == tensors["w"].tolist()
        assert (reply.error, reply.result.replayed, reply.result.read) == (None, seed > 0, {"w": 16})
        assert handle.count() == 0
        assert ledger.reclaim() == []


def test_a_load_that_fails_gives_the_handle_back_too(worker, tmp_path):
    tensors = {"nowhere": torch.ones(3)}
    flat, entries = bucket_of(tensors)
    ledger = ipc_payload.Ledger(rank=0)
    handle = ledger.export(staged(flat), tp_rank=0, bucket=0)
    reply, _ = session_with(
        worker, tmp_path, load_command(tmp_path, tensors, handle=handle.describe(), entries=entries)
    )
    assert "nowhere" in reply.error.message
    assert handle.count() == 0 and ledger.reclaim() == []
