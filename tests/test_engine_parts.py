"""The calls of an engine of one rank, on its owner: what they check, the requests they make, the state after; no server.

Its ranks agree as ever, being one; the sync is a stand-in, and so is the client.
"""

import dataclasses
import logging
import os
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import peft
import pytest
import torch
from test_api import BEGIN, END, FLUSH, GO_ON, PAUSE, RELEASE, RESUME, VERSION, Captured, refused
from test_lora import CONFIG, tensors

from tpcolocate.agreement import RankGroup
from tpcolocate.engine import adapters, life
from tpcolocate.engine.client import Client, Health
from tpcolocate.engine.context import OwnedServer, ServerLink, SliceContext
from tpcolocate.engine.engine import Engine
from tpcolocate.errors import (
    ConfigError,
    EngineDeadError,
    EngineStateError,
    LaunchError,
    RankFailedError,
    RankLostError,
    RequestError,
    SyncError,
)
from tpcolocate.groups import Host, Member
from tpcolocate.server.api import ServerApi
from tpcolocate.server.lifecycle import Life, Lifecycle, State, WeightsState

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

GENERATE, LOAD, UNLOAD = "generate", "load_lora_adapter_from_tensors", "unload_lora_adapter"
INIT, RECEIVE, DESTROY = "init_weights_update_group", "update_weights_from_distributed", "destroy_weights_update_group"
PLACE = {"master_address": "127.0.0.1", "master_port": 1234, "rank_offset": 1, "world_size": 2}


class Http(Captured):
    """A client whose server is healthy, and which may keep a request of ours unanswered."""

    def __init__(self, **info):
        super().__init__("0.5.21", **info)
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.listens = self.healthy = True
        self.is_stopped = False
        self.closed = 0

    def post(self, path, body=None, **options):
        if path == "/generate":
            assert self.may_answer.wait(30)
        return super().post(path, body, **options)

    def stream(self, path, body, *, timeout_s):
        yield {"text": "a"}

    def is_listening(self, *, timeout_s):
        return self.listens

    def is_healthy(self, *, timeout_s):
        return self.healthy

    def close(self):
        self.closed += 1


@dataclass(frozen=True)
class Report:
    warnings: tuple[str, ...] = ()


class Sync:
    """A sync that modifies the engine, or fails before or after; it holds generation as the real one does."""

    spec = None

    def __init__(self, owned):
        self.owned = owned
        self.error, self.modifies, self.missing = None, True, None

    def run(self, source, *, version, timeout_s, options, on_engine_modified, on_sent):
        self.owned.updates.begin_sync(timeout_s=timeout_s)
        if self.modifies:
            on_engine_modified()
        if self.error is not None:
            if not self.modifies:
                self.owned.updates.cancel_sync(timeout_s=timeout_s)
            raise self.error
        self.owned.api.client.answers["/model_info"] = {"weight_version": version}
        on_sent(self.missing if options.partial else [])
        self.owned.updates.end_sync(version, timeout_s=timeout_s)
        return Report()

    def call_back(self, *, timeout_s):
        self.owned.updates.begin_sync(timeout_s=timeout_s)
        self.owned.updates.cancel_sync(timeout_s=timeout_s)

    def close(self, *, timeout_s):
        return []


@pytest.fixture
def launch():
    """A function that makes an engine; `engine.asked` are the paths that were posted since it was made or read."""
    ended = []

    def link_to(lifecycle, url, **info):
        http = Http(**info)
        alive = [True]

        def stop(*, can_answer=True):
            ended.append("stopped" if can_answer else "stopped at once")
            alive.clear()

        process = SimpleNamespace(exited=lambda: bool(ended) or not alive, stop=stop, alive=alive)
        owned = OwnedServer.of(process, ServerApi(http), lifecycle)
        client = Client(url, api_key="key", check=lambda: lifecycle.state.check_generate())
        client.http = http
        return ServerLink(client, Sync(owned), owned, "0.5.21", lambda: ended.append("released"))

    def make(state=State(), restarts=0, **info):  # noqa: B008  (frozen)
        lifecycle = Lifecycle(state, weight_version="5")
        group = RankGroup([Member(0, 1, 1, Host.here(), 1, 0)], rank=0, group=None, timeout_s=5)
        context = SliceContext(group, None, 0, lifecycle, link_to(lifecycle, "http://somewhere", **info))

        def relaunch():
            assert lifecycle.state.life is Life.RESTARTING
            if make.launch_error is not None:
                raise make.launch_error
            ended.clear()
            return link_to(lifecycle, "http://elsewhere", **info), state

        return Engine(
            context,
            model_path="model",
            on_shutdown=lambda: ended.append("shut down"),
            relaunch=relaunch,
            restarts=restarts,
        )

    make.launch_error = None
    make.ended = ended
    return make


