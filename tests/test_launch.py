"""Arguments, environment, ports and the life of the server process; the server is a stand-in here."""

import errno
import importlib.machinery
import json
import os
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcolocate.engine import launch
from tpcolocate.engine.launch import (
    RECEIVER,
    ServerProcess,
    ServerSpec,
    child_environment,
    hold_port,
    server_arguments,
    to_argv,
)
from tpcolocate.errors import ConfigError, DeadlineError, LaunchError
from tpcolocate.groups import this_process
from tpcolocate.in_server import tpcolocate_receiver

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user, tp_size, device, shared, expected", [
    ({}, 1, "cuda", False, {"tp_size": 1}),
    ({"mem_fraction_static": 0.4}, 1, "cuda", False, {"mem_fraction_static": 0.4, "tp_size": 1}),
    ({}, 2, "cuda", False, {"disable_custom_all_reduce": True, "tp_size": 2}),
    ({"disable_custom_all_reduce": False}, 2, "cuda", False, {"disable_custom_all_reduce": False, "tp_size": 2}),
    ({}, 2, "cuda", True, {"disable_custom_all_reduce": True, "gpu_id_step": 0, "tp_size": 2}),
    ({"tp_size": 2, "pp_size": 1, "dp_size": 1}, 2, "cuda", False,
     {"disable_custom_all_reduce": True, "tp_size": 2, "pp_size": 1, "dp_size": 1}),
])  # fmt: skip
def test_a_gpu_server_gets_what_the_slice_asks_for_our_loader_and_nothing_more(user, tp_size, device, shared, expected):
    before = dict(user)
    arguments = server_arguments(user, tp_size=tp_size, device_type=device, shared_device=shared)
    assert arguments == {"custom_weight_loader": [RECEIVER]} | expected
    assert user == before


@pytest.mark.parametrize("theirs, expected", [
    (None, [RECEIVER]),
    ([], [RECEIVER]),
    (["their.loader", "another.one"], ["their.loader", "another.one", RECEIVER]),
    (("their.loader",), ["their.loader", RECEIVER]),
    ("their.loader", ["their.loader", RECEIVER]),
    ([RECEIVER], [RECEIVER]),
])  # fmt: skip
def test_our_loader_is_permitted_beside_theirs(theirs, expected):
    user = {"custom_weight_loader": theirs}
    assert server_arguments(user, tp_size=1, device_type="cuda")["custom_weight_loader"] == expected
    assert user == {"custom_weight_loader": theirs}


