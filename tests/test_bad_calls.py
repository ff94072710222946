"""Wrong arguments to every public call, on two ranks that really agree: the server is a stand-in.

For each parameter of each signature a pool of wrong values.  A call gives a value or an error of this library, the same on
both ranks; after an error the engine is as it was, nothing was asked of the server, and the engine can be used.
"""

import inspect
import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import run_ranks
from test_engine_parts import DESTROY, INIT, LOAD, PLACE, UNLOAD, Http, Sync
from test_lora import CONFIG, tensors

import tpcolocate
from tpcolocate.agreement import RankGroup
from tpcolocate.engine.client import Client
from tpcolocate.engine.context import OwnedServer, ServerLink, SliceContext
from tpcolocate.engine.engine import Engine
from tpcolocate.errors import ConfigError, EngineStateError, RankLostError, TpColocateError
from tpcolocate.groups import Host, Member, make_group
from tpcolocate.processes import this_process
from tpcolocate.server.api import ServerApi
from tpcolocate.server.lifecycle import Lifecycle, State
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = pytest.mark.timeout(450)
quick = pytest.mark.quick


class Unusual:
    """An object that fails at whatever is done with it."""

    def __repr__(self):
        raise ZeroDivisionError("repr")

    def __eq__(self, other):
        raise ZeroDivisionError("eq")

    def __hash__(self):
        raise ZeroDivisionError("hash")

    def __bool__(self):
        raise ZeroDivisionError("bool")


WRONG = {
    "None": None, "True": True, "False": False, "minus one": -1, "zero": 0, "one": 1, "one and a half": 1.5, "nan": math.nan,
    "infinity": math.inf, "minus infinity": -math.inf, "no text": "", "text": "x y", "digits": "5", "surrogate": "\ud800",
    "null character": "a\0b", "long text": "x" * 100_000, "no bytes": b"", "bytes": b"x", "object": object(), "no list": [],
    "list": [1], "list of texts": ["x"], "list of surrogates": ["\ud800"], "no mapping": {}, "mapping": {"a": 1},
    "mapping of numbers": {1: None}, "tuple": (), "set": {1}, "large": 10**30, "very large": 10**5000, "large float": 1e300,
    "complex": 1j, "function": len, "class": dict, "tensor": torch.tensor(1.5), "tensors": torch.ones(2), "array": np.ones(2),
    "numpy integer": np.int64(-3), "numpy float": np.float32("nan"), "range": range(3), "ellipsis": ...,
    "unusual": Unusual(), "list of unusual": [Unusual()],
}  # fmt: skip
# Of these, what is a good timeout, for ranks that meet on a busy machine.
GOOD_TIMEOUTS = {"one": 100, "one and a half": 150.5, "tensor": torch.tensor(150.5)}


def values_for(parameter):
    return WRONG | GOOD_TIMEOUTS if parameter.endswith("timeout_s") else WRONG


WEIGHTS = {"a": torch.ones(2)}
ADAPTER = {"tensors": tensors("o_proj"), "config": {**CONFIG, "target_modules": ["o_proj"]}}
# A call -> arguments that work.
CALLS = {
    "sync_weights": {"model_or_named_tensors": WEIGHTS},
    "save_weights": {"model_or_named_tensors": WEIGHTS, "folder": "{folder}/saved"},
    "set_lora": {"name": "a", "model": torch.nn.Linear(2, 2)},  # has no adapter: refused in any case
    "set_lora_from_tensors": {"name": "a", **ADAPTER},
    "unload_lora": {"name": "a"},
    "sleep": {},
    "wake": {},
    "pause_generation": {},
    "continue_generation": {},
    "abort_request": {},
    "flush_cache": {},
    "init_weights_update_group": {**PLACE, "world_size": 3},
    "update_weights_from_distributed": {"names": ["a"], "dtypes": ["float32"], "shapes": [[2]], "group_name": "joined"},
    "destroy_weights_update_group": {"group_name": "joined"},
    "shutdown": {},
    "health": {},
    "close": {},
}
NOT_HERE = {"generate", "generate_async", "restart"}  # of these, test_requests and test_engine_parts
CHANGES_NOTHING = {"health", "close", "abort_request", "shutdown"}


class Server(Http):
    """It reports the version that was set last."""

    def post(self, path, body=None, **options):
        if path == "/update_weight_version":
            self.answers["/model_info"] = {"weight_version": body["new_version"]}
        return super().post(path, body, **options)


class ReadingSync(Sync):
    """As the real one it reads the source before anything is asked of the server."""

    def __init__(self, owned, group):
        super().__init__(owned)
        self.group = group
        self.ignored = frozenset()

    def run(self, source, *, options, version, **more):
        with self.group.together("prepare a weight sync"):
            list(NamedWeights.of(source, rename=options.rename))
        if self.owned is not None:
            return super().run(source, options=options, version=version, **more)
        more["on_engine_modified"]()
        more["on_sent"](None)
        return SimpleNamespace(warnings=())

    def call_back(self, *, timeout_s):
        pass


