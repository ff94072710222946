"""Check contracts against the code of one release of SGLang; run in a process of its own with the release on its path.

The release's modules are imported unchanged.  Replaced are ``sgl_kernel`` (the CUDA kernels; names only, none is called),
the tokenizer manager behind SGLang's HTTP application (records requests instead of passing them to a scheduler), the
model, and the configuration that newer releases publish when a server starts.

Every function in `CONTRACTS` returns what the tests check, in JSON types, or raises, which does not stop the others.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import inspect
import io
import json
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

from tpcolocate import ipc_payload
from tpcolocate.engine.context import OwnedServer
from tpcolocate.engine.requests import KNOWN_FIELDS
from tpcolocate.in_server import tpcolocate_receiver
from tpcolocate.server.api import ServerApi
from tpcolocate.server.arguments import RECEIVER, check_installed, server_arguments, to_argv
from tpcolocate.server.http import ServerClient
from tpcolocate.server.installed import find_installed
from tpcolocate.server.lifecycle import Lifecycle, State
from tpcolocate.server.process import hold_port
from tpcolocate.server.releases import ENDPOINTS, SERVER_INFO, release

MODEL = "dummy"  # SGLang's name for no model: nothing is resolved
LOADED = []
"""Arguments of the calls of `recording_loader`."""


# Modules of the kernel package that a release imports unconditionally.
KERNELS = ("sgl_kernel.kvcacheio",)


class _Kernels:
    """Import hook that provides the `KERNELS` as modules in which every name exists."""

    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self) if fullname in KERNELS else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _absent(f"{spec.name}.{name}")
        return module

    def exec_module(self, module):
        pass


def _absent(name):
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(name)

    def kernel(*args, **kwargs):
        raise NotImplementedError(f"{name} is not available")

    return kernel


def recording_loader(model, named_tensors):
    """A weight loader with the signature of `tpcolocate_receiver.receive`."""
    LOADED.append((model, named_tensors))


# --- payloads -------------------------------------------------------------------------------------------------------


def _tensors():
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]
    made = [(str(dtype), (torch.randn(5, 3, generator=generator) * 3).to(dtype)) for dtype in dtypes]
    return [*made, ("empty", torch.empty(0, 4)), ("scalar", torch.tensor(3.5)), ("ä weight", torch.ones(2))]


def _bucket(tensors):
    entries, num_bytes = ipc_payload.layout([(name, tensor.shape, tensor.dtype) for name, tensor in tensors])
    flat = ipc_payload.allocate(num_bytes, torch.device("cpu"))
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        ipc_payload.view(flat, entry).copy_(tensor)
    return flat, entries


def _check_equal(found, sent):
    assert [name for name, _ in found] == [name for name, _ in sent], found
    for (name, tensor), (_, expected) in zip(found, sent, strict=True):
        assert tensor.dtype == expected.dtype and tensor.shape == expected.shape, (name, tensor)
        assert tensor.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist(), name


def bucket_passes_the_unpickler():
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    tensors = _tensors()
    flat, entries = _bucket(tensors)
    handle = ipc_payload.export(flat)
    before = handle.count()
    bucket = FlattenedTensorBucket(**MultiprocessingSerializer.deserialize(ipc_payload.payload(handle, entries)))
    _check_equal(bucket.reconstruct_tensors(), tensors)
    opened = handle.count()
    del bucket
    return {"before": before, "opened": opened, "after": handle.count()}


def command_passes_the_unpickler():
    from sglang.srt.utils import MultiprocessingSerializer

    job = {"do": "probe", "tp_rank": 1, "text": "ä\n"}
    [(name, data)] = MultiprocessingSerializer.deserialize(ipc_payload.command(job))
    assert json.loads(name) == job
    assert data.numel() == 0


def cuda_handle_passes_the_unpickler():
    """Without a device: all names are allowed, and SGLang finds the UUID in its argument."""
    from sglang.srt.utils import common, patch_torch
    from torch.multiprocessing import reductions

    handle = object.__new__(ipc_payload.CudaHandle)
    vars(handle).update(
        handle=b"H", num_bytes=256, offset=512, counter_file=b"/counter", counter_offset=3, event=b"E", event_sync=True,
        device_uuid="GPU-2",
    )  # fmt: skip
    rebuilt = []

    class Unpickler(common.SafeUnpickler):
        def find_class(self, module, name):
            found = super().find_class(module, name)  # raises for names that the release does not allow
            return (lambda *args: rebuilt.append(args)) if name == "rebuild_cuda_tensor" else found

    entries, _ = ipc_payload.layout([("w", torch.Size([64]), torch.float32)])
    Unpickler(io.BytesIO(base64.b64decode(ipc_payload.payload(handle, entries)))).load()
    [arguments] = rebuilt
    with _patched(
        torch.cuda,
        device_count=lambda: 3,
        get_device_properties=lambda i: types.SimpleNamespace(uuid=f"GPU-{i}"),
    ):
        there = patch_torch._modify_tuple(
            arguments, patch_torch._REDUCE_TENSOR_ARG_DEVICE_INDEX, patch_torch._device_from_maybe_uuid
        )
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    by_name = dict(zip(names, there, strict=True))
    assert by_name["storage_device"] == 2 and by_name["ref_counter_handle"] == b"/counter", by_name


class _patched:
    """Replace attributes of a module and restore them; absent ones are not added."""

    def __init__(self, module, **attributes):
        self.module, self.attributes, self.saved = module, attributes, {}

    def __enter__(self):
        for name, value in self.attributes.items():
            if hasattr(self.module, name):
                self.saved[name] = getattr(self.module, name)
                setattr(self.module, name, value)

    def __exit__(self, *error):
        for name, value in self.saved.items():
            setattr(self.module, name, value)


def unpickler_rules():
    """Return whether an unneeded function of an allowed module passes, and one that must never pass."""
    from sglang.srt.utils import common

    def allows(module, name):
        try:
            common.SafeUnpickler(io.BytesIO(b"")).find_class(module, name)
            return True
        except Exception:
            return False

    return {"exact": not allows("torch", "load"), "os_system": allows("os", "system")}


# --- the way through a TP worker ------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loaded = []

    def load_weights(self, named_tensors):
        self.loaded += named_tensors


class Drafts:
    """Replaces the draft model's worker and records all access to it."""

    def __init__(self):
        self.accessed = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self.accessed.append(name)
        return lambda *args, **kwargs: (True, "done")


