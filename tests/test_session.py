"""The engines of a `Colocation`: none is forgotten, whatever the trainer drops or interrupts; no server."""

import copy
import gc
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import tpcolocate
from tpcolocate import launch_request, session
from tpcolocate.engine.client import Client
from tpcolocate.engine.context import ServerLink
from tpcolocate.errors import ConfigError, EngineError
from tpcolocate.server.lifecycle import Life, Lifecycle, State

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


class Process:
    def __init__(self):
        self.calls, self.errors = 0, []

    def exited(self):
        return self.calls > 0

    def stop(self, **_):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture
def colo(monkeypatch):
    """A slice of one rank whose servers are stand-ins; `colo.processes` are theirs."""
    made = tpcolocate.init(1, device="cpu")
    made.processes = []

    def start(launch, lifecycle):
        process = Process()
        made.processes.append(process)
        http = SimpleNamespace(close=lambda: None)
        client = SimpleNamespace(url=f"http://server{len(made.processes)}", api_key="key", http=http, close=http.close)
        owned = SimpleNamespace(process=process, api=SimpleNamespace(loras_at_start=frozenset()))
        sync = SimpleNamespace(close=lambda timeout_s: [])
        link = ServerLink(client, sync, owned, "0.5.21", lambda: None)
        return session._Started(link, Lifecycle(State()) if lifecycle is None else lifecycle, State())

    agreed = SimpleNamespace(nonce="1-a", model_path="model", health_timeout_s=5.0, again=dict)
    monkeypatch.setattr(session, "agree_on_launch", lambda *args, **kwargs: agreed)
    monkeypatch.setattr(made, "_start", start)
    yield made
    made.close()


def test_an_engine_that_was_dropped_is_ended_by_close(colo):
    colo.launch("model")
    gc.collect()
    colo.close()
    colo.close()
    assert [process.calls for process in colo.processes] == [1]


def test_an_engine_that_was_shut_down_is_not_kept(colo):
    engine = colo.launch("model")
    engine.shutdown()
    assert colo._engines == []
    colo.close()
    assert colo.processes[0].calls == 1


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_belongs_to_its_process_is_not_copied(colo, copying):
    """As by data loaders and pools that start their workers anew: the error was that of some lock inside."""
    client = Client("http://127.0.0.1:1")
    for one in (colo, colo.launch("model"), client):
        with pytest.raises(ConfigError, match=f"{type(one).__name__} belongs to its process.*\n.*connect\\(job\\)"):
            copying({"inside": one} if copying is not copy.copy else one)
    client.close()


def test_a_close_that_was_interrupted_can_be_called_again(colo):
    engines = [colo.launch("model") for _ in range(2)]
    colo.processes[0].errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        colo.close()
    colo.close()
    assert all(engine._lifecycle.state.life is Life.ENDED for engine in engines)


def test_a_close_after_the_default_group_was_made_anew_closes_the_rest(colo, tmp_path):
    def begin(name):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / name}", rank=0, world_size=1)

    begin("first")
    colo._groups = [dist.new_group([0])]
    dist.destroy_process_group()
    begin("second")
    try:
        colo.close()
    finally:
        dist.destroy_process_group()
    assert colo._groups == []


def test_an_end_that_is_not_confirmed_does_not_keep_the_others_running(colo):
    engines = [colo.launch("model") for _ in range(2)]
    colo.processes[0].errors = [EngineError("pid 7 may still run")]
    with pytest.raises(EngineError, match="pid 7"):
        colo.close()
    assert all(engine._lifecycle.state.life is Life.ENDED for engine in engines) and colo._engines == []


@pytest.mark.parametrize("of", ["engine", "colocation"])
def test_an_end_that_is_not_confirmed_does_not_hide_the_error_that_led_to_it(colo, of):
    engine = colo.launch("model")
    colo.processes[0].errors = [EngineError("pid 7 may still run")]
    with pytest.raises(ZeroDivisionError) as caught:
        with engine if of == "engine" else colo:
            raise ZeroDivisionError
    assert caught.value.__notes__ == ["(after that: pid 7 may still run)"]
    assert engine._lifecycle.state.life is Life.ENDED