def asked(engine):
    """The paths that were posted since the last call of this."""
    http = engine._client
    paths = http.paths
    http.asked.clear()
    return paths


def test_an_engine_that_is_made_has_its_attributes(launch):
    engine = launch()
    assert (engine.url, engine.api_key, engine.sglang_version) == ("http://somewhere", "key", "0.5.21")
    assert (engine.model_path, engine.weight_version) == ("model", "5")
    assert repr(engine) == "Engine('http://somewhere')"


def test_requests_are_refused_from_a_sleep_to_the_sync_that_brings_the_weights(launch):
    engine = launch()
    assert engine.generate([[1]]) == {"success": True} and engine.generate([]) == []
    engine.sleep()
    # Mappings are released first; the server must go on meanwhile, because others may have requests in it.
    assert asked(engine) == [GENERATE, PAUSE, FLUSH, BEGIN, END, GO_ON, FLUSH, PAUSE, RELEASE]
    assert engine.health() is Health.ASLEEP
    for call in (lambda: engine.generate([[1]]), engine.continue_generation, engine.flush_cache, engine.sync_weights):
        with pytest.raises(EngineStateError):
            call({}) if call == engine.sync_weights else call()
    engine.sleep()
    engine.wake(["weights"])
    engine.wake()
    assert GO_ON not in asked(engine)
    with pytest.raises(EngineStateError, match="hold garbage"):
        engine.generate([[1]])
    assert engine.health() is Health.PAUSED
    engine.sync_weights({})
    assert asked(engine)[-1] == GO_ON and engine.health() is Health.READY
    engine.generate([[1]])


def test_one_thread_at_a_time_makes_collective_calls(launch):
    """With tp_size 1, too, where no other rank would notice."""
    engine = launch()
    begun, may_end = threading.Event(), threading.Event()
    run = engine._sync.run

    def held(*args, **options):
        begun.set()
        assert may_end.wait(30)
        return run(*args, **options)

    engine._sync.run = held
    syncing = threading.Thread(target=engine.sync_weights, args=({},))
    syncing.start()
    assert begun.wait(30)
    asked(engine)
    for call in (
        lambda: engine.sync_weights({}), engine.sleep, engine.wake, engine.pause_generation, engine.continue_generation,
        engine.flush_cache, engine.restart, lambda: engine.set_lora("a", torch.nn.Linear(1, 1)),
        lambda: engine.set_lora_from_tensors("a", tensors(), CONFIG), lambda: engine.unload_lora("a"),
        lambda: engine.init_weights_update_group(**PLACE), lambda: engine.update_weights_from_distributed([], dtypes=[], shapes=[]),
        engine.destroy_weights_update_group,
    ):  # fmt: skip
        with pytest.raises(
            ConfigError, match="another thread of this rank is in the collective call 'sync weights'"
        ) as caught:
            call()
        assert caught.value.rank == 0
    assert engine.generate([[1]]) and asked(engine) == [GENERATE]
    may_end.set()
    syncing.join(30)
    assert engine.weight_version == "6"
    engine.flush_cache()


def test_a_sleep_that_finds_a_request_is_refused_and_changes_nothing(launch):
    engine = launch()
    engine._client.may_answer.clear()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(engine.generate([[1]])))
    asking.start()
    while not engine._context.client.num_in_flight:
        asking.join(0.001)
    with pytest.raises(EngineStateError, match="1 requests of rank 0 are in flight"):
        engine.sleep()
    engine._client.may_answer.set()
    asking.join(30)
    assert answers == [{"success": True}] and asked(engine) == [GENERATE]
    engine.sleep(["kv_cache"])


def test_a_stream_that_is_not_read_to_its_end_is_in_flight_until_it_is_closed(launch):
    """To abort it, which the error advised alone, changes nothing in that."""
    engine = launch()
    stream = engine.generate([[1]], stream=True)
    next(stream)
    engine.abort_request()
    with pytest.raises(EngineStateError, match="1 requests of rank 0 are in flight") as caught:
        engine.sleep()
    assert "until its close()" in caught.value.hint
    stream.close()
    engine.sleep()


