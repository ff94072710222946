"""The trainer's end of a sync: who connects, who leaves, and what ends the waiting."""

import json
import threading
import time

import pytest
import zmq

from tpcolocate.errors import DeadlineError, EngineDeadError, EngineError, SyncError
from tpcolocate.server.channel import Channel

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


class Worker(threading.Thread):
    """Answers every command with what `answer` makes of it, until it is told to leave."""

    def __init__(self, path, tp_rank, answer=lambda command: {}):
        super().__init__(daemon=True)
        self.path, self.tp_rank, self.answer, self.seen = path, tp_rank, answer, []

    def run(self):
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, str(self.tp_rank).encode())
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(f"ipc://{self.path}")
            socket.send(json.dumps({"hello": self.tp_rank}).encode())
            while True:
                command = json.loads(socket.recv())
                self.seen.append(command)
                if command["do"] == "leave":
                    return
                answer = self.answer(command)
                if answer is None:
                    return
                socket.send(json.dumps({"number": command["number"], "by": self.tp_rank, **answer}).encode())
                if command.get("last"):
                    return


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
        channel.close()


def test_commands_reach_their_worker_and_answers_come_back(opened, tmp_path):
    channel, workers = opened(lambda c: {"got": c["x"]}, lambda c: {"got": -c["x"]})
    assert channel.greet(timeout_s=20) == {0: {"hello": 0}, 1: {"hello": 1}}
    channel.post({0: {"do": "it", "x": 1}, 1: {"do": "it", "x": 2}}, 7)
    answers = channel.collect(7, timeout_s=20)
    assert {k: (a["got"], a["by"]) for k, a in answers.items()} == {0: (1, 0), 1: (-2, 1)}
    channel.finish()
    assert [worker.seen[-1]["do"] for worker in workers] == ["leave", "leave"]
    assert list(tmp_path.iterdir()) == []


def test_several_commands_may_be_under_way(opened):
    channel, _ = opened(lambda c: {"got": c["x"]}, lambda c: {"got": c["x"]})
    channel.greet(timeout_s=20)
    for number in range(3):
        channel.post({k: {"do": "it", "x": number} for k in (0, 1)}, number)
    for number in (0, 1, 2):
        assert {a["got"] for a in channel.collect(number, timeout_s=20).values()} == {number}
    channel.finish()


def test_workers_that_know_the_last_command_are_not_told_to_leave(opened):
    channel, workers = opened(lambda c: {"got": c["x"]}, lambda c: {"got": c["x"]})
    channel.greet(timeout_s=20)
    channel.post({k: {"do": "it", "x": 1, "last": False} for k in (0, 1)}, 0)
    channel.post({k: {"do": "it", "x": 2, "last": True} for k in (0, 1)}, 1)
    for worker in workers:
        worker.join(20)
    assert {a["got"] for a in channel.collect(0, timeout_s=20).values()} == {1}
    assert {a["got"] for a in channel.collect(1, timeout_s=20).values()} == {2}, "also after SGLang has answered"
    channel.dismiss()
    channel.finish()
    assert [[command["do"] for command in worker.seen] for worker in workers] == [["it", "it"]] * 2


def test_dismissed_workers_are_gone_before_anybody_waits_for_them(opened):
    channel, workers = opened(lambda c: {})
    channel.greet(timeout_s=20)
    channel.dismiss()
    for worker in workers:
        worker.join(20)
    channel.dismiss()
    channel.finish()
    assert [[command["do"] for command in worker.seen] for worker in workers] == [["leave"]], "told once"


def test_a_request_that_fails_ends_the_waiting_with_its_error(tmp_path):
    def request():
        raise EngineDeadError("the server is gone")

    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(request)
    with pytest.raises(EngineDeadError, match="the server is gone"):
        channel.greet(timeout_s=20)
    with pytest.raises(EngineDeadError):
        channel.finish()


def test_a_request_that_ends_without_a_worker_is_told(tmp_path):
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(lambda: None)
    with pytest.raises(EngineError, match="ended the weight sync by itself"):
        channel.greet(timeout_s=20)
    channel.finish()


def test_a_worker_that_leaves_in_between_is_told(opened):
    channel, _ = opened(lambda c: None)
    channel.greet(timeout_s=20)
    channel.post({0: {"do": "it"}}, 0)
    with pytest.raises(EngineError, match="ended the weight sync by itself"):
        channel.collect(0, timeout_s=20)


def test_a_worker_that_takes_too_long_meets_the_deadline(opened):
    held = threading.Event()
    channel, _ = opened(lambda c: held.wait(20) and {})
    channel.greet(timeout_s=20)
    channel.post({0: {"do": "it"}}, 0)
    with pytest.raises(DeadlineError, match="answer command 0"):
        channel.collect(0, timeout_s=0.2)
    held.set()


def test_nobody_comes(tmp_path):
    over = threading.Event()
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    channel.call(lambda: over.wait(20))
    with pytest.raises(DeadlineError, match="open the weight sync"):
        channel.greet(timeout_s=0.2)
    over.set()
    channel.finish()


def test_a_path_that_no_socket_can_have_is_refused(tmp_path):
    with pytest.raises(SyncError, match="longer than 107 bytes"):
        Channel(tmp_path / ("x" * 107), tp_size=1)


def test_a_socket_that_nobody_was_called_to_goes_without_waiting(tmp_path):
    channel = Channel(tmp_path / "s.sock", tp_size=1)
    assert channel.endpoint == f"ipc://{tmp_path}/s.sock" and (tmp_path / "s.sock").exists()
    begun = time.monotonic()
    channel.finish()
    assert time.monotonic() - begun < 30 and not (tmp_path / "s.sock").exists()