def _engine(model, *, tp_rank, loaders, draft=None):
    """Build the release's scheduler code for weight updates, TP worker and model runner around a model.

    Returns:
        A function that runs a request through all of them; the arguments of the calls that load adapters.
    """
    from sglang.srt.managers import tp_worker
    from sglang.srt.model_executor import model_runner

    adapters = []

    def load_adapter(*args, **kwargs):
        adapters.append(args)

    if hasattr(model_runner.ModelRunner, "update_weights_from_tensor"):

        class Runner(model_runner.ModelRunner):  # up to 0.5.16
            load_lora_adapter_from_tensors = staticmethod(load_adapter)

            def __init__(self):
                self.server_args = types.SimpleNamespace(custom_weight_loader=loaders)
                self.model, self.device, self.tp_rank = model, "cpu", tp_rank

        runner = Runner()
        modules = [tp_worker]
    else:
        from sglang.srt.model_executor.model_runner_components import weight_updater

        values = {f.name: None for f in dataclasses.fields(weight_updater.WeightUpdater) if not f.name.startswith("_")}
        values |= {"tp_rank": tp_rank, "device": "cpu", "custom_weight_loaders": loaders, "get_model": lambda: model}
        values["get_model_runner"] = lambda: runner
        runner = types.SimpleNamespace(
            weight_updater=weight_updater.WeightUpdater(**values),
            tp_rank=tp_rank,
            model=model,
            server_args=types.SimpleNamespace(weight_cache_mode="off"),
            load_lora_adapter_from_tensors=load_adapter,
        )
        modules = [tp_worker, weight_updater]

    class Worker(tp_worker.TpModelWorker):
        model_runner = runner

        def __init__(self):
            self.tp_rank = tp_rank
            self.ps = types.SimpleNamespace(tp_rank=tp_rank, tp_size=2)
            self._model_runner = runner

    try:
        from sglang.srt.managers.scheduler_components import weight_updater as scheduling

        manager_class = scheduling.SchedulerWeightUpdaterManager
        absent = dataclasses.MISSING
        values = {
            f.name: None
            for f in dataclasses.fields(manager_class)
            if f.init and f.default is absent and f.default_factory is absent
        }
        modules.append(scheduling)
    except ImportError:  # up to 0.5.13
        from sglang.srt.managers import scheduler_update_weights_mixin as scheduling

        class manager_class(scheduling.SchedulerUpdateWeightsMixin):
            def __init__(self, **values):
                vars(self).update(values)

        values = {}
    scheduler = types.SimpleNamespace(record_weight_version_change=lambda **kwargs: None)
    values |= {"tp_worker": Worker(), "draft_worker": draft, "tp_cpu_group": None, "scheduler": scheduler}
    names = set(values)
    if dataclasses.is_dataclass(manager_class):
        names = {f.name for f in dataclasses.fields(manager_class) if f.init}
    group = types.SimpleNamespace(cpu_group=None)
    published = {
        "get_parallel": lambda: types.SimpleNamespace(tp_rank=tp_rank, tp_size=2, tp_group=group),
        "get_model": lambda: types.SimpleNamespace(weight_cache_mode="off", custom_weight_loader=loaders),
    }

    def run(request):
        if not torch.distributed.is_initialized():  # for the barrier behind every update
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        with ExitStack() as patches:
            for module in modules:
                patches.enter_context(_patched(module, **published))
            manager = manager_class(**{name: value for name, value in values.items() if name in names})
            if "LoRA" in type(request).__name__:
                return manager.tp_worker.load_lora_adapter_from_tensors(request)
            session = hasattr(manager, "begin_weight_update")
            if session:
                assert manager.begin_weight_update(_request("BeginWeightUpdateReqInput", selector="target")).success
            answer = manager.update_weights_from_tensor(request)
            assert answer.success, answer.message
            if session:
                assert manager.end_weight_update(_request("EndWeightUpdateReqInput")).success

    return run, adapters


