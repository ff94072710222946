"""Why a server does not answer: errors name the process that died or is stopped, and the log."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tpcolocate.errors import DeadlineError, EngineDeadError
from tpcolocate.processes import is_stopped, start_of
from tpcolocate.server.evidence import Evidence, Finding
from tpcolocate.server.http import ServerClient

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def record(tmp_path, child):
    """The list of processes that a supervisor writes, with one process."""
    path = tmp_path / "processes.json"
    entry = {"name": "sglang::scheduler_TP1", "pid": child.pid, "started": start_of(child.pid)}
    own = {"name": "supervisor", "pid": os.getpid(), "started": start_of(os.getpid())}
    path.write_text(json.dumps({"supervisor": own, "processes": [entry], "files": []}))
    return path


def stop(child):
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)


def test_a_stopped_process_is_named_at_once_and_is_not_dead(tmp_path, child, record):
    asked = []
    evidence = Evidence(tmp_path / "log", record, lambda: asked.append(1))
    stop(child)
    assert is_stopped(child.pid)
    found = evidence()
    assert len(asked) == 1, "no death is waited for"
    assert found.cause == f"sglang::scheduler_TP1 (pid {child.pid}) is stopped" and not found.is_dead
    assert "kill -CONT" in found.hint and str(tmp_path / "log") in found.hint
    child.send_signal(signal.SIGCONT)
    while is_stopped(child.pid):
        time.sleep(0.01)
    found = evidence()
    assert found.cause is None and not found.is_dead


def test_a_death_that_is_reported_a_moment_later_is_waited_for(tmp_path, record):
    reports = iter([None, None, None, "sglang::detokenizer (pid 7) was killed by SIGKILL"])
    found = Evidence(tmp_path / "log", record, lambda: next(reports))()
    assert found.is_dead and found.cause == "sglang::detokenizer (pid 7) was killed by SIGKILL"
    assert found.tail == "(no log)" and found.hint == "there is no log; launch(log_path=...) keeps one"


def test_another_process_reads_the_death_from_the_log(tmp_path, record):
    log = tmp_path / "log"
    mine, other = "[launch 0123abcd]", "[launch ffffffff]"
    folder = tmp_path / "tpcolocate-0-77-0123abcd89"
    folder.mkdir()
    processes = record.rename(folder / "processes.json")
    log.write_text(f"[tpcolocate] of an earlier server {mine}\n")
    evidence = Evidence(log, processes)
    with log.open("a") as file:
        file.write(f"a line\n[tpcolocate] main process (pid 3) exited with code 1 {other}\n")
        file.flush()
        assert not evidence().is_dead, "of the server of another slice, with the same log"
        file.write(f"[tpcolocate] sglang::detokenizer (pid 7) was killed by SIGKILL {mine}\nlast words\n")
    found = evidence()
    assert found.is_dead and found.cause == "sglang::detokenizer (pid 7) was killed by SIGKILL"
    assert found.tail.endswith(f"was killed by SIGKILL {mine}\nlast words")


def test_another_process_sees_that_the_folder_of_the_launch_is_gone(tmp_path):
    found = Evidence(tmp_path / "log", tmp_path / "gone" / "processes.json")()
    assert found.is_dead and found.cause == "the server was ended"


def silent():
    """A server that accepts connections and never answers."""
    import socket

    listening = socket.create_server(("127.0.0.1", 0))
    return listening, f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("found, kind, words", [
    (Finding("sglang::detokenizer (pid 7) is stopped", False, "/log", "tail"), DeadlineError, "no answer within 0.2 s: sglang::deto"),
    (Finding("sglang::detokenizer (pid 7) was killed by SIGKILL", True, "/log", "tail"), EngineDeadError,
     "sglang::detokenizer (pid 7) was killed by SIGKILL; /generate: no answer"),
    (Finding(None, False, "/log", "tail"), DeadlineError, "/generate: no answer within 0.2 s"),
])  # fmt: skip
def test_a_request_without_an_answer_says_why(found, kind, words):
    listening, url = silent()
    client = ServerClient(url)
    client.evidence = lambda: found
    with listening, pytest.raises(kind) as caught:
        client.post("/generate", {}, timeout_s=0.2)
    client.close()
    assert words in caught.value.message
    assert "/log" in caught.value.hint or found.cause is None


def test_a_connection_that_is_reset_says_why_with_the_log_and_its_end():
    listening, url = silent()
    client = ServerClient(url)
    client.evidence = lambda: Finding("main process (pid 7) exited with code 3", True, "/log", "the tail")

    def hang_up():
        listening.accept()[0].close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(EngineDeadError) as caught:
        client.post("/generate", {}, timeout_s=20)
    thread.join()
    listening.close()
    client.close()
    assert caught.value.message.startswith("main process (pid 7) exited with code 3; /generate: ")
    assert caught.value.hint == "see the server's log /log" and caught.value.details == "the tail"


def test_a_probe_does_not_look_for_reasons():
    listening, url = silent()
    listening.close()
    client = ServerClient(url)
    client.evidence = lambda: pytest.fail("it was asked")
    assert not client.is_listening(timeout_s=1) and not client.is_healthy(timeout_s=1)
    client.close()
