"""Contracts with SGLang, checked against the code of its releases.

One process per release runs ``probe.py`` with that release on its path, and every contract is a test of its own that
checks the probe's result: if a new release breaks one, the failing test names both.

The releases that other tests run (see tests/test_engine.py) are checked by ``make test``; all of them, including the
newest on the index, by ``make contracts``, which fetches them first.
"""

import ast
import os
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fetch
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import tpcolocate
from tpcolocate.in_server import tpcolocate_receiver
from tpcolocate.server.installed import Installed
from tpcolocate.server.releases import (
    ENDPOINTS,
    EXACT_UNPICKLER,
    HEALTH_RUNS_RELEASED,
    IGNORED_FIELDS,
    RENAMED,
    release,
)

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).resolve().parent
PACKAGE = Path(tpcolocate.__file__).parent
PROBE_TIMEOUT_S = 240
GET = ("/model_info", "/server_info", "/health")
NEWEST = fetch.newest()


def folder_of(version):
    """Return the folder of a release: the environment's, one beside it, or a fetched one."""
    if version == metadata.version("sglang"):
        return Path(metadata.distribution("sglang").locate_file(""))
    if version in fetch.INSTALLED:
        return Path(sys.prefix) / f"sglang-{version}"
    return fetch.folder_of(version)


def releases():
    """Return all releases as test parameters; those that must be fetched are marked ``contracts``."""
    versions = [*fetch.PINNED, *fetch.INSTALLED]
    versions += ["newest"] if NEWEST is None else [] if NEWEST in versions else [NEWEST]
    fetched = pytest.mark.contracts
    return [pytest.param(version, marks=() if version in fetch.INSTALLED else fetched) for version in versions]


every_release = pytest.mark.parametrize("version", releases(), scope="module")
_probed = {}


def probe(version):
    """Run the probe of one release, once."""
    if version not in _probed:
        _probed[version] = _run_probe(version)
    return _probed[version]


def _run_probe(version):
    folder = folder_of(version)
    if not (folder / "sglang").is_dir():
        pytest.fail(f"SGLang {version} is not in {folder}: make contracts fetches it", pytrace=False)
    out = HERE.parents[1] / "out"
    out.mkdir(exist_ok=True)
    answers = out / f"contracts-{version}.pickle"
    answers.unlink(missing_ok=True)
    path = [folder, PACKAGE / "server" / "cpu_stub", PACKAGE / "in_server", HERE, PACKAGE.parent]
    environment = {
        **os.environ,
        "PROBED": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    log = answers.with_suffix(".log")
    with log.open("wb") as output:
        command = [sys.executable, "-P", str(HERE / "probe.py"), str(answers)]
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=output, timeout=PROBE_TIMEOUT_S, check=False, cwd=out
        )
    found = pickle.loads(answers.read_bytes()) if answers.exists() else {}
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    return {"answers": found, "end": f"the probe ended with {done.returncode}:\n{tail}"}


def answer(version, contract):
    """Return the probe's result for one contract."""
    probed = probe(version)
    if contract not in probed["answers"]:
        pytest.fail(f"SGLang {version} was not probed for {contract}: {probed['end']}", pytrace=False)
    found = probed["answers"][contract]
    if "error" in found:
        pytest.fail(f"SGLang {version}, {contract}: {found['error']}\n{found['traceback']}", pytrace=False)
    return found["value"]


# --- payloads -------------------------------------------------------------------------------------------------------


@every_release
def test_the_probe_runs_the_release(version):
    assert answer(version, "version")["version"] == version


@every_release
def test_our_bucket_passes_the_unpickler(version):
    """And the bucket class returns the same bytes; the handle is released with the bucket."""
    assert answer(version, "bucket_passes_the_unpickler") == {"before": 1, "opened": 1, "after": 0}


@every_release
def test_our_command_passes_the_unpickler(version):
    answer(version, "command_passes_the_unpickler")


@every_release
def test_our_cuda_handle_passes_the_unpickler_and_its_uuid_is_found(version):
    answer(version, "cuda_handle_passes_the_unpickler")


@every_release
def test_the_unpickler_is_as_strict_as_in_the_table(version):
    found = answer(version, "unpickler_rules")
    assert found == {"exact": Version(version) in EXACT_UNPICKLER, "os_system": False}


# --- inside the server ----------------------------------------------------------------------------------------------