def _update(payloads, **fields):
    """Return a request as `ServerApi.push` sends it, in the release's class."""
    target_only = release(find_installed(os.environ).version).target_only()
    received = _received(payloads)
    return _request(
        "UpdateWeightsFromTensorReqInput", serialized_named_tensors=received, flush_cache=False, **target_only, **fields
    )


def _request(name, **fields):
    from sglang.srt.managers import io_struct

    return getattr(io_struct, name)(**fields)


def _received(payloads):
    """Return payloads as they arrive at a TP worker: bytes from 0.5.15 on, text before."""
    from sglang.srt.managers import io_struct

    hint = str(typing.get_type_hints(io_struct.UpdateWeightsFromTensorReqInput)["serialized_named_tensors"])
    return [p if "str" in hint else base64.b64decode(p) for p in payloads]


def the_loader_is_called_with_model_and_named_tensors():
    """On each TP rank, with that rank's payload."""
    import probe  # by its dotted name, as the release imports it

    found = []
    for tp_rank in range(2):
        model = Model()
        run, _ = _engine(model, tp_rank=tp_rank, loaders=["other.loader", "probe.recording_loader"])
        probe.LOADED.clear()
        commands = [ipc_payload.command({"for": k}) for k in range(2)]
        run(_update(commands, load_format="probe.recording_loader"))
        [(given, named_tensors)] = probe.LOADED
        assert given is model and model.loaded == []
        [(name, data)] = named_tensors
        assert data.numel() == 0
        found.append(json.loads(name))
    return found


