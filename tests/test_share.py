"""What the ranks of a launch report to each other, on real gloo groups that fail, ranks that stall, and ranks that die."""

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from harness import run_ranks
from test_agreement import group_of, store

from tpcolocate import errors, launch, rendezvous
from tpcolocate.agreement import RankGroup

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]


class Answers(BaseHTTPRequestHandler):
    """A server of which little is asked."""

    def do_GET(self):
        body = b'{"version": "0.5.21", "weight_version": "7"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Broken:
    """A process group of which this rank's connection was reset."""

    group_name = "broken"

    def allgather(self, *args):
        raise RuntimeError("Connection closed by peer")


def sockets():
    """Descriptors of this process that are sockets."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                found.add(int(entry))
    return found


@contextlib.contextmanager
def launched(rank, *, timeout_s=20.0, health_timeout_s=5.0, reset=False, broken_on=()):
    """A launch on this rank whose server runs already, on the owner; its group is real, and may be broken on purpose.

    Args:
        reset: Cut the connections of the group.
        broken_on: Ranks that alone see the group as broken.
    """
    launch.read_spec = lambda path: None
    before = sockets()
    group = group_of(rank, [0, 1], timeout_s)
    nonce = group.all_gather(f"{os.getpid()}", what="choose a nonce")[0]
    if reset:
        for descriptor in sockets() - before:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    connection.shutdown(socket.SHUT_RDWR)
    if rank in broken_on:
        group = RankGroup(group.members, rank=rank, group=Broken(), timeout_s=timeout_s)
    tp_slice = launch.TpSlice(group, 0, torch.device("cpu"), (), False, "job", 0)
    made = launch.Launch(tp_slice, launch.LaunchRequest("model", {}, {}, nonce, health_timeout_s=health_timeout_s))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield made, group, made._running_server(url, "key", {"version": "0.5.21", "weight_version": "7"})
    finally:
        server.shutdown()
        server.server_close()
        if rank == 0:
            shutil.rmtree(made.sync_folder, ignore_errors=True)  # which no `start_server` has made here


def share(made, rank, running, error=None, *, loads=lambda: True):
    """As `start_server` and `wait_for_server` do, but for the server, which `loads` has been waited for."""
    if rank == 0:
        made.sync_folder.mkdir(mode=0o700)
        while not loads():
            time.sleep(0.01)
        if error is None:
            rendezvous.announce(made._announcement_path, made._announcement(running))
        return made.share(error, None if error is not None else running)
    return made.wait_for_server()


def with_a_broken_group(rank, how, error):
    with launched(rank, **how) as (made, group, running):
        before = group.group
        alone = how.get("broken_on") == (1,)
        found = share(
            made,
            rank,
            running,
            errors.LaunchError("no GPU") if error else None,
            loads=lambda: made._meeting_place.exists() or not alone,
        )
        assert group.group is not before
        made.acknowledge(None, None)
        # Collective calls work, and again between both ranks.
        return found.weight_version, found.url, group.all_gather(rank, what="meet in a later call")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"reset": True}, {"broken_on": (0, 1)}, {"broken_on": (1,)}], ids=["reset", "both ranks", "a client alone"]
)
def test_a_broken_group_is_made_anew_and_the_announcement_has_the_server(how):
    one, other = run_ranks(with_a_broken_group, 2, how, False)
    assert one == other and one[0] == "7" and one[2] == [0, 1]


def test_an_error_of_the_owner_reaches_the_clients_past_a_broken_group():
    for outcome in run_ranks(with_a_broken_group, 2, {"reset": True}, True, expect_errors=True):
        assert type(outcome.error) is errors.LaunchError and "no GPU" in str(outcome.error), outcome


def without_a_way_back(rank):
    """The group is broken, and the other way as well."""
    with launched(rank, timeout_s=30.0, health_timeout_s=30.0, reset=True) as (made, group, running):

        def fail(*args, **options):
            raise RuntimeError("no device")

        launch.make_group_over_file.__globals__["_gloo"] = fail
        share(made, rank, running)


def test_a_group_that_cannot_be_made_anew_is_an_error_on_every_rank():
    for outcome in run_ranks(without_a_way_back, 2, expect_errors=True):
        assert type(outcome.error) is errors.RankLostError, outcome
        assert "could not be made anew" in str(outcome.error.__notes__)


def stalling(rank, who):
    """One rank comes once the other has given up."""
    with launched(rank, timeout_s=1.5, health_timeout_s=1.5) as (made, group, running):
        launch._LEAST_S = launch._GRACE_S = 0.5
        if rank == who:
            store().wait(["the other gave up"], timedelta(seconds=40))
        try:
            share(made, rank, running)
            made.acknowledge(None, None)
        except errors.TpColocateError as error:
            if rank != who:
                store().set("the other gave up", "1")
            return type(error).__name__, str(error)
        return "launched"


@pytest.mark.parametrize("who, awaited", [(0, "rank 0, which starts the server,"), (1, "another rank")])
@pytest.mark.slow
def test_a_rank_that_stalls_costs_the_launch_on_every_rank_and_the_limits_are_named(who, awaited):
    found = run_ranks(stalling, 2, who)
    kind, text = found[1 - who]
    assert kind == "DeadlineError" and awaited in text
    assert "within 3 s: health_timeout_s=1.5 of launch() and timeout_s=1.5 of init()" in text
    assert found[who] != "launched", "an engine whose collective calls would all fail"


def dying(rank):
    with launched(rank, timeout_s=30.0, health_timeout_s=30.0) as (made, group, running):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            made._look_at_clients()
            time.sleep(0.05)


def test_a_client_that_dies_while_the_server_loads_ends_the_launch():
    owner, client = run_ranks(dying, 2, expect_errors=True)
    assert client.exitcode == -signal.SIGKILL
    assert type(owner.error) is errors.RankLostError and "rank 1 has exited while the server loaded" in str(owner.error)


def failing_client(rank):
    with launched(rank) as (made, group, running):
        share(made, rank, running)
        made.acknowledge(MemoryError("no memory") if rank == 1 else None, None)


def test_what_a_client_fails_in_after_it_has_the_url_is_raised_on_the_owner_too():
    for outcome in run_ranks(failing_client, 2, expect_errors=True):
        assert type(outcome.error) is errors.RankFailedError and "no memory" in str(outcome.error), outcome