@every_release
def test_the_loader_is_called_with_model_and_named_tensors_of_its_tp_rank(version):
    assert answer(version, "the_loader_is_called_with_model_and_named_tensors") == [{"for": 0}, {"for": 1}]


@every_release
def test_our_receiver_is_found_by_its_name(version):
    answer(version, "our_receiver_is_found_by_its_name")


@every_release
def test_a_loader_that_was_not_permitted_is_not_called(version):
    found = answer(version, "a_loader_that_was_not_permitted_is_not_called")
    assert found["called"] == 0 and "Unknown load_format" in found["refused"]


@every_release
def test_a_stock_bucket_reaches_the_models_own_loader(version):
    answer(version, "a_stock_bucket_reaches_the_models_own_loader")


@every_release
def test_a_draft_model_is_not_updated_where_the_table_has_a_field_for_it(version):
    found = answer(version, "a_draft_model_is_not_updated")
    assert found["without"], "without the field it must be updated"
    assert (found["with"] == []) == bool(release(version).target_only())


@every_release
def test_health_runs_while_memory_is_released_as_in_the_table(version):
    found = answer(version, "health_while_released")
    assert found == {"handled": True, "guarded": Version(version) not in HEALTH_RUNS_RELEASED}


@every_release
def test_the_fields_of_generate_that_are_ignored_are_read_nowhere(version):
    """Beyond the request's own classes, which copy them."""
    sources = list((folder_of(version) / "sglang" / "srt").rglob("*.py"))
    assert sources
    texts = {path: path.read_text(errors="replace") for path in sources}
    for name, span in IGNORED_FIELDS.items():
        named = [path.name for path, text in texts.items() if name in text]
        assert set(named).issubset(["io_struct.py"]) == (Version(version) in span), named


# --- requests ---------------------------------------------------------------------------------------------------------


@every_release
def test_endpoints_match_the_table(version):
    routes = answer(version, "endpoints")["routes"]
    row = release(version)
    for path, endpoint in ENDPOINTS.items():
        there = path in routes and "POST" in routes[path]["methods"]
        assert there == row.has(path), path
        assert not there or endpoint.request is None or endpoint.request in " ".join(routes[path]["takes"]), path
    for path in GET:
        assert "GET" in routes[path]["methods"], path
    assert "POST" in routes["/generate"]["methods"]


@pytest.mark.parametrize("path", ENDPOINTS)
@every_release
def test_fields_match_the_table(version, path):
    """In both directions, for all fields that we could send."""
    found, row, endpoint = answer(version, "endpoints"), release(version), ENDPOINTS[path]
    if not row.has(path):
        assert endpoint.request is None or endpoint.request not in found["fields"]
        return
    taken = set(found["routes"][path]["query"] if endpoint.request is None else found["fields"][endpoint.request])
    taken -= {"rid", "http_worker_ipc"} - set(endpoint.fields)  # of every request, for SGLang's own use
    assert taken == {name for name in endpoint.fields if row.has(path, name)}


@every_release
def test_a_push_arrives(version):
    sent = answer(version, "a_push_arrives")
    names = {"serialized_named_tensors", "load_format", "flush_cache", *release(version).target_only()}
    assert {path: set(fields) for path, fields in sent.items()} == {"/update_weights_from_tensor": names}


@every_release
def test_begin_and_end_of_a_sync_arrive_and_the_version_is_reported(version):
    sent = answer(version, "begin_and_end_of_a_sync_arrive")
    assert ("/begin_weight_update" in sent) == ("/end_weight_update" in sent) == release(version).weight_session
    assert {"/pause_generation", "/flush_cache", "/update_weight_version", "/continue_generation"} <= set(sent)


@every_release
def test_sleep_and_wake_arrive(version):
    sent = answer(version, "sleep_and_wake_arrive")
    assert sent["/release_memory_occupation"] == sent["/resume_memory_occupation"] == ["tags"]
    assert sent["/pause_generation"] == ["mode"] and "/continue_generation" in sent


@every_release
def test_update_groups_arrive(version):
    sent = answer(version, "update_groups_arrive")
    assert {"/init_weights_update_group", "/destroy_weights_update_group"} <= set(sent)