def test_a_stream_that_was_asked_for_before_a_sleep_is_refused_when_it_is_read(launch):
    engine = launch()
    early, late = engine.generate([[1]], stream=True), engine.generate([[1]], stream=True)
    assert list(early) == [{"text": "a"}]
    engine.sleep()
    with pytest.raises(EngineStateError, match="while asleep"):
        next(late)
    assert engine._context.client.num_in_flight == 0


@pytest.mark.parametrize("error", [refused("no such tag"), EngineDeadError("gone")])
def test_a_sleep_that_fails_leaves_the_engine_awake(launch, error):
    engine = launch()
    engine._client.answers["/release_memory_occupation"] = error
    with pytest.raises(type(error)):
        engine.sleep()
    engine.generate([[1]])


def test_without_a_memory_saver_nothing_sleeps(launch):
    engine = launch(State(frees_memory=False))
    with pytest.raises(EngineStateError, match="without enable_memory_saver"):
        engine.sleep()
    engine.generate([[1]])
    assert asked(engine) == [GENERATE]


def test_memory_that_was_never_released_is_not_resumed(launch):
    engine = launch()
    engine.sleep(["kv_cache"])
    asked(engine)
    engine.wake(["weights", "kv_cache"])
    assert [body for path, body in engine._client.asked if path.endswith(RESUME)] == [{"tags": ["kv_cache"]}]
    assert asked(engine)[-1] == GO_ON
    engine.wake()
    assert RESUME not in asked(engine)


def test_a_pause_is_asked_for_once_and_a_sync_leaves_it(launch):
    engine = launch()
    engine.pause_generation()
    engine.pause_generation("retract")
    assert asked(engine) == [PAUSE] and engine.health() is Health.PAUSED
    with pytest.raises(EngineStateError, match="paused with 'retract'"):
        engine.pause_generation("abort")
    engine.sync_weights({})
    assert not {PAUSE, GO_ON} & set(asked(engine))
    engine.continue_generation()
    engine.continue_generation()
    assert asked(engine) == [GO_ON] and engine.health() is Health.READY


def test_a_pause_that_the_server_refuses_is_none(launch):
    engine = launch()
    engine._client.answers["/pause_generation"] = [refused(), {"success": True}]
    with pytest.raises(RequestError):
        engine.pause_generation()
    assert engine.health() is Health.READY
    engine.pause_generation("abort")


def test_a_pause_in_place_warns_of_the_watchdog(launch, caplog):
    engine = launch()
    engine._context.owned.api.info["watchdog_timeout"] = 300
    with caplog.at_level(logging.WARNING, logger="tpcolocate"):
        engine.pause_generation("retract")
        engine.continue_generation()
        assert caplog.text == ""
        engine.pause_generation("in_place")
    assert "end the server after 300 s without a forward" in caplog.text and "watchdog_timeout" in caplog.text


@pytest.mark.parametrize("timeout_s", [0, -1, None, "5", float("nan"), float("inf"), True])
def test_timeouts_of_pauses_are_checked_before_anything_is_asked_for(launch, timeout_s):
    engine = launch()
    before = len(engine._client.asked)
    for call in (engine.pause_generation, engine.continue_generation, engine.abort_request, engine.flush_cache):
        with pytest.raises(ConfigError, match="timeout_s must be a positive number of seconds"):
            call(timeout_s=timeout_s)
    assert len(engine._client.asked) == before


def test_a_cache_that_a_pause_in_place_keeps_is_a_warning(launch):
    engine = launch()
    engine.pause_generation("in_place")
    engine._client.answers["/flush_cache"] = [refused(), "flushed", "flushed"]
    [warning] = engine.sync_weights({}).warnings
    assert "cache of the old weights" in warning
    engine.flush_cache()
    assert engine.sync_weights({}).warnings == ()


def test_requests_are_aborted_by_name_or_all(launch):
    engine = launch()
    engine.abort_request("a")
    engine.abort_request()
    with pytest.raises(ConfigError, match="rid is empty"):
        engine.abort_request("")
    assert [body for _, body in engine._client.asked] == [{"rid": "a"}, {"abort_all": True}]


@pytest.mark.parametrize("modifies", [True, False])
def test_a_sync_that_fails_leaves_the_weights_unknown_only_if_they_may_have_changed(launch, modifies):
    engine = launch()
    engine._sync.modifies, engine._sync.error = modifies, SyncError("broken")
    with pytest.raises(SyncError):
        engine.sync_weights({})
    assert engine.weight_version == "5"
    assert (asked(engine)[-1] == GO_ON) is not modifies
    assert engine.health() is (Health.PAUSED if modifies else Health.READY)
    engine._sync.modifies, engine._sync.error = True, None
    engine.sync_weights({}, partial=True)
    assert (GO_ON in asked(engine)) is not modifies, "a part of the weights repairs nothing"
    engine.sync_weights({}, weight_version="a")
    assert asked(engine)[-1] == GO_ON and engine.weight_version == "a" and engine.health() is Health.READY