def our_receiver_is_found_by_its_name():
    """By the release's import of dotted names; and it never raises, even for an unknown command."""
    from sglang.srt.utils import dynamic_import

    found = dynamic_import(RECEIVER)
    assert Path(inspect.getfile(found)) == Path(tpcolocate_receiver.__file__).with_name("session.py")
    assert list(inspect.signature(found).parameters) == list(inspect.signature(recording_loader).parameters)
    run, _ = _engine(Model(), tp_rank=0, loaders=[RECEIVER])
    run(_update([ipc_payload.command({"do": "nothing that exists"})], load_format=RECEIVER))


def a_loader_that_was_not_permitted_is_not_called():
    import probe

    run, _ = _engine(Model(), tp_rank=0, loaders=[])
    probe.LOADED.clear()
    try:
        run(_update([ipc_payload.command({})], load_format="probe.recording_loader"))
        refused = None
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    return {"refused": refused, "called": len(probe.LOADED)}


def a_stock_bucket_reaches_the_models_own_loader():
    model = Model()
    run, _ = _engine(model, tp_rank=0, loaders=[])
    tensors = _tensors()
    flat, entries = _bucket(tensors)
    handle = ipc_payload.export(flat)
    run(_update([ipc_payload.payload(handle, entries)], load_format="flattened_bucket"))
    _check_equal(model.loaded, tensors)


def a_draft_model_is_not_updated():
    """With the fields of the table, and as a control without them."""
    accessed = {}
    for name, fields in {"with": None, "without": {}}.items():
        drafts = Drafts()
        run, _ = _engine(Model(), tp_rank=0, loaders=["probe.recording_loader"], draft=drafts)
        request = _update([ipc_payload.command({})], load_format="probe.recording_loader")
        if fields is not None:
            for field in release(find_installed(os.environ).version).target_only():
                setattr(request, field, "all" if field == "selector" else False)
        try:
            run(request)
        except TypeError:
            pass  # the fake is not iterable, but its access is recorded
        accessed[name] = drafts.accessed
    return accessed


# --- requests, over HTTP ---------------------------------------------------------------------------------------------


class Manager:
    """A tokenizer manager that records the requests of SGLang's application and reports success."""

    def __init__(self, server_args):
        from sglang.srt.managers import io_struct

        self.server_args = server_args
        self.model_path = self.served_model_name = MODEL
        self.is_generation, self.startup_time = True, 0.0
        self.model_config = types.SimpleNamespace(
            is_image_understandable_model=False, is_audio_understandable_model=False, hf_config=None
        )
        self.weight_version = None
        self.received = []
        lora = next(getattr(io_struct, n) for n in ("LoRAUpdateOutput", "LoRAUpdateResult") if hasattr(io_struct, n))
        self.answers = {
            "load_lora_adapter_from_tensors": lambda: lora(success=True, loaded_adapters={}),
            "unload_lora_adapter": lambda: lora(success=True, loaded_adapters={}),
            "flush_cache": lambda: types.SimpleNamespace(success=True, message=""),
            "get_internal_state": lambda: [],
        }

    def resolved_config_dict(self, fields):
        return fields

    def config_value(self, name):
        return self.weight_version if name == "weight_version" else None

    def record_config_updates(self, source, *, weight_version):
        self.weight_version = weight_version

    def abort_request(self, **kwargs):
        self.received.append(("abort_request", kwargs))

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        async def method(*args, **kwargs):
            self.received.append((name, args[0] if args else kwargs))
            if name == "update_weight_version":
                self.weight_version = args[0].new_version
            return self.answers.get(name, lambda: (True, "done"))()

        return method


