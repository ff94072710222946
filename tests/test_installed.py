"""The installed SGLang, read from its source."""

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
from harness import run_ranks

from tpcolocate.errors import ConfigError
from tpcolocate.server.arguments import check_installed, server_arguments
from tpcolocate.server.installed import Installed, find_installed

pytestmark = pytest.mark.quick

# As in releases up to 0.5.13, with the arguments that every release must have.
CALLS = """
class ServerArgs:
    host: str = "127.0.0.1"
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path", "--model", type=str)
        for_later = parser.add_argument_group("x")
        parser.add_argument("--host", type=str)
        parser.add_argument("--port", type=int)
        parser.add_argument("--config", type=str)
        parser.add_argument("--tp-size", "--tensor-parallel-size", type=int)
        parser.add_argument("--speculative-algorithm", type=str)
        parser.add_argument("--custom-weight-loader", nargs="*")
        parser.add_argument("--mem-fraction-static", type=float)
        parser.add_argument("--stream-output", action="store_true")
        parser.add_argument("--shared", action=argparse.BooleanOptionalAction)
        parser.add_argument("--gone", action=DeprecatedAction, help="Use --shared instead.")
        parser.add_argument("--stopped", action=DeprecatedAction, error_message=("no longer " "there"))
        parser.add_argument("--vague", action=DeprecatedAction, help=f"{x}")

class Other:
    unrelated: A[int, "help"] = 1
    def add_cli_args(parser):
        other.add_argument("--host")

def add_cli_args(parser):
    parser.add_argument("--outside")
"""
# As in 0.5.14 and newer, in several files from 0.5.20 on.
FIELDS = """
class Ns(msgspec.Struct):
    _NS_PATH = "serving"
    model_path: A[str, Arg(help="h", aliases=["--model"])]
    host: A[str, "The " "host"] = "x"
    port: Annotated[int, f"The port {x}"] = 1
    tp_size: A[int, Arg(cli_name="--tensor-parallel-size", aliases=["--tp-size"], help="h"), NS("parallel")] = 1
    both: A[bool, Arg(help="h", action=argparse.BooleanOptionalAction)] = True
    hidden: A[bool, Arg(no_cli=True)] = False
    shown: A[bool, Arg(no_cli=False)] = False
    bare: int = 3
    optional: Optional[int] = None
    derived = Derived(fn="x")

class NotOne(msgspec.Struct):
    elsewhere: A[int, "help"] = 1

class ServerArgs:
    def add_cli_args(parser):
        add_cli_args_from_dataclass(parser, ServerArgs)
        parser.add_argument("--config")
"""


def made(folder, *, server_args=CALLS, fields=None, io_struct="", version="0.5.20"):
    """Create the files of an SGLang that are read."""
    srt = folder / "sglang" / "srt"
    (srt / "managers").mkdir(parents=True)
    (srt / "arg_groups" / "fields").mkdir(parents=True)
    (folder / "sglang" / "__init__.py").write_text("raise SystemExit('it must not be imported')")
    (srt / "server_args.py").write_text(server_args)
    (srt / "managers" / "io_struct.py").write_text(io_struct)
    if fields is not None:
        (srt / "arg_groups" / "fields" / "serving.py").write_text(fields)
    if version is not None:
        (folder / f"sglang-{version}.dist-info").mkdir()
        (folder / f"sglang-{version}.dist-info" / "METADATA").write_text(f"Name: sglang\nVersion: {version}\n")
    found = find_installed({"PYTHONPATH": str(folder)})
    assert found == Installed(folder / "sglang", version)
    return found


def test_arguments_from_add_argument_calls(tmp_path):
    arguments = made(tmp_path).arguments()
    ignored = {name: reason for name, reason in arguments.items() if reason is not None}
    assert ignored == {"gone": "Use --shared instead.", "stopped": "no longer there", "vague": "it is deprecated"}
    assert set(arguments) == {
        "model-path", "model", "host", "port", "config", "tp-size", "tensor-parallel-size", "speculative-algorithm",
        "custom-weight-loader", "mem-fraction-static", "stream-output", "shared", "no-shared", *ignored,
    }  # fmt: skip


def test_arguments_from_fields(tmp_path):
    arguments = made(tmp_path, server_args="class ServerArgs: pass", fields=FIELDS).arguments()
    assert set(arguments) == {
        "model-path", "model", "host", "port", "tp-size", "tensor-parallel-size", "both", "no-both", "shown", "config"
    }  # fmt: skip


@pytest.mark.parametrize("source", ["class ServerArgs: pass", "class ServerArgs(: broken", "\0"])
def test_a_source_that_cannot_be_parsed_is_not_checked(tmp_path, source):
    installed = made(tmp_path, server_args=source)
    assert installed.arguments() is None
    check_installed({"whatever": 1}, installed)  # the server decides


def test_a_missing_source_is_not_checked(tmp_path):
    nowhere = Installed(tmp_path, None)
    assert nowhere.arguments() is None and nowhere.request_fields("X") is None


def test_a_missing_package_is_reported_with_what_to_install():
    with pytest.raises(ConfigError, match="SGLang is not installed for") as caught:
        check_installed({"whatever": 1}, None)
    assert f"{sys.executable} -m pip install 'sglang>=" in caught.value.hint
    without = Installed(Path("nowhere"), "0.5.21", has_memory_saver=False)
    with pytest.raises(ConfigError, match="torch_memory_saver, which .* does not have"):
        check_installed({"enable_memory_saver": True}, without)
    check_installed({"enable_memory_saver": False}, without)
    check_installed({"enable_memory_saver": True, "device": "cpu"}, without)


