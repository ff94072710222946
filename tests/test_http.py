"""HTTP to the engine against a real server: errors of our classes, nothing sent twice, nothing through a proxy."""

import asyncio
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tpcolocate.errors import ConfigError, DeadlineError, EngineDeadError, RequestError
from tpcolocate.parallel import in_background
from tpcolocate.server import connections
from tpcolocate.server import http as http_module
from tpcolocate.server.evidence import Finding
from tpcolocate.server.http import ServerClient

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

EVENTS = [b'data: {"text": "a"}\n\n', b": a comment\n\n", b'data: {"text": "ab"}\n\n']
ERRORS = {
    "/openai": (400, b'{"error": {"message": "too long", "code": 400}}', "too long"),
    "/message": (500, b'{"success": false, "message": "no such adapter"}', "no such adapter"),
    "/error_message": (400, b'{"error_message": "bad tag"}', "bad tag"),
    "/detail": (422, b'{"detail": "field required"}', "field required"),
    "/detail_list": (422, b'{"detail": [{"loc": ["body"]}]}', "[{'loc': ['body']}]"),
    "/error_text": (400, b'{"error": "plain words"}', "plain words"),
    "/plain": (503, b"Service is starting\n", "Service is starting"),
    "/empty": (404, b"", "Not Found"),
    "/list": (400, b'["what"]', '["what"]'),
    "/key": (401, b'{"error": "Unauthorized"}', "Unauthorized"),
    "/adapter": (
        400,
        b'{"error": "Failed to implicitly load LoRA adapter a: no hub"}',
        "Failed to implicitly load LoRA adapter a: no hub",
    ),
}
HINTS = {"/key": "api_key=engine.api_key", "/adapter": "ask once set_lora\\(\\) has returned"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def events(self, chunks, finish=True):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        if finish:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def handle_any(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, self.path, body, self.headers.get("Authorization")))
        if path in ERRORS:
            self.answer(*ERRORS[path][:2])
        elif path == "/dropped":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif path == "/generate":
            self.generate(json.loads(body))
        elif path == "/closing":
            self.answer(500, b"Internal Server Error", "text/plain")
            self.wfile.flush()
            self.close_connection = True
            self.server.over.wait(0.2)  # what comes meanwhile is lost
        elif path == "/slow":
            self.server.over.wait(30)
            self.close_connection = True
        elif path == "/text":
            self.answer(200, b"Cache flushed.\n", "text/plain")
        elif path == "/nothing":
            self.answer(200, b"")
        elif path == "/events":
            self.events([*EVENTS, b"data: [DONE]\n\n", b'data: {"text": "never"}\n\n'])
        elif path == "/events_error":
            self.events([EVENTS[0], b'data: {"error": {"message": "aborted by the server"}}\n\n', b"data: [DONE]\n\n"])
        elif path == "/events_cut":
            self.events(EVENTS[:1], finish=False)
        elif path == "/events_short":
            self.events(EVENTS[:1])
        elif path == "/events_pausing":
            self.events(self.pausing([*EVENTS, b"data: [DONE]\n\n"]))
        elif path == "/events_stuck":
            self.events(EVENTS[:1], finish=False)
            self.wfile.flush()
            self.server.over.wait(30)
        else:
            self.answer(200, json.dumps({"method": self.command, "body": json.loads(body or b"null")}).encode())

    def pausing(self, chunks):
        """Before each chunk but the first one it waits until the client has looked whether the server is up."""
        for number, chunk in enumerate(chunks):
            before = self.server.num_looks()
            while number > 0 and self.server.num_looks() == before and not self.server.over.wait(0.01):
                pass
            yield chunk

    def generate(self, body):
        if body.get("drop"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        with self.server.counting:
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        if body.get("held"):
            self.server.go_on.wait(30)
        self.server.over.wait(body.get("seconds", 0.0))
        with self.server.counting:
            self.server.running -= 1
        if body.get("stream"):
            self.events([*EVENTS, b"data: [DONE]\n\n"])
        else:
            self.answer(200, json.dumps(body).encode())

    do_GET = do_POST = handle_any


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # clients that give up close their connections

    def __enter__(self):
        self.requests, self.over, self.go_on = [], threading.Event(), threading.Event()
        self.counting, self.running, self.most_running = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def num_looks(self):
        return sum(path == "/model_info" for _, path, *_ in list(self.requests))

    def __exit__(self, *error):
        self.over.set()
        self.go_on.set()
        self.shutdown()
        self.server_close()


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        yield server


@pytest.fixture
def client(server):
    client = ServerClient(server.url, api_key="secret")
    yield client
    client.close()


@pytest.fixture
def connects(monkeypatch):
    """However busy the machine is, a request waits for its answer, and not for its connection, when its short time is over."""
    monkeypatch.setattr(http_module, "_connect_timeout", lambda timeout_s: 60.0)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send_blocking(client, path, timeout_s=10.0):
    return client.post(path, {"a": 1}, timeout_s=timeout_s)


def send_async(client, path, timeout_s=10.0):
    return asyncio.run(client.post_async(path, {"a": 1}, timeout_s=timeout_s))


def send_stream(client, path, timeout_s=10.0):
    return list(client.stream(path, {"a": 1}, timeout_s=timeout_s))


def send_stream_async(client, path, timeout_s=10.0):
    async def collect():
        return [event async for event in client.stream_async(path, {"a": 1}, timeout_s=timeout_s)]

    return asyncio.run(collect())


WAYS = [send_blocking, send_async, send_stream, send_stream_async]
every_way = pytest.mark.parametrize("send", WAYS)


@pytest.mark.parametrize("send", WAYS[:2])
def test_json_goes_out_with_the_key_and_comes_back(server, client, send):
    assert send(client, "/x") == {"method": "POST", "body": {"a": 1}}
    [(_, _, body, authorization)] = server.requests
    assert json.loads(body) == {"a": 1} and authorization == "Bearer secret"


def test_a_request_reports_that_it_has_left_before_it_is_answered(server, client):
    left = threading.Event()
    answer = in_background(lambda: client.post("/slow", {"a": 1}, timeout_s=60, sent=left.set), name="test")
    assert left.wait(30) and not answer.done()
    server.over.set()  # the connection is closed, without an answer
    with pytest.raises(EngineDeadError):
        answer.result()
    assert client.post("/any", {"b": 2}, timeout_s=10, sent=left.clear) == {"method": "POST", "body": {"b": 2}}
    assert not left.is_set() and [body for *_, body, _ in server.requests] == [b'{"a":1}', b'{"b":2}']


def test_get_params_and_empty_bodies(server, client):
    assert client.get("/x", timeout_s=10.0) == {"method": "GET", "body": None}
    assert client.post("/flush_cache", params={"timeout": 3}, timeout_s=10.0)["body"] == {}  # {} and not nothing
    assert server.requests[1][1] == "/flush_cache?timeout=3"
    assert client.get("/text", timeout_s=10.0) == "Cache flushed.\n"
    assert client.get("/nothing", timeout_s=10.0) is None


@pytest.mark.parametrize("path", ERRORS)
@every_way
def test_a_refusal_has_the_servers_message(server, client, send, path):
    status, _, words = ERRORS[path]
    with pytest.raises(RequestError) as caught:
        send(client, path)
    assert caught.value.message == f"{path}: {status}: {words}"
    assert caught.value.status == status and caught.value.url == server.url
    assert re.search(HINTS.get(path, "^$"), caught.value.hint or "")
    assert len(server.requests) == 1


@every_way
def test_a_dropped_connection_is_a_dead_engine_and_is_not_tried_again(server, client, send):
    client.get("/x", timeout_s=10.0)  # an idle connection that might be used, lost and replaced
    with pytest.raises(EngineDeadError) as caught:
        send(client, "/dropped")
    assert caught.value.url == server.url
    assert [path for _, path, *_ in server.requests] == ["/x", "/dropped"]


@every_way
def test_no_answer_in_time_is_a_deadline_and_is_not_tried_again(server, client, send, connects):
    began = time.monotonic()
    with pytest.raises(DeadlineError, match="/slow: no answer within 0.2 s"):
        send(client, "/slow", timeout_s=0.2)
    assert 0.2 <= time.monotonic() - began < 25, "the answer comes after 30 s"
    until(lambda: server.requests)  # which the server's own thread may read later
    assert len(server.requests) == 1


@every_way
def test_an_unused_port_is_a_dead_engine(send):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = ServerClient(f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(EngineDeadError, match="/x: (NewConnection|Connect)Error"):
            send(client, "/x")
        client.close()


@pytest.mark.parametrize("send", WAYS[2:])
class TestStreams:
    def test_events_end_with_done(self, client, send):
        assert send(client, "/events") == [{"text": "a"}, {"text": "ab"}]

    def test_an_error_among_the_events_is_raised(self, client, send):
        with pytest.raises(RequestError, match="/events_error: aborted by the server"):
            send(client, "/events_error")

    @pytest.mark.parametrize("path", ["/events_cut", "/events_short"])
    def test_a_stream_that_is_cut_is_no_end(self, client, send, path):
        with pytest.raises(EngineDeadError):
            send(client, path)

    def test_the_deadline_is_for_each_event(self, client, send):
        with pytest.raises(DeadlineError):
            send(client, "/events_stuck", timeout_s=0.3)


def test_a_stream_that_is_left_early_gives_its_connection_back(server, client):
    stream = client.stream("/events", {}, timeout_s=10.0)
    assert next(stream) == {"text": "a"}
    stream.close()
    assert client.get("/x", timeout_s=10.0)["method"] == "GET"


@pytest.fixture
def accepted(server, monkeypatch):
    """Connections that the server has accepted so far."""
    found = []
    original = server.get_request
    monkeypatch.setattr(server, "get_request", lambda: found.append(original()) or found[-1])
    return found


def test_one_connection_serves_one_request_after_the_other(client, accepted, monkeypatch):
    monkeypatch.setattr(connections, "_KEEPALIVE_S", 60.0)
    for _ in range(5):
        assert client.post("/x", {"a": 1}, timeout_s=10.0)["body"] == {"a": 1}
    with pytest.raises(RequestError):
        client.get("/openai", timeout_s=10.0)
    assert client.get("/x", timeout_s=10.0)["method"] == "GET"
    assert len(accepted) == 1


def test_a_connection_that_the_server_has_closed_is_not_used_again(server, client, accepted):
    client.get("/x", timeout_s=10.0)
    accepted[0][0].shutdown(socket.SHUT_RDWR)
    assert client.get("/x", timeout_s=10.0)["method"] == "GET"
    assert len(accepted) == 2 and len(server.requests) == 2, "found closed before anything was sent on it"


def test_an_old_idle_connection_is_not_used_again(client, accepted, monkeypatch):
    client.get("/x", timeout_s=10.0)
    monkeypatch.setattr(connections, "_KEEPALIVE_S", 0.0)
    client.get("/x", timeout_s=10.0)
    assert len(accepted) == 2


def test_nan_is_refused_before_anything_is_sent(server, client):
    with pytest.raises(ValueError, match="JSON"):
        client.post("/x", {"temperature": float("nan")}, timeout_s=10.0)
    assert server.requests == []


def test_several_event_loops_one_after_the_other_and_threads(server, client):
    async def many():
        return await asyncio.gather(*(client.post_async("/x", {"i": i}, timeout_s=10.0) for i in range(20)))

    for _ in range(2):
        assert [answer["body"]["i"] for answer in asyncio.run(many())] == list(range(20))
    found = []
    threads = [threading.Thread(target=lambda: found.append(send_blocking(client, "/x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(server.requests) == 48


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("send", WAYS[:2])
def test_a_proxy_of_the_environment_gets_nothing(server, monkeypatch, name, send):
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))  # refuses every connection
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with pytest.raises(httpx.ConnectError):  # the variable does say something to others
            httpx.get(server.url + "/x")
        client = ServerClient(server.url)
        assert send(client, "/x")["method"] == "POST"
        client.close()


def test_a_line_per_request_stays_out_of_the_log_for_this_server_only(server, caplog):
    caplog.set_level(logging.INFO, logger="httpx")

    def lines(call):
        caplog.clear()
        call()
        return [record.getMessage() for record in caplog.records if record.name == "httpx"]

    def by_others():
        httpx.get(server.url + "/other", trust_env=False)

    assert len(lines(by_others)) == 1
    one, two = ServerClient(server.url), ServerClient(server.url)
    assert lines(lambda: send_blocking(one, "/x")) == lines(lambda: send_async(one, "/x")) == []
    one.close()
    one.close()
    assert lines(lambda: send_blocking(two, "/x")) == [], "another client of the same server goes on"
    prefix = ServerClient(server.url[:-1])  # port 3000 is no part of port 30001
    two.close()
    assert len(lines(by_others)) == 1
    prefix.close()


@pytest.mark.parametrize("path, listening", [(None, True), ("dead", False)])
def test_listening(server, client, path, listening):
    if path == "dead":
        server.shutdown()
        server.server_close()
    assert client.is_listening(timeout_s=5.0) is listening
    assert client.is_healthy(timeout_s=5.0) is listening


# --- connections ----------------------------------------------------------------------------------------------------


@every_way
def test_a_connection_that_the_server_closes_after_a_500_is_not_used_again(server, client, accepted, send):
    for _ in range(3):
        with pytest.raises(RequestError) as caught:
            send(client, "/closing")
        assert caught.value.status == 500
        assert client.get("/x", timeout_s=10.0)["method"] == "GET"

    async def on_one_loop():
        for _ in range(3):
            with pytest.raises(RequestError):
                await client.post_async("/closing", {}, timeout_s=10.0)
            assert await client.post_async("/x", {}, timeout_s=10.0)

    asyncio.run(on_one_loop())


def generate_blocking(client, body, timeout_s=30.0):
    return client.post("/generate", body, timeout_s=timeout_s)


def generate_async(client, body, timeout_s=30.0):
    return asyncio.run(client.post_async("/generate", body, timeout_s=timeout_s))


def generate_stream(client, body, timeout_s=30.0):
    return list(client.stream("/generate", {**body, "stream": True}, timeout_s=timeout_s))


def generate_stream_async(client, body, timeout_s=30.0):
    async def collect():
        events = client.stream_async("/generate", {**body, "stream": True}, timeout_s=timeout_s)
        return [event async for event in events]

    return asyncio.run(collect())


every_generate = pytest.mark.parametrize(
    "generate", [generate_blocking, generate_async, generate_stream, generate_stream_async]
)


@every_generate
def test_a_lost_connection_to_a_server_that_is_up_is_no_dead_engine(server, client, generate, monkeypatch):
    monkeypatch.setattr(http_module, "_ENDING_S", 0.0)
    with pytest.raises(RequestError, match="the server is up, but closed the connection") as caught:
        generate(client, {"drop": True})
    assert caught.value.status is None
    monkeypatch.setattr(client, "_is_up", lambda *_: False)
    with pytest.raises(EngineDeadError, match="/generate: "):
        generate(client, {"drop": True})
    sent = [path for _, path, *_ in server.requests]
    assert sent.count("/generate") == 2, "never sent again"


@every_generate
@pytest.mark.parametrize("answers", [0, 2])
def test_a_lost_connection_to_a_server_that_does_not_answer_costs_no_more_than_the_requests_own_time(
    client, generate, answers, monkeypatch
):
    """It may stop answering between two looks: those after the first would otherwise take their full ten seconds each."""
    monkeypatch.setattr(http_module, "_ENDING_S", 0.0)
    monkeypatch.setattr(http_module, "_LEAST_LOOKS_S", 0.1)
    monkeypatch.setattr(http_module, "_LEAST_LOOK_S", 0.01)
    now, began, asked = [0.0], time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: began() + now[0])

    def is_listening(*, timeout_s):
        asked.append(timeout_s)
        now[0] += timeout_s
        return len(asked) <= answers // 2

    monkeypatch.setattr(client, "is_listening", is_listening)
    with pytest.raises(EngineDeadError):
        generate(client, {"drop": True}, timeout_s=6.0)
    assert sum(asked) < 7.0, asked
    asked.clear()
    with pytest.raises(EngineDeadError):
        generate(client, {"drop": True}, timeout_s=None)
    assert asked == [10.0] * (2 + answers // 2), "as long as a busy server may need"


@pytest.fixture
def few(server, monkeypatch):
    """A client with four connections for generation."""
    monkeypatch.setattr(connections, "_MOST_CONNECTIONS", 4)
    client = ServerClient(server.url)
    yield client
    client.close()


def test_requests_wait_for_one_of_few_connections_and_others_pass_them(server, few):
    threads = [
        in_background(lambda i=i: generate_blocking(few, {"i": i, "held": True, "seconds": 0.05}), name="test")
        for i in range(40)
    ]
    until(lambda: server.running == 4)
    assert few.get("/x", timeout_s=10.0)["method"] == "GET" and not any(thread.done() for thread in threads)
    server.go_on.set()
    assert [thread.result()["i"] for thread in threads] == list(range(40))
    assert server.most_running <= 4

    async def many():
        bodies = [{"i": i, "seconds": 0.05} for i in range(40)]
        return await asyncio.gather(*(few.post_async("/generate", body, timeout_s=30.0) for body in bodies))

    server.most_running = 0
    assert [answer["i"] for answer in asyncio.run(many())] == list(range(40))
    assert server.most_running <= 4


def test_a_stream_that_is_left_early_gives_its_place_back(few):
    for _ in range(10):
        stream = few.stream("/generate", {"stream": True}, timeout_s=5.0)
        next(stream)
        stream.close()


def test_no_free_connection_in_time_is_a_deadline_and_nothing_was_sent(server, few):
    running = [in_background(lambda: generate_blocking(few, {"seconds": 20}), name="test") for _ in range(4)]
    while server.running < 4:
        time.sleep(0.01)
    with pytest.raises(DeadlineError, match="no free connection within 0.1 s: 4 requests of this process"):
        generate_blocking(few, {}, timeout_s=0.1)

    async def on_one_loop():
        tasks = [asyncio.create_task(few.post_async("/generate", {"seconds": 20}, timeout_s=60.0)) for _ in range(4)]
        while server.running < 8:
            await asyncio.sleep(0.01)
        with pytest.raises(DeadlineError, match="no free connection within 0.1 s"):
            await few.post_async("/generate", {}, timeout_s=0.1)
        server.over.set()
        await asyncio.gather(*tasks)

    asyncio.run(on_one_loop())
    for each in running:
        each.result()
    assert len(server.requests) == 8


UNDER_A_LIMIT = """
import asyncio, resource, sys, threading
from concurrent.futures import ThreadPoolExecutor
from tpcolocate.errors import ConfigError
from tpcolocate.server.http import ServerClient

resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
client = ServerClient(sys.argv[1])
with ThreadPoolExecutor(100) as pool:
    found = list(pool.map(lambda i: client.post("/generate", {"i": i, "seconds": 0.01}, timeout_s=60)["i"], range(300)))
assert found == list(range(300))

async def many():
    return await asyncio.gather(*(client.post_async("/generate", {"i": i, "seconds": 0.01}, timeout_s=60) for i in range(300)))

assert [each["i"] for each in asyncio.run(many())] == list(range(300))
client.close()
taken = []
try:
    while True:
        taken.append(open("/dev/null"))
except OSError:
    pass
client = ServerClient(sys.argv[1])
for send in (client.post, lambda path, body, timeout_s: asyncio.run(client.post_async(path, body, timeout_s=timeout_s))):
    for _ in range(3 if send != client.post else 0):
        taken.pop().close()  # of an event loop
    try:
        send("/generate", {}, timeout_s=10)
    except ConfigError as error:
        assert "no file descriptor left for a connection; its limit is 128" in str(error), error
    else:
        raise AssertionError("there was one")
print("done")
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_hundreds_of_requests_under_a_low_limit_of_descriptors(server):
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, server.url], capture_output=True, text=True, timeout=180
    )
    assert done.stdout == "done\n", done.stderr


def in_a_child(client, answers):
    answers.put([generate_blocking(client, {"i": 1})["i"], generate_async(client, {"i": 2})["i"]])


def test_a_forked_child_has_connections_of_its_own(server, client, accepted):
    assert generate_blocking(client, {"i": 0})["i"] == 0
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=in_a_child, args=(client, answers))
    child.start()
    assert answers.get(timeout=30) == [1, 2]
    child.join(30)
    assert generate_blocking(client, {"i": 3})["i"] == 3
    assert len(accepted) >= 3, "the child took none of its parent's"
    ports = [address[1] for _, address in accepted]
    assert len(set(ports)) == len(ports)


def open_sockets():
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return sum(link.startswith("socket:") for link in links)


def test_an_event_loop_per_step_leaves_no_sockets(server, client):
    generate_async(client, {})
    before = open_sockets()
    for _ in range(10):
        generate_async(client, {})
    until(lambda: open_sockets() <= before)  # the server's end, in this process, has to notice as well
    for _ in range(3):  # not by asyncio.run, which ends generators
        loop = asyncio.new_event_loop()
        loop.run_until_complete(client.post_async("/generate", {}, timeout_s=10.0))
        loop.close()
    assert len(client._connections._of_process.loops) == 1


def test_threads_with_a_loop_each_do_not_meet_in_the_connections_of_a_loop_that_was_closed(client):
    class Closed:
        def is_closed(self):
            time.sleep(0.1)  # in which the other thread comes
            return True

    closed = Closed()
    client._connections._of_process.loops[closed] = None

    async def use():
        await client._connections.of_loop()

    for thread in [in_background(lambda: asyncio.run(use()), name="test") for _ in range(4)]:
        thread.result(10)
    assert closed not in client._connections._of_process.loops


@pytest.mark.parametrize("ticks", range(1, 5))
def test_a_request_that_is_cancelled_as_it_begins_is_cancelled(server, client, ticks):
    """Python 3.11's `asyncio.wait_for` returns in place of a cancellation that comes with its result."""

    async def cancel():
        await client._connections.of_loop()
        task = asyncio.create_task(client.post_async("/generate", {"seconds": 20}, timeout_s=60.0))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=15)  # it would be answered after 20 s
        return task.cancelled()

    assert asyncio.run(cancel())


@every_way
def test_a_server_that_is_too_busy_to_take_connections_is_not_dead(send):
    """A kernel has 128 of them wait for it, or as many as the system permits, and lets the rest try again."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as busy:
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(busy.getsockname())
        client = ServerClient(f"http://127.0.0.1:{busy.getsockname()[1]}")
        with pytest.raises(DeadlineError, match=r"no connection within 0\.3 s") as caught:
            send(client, "/generate", 0.3)
        assert "nothing was sent" in caught.value.hint
        client.close()
        for each in waiting:
            each.close()
    assert http_module._connect_timeout(None) >= 60, "which the kernel's tries need"


@pytest.mark.parametrize("kind", [TimeoutError, ConnectionError, KeyError])
@pytest.mark.parametrize("path", ["/slow", "/events_stuck"])
def test_what_a_signals_handler_raises_is_no_error_of_the_server(client, path, kind):
    raised = kind("of the script's own watchdog")

    def watchdog(*_):
        raise raised

    before = signal.signal(signal.SIGALRM, watchdog)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(kind) as caught:
            list(client.stream(path, {}, timeout_s=None)) if "events" in path else client.post(path, timeout_s=20.0)
        assert caught.value is raised
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_whose_handler_closes_a_client_while_it_is_used_does_not_wait_for_its_own_thread(client, monkeypatch):
    new_pool = client._connections._new_pool

    def interrupted():
        client.close()  # as a handler of SIGTERM that shuts the engine down
        return new_pool()

    monkeypatch.setattr(client._connections, "_new_pool", interrupted)
    assert in_background(client._connections.pool, name="test").result(30) is not None


def test_close_closes_the_connections_of_a_running_loop(client):
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(client.post_async("/generate", {}, timeout_s=10.0), loop).result(10)
    of_loop = client._connections._of_process.loops[loop]
    client.close()
    until(lambda: of_loop.client.is_closed)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.mark.parametrize("generate", [generate_blocking, generate_async])
def test_without_a_timeout_a_request_waits_as_long_as_the_server_is_up(server, client, generate, monkeypatch):
    for module in (connections, http_module):
        monkeypatch.setattr(module, "LOOK_S", 0.1)
    asking = in_background(lambda: generate(client, {"i": 1, "held": True}, timeout_s=None), name="test")
    until(lambda: server.num_looks() >= 2)
    server.go_on.set()
    assert asking.result()["i"] == 1
    monkeypatch.setattr(client, "_is_up", lambda *_: False)
    began = time.monotonic()
    with pytest.raises(EngineDeadError, match="the server does not answer"):
        generate(client, {"seconds": 20}, timeout_s=None)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("generate", [generate_blocking, generate_async])
def test_a_server_whose_processes_run_may_be_silent_for_minutes(
    server, client, generate, monkeypatch, caplog, tmp_path
):
    """While it tokenized a large batch for 20 s it was an EngineDeadError."""
    for module in (connections, http_module):
        monkeypatch.setattr(module, "LOOK_S", 0.1)
    monkeypatch.setattr(client, "_is_up", lambda *_: False)
    log, looks = tmp_path / "log", []

    def evidence():
        looks.append(1)
        if len(looks) == 3:
            server.go_on.set()  # now it answers
        return Finding(None, False, log, "its end")

    client.evidence = evidence
    assert generate(client, {"i": 1, "held": True}, timeout_s=None)["i"] == 1
    warned = [message for message in caplog.messages if "all its processes run" in message]
    assert len(warned) >= 3 and warned[0].startswith(f"{client.url} has not answered for ")
    client.evidence = lambda: Finding("sglang::scheduler (pid 7) is stopped", False, log, "its end")
    with pytest.raises(EngineDeadError, match=r"^sglang::scheduler \(pid 7\) is stopped; the server does not answer"):
        generate(client, {"seconds": 20}, timeout_s=None)
    client.evidence = lambda: Finding(None, False, log, "its end")
    monkeypatch.setattr(http_module, "_SILENT_S", 0.0)
    with pytest.raises(EngineDeadError, match=r"nothing for \d+ s, though its processes run"):
        generate(client, {"seconds": 20}, timeout_s=None)


def test_an_answer_ends_the_silence_of_a_server(client, monkeypatch, tmp_path):
    now, is_up = [1000.0], [False]
    monkeypatch.setattr(http_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(client, "_is_up", lambda *_: is_up[0])
    client.evidence = lambda: Finding(None, False, tmp_path / "log", "its end")

    def looks(*answers):
        for is_up[0] in answers:
            now[0] += 80
            client._look()

    looks(False, False, False)
    looks(True, False, False, False)
    now[0] += 1000  # no request, no looks
    looks(False, False, False, False)
    with pytest.raises(EngineDeadError, match="nothing for 320 s"):
        looks(False)


@pytest.mark.parametrize("generate", [generate_blocking, generate_async])
def test_a_request_that_the_server_holds_says_why(server, client, generate, monkeypatch, caplog, connects):
    """After a pause that was not ended generate() waited without a word, or asked for a longer timeout_s."""
    for module in (connections, http_module):
        monkeypatch.setattr(module, "LOOK_S", 0.1)
    why = "generation is paused (retract) until continue_generation() is called"
    client.held = lambda: why
    warning = f"requests to {client.url} wait: {why}"
    held = in_background(lambda: generate(client, {"held": True}, timeout_s=None), name="test")
    until(lambda: caplog.messages.count(warning) >= 2)
    server.go_on.set()
    held.result()
    assert 2 <= caplog.messages.count(warning) <= server.num_looks()
    with pytest.raises(DeadlineError) as caught:
        generate(client, {"seconds": 20}, timeout_s=0.1)
    assert caught.value.message == f"/generate: no answer within 0.1 s: {why}"
    assert "continue_generation() on every rank" in caught.value.hint and "raise timeout_s" not in caught.value.hint
    with pytest.raises(DeadlineError, match="no answer within 0.1 s.*\n.*raise timeout_s"):
        client.get("/slow", timeout_s=0.1)
    caplog.clear()
    client.held = lambda: None
    generate(client, {"seconds": 0.3}, timeout_s=None)
    assert caplog.messages == []


@pytest.mark.parametrize("send", [send_stream, send_stream_async])
def test_without_a_timeout_a_stream_that_has_begun_waits_as_long_as_the_server_is_up(server, client, send, monkeypatch):
    for module in (connections, http_module):
        monkeypatch.setattr(module, "LOOK_S", 0.1)
    assert send(client, "/events_pausing", timeout_s=None) == [{"text": "a"}, {"text": "ab"}]
    assert server.num_looks() >= 3
    monkeypatch.setattr(client, "_is_up", lambda *_: False)
    began = time.monotonic()
    with pytest.raises(EngineDeadError, match="the server does not answer"):
        send(client, "/events_stuck", timeout_s=None)
    assert time.monotonic() - began < 15
    wait_for_the_end_of_lookouts()


def test_a_stream_without_a_timeout_that_is_left_early_ends_its_thread(client, monkeypatch):
    monkeypatch.setattr(http_module, "LOOK_S", 0.05)
    stream = client.stream("/events_stuck", {}, timeout_s=None)
    assert next(stream) == {"text": "a"}
    stream.close()
    wait_for_the_end_of_lookouts()


def wait_for_the_end_of_lookouts():
    until(lambda: not any(thread.name == "tpcolocate stream" for thread in threading.enumerate()))


def test_a_deadline_names_its_argument(client, connects):
    with pytest.raises(DeadlineError, match="for more time raise timeout_s"):
        generate_blocking(client, {"seconds": 20}, timeout_s=0.1)


@pytest.mark.parametrize("body", [{"a": float("inf")}, {"a": object()}, {"a": "\ud800"}, {"a": b"x"}, {"a": {1, 2}}])
@every_generate
def test_what_json_cannot_hold_is_an_error_of_this_library(server, client, generate, body):
    with pytest.raises(ConfigError, match="the request is no JSON"):
        generate(client, body)
    assert server.requests == []