def test_after_a_sleep_two_partial_syncs_that_together_bring_everything_let_generation_go_on(launch):
    """As with a tower that is never trained: without the second one the error names what is missing."""
    engine = launch()
    engine.sleep(["weights"])
    engine.wake(["weights"])
    asked(engine)
    engine._sync.missing = ["tower.weight"]
    report = engine.sync_weights({}, partial=True)
    assert GO_ON not in asked(engine) and "tower.weight" in report.warnings[0]
    assert "enable_weights_cpu_backup" in report.warnings[0]
    with pytest.raises(EngineStateError, match="still missing are tower.weight"):
        engine.generate([1])
    engine._sync.missing = ["trained.weight"]
    assert engine.sync_weights({}, partial=True).warnings == ()
    assert asked(engine)[-1] == GO_ON and engine.health() is Health.READY


def described(names=("a",)):
    return {"names": list(names), "dtypes": [torch.float32] * len(names), "shapes": [[2]] * len(names)}


def test_update_groups_are_joined_used_and_left(launch):
    engine = launch()
    with pytest.raises(EngineStateError, match="no update group"):
        engine.update_weights_from_distributed(**described())
    engine.init_weights_update_group(**PLACE)
    assert dict(engine._client.asked)[f"/{INIT}"] == {**PLACE, "group_name": "weight_update_group", "backend": "nccl"}
    with pytest.raises(EngineStateError, match="is in an update group"):
        engine.init_weights_update_group(**PLACE)
    asked(engine)
    engine._client.answers["/model_info"] = {"weight_version": "6"}
    engine.update_weights_from_distributed(**described("abc"), bucket_bytes=16)
    paths = asked(engine)
    assert [path for path in paths if path not in (FLUSH, BEGIN, END, VERSION)] == [PAUSE, RECEIVE, RECEIVE, GO_ON]
    assert engine.weight_version == "6"
    for wrong in ({"bucket_bytes": 0}, {"dtypes": []}):
        with pytest.raises(ConfigError):
            engine.update_weights_from_distributed(**{**described(), **wrong})
    engine.destroy_weights_update_group()
    assert asked(engine) == [DESTROY]
    with pytest.raises(EngineStateError, match="no update group"):
        engine.destroy_weights_update_group()


def test_an_update_that_fails_leaves_the_weights_unknown_and_the_group_as_it_is(launch):
    engine = launch()
    engine.init_weights_update_group(**PLACE)
    engine._client.answers["/update_weights_from_distributed"] = refused("no sender")
    with pytest.raises(SyncError, match="no sender"):
        engine.update_weights_from_distributed(**described())
    assert GO_ON not in asked(engine) and engine.health() is Health.PAUSED
    engine.destroy_weights_update_group()
    engine.sync_weights({})
    assert asked(engine)[-1] == GO_ON


def test_adapters_are_replaced_counted_and_removed(launch):
    adapter, config = tensors("o_proj"), {**CONFIG, "target_modules": ["o_proj"]}
    engine = launch(enable_lora=True, max_loaded_loras=2, lora_paths={"first": "path"})
    for _ in range(2):
        engine.set_lora_from_tensors("a", adapter, config)
        assert asked(engine) == [UNLOAD, LOAD], "in place of one of that name"
    with pytest.raises(EngineStateError, match="holds 2 adapters"):
        engine.set_lora_from_tensors("b", adapter, config)
    with pytest.raises(ConfigError, match="needs a name"):
        engine.set_lora_from_tensors("", adapter, config)
    assert asked(engine) == []
    engine.unload_lora("first")
    engine._client.answers["/load_lora_adapter_from_tensors"] = [refused("broken"), {"success": True}]
    with pytest.raises(RequestError, match="broken"):
        engine.set_lora_from_tensors("a", adapter, config)  # and the one of that name is gone
    engine.set_lora_from_tensors("b", adapter, config)
    with pytest.raises(ConfigError, match="not started for LoRA"):
        launch(enable_lora=False).set_lora_from_tensors("a", adapter, config)


