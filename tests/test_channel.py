"""The trainer's end of a sync: who connects, who leaves, and what ends the waiting."""

import threading
import time

import pytest
import zmq

from tpcolocate.errors import DeadlineError, EngineDeadError, EngineError, SyncError
from tpcolocate.in_server.tpcolocate_receiver.protocol import (
    Addressed,
    FindUnwritten,
    Greeting,
    Leave,
    Reply,
    RunProgram,
    UnwrittenParameters,
    addressed_to_all,
    decode_command,
    decode_envelope,
    encode_reply,
)
from tpcolocate.server import channel as module
from tpcolocate.server.channel import Channel

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


class Worker(threading.Thread):
    """Answers every command with the names that `answer` makes of it, until it gets `Leave` or that is None."""

    def __init__(self, path, tp_rank, answer):
        super().__init__(daemon=True)
        self.path, self.tp_rank, self.answer, self.seen = path, tp_rank, answer, []

    def run(self):
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, str(self.tp_rank).encode())
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(f"ipc://{self.path}")
            socket.send(encode_reply(greeting(self.tp_rank)))
            while True:
                envelope = decode_envelope(socket.recv())
                command = decode_command(envelope)
                assert envelope.for_tp_rank == self.tp_rank
                self.seen.append(command)
                if isinstance(command, Leave) or (names := self.answer(command)) is None:
                    return
                reply = Reply(self.tp_rank, envelope.number, None, True, 0.1, UnwrittenParameters(names))
                socket.send(encode_reply(reply))
                if isinstance(command, RunProgram) and command.is_last:
                    return


def greeting(tp_rank):
    return Reply(tp_rank, None, None, False, 0.1, Greeting(None, f"plan of {tp_rank}", "worker"))


def program_of(command):
    return [command.program]


@pytest.fixture
def opened(tmp_path):
    """A function that opens a channel whose request lasts until all workers have left."""
    channels = []

    def make(*answers):
        path = tmp_path / "s.sock"
        workers = [Worker(path, k, answer) for k, answer in enumerate(answers)]

        def request():
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        channel = Channel(path, tp_size=len(workers))
        channel.call(request)
        channels.append(channel)
        return channel, workers

    yield make
    for channel in channels:
        channel.close(timeout_s=20)


def test_commands_reach_their_worker_and_answers_come_back(opened, tmp_path):
    channel, workers = opened(program_of, lambda c: [*program_of(c), "and more"])
    assert channel.greet(timeout_s=20) == {0: greeting(0), 1: greeting(1)}
    channel.post({k: Addressed(k, RunProgram(program=name)) for k, name in enumerate("ab")}, 7)
    replies = channel.collect(7, timeout_s=20)
    assert {k: (r.result.names, r.tp_rank) for k, r in replies.items()} == {0: (["a"], 0), 1: (["b", "and more"], 1)}
    channel.finish(timeout_s=20)
    assert [worker.seen[-1] for worker in workers] == [Leave(), Leave()]
    assert list(tmp_path.iterdir()) == []


def test_several_commands_may_be_under_way(opened):
    channel, _ = opened(program_of, program_of)
    channel.greet(timeout_s=20)
    for number in range(3):
        channel.post(addressed_to_all(RunProgram(program=f"p{number}"), 2), number)
    for number in (0, 1, 2):
        assert [r.result.names for r in channel.collect(number, timeout_s=20).values()] == [[f"p{number}"]] * 2
    channel.finish(timeout_s=20)


def test_workers_that_got_the_last_command_are_not_sent_another(opened):
    commands = [RunProgram(program="p1"), RunProgram(program="p2", is_last=True)]
    channel, workers = opened(program_of, program_of)
    channel.greet(timeout_s=20)
    for number, command in enumerate(commands):
        channel.post(addressed_to_all(command, 2), number)
    for worker in workers:
        worker.join(20)
    for number, name in enumerate(["p1", "p2"]):  # also after SGLang has answered
        assert [r.result.names for r in channel.collect(number, timeout_s=20).values()] == [[name]] * 2
    channel.dismiss()
    channel.finish(timeout_s=20)
    assert [[command.program for command in worker.seen] for worker in workers] == [["p1", "p2"]] * 2


def test_dismissed_workers_leave_before_they_are_waited_for(opened):
    channel, workers = opened(program_of)
    channel.greet(timeout_s=20)
    channel.dismiss()
    for worker in workers:
        worker.join(20)
    channel.dismiss()
    channel.finish(timeout_s=20)
    assert [worker.seen for worker in workers] == [[Leave()]], "sent once"


def test_a_request_that_fails_ends_the_waiting_with_its_error(tmp_path):
    def request():
        raise EngineDeadError("the server is gone")

    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(request)
    with pytest.raises(EngineDeadError, match="the server is gone"):
        channel.greet(timeout_s=20)
    with pytest.raises(EngineDeadError):
        channel.finish(timeout_s=20)