class Sent(ServerClient):
    """A client that records what is posted."""

    def __init__(self, url):
        super().__init__(url)
        self.posted = []

    def _exchange(self, method, path, body, **options):
        if method == "POST":
            self.posted.append((path, dict(body or {})))
        return super()._exchange(method, path, body, **options)


_server = {}


def _serve():
    """The release's HTTP application on a port of its own, once per process."""
    if _server:
        return _server["client"], _server["manager"]
    import uvicorn
    from sglang.srt.entrypoints import http_server
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=MODEL)
    manager = Manager(server_args)
    try:
        from sglang.srt.runtime_context import publish
    except ImportError:
        pass  # before 0.5.15
    else:
        getattr(server_args, "resolve_once", lambda: None)()
        publish(server_args, role="tokenizer")
    http_server.set_global_state(
        http_server._GlobalState(tokenizer_manager=manager, template_manager=None, scheduler_info={})
    )
    reserved = hold_port()
    config = uvicorn.Config(http_server.app, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    reserved.listen()
    threading.Thread(target=server.run, kwargs={"sockets": [reserved]}, daemon=True).start()
    url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
    client = Sent(url)
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the application does not start"
        time.sleep(0.02)
    _server.update(client=client, manager=manager)
    return client, manager


def _plain(value):
    """Return a value as in JSON: bytes as the base64 that was posted."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _arrives(*calls):
    """Make calls of an owner to the application; everything posted must reach SGLang's own structure, field by field.

    Returns:
        Path -> names of the fields that were posted.
    """
    client, manager = _serve()
    owned = OwnedServer.of(None, ServerApi(client), Lifecycle(State()))
    client.posted.clear()
    manager.received.clear()
    for call in calls:
        call(owned)
    received = {}
    for name, request in manager.received:
        received.setdefault(name, []).append(request)
    for path, body in client.posted:
        if path in ("/update_weight_version", "/flush_cache"):
            continue  # handled by the application itself; other contracts check their effect
        request = received[path.strip("/")].pop(0)
        for field, value in body.items():
            there = getattr(request, field)  # AttributeError: dropped
            assert _plain(there) == _plain(value), (path, field, there, value)
    return {path: sorted(body) for path, body in client.posted}


def a_push_arrives():
    payloads = [ipc_payload.command({"tp_rank": k}) for k in range(2)]
    return _arrives(lambda owned: owned.api.push(payloads, load_format=RECEIVER, timeout_s=10))


def begin_and_end_of_a_sync_arrive():
    found = _arrives(
        lambda owned: owned.updates.begin_sync(timeout_s=10),
        lambda owned: owned.updates.end_sync("seven", timeout_s=10),  # raises if the version is not reported
        lambda owned: owned.updates.begin_sync(timeout_s=10),
        lambda owned: owned.updates.cancel_sync(timeout_s=10),
    )
    _, manager = _serve()
    assert not any(name == "abort_request" for name, _ in manager.received), "publishing a version must abort nothing"
    return found


def sleep_and_wake_arrive():
    return _arrives(
        lambda owned: owned.generation.release_memory(["kv_cache", "weights"], timeout_s=10),
        lambda owned: owned.generation.resume_memory(["weights"], State(asleep=frozenset({"kv_cache"})), timeout_s=10),
        lambda owned: owned.generation.resume_memory(["kv_cache"], State(), timeout_s=10),
    )


def update_groups_arrive():
    fields = {
        "master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 3, "group_name": "g",
        "backend": "gloo",
    }  # fmt: skip
    return _arrives(
        lambda owned: owned.api.init_weights_update_group(**fields, timeout_s=10),
        lambda owned: owned.api.destroy_weights_update_group(group_name="g", timeout_s=10),
    )


def an_adapter_arrives_and_passes_the_unpickler():
    """Over HTTP and through a TP worker, up to where the release loads it."""
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.arange(6.0).reshape(2, 3)}
    _, manager = _serve()

    def load(owned):
        owned.api.info["enable_lora"] = True
        owned.api.load_lora("mine", tensors, {"r": 2, "lora_alpha": 4}, tp_size=2, timeout_s=10)

    found = _arrives(load)
    [request] = [r for name, r in manager.received if name == "load_lora_adapter_from_tensors"]
    request.lora_id = "id"  # as the tokenizer manager sets it
    run, adapters = _engine(Model(), tp_rank=1, loaders=[])
    run(request)
    [arguments] = adapters
    given = arguments[1]
    assert isinstance(given, dict), f"the release calls items() on what it is given: {type(given)}"
    assert {name: tensor.tolist() for name, tensor in given.items()} == {n: t.tolist() for n, t in tensors.items()}
    return found


def endpoints():
    """Return the application's paths with methods, and the fields or query parameters of their requests."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers import io_struct

    routes = {}
    for route in http_server.app.routes:
        if not getattr(route, "methods", None):
            continue
        there = routes.setdefault(route.path, {"methods": set(), "takes": [], "query": []})
        there["methods"] |= route.methods
        there["takes"] += [str(hint) for hint in typing.get_type_hints(route.endpoint).values()]
        there["query"] += (
            [parameter.name for parameter in route.dependant.query_params] if hasattr(route, "dependant") else []
        )
    fields = {}
    for endpoint in ENDPOINTS.values():
        structure = getattr(io_struct, endpoint.request or "", None)
        if structure is not None:
            fields[endpoint.request] = _fields_of(structure)
    return {
        "routes": {path: {**route, "methods": sorted(route["methods"])} for path, route in routes.items()},
        "fields": fields,
    }


def _fields_of(structure):
    if dataclasses.is_dataclass(structure):
        return [field.name for field in dataclasses.fields(structure)]
    import msgspec.structs

    return [field.name for field in msgspec.structs.fields(structure)]


def generate_describes_its_fields():
    """As `Client` asks for it, for fields that are not in every release."""
    client, _ = _serve()
    schemas = client.get("/openapi.json", timeout_s=60)["components"]["schemas"]
    described = set(schemas["GenerateReqInput"]["properties"])
    return {"missing": sorted(KNOWN_FIELDS - described), "num": len(described)}


def server_info_has_the_expected_keys():
    client, _ = _serve()
    info = client.get("/server_info", timeout_s=30)
    return {"version": info.get("version"), "missing": [key for key in SERVER_INFO if key not in info]}


# --- arguments ------------------------------------------------------------------------------------------------------

# Arguments that the guide and errors recommend, beside our defaults.
USER_ARGUMENTS = {
    "plain": {},
    "memory": {"mem_fraction_static": 0.4, "enable_memory_saver": True, "enable_weights_cpu_backup": True},
    "lora": {
        "enable_lora": True, "lora_backend": "torch_native", "max_lora_rank": 8, "max_loras_per_batch": 2,
        "lora_target_modules": ["q_proj", "k_proj"],
    },
    "small": {"context_length": 256, "max_total_tokens": 2048, "max_running_requests": 8, "dtype": "bfloat16"},
}  # fmt: skip


def _parser():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def arguments_read_from_the_source_match_the_parser():
    installed = find_installed(os.environ)
    options = {o.removeprefix("--") for action in _parser()._actions for o in action.option_strings}
    read = set(installed.arguments()) | {"help", "-h"}
    return {
        "version": installed.version,
        "num": len(options),
        "missed": sorted(options - read),
        "invented": sorted(read - options),
        "update_fields": sorted(installed.request_fields("UpdateWeightsFromTensorReqInput")),
    }


def every_argument_parses():
    """By the release's parser and reader of config files, combined as in ``prepare_server_args``."""
    try:
        from sglang.srt.server_args_config_parser import ConfigArgumentMerger
    except ImportError:
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
    parser = _parser()
    dest = {option: action.dest for action in parser._actions for option in action.option_strings}
    found = {}
    for device_type in ("cpu", "cuda"):
        for tp_size in (1, 2):
            for name, user in USER_ARGUMENTS.items():
                arguments = server_arguments(user, tp_size=tp_size, device_type=device_type, shared_device=tp_size == 2)
                check_installed(arguments, dataclasses.replace(find_installed(os.environ), has_memory_saver=True))
                arguments |= {"host": "127.0.0.1", "port": 1234, "nccl_port": 1235}
                with tempfile.TemporaryDirectory() as folder:
                    config = Path(folder) / "server.yaml"
                    config.write_text(json.dumps({"api-key": "k", "admin-api-key": "a"}))
                    argv = ["--model-path", "m", "--config", str(config), *to_argv(arguments)]
                    parsed = vars(parser.parse_args(ConfigArgumentMerger(parser).merge_config_with_args(argv)))
                expected = {**arguments, "model_path": "m", "api_key": "k", "admin_api_key": "a"}
                there = {name: parsed[dest["--" + name.replace("_", "-")]] for name in expected}
                wrong = {name: (there[name], value) for name, value in expected.items() if there[name] != value}
                assert not wrong, (device_type, tp_size, name, wrong)
                found[f"{device_type}-{tp_size}-{name}"] = len(expected)
    return found


# --- messages --------------------------------------------------------------------------------------------------------


def rejections_have_the_expected_messages():
    """Two rejections are recognised by the text of the server's message."""
    import sglang.srt

    srt = Path(sglang.srt.__path__[0])
    sessions = [p for p in (srt / "managers").rglob("*.py") if "session is already open" in p.read_text()]
    return {
        "session": bool(sessions),
        "adapter": "does not exist" in (srt / "lora" / "lora_registry.py").read_text(),
    }


def health_while_released():
    """Return whether a health request runs while memory is released; see `HEALTH_RUNS_RELEASED`."""
    from sglang.srt.managers.scheduler import Scheduler

    for name in ("process_input_requests", "process_input_requests_"):
        if hasattr(Scheduler, name):
            source = inspect.getsource(getattr(Scheduler, name))
            return {"handled": "is_health_check_generate_req" in source, "guarded": "offload_tags" in source}
    raise AssertionError("the scheduler has no process_input_requests")


def version():
    import sglang

    assert Path(sglang.__file__).is_relative_to(Path(os.environ["PROBED"])), sglang.__file__
    row = release(sglang.__version__)
    return {"version": sglang.__version__, "has": {p: row.has(p) for p in ENDPOINTS}}


CONTRACTS = (
    version, bucket_passes_the_unpickler, command_passes_the_unpickler, cuda_handle_passes_the_unpickler, unpickler_rules,
    the_loader_is_called_with_model_and_named_tensors, our_receiver_is_found_by_its_name,
    a_loader_that_was_not_permitted_is_not_called, a_stock_bucket_reaches_the_models_own_loader, a_draft_model_is_not_updated,
    a_push_arrives,
    begin_and_end_of_a_sync_arrive, sleep_and_wake_arrive, update_groups_arrive,
    an_adapter_arrives_and_passes_the_unpickler, endpoints, generate_describes_its_fields,
    server_info_has_the_expected_keys, arguments_read_from_the_source_match_the_parser, every_argument_parses,
    rejections_have_the_expected_messages, health_while_released,
)  # fmt: skip


def main(out):
    sys.meta_path.append(_Kernels())
    import sgl_kernel

    if not hasattr(sgl_kernel, "__path__"):
        sgl_kernel.__path__ = []  # the stub is a single module; some releases import submodules of the package
    found = {}
    for contract in CONTRACTS:
        started = time.monotonic()
        try:
            found[contract.__name__] = {"value": contract()}
        except BaseException as error:
            found[contract.__name__] = {
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        found[contract.__name__]["seconds"] = round(time.monotonic() - started, 2)
        # After every contract: a release that crashes the process must not lose the others' results.
        Path(out).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # without waiting for the application's thread