def test_an_adapter_that_is_not_finite_is_served_with_a_warning_that_names_its_weights(launch, caplog):
    adapter, config = tensors("o_proj"), {**CONFIG, "target_modules": ["o_proj"]}
    engine = launch(enable_lora=True)
    engine.set_lora_from_tensors("a", adapter, config)
    assert caplog.text == ""
    name = next(iter(adapter))
    adapter[name][0, 0] = float("nan")
    engine.set_lora_from_tensors("a", adapter, config)
    assert f"adapter 'a' is served, and 1 weight is NaN or infinite in part: {name}" in caplog.text
    assert asked(engine)[-2:] == [UNLOAD, LOAD]


def with_adapter(fill):
    """A model of one layer with an adapter, and the factor that the adapter adds nothing without."""
    layers = torch.nn.ModuleList([torch.nn.ModuleDict({"o_proj": torch.nn.Linear(8, 8)})])
    model = peft.get_peft_model(
        torch.nn.ModuleDict({"layers": layers}), peft.LoraConfig(r=2, target_modules=["o_proj"])
    )
    factor = layers[0]["o_proj"].lora_B["default"].weight
    torch.nn.init.constant_(factor, fill)
    return model, factor


def test_an_adapter_that_is_in_the_weights_is_not_served_unless_it_added_nothing(launch):
    engine = launch(enable_lora=True)
    model, factor = with_adapter(0.0)
    engine.sync_weights(model)
    engine.set_lora("policy", model)
    torch.nn.init.ones_(factor)
    engine.set_lora("policy", model)
    assert "counts it twice" in engine.sync_weights(model).warnings[0]
    with pytest.raises(ConfigError, match="would count twice"):
        engine.set_lora("policy", model)


def test_a_sync_to_a_server_without_adapters_does_not_look_for_them(launch, monkeypatch):
    """That is a walk through all modules, in every sync of a script that has imported peft."""
    engine, looked = launch(enable_lora=True), []
    monkeypatch.setattr(adapters, "applied_adapters", lambda source: looked.append(source) or {})
    engine.sync_weights(torch.nn.Linear(1, 1))
    engine._context.server = dataclasses.replace(engine._context.server, serves_adapters=False)
    engine.sync_weights(torch.nn.Linear(1, 1))
    assert len(looked) == 1


def test_health(launch):
    engine = launch()
    http = engine._client
    assert engine.health() is Health.READY
    http.is_stopped = True
    assert engine.health() is Health.STOPPED
    http.is_stopped = False
    http.healthy = False
    assert engine.health() is Health.STARTING
    http.listens = False
    assert engine.health() is Health.DEAD
    engine._lifecycle.state = State(weights=WeightsState.UNKNOWN)
    assert engine.health() is Health.DEAD
    http.listens = True
    assert engine.health() is Health.PAUSED
    launch.ended.append("by itself")
    assert engine.health() is Health.DEAD


def test_a_server_that_is_stopped_while_its_health_is_asked_for_is_stopped(launch, monkeypatch):
    """Its answer takes SGLang 20 s, and is no."""
    engine = launch()
    http = engine._client
    monkeypatch.setattr(http, "is_healthy", lambda timeout_s: setattr(http, "is_stopped", True))
    assert engine.health() is Health.STOPPED


def test_a_shutdown_ends_the_server_once_and_nothing_may_be_asked_for_after_it(launch):
    with launch() as engine:
        pass
    engine.shutdown()
    assert launch.ended == ["stopped", "released", "shut down"] and engine._client.closed == 1
    for call in (
        engine.sleep,
        engine.wake,
        engine.pause_generation,
        engine.continue_generation,
        engine.abort_request,
        engine.flush_cache,
        lambda: engine.generate([[1]]),
        lambda: engine.sync_weights({}),
        lambda: engine.unload_lora("a"),
        lambda: engine.init_weights_update_group(**PLACE),
    ):
        with pytest.raises(EngineStateError, match="shut down"):
            call()
    assert asked(engine) == [] and engine.health() is Health.DEAD


# --- the end ---------------------------------------------------------------------------------------------------------