def test_request_fields(tmp_path):
    source = (
        "class A(B, kw_only=True):\n    x: int\n    y: Optional[str] = None\n    def f(self):\n        z: int = 1\n"
    )
    installed = made(tmp_path, io_struct=source)
    assert installed.request_fields("A") == {"x", "y"} and installed.request_fields("B") is None


def test_the_servers_path_is_searched_as_by_python(tmp_path, monkeypatch):
    first, second = made(tmp_path / "a", version="0.5.12"), made(tmp_path / "b", version=None)
    both = os.pathsep.join([str(tmp_path / "b"), str(tmp_path / "a")])
    assert find_installed({"PYTHONPATH": both}).folder == second.folder
    assert find_installed({"PYTHONPATH": str(tmp_path / "empty") + os.pathsep + str(tmp_path / "a")}) == first
    monkeypatch.chdir(tmp_path / "b")
    assert find_installed({"PYTHONPATH": str(tmp_path / "a")}).folder == second.folder, "-m searches it first"
    assert find_installed({"PYTHONPATH": str(tmp_path / "a"), "PYTHONSAFEPATH": "1"}) == first
    assert find_installed({}, folder=str(tmp_path / "a")) == first, "the server's, not this process's"


@pytest.mark.parametrize("text, version", [
    ("version: str\n__version__ = version = '0.5.9'\n", "0.5.9"),
    ("__version__ = version = compute()\n", "0.5.20"),
    ("(", "0.5.20"),
])  # fmt: skip
def test_the_version_of_the_package_precedes_that_of_its_distribution(tmp_path, text, version):
    made(tmp_path)
    (tmp_path / "sglang" / "_version.py").write_text(text)
    assert find_installed({"PYTHONPATH": str(tmp_path)}).version == version


def find_here(rank):
    found = find_installed(os.environ)
    return found.version, found.folder.name, len(found.arguments()), "sglang" in sys.modules


def test_what_is_installed_here_is_found_and_not_imported():
    [(version, folder, num_arguments, is_imported)] = run_ranks(find_here, 1, init_group=False)
    assert (version, folder, is_imported) == (metadata.version("sglang"), "sglang", False) and num_arguments > 300


REQUEST = "class UpdateWeightsFromTensorReqInput(BaseReq):\n    load_format: str\n"


@pytest.mark.parametrize("arguments, words, hint", [
    ({"mem_fraction": 0.4}, "SGLang 0.5.20 has no argument mem_fraction (launch got mem_fraction=0.4)", "has mem_fraction_static"),
    ({"incremental_streaming_output": True}, "has no argument incremental_streaming_output", "has stream_output"),
    ({"qqqqqqqq": None}, "has no argument qqqqqqqq", "--help"),
    ({"gone": True}, "accepts gone and ignores it: Use --shared instead.", "leave it out"),
    ({"shared": False}, "shared=False would leave SGLang 0.5.20 at its default", "no_shared=True"),
    ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm='EAGLE' cannot be used with SGLang 0.5.20", "0.5.10 or newer"),
])  # fmt: skip
def test_arguments_that_the_installed_release_lacks_are_rejected(tmp_path, arguments, words, hint):
    with pytest.raises(ConfigError) as caught:
        check_installed(arguments, made(tmp_path, io_struct=REQUEST))
    assert words in caught.value.message and hint in caught.value.hint


@pytest.mark.parametrize("arguments", [
    {"mem_fraction_static": 0.4, "stream_output": True, "shared": True, "no_shared": True, "model": "x"},
    {"stream_output": False, "host": None},
    {"speculative_algorithm": None},
])  # fmt: skip
def test_supported_arguments_pass(tmp_path, arguments):
    check_installed(arguments, made(tmp_path, io_struct=REQUEST))


@pytest.mark.parametrize("io_struct, version, refused", [
    (REQUEST + "    disable_draft_model: bool\n", None, False),
    (REQUEST + "    selector: str\n", "0.5.9", False),  # the source precedes the version
    (REQUEST, None, True),
    ("", "0.5.9", True),
    ("", "0.5.10", False),
    ("", None, False),  # unknown: the version is checked once the server runs
])  # fmt: skip
def test_speculative_decoding_needs_updates_without_the_draft_model(tmp_path, io_struct, version, refused):
    installed = made(tmp_path, io_struct=io_struct, version=version)
    if refused:
        with pytest.raises(ConfigError, match="draft model"):
            check_installed({"speculative_algorithm": "NEXTN"}, installed)
    else:
        check_installed({"speculative_algorithm": "NEXTN"}, installed)


def test_a_release_that_is_too_old_is_rejected_before_it_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"SGLang 0\.5\.8 is not supported"):
        check_installed({}, made(tmp_path, version="0.5.8"))


@pytest.mark.parametrize("device_type, tp_size", [("cpu", 1), ("cpu", 2), ("cuda", 1), ("cuda", 2)])
def test_our_default_arguments_are_supported_by_the_installed_release(device_type, tp_size):
    installed = find_installed(os.environ)
    assert installed is not None and installed.arguments() is not None, (
        "SGLang must be installed: see scripts/make_venv.py"
    )
    check_installed(server_arguments({}, tp_size=tp_size, device_type=device_type, shared_device=True), installed)