def test_a_request_that_ends_without_a_worker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LATE_MS", 200)
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(lambda: None)
    with pytest.raises(EngineError, match="ended the weight sync by itself"):
        channel.greet(timeout_s=20)
    channel.finish(timeout_s=20)


def test_a_worker_that_leaves_in_between_is_an_error(opened, monkeypatch):
    monkeypatch.setattr(module, "_LATE_MS", 200)
    channel, _ = opened(lambda c: None)
    channel.greet(timeout_s=20)
    channel.post({0: Addressed(0, FindUnwritten())}, 0)
    with pytest.raises(EngineError, match="ended the weight sync by itself: its TP workers did not answer command 0"):
        channel.collect(0, timeout_s=20)


def test_a_reply_that_comes_after_the_end_of_the_request_counts(tmp_path):
    """ZeroMQ hands it over in a thread of its own, which on a busy machine may have to wait for its turn."""
    over = threading.Event()
    worker = Worker(tmp_path / "s.sock", 0, lambda command: over.set() or time.sleep(1.5) or ["late"])
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(lambda: worker.start() or over.wait(20))
    channel.greet(timeout_s=20)
    channel.post({0: Addressed(0, RunProgram(is_last=True))}, 0)
    assert channel.collect(0, timeout_s=20)[0].result.names == ["late"]
    channel.finish(timeout_s=20)
    worker.join(20)


def test_a_worker_that_has_left_gets_no_more_commands(opened):
    channel, [worker] = opened(lambda c: None)
    channel.greet(timeout_s=20)
    channel.post({0: Addressed(0, FindUnwritten())}, 0)
    worker.join(20)
    with pytest.raises(EngineDeadError, match="TP rank 0 has left the weight sync"):
        for number in range(1, 1000):  # until ZeroMQ has noticed
            channel.post({0: Addressed(0, FindUnwritten())}, number)
            time.sleep(0.01)


@pytest.mark.parametrize("least_s, timeout_s", [(0.1, 0.0), (0.0, 3.1)])
def test_a_request_that_does_not_end_is_an_error(tmp_path, monkeypatch, least_s, timeout_s):
    monkeypatch.setattr(module, "_LEAVE_S", least_s)
    over = threading.Event()
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(lambda: over.wait(20))
    with pytest.raises(
        DeadlineError, match="did not answer in time after the end of the weight sync\n.*the server's log"
    ):
        channel.finish(timeout_s=timeout_s)
    over.set()


def test_a_stopped_process_is_named_where_the_server_is_too_late(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LEAVE_S", 0.1)
    over, stopped = threading.Event(), lambda: ["sglang::scheduler (pid 7) is stopped"]
    channel = Channel(tmp_path / "s.sock", tp_size=1, stopped=stopped)
    channel.call(lambda: over.wait(20))
    for call in (channel.greet, channel.finish):
        with pytest.raises(DeadlineError, match=r"in time.*: sglang::scheduler \(pid 7\) is stopped\n.*kill -CONT"):
            call(timeout_s=0.1)
    over.set()


def test_an_answer_that_comes_late_is_waited_for_while_the_sync_has_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LEAVE_S", 0.1)
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(lambda: time.sleep(0.5))
    channel.finish(timeout_s=30)


def test_a_folder_that_is_not_there_leaves_nothing_behind(tmp_path):
    with pytest.raises(zmq.ZMQError):
        Channel(tmp_path / "none" / "s.sock", tp_size=1)


def test_a_worker_that_takes_too_long_meets_the_deadline(opened):
    held = threading.Event()
    channel, _ = opened(lambda c: held.wait(20) and [])
    channel.greet(timeout_s=20)
    channel.post({0: Addressed(0, FindUnwritten())}, 0)
    with pytest.raises(DeadlineError, match="answer command 0"):
        channel.collect(0, timeout_s=0.2)
    held.set()


def test_no_worker_connects(tmp_path):
    over = threading.Event()
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(lambda: over.wait(20))
    with pytest.raises(DeadlineError, match="open the weight sync"):
        channel.greet(timeout_s=0.2)
    over.set()
    channel.finish(timeout_s=20)


def test_a_path_that_no_socket_can_have_is_refused(tmp_path):
    with pytest.raises(SyncError, match="longer than 107 bytes"):
        Channel(tmp_path / ("x" * 107), tp_size=1)


def test_a_socket_without_a_request_is_closed_without_waiting(tmp_path):
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    assert channel.endpoint == f"ipc://{tmp_path}/s.sock" and (tmp_path / "s.sock").exists()
    begun = time.monotonic()
    channel.finish(timeout_s=20)
    assert time.monotonic() - begun < 30 and not (tmp_path / "s.sock").exists()