def interrupted_once(function):
    """A function that raises KeyboardInterrupt at its first call, before it does anything."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("call", ["shutdown", "close", "restart"])
def test_a_server_that_holds_requests_is_not_waited_for(launch, call):
    engine = launch()
    engine.pause_generation()
    if call == "restart":
        launch.launch_error = LaunchError("no memory")  # what the fake has noted stays
        with pytest.raises(LaunchError):
            engine.restart()
    else:
        engine.shutdown(wait=call == "shutdown")
    assert launch.ended[0] == "stopped at once"


@pytest.mark.parametrize("place", ["wait", "stop", "disconnect"])
@pytest.mark.parametrize("again", [{}, {"wait": False}], ids=["shutdown", "close"])
def test_a_shutdown_that_was_interrupted_goes_on_where_it_was(launch, monkeypatch, place, again):
    engine = launch()
    context = engine._context
    if place == "wait":
        monkeypatch.setattr(context.group, "all_gather", interrupted_once(context.group.all_gather))
    elif place == "stop":
        context.owned.process.stop = interrupted_once(context.owned.process.stop)
    else:
        engine._sync.close = interrupted_once(engine._sync.close)
    with pytest.raises(KeyboardInterrupt):
        engine.shutdown()
    with pytest.raises(EngineStateError, match="being shut down") as caught:
        engine.sync_weights({})
    assert "shutdown() again" in caught.value.hint
    engine.shutdown(**again)
    assert launch.ended[-2:] == ["released", "shut down"] and "stopped" in launch.ended
    ended = list(launch.ended)
    engine.shutdown(**again)
    assert launch.ended == ended, "the end comes once"


def test_the_ranks_are_awaited_once_and_an_interrupted_wait_is_taken_up_again(launch, monkeypatch):
    engine = launch()
    met = []

    def all_gather(value, *, what, timeout_s):
        met.append(what)
        if len(met) == 1:
            raise KeyboardInterrupt  # the same call resumes the round, if it has begun

    monkeypatch.setattr(engine._context.group, "all_gather", all_gather)
    with pytest.raises(KeyboardInterrupt):
        engine.shutdown()
    engine.shutdown()
    engine.shutdown()
    assert met == ["shut the engine down", "shut the engine down", "end the server"]


def test_a_client_whose_owner_does_not_come_keeps_to_the_deadline_of_its_call(launch, monkeypatch):
    """The owner was interrupted: its server runs on, and may still read what this rank has mapped."""
    engine, waited = launch(), []
    engine._context.server = dataclasses.replace(engine._context.server, owned=None)
    monkeypatch.setattr(life, "SERVER_ENDS_S", 0.2)

    def all_gather(value, *, what, timeout_s):
        if what == "end the server":
            time.sleep(timeout_s)
            raise RankLostError("lost contact")

    monkeypatch.setattr(engine._context.group, "all_gather", all_gather)
    engine._sync.close = lambda *, timeout_s: waited.append(timeout_s) or []
    engine.shutdown(timeout_s=0.3)
    assert waited == [0.0]


def test_a_client_that_does_not_wait_for_the_others_gives_the_server_time_to_end(launch):
    engine, waited = launch(), []
    engine._context.server = dataclasses.replace(engine._context.server, owned=None)
    engine._sync.close = lambda *, timeout_s: waited.append(timeout_s) or []
    engine.shutdown(wait=False)
    assert waited == [life.SERVER_ENDS_S]


def test_threads_that_shut_down_at_once_end_the_server_once(launch):
    engine = launch()
    stop = engine._context.owned.process.stop
    entered, may_end = threading.Event(), threading.Event()

    def slowly(**options):
        entered.set()
        assert may_end.wait(30)
        if "stopped" not in launch.ended:
            stop(**options)

    engine._context.owned.process.stop = slowly
    threads = [threading.Thread(target=engine.shutdown, kwargs={"wait": wait}) for wait in (True, False, False)]
    for thread in threads:
        thread.start()
    assert entered.wait(30)
    may_end.set()
    for thread in threads:
        thread.join(30)
    assert launch.ended == ["stopped", "released", "shut down"]


def test_a_shutdown_within_a_shutdown_as_by_a_signal_handler_does_not_block(launch):
    engine = launch()
    stop = engine._context.owned.process.stop

    def stop_and_be_interrupted(**options):
        if "stopped" not in launch.ended:
            stop(**options)
            engine.shutdown(wait=False)

    engine._context.owned.process.stop = stop_and_be_interrupted
    engine.shutdown()
    assert launch.ended == ["stopped", "released", "shut down"]


def test_a_forked_child_ends_nothing(launch):
    engine = launch()
    child = os.fork()
    if child == 0:
        try:
            engine.shutdown()
            os._exit(len(launch.ended))
        finally:
            os._exit(99)
    assert os.waitpid(child, 0)[1] == 0
    engine.generate([[1]])


def test_a_shutdown_during_a_call_of_another_thread_stays(launch):
    engine = launch()
    engine.sleep()
    post = engine._client.post

    def post_and_close(path, body=None, **options):
        if path.endswith(RESUME):
            engine.shutdown(wait=False)
        return post(path, body, **options)

    engine._client.post = post_and_close
    engine.wake()
    assert engine._lifecycle.state.life is Life.ENDED
    with pytest.raises(EngineStateError, match="shut down"):
        engine.generate([[1]])


# --- weights that are not the trainer's ---------------------------------------------------------------------------------


def test_weights_that_the_server_has_started_with_are_refused_until_a_full_sync(launch):
    engine = launch(State(weights=WeightsState.UNSYNCED))
    for call in (lambda: engine.generate([[1]]), engine.continue_generation):
        with pytest.raises(EngineStateError, match="no full sync has brought the trainer's weights"):
            call()
    assert engine.health() is Health.PAUSED
    engine._sync.missing = ["tower.weight"]
    [warning] = engine.sync_weights({}, partial=True).warnings
    assert "tower.weight" in warning and "cpu_backup" not in warning and GO_ON not in asked(engine)
    with pytest.raises(EngineStateError, match="still missing are tower.weight"):
        engine.generate([[1]])
    engine.sync_weights({})
    assert asked(engine)[-1] == GO_ON
    engine.generate([[1]])


# --- restart ------------------------------------------------------------------------------------------------------------


def kill(engine):
    engine._context.owned.process.alive.clear()


@pytest.mark.parametrize("dies", [True, False])
def test_a_restart_puts_another_server_in_place(launch, dies):
    engine = launch(enable_lora=True, lora_paths={"first": "path"})
    engine.sync_weights({})
    engine.init_weights_update_group(**PLACE)
    adapter, config = tensors("o_proj"), {**CONFIG, "target_modules": ["o_proj"]}
    engine.set_lora_from_tensors("a", adapter, config)
    engine.unload_lora("first")
    engine.sleep(["kv_cache"])
    old = engine._context.server
    if dies:
        kill(engine)
        assert engine.health() is Health.DEAD
    assert engine.restart() is None
    assert old.client.http.closed and not old.owned.process.alive
    assert (engine.url, engine.api_key, repr(engine)) == ("http://elsewhere", "key", "Engine('http://elsewhere')")
    assert asked(engine) == [UNLOAD, UNLOAD, LOAD], "the first one, which it has started with, and the one that was set"
    with pytest.raises(EngineStateError, match="no full sync"):
        engine.generate([[1]])
    with pytest.raises(EngineStateError, match="no update group"):
        engine.update_weights_from_distributed(**described())
    assert engine.health() is Health.PAUSED and engine.weight_version == "6"
    engine.sync_weights({})
    assert engine.weight_version == "7", "it goes on"
    assert asked(engine)[-1] == GO_ON and engine.health() is Health.READY
    engine.generate([[1]])
    engine.shutdown()
    assert launch.ended[-3:] == ["stopped", "released", "shut down"]


def test_a_restart_with_a_source_ends_with_a_full_sync(launch):
    engine = launch()
    kill(engine)
    assert engine.restart({}, weight_version="40") == Report()
    assert engine.weight_version == "40"
    engine.generate([[1]])
    with pytest.raises(ConfigError, match="partial without weights"):
        engine.restart(partial=True)
    old = engine._context.server
    for wrong in ({"bucket_bytes": 0}, {"weight_version": ""}, {"timeout_s": -1}, {"buckets": 1}, {"folder": b""}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            engine.restart({}, **wrong)
    assert engine._context.server is old and old.owned.process.alive, "refused before the old server has ended"


def test_a_server_whose_model_was_removed_runs_on(launch, tmp_path):
    """As by a trainer that keeps its last checkpoints only: no other one could be started in its place."""
    engine = launch()
    engine.model_path = str(tmp_path / "checkpoint-10")
    with pytest.raises(ConfigError, match="there is no folder .*checkpoint-10"):
        engine.restart({})
    engine.generate([[1]])
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "config.json").write_text("{}")
    engine.restart({})


def test_a_pause_of_the_users_stays_over_a_restart(launch):
    engine = launch()
    engine.pause_generation("abort")
    engine.restart({})
    assert GO_ON not in asked(engine) and engine.health() is Health.PAUSED
    engine.continue_generation()
    assert asked(engine) == [GO_ON]


def test_a_restart_that_fails_can_be_tried_again_or_given_up(launch):
    engine = launch()
    launch.launch_error = LaunchError("no memory")
    with pytest.raises(LaunchError):
        engine.restart()
    for call in (lambda: engine.generate([[1]]), lambda: engine.sync_weights({}), engine.sleep):
        with pytest.raises(EngineStateError, match="being restarted, or could not be"):
            call()
    assert engine.health() is Health.DEAD
    launch.launch_error = None
    engine.restart({})
    engine.generate([[1]])
    engine.shutdown()
    with pytest.raises(EngineStateError, match="shut down"):
        engine.restart()


def test_a_restart_that_another_rank_leaves_at_its_very_end_has_failed_on_all(launch, monkeypatch):
    """As with Ctrl-C there: no rank goes on with a server that another one does not have, or half with the old one."""
    engine = launch()
    engine.init_weights_update_group(**PLACE)
    agree, calls = engine._context.group.agree, []

    def left(error, value=None, *, what, timeout_s=None):
        calls.append(what)
        if calls.count("restart the server") == 2:
            calls.clear()
            raise RankFailedError("KeyboardInterrupt", rank=1)
        return agree(error, value, what=what, timeout_s=timeout_s)

    monkeypatch.setattr(engine._context.group, "agree", left)
    with pytest.raises(RankFailedError):
        engine.restart()
    new = engine._context.server
    assert (engine.url, engine._client, engine._sync) == ("http://elsewhere", new.client.http, new.sync)
    assert not new.owned.process.alive and new.client.http.closed, "a restart that fails leaves no server"
    with pytest.raises(EngineStateError, match="being restarted, or could not be"):
        engine.generate([[1]])
    monkeypatch.undo()
    engine.restart({})
    engine.init_weights_update_group(**PLACE)
    engine.generate([[1]])


def test_an_engine_that_is_shut_down_while_it_restarts_keeps_no_server(launch):
    engine = launch()
    started = []
    relaunch = engine._life._relaunch

    def closing():
        found = relaunch()
        started.append(found[0])
        engine.shutdown(wait=False)  # by another thread
        return found

    engine._life._relaunch = closing
    with pytest.raises(EngineStateError, match="shut down"):
        engine.restart()
    assert not started[0].owned.process.alive and engine.health() is Health.DEAD


def test_an_engine_restarts_by_itself_as_often_as_it_was_launched_to(launch, caplog):
    engine = launch(restarts=2)
    engine.sync_weights({})
    assert engine.url == "http://somewhere"
    kill(engine)
    engine.sync_weights({})
    assert engine.url == "http://elsewhere" and "found dead before 'sync weights': restart 1 of 2" in caplog.text
    engine.generate([[1]])
    engine._client.listens = False  # it has not exited yet, but will
    engine.flush_cache()
    assert "found dead before 'flush the cache': restart 2 of 2" in caplog.text
    with pytest.raises(EngineStateError, match="no full sync"):
        engine.generate([[1]])
    kill(engine)
    before = engine._context.server
    engine.sync_weights({})  # the stand-in does not mind
    assert engine._context.server is before, "no more"


def test_the_owner_alone_counts_restarts():
    """A rank that was interrupted as it asked would else ask once more than the others, in every call from then on."""
    answers, asked_for = [True, False, False], []

    def run_on(owner_rank, action, *, what):
        asked_for.append(what)
        return answers.pop(0)

    group = SimpleNamespace(run_on=run_on, ranks=(0, 1))
    context = SimpleNamespace(group=group, owner_rank=0, state=State(), owned=None)
    client = life.EngineLife(context, on_shutdown=None, relaunch=None, restarts=1)
    assert [client.must_restart("sleep") for _ in range(3)] == [True, False, False]
    assert asked_for == ["sleep: look at the server"] * 3


def test_an_engine_does_not_restart_by_itself_unless_asked_to(launch):
    engine = launch()
    kill(engine)
    before = engine._context.server
    engine.sync_weights({})
    assert engine._context.server is before


@pytest.mark.parametrize("answers, exited, is_dead", [
    ([True], False, False),
    ([False, True], False, False),  # it was busy
    ([False, False], False, True),
    ([], True, True),
])  # fmt: skip
def test_a_server_is_dead_if_it_has_exited_or_does_not_answer_twice(answers, exited, is_dead):
    listens = iter(answers)
    api = SimpleNamespace(client=SimpleNamespace(is_listening=lambda *, timeout_s: next(listens)))
    owned = OwnedServer(SimpleNamespace(exited=lambda: exited), api, None, None)
    assert owned.is_dead is is_dead and list(listens) == []