def make_engine(group):
    """An engine of two ranks, rank 0 its owner; joined to an update group."""
    lifecycle = Lifecycle(State(), weight_version="5")
    http = Server(enable_lora=True, max_loaded_loras=2)
    process = SimpleNamespace(exited=lambda: False, stop=lambda **_: None)
    owned = OwnedServer.of(process, ServerApi(http), lifecycle) if group.rank == 0 else None
    client = Client("http://somewhere", api_key="key", check=lambda: lifecycle.state.check_generate())
    client.http = http
    link = ServerLink(client, ReadingSync(owned, group), owned, "0.5.21", lambda: None)
    context = SliceContext(group, None, 0, lifecycle, link)
    engine = Engine(context, model_path="model", on_shutdown=lambda: None, relaunch=lambda: None, restarts=0)
    engine._update_groups._names.add("joined")
    return engine


def facts(engine):
    """All that an engine keeps of its calls."""
    lifecycle = engine._lifecycle
    return (
        lifecycle.state, lifecycle.weight_version, lifecycle._num_syncs, engine._adapters._names,
        frozenset(engine._update_groups._names), list(engine._client.paths),
    )  # fmt: skip


def two_ranks(rank):
    import torch.distributed as dist

    pid, started = this_process()
    members = [None, None]
    dist.all_gather_object(members, Member(rank, 2, 2, Host.here(), pid, started))
    group = make_group([0, 1], timeout_s=20.0, description="test")
    return RankGroup(members, rank=rank, group=group, timeout_s=20.0)