@every_release
def test_an_adapter_arrives_and_passes_the_unpickler(version):
    sent = answer(version, "an_adapter_arrives_and_passes_the_unpickler")
    form = "serialized_named_tensors" if release(version).lora_payload_per_rank else "serialized_tensors"
    assert form in sent["/load_lora_adapter_from_tensors"]


@every_release
def test_generate_describes_its_fields_and_has_the_expected_ones(version):
    found = answer(version, "generate_describes_its_fields")
    assert found["missing"] == [] and found["num"] > 40


@every_release
def test_server_info_has_the_expected_keys(version):
    assert answer(version, "server_info_has_the_expected_keys") == {"version": version, "missing": []}


@every_release
def test_rejections_have_the_expected_messages(version):
    found = answer(version, "rejections_have_the_expected_messages")
    assert found == {"session": release(version).weight_session, "adapter": True}


# --- arguments --------------------------------------------------------------------------------------------------------


@every_release
def test_every_argument_parses(version):
    assert len(answer(version, "every_argument_parses")) == 16


@every_release
def test_arguments_read_from_the_source_match_the_parser(version):
    found = answer(version, "arguments_read_from_the_source_match_the_parser")
    assert found["version"] == version and found["num"] > 300
    assert found["missed"] == found["invented"] == []
    path = "/update_weights_from_tensor"
    assert set(found["update_fields"]) == {name for name in ENDPOINTS[path].fields if release(version).has(path, name)}


@every_release
def test_every_removed_argument_has_the_successor_of_the_table(version):
    """For every renamed argument of this release or an older one, this release has one of the two names."""
    known = Installed(folder_of(version) / "sglang", version).arguments()
    older = [param.values[0] for param in releases() if param.values[0] != "newest"]
    older = [v for v in older if Version(v) < Version(version) and (folder_of(v) / "sglang").is_dir()]
    had = set(known).union(*(Installed(folder_of(v) / "sglang", v).arguments() for v in older))
    for old, new in RENAMED:
        names = {old.replace("_", "-"), new.partition("=")[0].replace("_", "-")}
        assert names & set(known) or not names & had, (old, new)


# --- the receiver -----------------------------------------------------------------------------------------------------


def imports_of(folder):
    """Return the top-level packages that the files of a package import, without the standard library."""
    found = set()
    for path in Path(folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names


@every_release
def test_the_receiver_imports_only_what_comes_with_sglang(version):
    # Triton comes with torch's builds for GPUs; without it and numpy, `kernels` falls back to torch's copies.
    assert imports_of(Path(tpcolocate_receiver.__file__).parent) == {"torch", "zmq", "safetensors", "triton", "numpy"}
    [distribution] = metadata.distributions(name="sglang", path=[str(folder_of(version))])
    brought = {Requirement(line).name for line in distribution.requires if not Requirement(line).marker}
    # safetensors comes with transformers
    assert {"torch", "pyzmq", "transformers", "numpy"} <= brought, sorted(brought)


def test_the_receiver_imports_with_torch_and_pyzmq_alone():
    """By its name from its folder, as in a TP worker, with all other packages blocked."""
    script = (
        "import sys, torch\n"
        "try:\n    import zmq\nexcept ImportError:\n    pass\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.partition('.')[0]\n"
        "        if top not in sys.stdlib_module_names | {'torch', 'zmq', 'tpcolocate_receiver'}:\n"
        "            raise ImportError(f'{name} must not be imported by the receiver')\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "import tpcolocate_receiver\n"
        "assert callable(tpcolocate_receiver.receive) and 'tpcolocate' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE / "in_server")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


# --- these tests can fail ---------------------------------------------------------------------------------------------


def test_a_missing_release_fails_and_is_not_skipped():
    with pytest.raises(pytest.fail.Exception, match="SGLang 0.0.0 is not in .*make contracts fetches it"):
        answer("0.0.0", "version")


def test_a_contract_that_is_broken_or_was_not_probed_fails(monkeypatch):
    broken = {"answers": {"x": {"error": "KeyError: 'y'", "traceback": "..."}}, "end": "the probe ended with -9"}
    monkeypatch.setitem(_probed, "0.0.0", broken)
    with pytest.raises(pytest.fail.Exception, match="SGLang 0.0.0, x: KeyError: 'y'"):
        answer("0.0.0", "x")
    with pytest.raises(pytest.fail.Exception, match="not probed for z: the probe ended with -9"):
        answer("0.0.0", "z")