def test_the_permitted_loader_is_found_on_the_path_that_the_server_gets(tmp_path):
    """In a folder of its own: the server's environment need not have this package."""
    environment, _ = child_environment({"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}, visibility={})
    module, _, function = RECEIVER.rpartition(".")
    (tmp_path / f"{module}.py").write_text("raise SystemExit('another module of this name came first')")
    [folder, *_] = environment["PYTHONPATH"].split(os.pathsep)
    spec = importlib.machinery.PathFinder.find_spec(module, environment["PYTHONPATH"].split(os.pathsep))
    assert spec.origin == str(Path(folder) / module / "__init__.py") == tpcolocate_receiver.__file__
    assert callable(getattr(tpcolocate_receiver, function))
    assert os.listdir(folder) and not (Path(folder) / "tpcolocate").exists()


def test_a_cpu_server_gets_what_a_cpu_needs_and_the_user_wins():
    ours = server_arguments({}, tp_size=1, device_type="cpu")
    assert ours["device"] == "cpu" and ours["attention_backend"] == "torch_native" and ours["sleep_on_idle"] is True
    theirs = server_arguments({"dtype": "bfloat16", "sleep_on_idle": False}, tp_size=1, device_type="cpu")
    assert theirs == ours | {"dtype": "bfloat16", "sleep_on_idle": False}


@pytest.mark.parametrize("user, words", [
    *(({name: "x"}, f"does not take {name}='x'") for name in launch._REFUSED),
    ({"pp_size": 2}, "pp_size=2 is not supported"),
    ({"data_parallel_size": 4}, "data_parallel_size=4 is not supported"),
    *(({name: 2}, f"{name}=2 is not supported: weights are addressed") for name in launch._MUST_BE_ONE),
    *(({name: "x"}, f"{name}='x' is not supported: {why}") for name, why in launch._UNSUPPORTED.items()),
    *(({"load_format": kind}, f"load_format='{kind}' is not supported") for kind in launch._QUANTISED_FORMATS),
    ({"tp_size": 4}, r"tp_size=4\) contradicts init\(tp_size=2"),
])  # fmt: skip
def test_what_cannot_work_is_refused_by_name_and_with_what_to_do(user, words):
    with pytest.raises(ConfigError, match=words):
        server_arguments(user, tp_size=2, device_type="cuda")


def test_what_is_switched_off_is_not_refused():
    user = {**dict.fromkeys(launch._MUST_BE_ONE, 1), **dict.fromkeys(launch._UNSUPPORTED), "load_format": "dummy"}
    user["enable_dp_attention"] = False
    assert server_arguments(user, tp_size=2, device_type="cuda").items() >= user.items()


@pytest.mark.parametrize("arguments, argv", [
    ({}, []),
    ({"mem_fraction_static": 0.4}, ["--mem-fraction-static", "0.4"]),
    ({"tp_size": 1, "seed": 0}, ["--tp-size", "1", "--seed", "0"]),  # neither is taken for True or False
    ({"enable_lora": True, "disable_custom_all_reduce": False, "chat_template": None}, ["--enable-lora"]),
    ({"lora_target_modules": ["q_proj", "k_proj"]}, ["--lora-target-modules", "q_proj", "k_proj"]),
    ({"cuda_graph_bs": (1, 2)}, ["--cuda-graph-bs", "1", "2"]),
    ({"json_model_override_args": {"a": [1]}}, ["--json-model-override-args", '{"a": [1]}']),
    ({"served_model_name": "a b"}, ["--served-model-name", "a b"]),
])  # fmt: skip
def test_arguments_become_a_command_line(arguments, argv):
    assert to_argv(arguments) == argv


# --- environment ----------------------------------------------------------------------------------------------------

LOOPBACK = "localhost,127.0.0.1,::1"
IN_SERVER = str(Path(tpcolocate_receiver.__file__).parent.parent)
ALWAYS = {"NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK, "PYTHONPATH": IN_SERVER}
TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
    "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2", "ROLE_NAME": "default", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "OMP_NUM_THREADS": "1", "PET_NPROC_PER_NODE": "2",
}  # fmt: skip


@pytest.mark.parametrize("parent, more, expected", [
    ({"HOME": "/h"}, {}, {"HOME": "/h"}),
    (TORCHRUN | {"PATH": "/bin"}, {}, {"PATH": "/bin"}),
    ({"CUDA_VISIBLE_DEVICES": "3"}, {"visibility": {"CUDA_VISIBLE_DEVICES": "3,1"}}, {"CUDA_VISIBLE_DEVICES": "3,1"}),
    ({"HIP_VISIBLE_DEVICES": "3"}, {"visibility": {"HIP_VISIBLE_DEVICES": None, "X": "1"}}, {"X": "1"}),
    ({"A": "1", "RANK": "0"}, {"user": {"A": "2", "RANK": "7", "NO_PROXY": "mine"}}, {"A": "2", "RANK": "7", "NO_PROXY": "mine"}),
    ({"CUDA_VISIBLE_DEVICES": "3"}, {"visibility": {"CUDA_VISIBLE_DEVICES": "3"}, "user": {"CUDA_VISIBLE_DEVICES": "0"}},
     {"CUDA_VISIBLE_DEVICES": "0"}),
    ({"NO_PROXY": "corp.example,127.0.0.1"}, {}, {"NO_PROXY": "corp.example,127.0.0.1,localhost,::1"}),
    ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}),
    # CPU engine: a core group per rank
    ({}, {"device_type": "cpu", "tp_size": 1, "cores": [0, 1, 2]},
     {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0,1,2"}),
    ({}, {"device_type": "cpu", "tp_size": 2, "cores": [4, 5, 8, 9, 10]},
     {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "4,5|8,9"}),
    ({}, {"device_type": "cpu", "tp_size": 3, "cores": [6, 7]},
     {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "6|7|6"}),
    ({"SGLANG_CPU_OMP_THREADS_BIND": "all"}, {"device_type": "cpu", "cores": [0]},
     {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "all"}),
    ({}, {"device_type": "cpu"}, {"SGLANG_USE_CPU_ENGINE": "1"}),
    ({"PYTHONPATH": "/mine"}, {"device_type": "cpu", "stub": "/stub"},
     {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"{IN_SERVER}:/stub:/mine"}),
    ({}, {"device_type": "cpu", "stub": "/stub"}, {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"{IN_SERVER}:/stub"}),
    ({"PYTHONPATH": "/old"}, {"device_type": "cpu", "stub": "/stub", "user": {"PYTHONPATH": "/new"}},
     {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"{IN_SERVER}:/stub:/new"}),
    ({"PYTHONPATH": "/mine"}, {"device_type": "cuda", "stub": "/stub"}, {"PYTHONPATH": f"{IN_SERVER}:/mine"}),
    ({"PYTHONPATH": "/old"}, {"user": {"PYTHONPATH": "/new"}}, {"PYTHONPATH": f"{IN_SERVER}:/new"}),
])  # fmt: skip
def test_the_servers_environment(parent, more, expected):
    before = dict(parent)
    environment, warnings = child_environment(parent, **{"visibility": {}, **more})
    assert environment == ALWAYS | expected
    assert warnings == []
    assert parent == before, "the trainer's own is never written"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
@pytest.mark.parametrize("value, left", [
    ("expandable_segments:True", None),
    ("Expandable_Segments: true", None),
    ("max_split_size_mb:128,expandable_segments:True", "max_split_size_mb:128"),
    ("roundup_power2_divisions:[256:1,>:4], expandable_segments:True,garbage_collection_threshold:0.8",
     "roundup_power2_divisions:[256:1,>:4],garbage_collection_threshold:0.8"),
])  # fmt: skip
def test_expandable_segments_are_left_out_with_a_warning_and_nothing_else_is(name, value, left):
    environment, warnings = child_environment({name: value}, visibility={})
    assert environment.get(name) == left
    assert len(warnings) == 1 and name in warnings[0] and value in warnings[0]


@given(cores=st.lists(st.integers(0, 500), min_size=1, max_size=40, unique=True), tp_size=st.integers(1, 8))
def test_cores_are_dealt_evenly_and_to_one_rank_each_if_there_are_enough(cores, tp_size):
    groups = [[int(core) for core in group.split(",")] for group in launch._bind(cores, tp_size).split("|")]
    assert len(groups) == tp_size
    assert len({len(group) for group in groups}) == 1
    dealt = [core for group in groups for core in group]
    assert set(dealt) <= set(cores)
    if len(cores) >= tp_size:
        assert len(set(dealt)) == len(dealt) > len(cores) - tp_size


# --- ports ----------------------------------------------------------------------------------------------------------


def test_a_held_port_is_the_servers_alone_and_given_to_nobody_who_asks_for_any():
    with hold_port() as held:
        port = held.getsockname()[1]
        given = []
        for host in ("127.0.0.1", "0.0.0.0"):
            for _ in range(100):
                for reuse in (0, 1):
                    other = socket.socket()
                    given.append(other)
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                    other.bind((host, 0))
        assert port not in {other.getsockname()[1] for other in given}
        for other in given:
            other.close()
        with socket.socket() as plain, pytest.raises(OSError) as caught:
            plain.bind(("127.0.0.1", port))
        assert caught.value.errno == errno.EADDRINUSE
        # As uvicorn and torch's stores bind.
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
            with pytest.raises(ConfigError, match=f"port {port} is taken"):
                hold_port(port)


def test_two_ports_differ():
    with hold_port() as one, hold_port() as two:
        assert one.getsockname()[1] != two.getsockname()[1]


# --- life -----------------------------------------------------------------------------------------------------------

SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CLASH = "print('ERROR: [Errno 98] error while attempting to bind: address already in use'); raise SystemExit(3)"


@pytest.fixture
def stand_in(monkeypatch, tmp_path, no_leftovers):
    """Replaces SGLang's command by one script per try; returns a starter, and the commands that SGLang would have got."""
    commands = []

    def start(*scripts, health_timeout_s=20.0, **arguments):
        tries = iter(scripts)
        spawn = ServerProcess._spawn

        def spawn_instead(self, command):
            commands.append(command)
            ports = [command[command.index(flag) + 1] for flag in ("--port", "--nccl-port")]
            spawn(self, [sys.executable, "-c", next(tries), *ports, self.api_key])

        monkeypatch.setattr(ServerProcess, "_spawn", spawn_instead)
        pid, started = this_process()
        spec = ServerSpec(
            "model", arguments, dict(os.environ), tmp_path / "logs" / "server.log", pid, started, grace_s=3.0
        )
        return ServerProcess.start(spec, health_timeout_s=health_timeout_s)

    return start, commands


def ports_of(command):
    return [command[command.index(flag) + 1] for flag in ("--port", "--nccl-port")]


def test_it_starts_answers_and_stops(stand_in):
    start, commands = stand_in
    server = start(SERVE)
    assert server.url == f"http://127.0.0.1:{ports_of(commands[0])[0]}"
    assert server.client.get("/model_info", timeout_s=5.0) == {}
    assert not server.exited() and server.pid is not None
    server.stop()
    assert server.exited() and server.exit_code is not None
    server.stop()
    server.remove_log()
    assert not server.spec.log_path.exists()


def test_the_key_is_in_a_private_file_and_not_on_the_command_line(stand_in, monkeypatch):
    start, commands = stand_in
    seen = []
    spawn_seen = ServerProcess._wait_healthy

    def look(self, *args):
        config = Path(commands[0][commands[0].index("--config") + 1])
        seen.append((config, config.stat().st_mode & 0o777, json.loads(config.read_text()), self.api_key))
        return spawn_seen(self, *args)

    monkeypatch.setattr(ServerProcess, "_wait_healthy", look)
    start(SERVE).stop()
    [(config, mode, content, key)] = seen
    assert mode == 0o600 and content == {"api-key": key, "admin-api-key": key} and len(key) > 30
    assert not any(key in word for word in commands[0])
    assert not config.exists(), "once it was read"


def test_no_key_looks_like_an_option():
    """SGLang makes command-line arguments of its config file; one key in 64 of a wider alphabet begins with a dash."""
    spec = ServerSpec("model", {}, {}, Path("unused"), *this_process())
    keys = {ServerProcess(spec).api_key for _ in range(500)}
    assert len(keys) == 500
    assert all(key.isalnum() and len(key) == 64 for key in keys)


def test_a_taken_port_is_tried_again_with_others(stand_in, caplog):
    start, commands = stand_in
    server = start(CLASH, SERVE)
    server.stop()
    first, second = map(ports_of, commands)
    assert len(commands) == 2 and not set(first) & set(second)
    assert "try 2 of 3" in caplog.text


def test_tries_end(stand_in):
    start, commands = stand_in
    with pytest.raises(LaunchError, match="exited with code 3"):
        start(CLASH, CLASH, CLASH, SERVE)
    assert len(commands) == 3


def test_a_port_that_the_user_chose_is_not_tried_again(stand_in):
    start, commands = stand_in
    with hold_port() as free:
        port = free.getsockname()[1]
    with pytest.raises(LaunchError, match="exited with code 3"):
        start(CLASH, SERVE, port=port)
    assert [ports_of(command)[0] for command in commands] == [str(port)]


def test_another_failure_after_a_clash_is_not_taken_for_one(stand_in):
    """All tries write to one log."""
    start, commands = stand_in
    with pytest.raises(LaunchError, match="exited with code 1 .*: ValueError: no such model") as caught:
        start(CLASH, "raise ValueError('no such model')", SERVE)
    assert len(commands) == 2
    assert "address already in use" not in caught.value.details


def test_a_clash_far_above_the_end_of_the_log_is_still_one(stand_in):
    start, commands = stand_in
    start("print('EADDRINUSE'); print('shutting down\\n' * 100); raise SystemExit(1)", SERVE).stop()
    assert len(commands) == 2


def test_an_early_exit_tells_why_without_the_key(stand_in):
    start, _ = stand_in
    with pytest.raises(LaunchError) as caught:
        start("import sys; print('args: api_key=' + sys.argv[3]); raise RuntimeError('no GPU')")
    error = caught.value
    assert "exited with code 1 while it started: RuntimeError: no GPU" in error.message
    assert "args: api_key=***\n" in error.details


def test_a_server_that_never_answers_is_ended_at_the_deadline(stand_in):
    start, _ = stand_in
    with pytest.raises(DeadlineError, match="not healthy within 0.8 s") as caught:
        start("print('loading', flush=True); import time; time.sleep(600)", health_timeout_s=0.8)
    assert caught.value.details.endswith("\nloading")


def test_the_end_of_a_log_hides_the_key_wherever_it_is_cut(tmp_path):
    pid, started = this_process()
    server = ServerProcess(ServerSpec("model", {}, {}, tmp_path / "log", pid, started))
    assert server.log_tail() == "(no log was written)"
    for cut in range(len(server.api_key) + 1):
        rest = "x" * (launch._LOG_TAIL_BYTES - cut - 1)
        server.spec.log_path.write_text(f"key {server.api_key}\n{rest}")
        assert not any(server.api_key[i:] in server.log_tail() for i in range(len(server.api_key) - 3))
    server.spec.log_path.write_text("".join(f"{i}\n" for i in range(100)))
    assert server.log_tail().splitlines()[1:] == [str(i) for i in range(60, 100)]
    assert server.last_line() == "99"


@pytest.mark.parametrize("tail, reason", [
    ("Traceback\n  File x\nValueError: bad model", ": ValueError: bad model"),
    ("torch.OutOfMemoryError: CUDA out of memory.\nbye", ": torch.OutOfMemoryError: CUDA out of memory."),
    ("KeyError: 'a'\nRuntimeError: later", ": RuntimeError: later"),
    ("usage: x\nlaunch_server.py: error: unrecognized arguments: --x", ": launch_server.py: error: unrecognized arguments: --x"),
    ("[2026-01-01 00:00:00 TP0] Scheduler hit an exception: Traceback", ""),
    ("    raise ValueError", ""),
    ("all is well", ""),
    ("", ""),
])  # fmt: skip
def test_the_reason_is_the_last_line_that_names_an_error(tail, reason):
    assert launch._reason(tail) == reason