def outcome(call):
    """Class and text of what a call has raised, and whether it is an error of this library; None if it returned."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), isinstance(error, TpColocateError), isinstance(error, RankLostError)


def same(one, other):
    """Whether two outcomes are the same, but for the addresses of objects that each rank has made."""
    return re.sub(r"0x[0-9a-f]+", "0x", repr(one)) == re.sub(r"0x[0-9a-f]+", "0x", repr(other))


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def bad_calls(rank, folder):
    """Every wrong value of every parameter; returns (call, parameter, value) -> (outcome, what is wrong after it)."""
    os.chdir(folder)  # some of the values are names that a folder can have
    group, found = two_ranks(rank), {}
    for name, arguments in CALLS.items():
        arguments = {k: v.format(folder=folder) if k == "folder" else v for k, v in arguments.items()}
        for parameter in parameters(getattr(Engine, name)):
            for words, value in values_for(parameter).items():
                engine = make_engine(group)
                before = facts(engine)
                given = {**arguments, parameter: value}
                one = outcome(lambda engine=engine, name=name, given=given: getattr(engine, name)(**given))
                wrong = None
                if one is not None and facts(engine) != before:
                    wrong = f"{before} before, {facts(engine)} after"
                elif one is not None:
                    again = outcome(lambda engine=engine: engine.sync_weights(WEIGHTS))
                    if again is not None or engine.weight_version != "6":
                        wrong = f"the sync after it: {again}, version {engine.weight_version}"
                found[name, parameter, words] = one, wrong
    return found


def test_every_wrong_argument_is_an_error_of_ours_on_all_ranks_or_a_value(tmp_path):
    ours, theirs = run_ranks(bad_calls, 2, str(tmp_path), timeout_s=400)
    assert len(ours) >= 1000
    problems = [
        f"{call}: {one} and {theirs[call][0]}" for call, (one, _) in ours.items() if not same(one, theirs[call][0])
    ]
    for found in (ours, theirs):
        problems += [f"{call}: raw {one}" for call, (one, _) in found.items() if one is not None and not one[2]]
        problems += [f"{call}: lost {one}" for call, (one, _) in found.items() if one is not None and one[3]]
        problems += [f"{call}: {one}: {wrong}" for call, (one, wrong) in found.items() if wrong is not None]
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:60])


@quick
def test_all_public_calls_are_tried():
    public = {name for name, one in vars(Engine).items() if inspect.isfunction(one) and not name.startswith("_")}
    assert public == set(CALLS) | NOT_HERE


def entry_points(rank, folder):
    """The same for `init`, `connect` and `launch`; nothing is launched: an argument that SGLang lacks is refused last."""
    os.chdir(folder)  # some of the values are names that a folder can have
    found = {}

    def tried(words, call):
        found[words] = outcome(call), None

    for parameter in parameters(tpcolocate.init):
        for words, value in values_for(parameter).items():
            given = {"tp_size": 2, "device": "cpu", "timeout_s": 20.0, parameter: value}
            tried(("init", parameter, words), lambda given=given: tpcolocate.init(**given).close())
    for parameter in parameters(tpcolocate.connect):
        for words, value in WRONG.items():
            given = {"job": "a job that there is not", parameter: value}
            tried(("connect", parameter, words), lambda given=given: tpcolocate.connect(**given))
    with tpcolocate.init(2, device="cpu", timeout_s=20.0) as colo:
        for parameter in [
            *parameters(tpcolocate.Colocation.launch)[:-1],
            "tp_size",
            "context_length",
            "dtype",
            "weight_version",
        ]:
            for words, value in values_for(parameter).items():
                given = {"model_path": folder, "not_an_argument": 1, parameter: value}
                tried(("launch", parameter, words), lambda given=given: colo.launch(**given).shutdown())
        assert colo._slice.all_gather(rank, what="see that the group is well") == [0, 1]
    return found


def test_wrong_arguments_of_the_entry_points(tmp_path):
    ours, theirs = run_ranks(entry_points, 2, str(tmp_path), timeout_s=400)
    problems = [
        f"{call}: {one} and {theirs[call][0]}" for call, (one, _) in ours.items() if not same(one, theirs[call][0])
    ]
    problems += [f"{call}: raw {one}" for call, (one, _) in ours.items() if one is not None and not one[2]]
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:60])


@quick
def test_calls_that_differ_between_the_ranks_are_refused_on_both():
    ours, theirs = run_ranks(differing_calls, 2, timeout_s=60)
    for (words, one), (_, other) in zip(ours.items(), theirs.items()):
        assert one is not None and one[0] == "ConfigError" and one == other, words


def differing_calls(rank):
    group = two_ranks(rank)
    wrong = [
        ("sync_weights", {"model_or_named_tensors": WEIGHTS}, "bucket_bytes", (1, 2)),
        ("sync_weights", {"model_or_named_tensors": WEIGHTS}, "bucket_bytes", (2**20, "x")),
        ("sync_weights", {"model_or_named_tensors": WEIGHTS}, "timeout_s", (math.nan, 50)),
        ("sync_weights", {"model_or_named_tensors": WEIGHTS}, "weight_version", ("7", "\ud800")),
        ("sync_weights", {"model_or_named_tensors": WEIGHTS}, "nonfinite", ("warn", "refuse")),
        ("unload_lora", {}, "name", ("a", "b")),
        ("sleep", {}, "timeout_s", (50, None)),
        ("wake", {}, "tags", (["weights"], ["kv_cache"])),
        ("pause_generation", {}, "mode", ("abort", "retract")),
        ("update_weights_from_distributed", CALLS["update_weights_from_distributed"], "partial", (True, 1)),
    ]  # fmt: skip
    found = {}
    for name, given, parameter, values in wrong:
        engine = make_engine(group)
        before = facts(engine)
        given = {**given, parameter: values[rank]}
        found[name, parameter, str(values)] = outcome(
            lambda engine=engine, name=name, given=given: getattr(engine, name)(**given)
        )
        assert facts(engine) == before, (name, parameter)
    return found


@quick
def test_integers_are_versions_and_a_refused_sync_is_none():
    [(versions, counted)] = run_ranks(versions_of_syncs, 1, timeout_s=60, init_group=False)
    assert versions == ["6", "6", "41", "42", "1.5"] and counted == "44", (
        "one that is no number is counted all the same"
    )


def versions_of_syncs(rank):
    group = RankGroup([Member(0, 1, 1, Host.here(), 1, 0)], rank=0, group=None, timeout_s=5)
    engine, versions = make_engine(group), []

    def sync(**given):
        try:
            engine._client.answers["/model_info"] = {"weight_version": "?"}
            engine.sync_weights(WEIGHTS, **given)
        except (ConfigError, EngineStateError):
            pass
        versions.append(engine.weight_version)

    sync()
    sync(bucket_bytes=0)
    sync(weight_version=np.int64(41))
    sync()
    sync(weight_version="1.5")
    versions_before = list(versions)
    sync(rename=3)
    engine._sync.modifies, engine._sync.error = False, EngineStateError("refused")
    sync()
    engine._sync.modifies, engine._sync.error = True, None
    assert versions[-1] == versions_before[-1]
    sync()
    return versions_before, engine.weight_version


@quick
def test_the_requests_that_a_bad_call_must_not_make_are_those_of_a_good_one():
    """Else the test above would see nothing."""
    group = RankGroup([Member(0, 1, 1, Host.here(), 1, 0)], rank=0, group=None, timeout_s=5)
    engine = make_engine(group)
    engine.set_lora_from_tensors(**CALLS["set_lora_from_tensors"])
    engine.unload_lora("a")
    engine.init_weights_update_group(**PLACE)
    engine.destroy_weights_update_group()
    assert engine._client.paths == [UNLOAD, LOAD, UNLOAD, INIT, DESTROY]