def test_an_interrupt_while_kernels_are_compiled_leaves_no_server(monkeypatch):
    undone, server = [], object()

    def acknowledge(error, value):
        raise error

    launch = SimpleNamespace(
        start_server=lambda lifecycle: (SimpleNamespace(), server, None),
        acknowledge=acknowledge,
        undo=lambda server, failed: undone.append((server, type(failed))),
    )

    def interrupted(device, *, timeout_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(session.kernels, "wait_until_prepared", interrupted)
    with tpcolocate.init(1, device="cpu") as colo, pytest.raises(KeyboardInterrupt):
        colo._start(launch, None)
    assert undone == [(server, KeyboardInterrupt)]


def test_a_client_does_not_take_a_stopped_server_for_dead():
    """What it has mapped would be taken back, and released a second time once it goes on; and each look took 5 s."""
    evidence = SimpleNamespace(stopped=lambda: ["main process (pid 7) is stopped"])
    launch = SimpleNamespace(evidence=lambda server: evidence, sync_folder=Path("/nowhere"))
    with socket.create_server(("127.0.0.1", 0)) as silent, tpcolocate.init(1, device="cpu") as colo:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        running = SimpleNamespace(
            url=url,
            api_key="key",
            state=State(),
            spec=None,
            weight_version="0",
            sglang_version="0",
            serves_adapters=False,
        )
        link = colo._connect(launch, running, None, None, None).link
        assert link.sync.context.reader_is_alive()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()  # it was not asked
        link.client.close()


def test_requests_know_of_a_pause_of_the_engine():
    launch = SimpleNamespace(evidence=lambda server: None, sync_folder=Path("/nowhere"))
    running = SimpleNamespace(
        url="http://127.0.0.1:1", api_key="key", state=State(), spec=None, weight_version="0", sglang_version="0",
        serves_adapters=False,
    )  # fmt: skip
    with tpcolocate.init(1, device="cpu") as colo:
        started = colo._connect(launch, running, None, None, None)
        http = started.link.client.http
        assert http.held() is None
        started.lifecycle.state = started.lifecycle.state.pausing("abort")
        assert "generation is paused (abort)" in http.held()
        started.link.client.close()


def test_a_second_launch_is_a_warning_that_names_the_first(colo, caplog):
    first = colo.launch("model")
    assert caplog.text == ""
    second = colo.launch("model")
    assert "ranks 0 launch another server while that of Engine('http://server1') runs" in caplog.text
    second.shutdown()
    assert first._lifecycle.state.life is Life.RUNNING and colo.processes[0].calls == 0


def test_an_engine_of_an_earlier_init_is_named_as_well(colo, monkeypatch, caplog):
    colo.launch("model")
    again = tpcolocate.init(1, device="cpu")  # as where a notebook's cell is run again
    monkeypatch.setattr(again, "_start", colo._start)
    again.launch("model")
    assert "ranks 0 launch another server while that of Engine('http://server1') runs" in caplog.text
    again.close()


def test_a_forked_child_closes_nothing(colo):
    colo.launch("model")
    child = os.fork()
    if child == 0:
        try:
            colo.close()
            os._exit(colo.processes[0].calls)
        finally:
            os._exit(99)
    assert os.waitpid(child, 0)[1] == 0
    assert colo._engines != [] and not colo._closed


def test_a_restart_after_close_starts_nothing(colo):
    engine = colo.launch("model")
    colo.close()
    with pytest.raises(tpcolocate.errors.EngineStateError, match="shut down"):
        engine.restart()
    assert len(colo.processes) == 1


def test_a_restart_is_like_the_launch_whatever_has_changed_since(colo, monkeypatch, tmp_path):
    """Lists and dicts that the script has passed, its environment, and the folder of relative paths."""
    requests = []

    def agree(*args, **kwargs):
        requests.append(launch_request.agree_on_launch(*args, **kwargs))
        return requests[-1]

    monkeypatch.setattr(session, "agree_on_launch", agree)
    monkeypatch.setenv("REPEATED", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    env, bias = {"OWN": "1", "REPEATED": "1"}, {"a": [1]}
    engine = colo.launch(
        tmp_path, log_path="logs/server.log", env=env, json_model_override_args=bias, max_loras_per_batch=3
    )
    env["OWN"] = "2"
    bias["a"].append(2)
    monkeypatch.setenv("REPEATED", "2")
    monkeypatch.chdir("/")
    engine.restart()
    first, again = requests
    assert again.arguments == first.arguments and again.arguments["json_model_override_args"] == {"a": [1]}
    assert again.log_path == str(tmp_path / "logs/server.log") and again.working_directory == str(tmp_path)
    assert again.env == {"OWN": "1"}, "what it repeated of the environment is that of the environment"
    assert again.again() == first.again() and again.nonce != first.nonce


@pytest.mark.parametrize("restart", [-1, 1.0, True, "2"])
def test_the_number_of_restarts_is_checked_before_anything_starts(restart):
    with (
        tpcolocate.init(1, device="cpu") as colo,
        pytest.raises(ConfigError, match="restart must be (an integer|at least 0)"),
    ):
        colo.launch("model", restart=restart)


AT_EXIT = """
import test_session, tpcolocate, os
from pytest import MonkeyPatch
patch = MonkeyPatch()
fixture = test_session.colo.__wrapped__ if hasattr(test_session.colo, "__wrapped__") else test_session.colo._fixture_function
colo = next(made := fixture(patch))
colo.launch("model")
process = colo.processes[0]
process.stop = lambda **_: os.write(1, b"stopped in %d" % os.getpid())
child = os.fork()  # ends first, by the same way out
if child:
    os.waitpid(child, 0)
    os.write(1, b"%d " % os.getpid())
"""


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_an_engine_that_still_runs_is_ended_with_its_process_and_not_with_a_fork():
    command = [sys.executable, "-c", AT_EXIT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__), timeout=120)
    pid, _, rest = done.stdout.partition(" ")
    assert rest == f"stopped in {pid}", done.stdout + done.stderr
    assert "was not shut down before the end of its process" in done.stderr
