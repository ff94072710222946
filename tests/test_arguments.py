"""Server arguments: defaults, the user's, what is rejected, and the command line."""

import os
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from tpcolocate.errors import ConfigError
from tpcolocate.server import arguments as rules
from tpcolocate.server.arguments import RECEIVER, check_installed, server_arguments, to_argv
from tpcolocate.server.installed import find_installed

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


@pytest.mark.parametrize("user, tp_size, device, shared, expected", [
    ({}, 1, "cuda", False, {"tp_size": 1}),
    ({"mem_fraction_static": 0.4}, 1, "cuda", False, {"mem_fraction_static": 0.4, "tp_size": 1}),
    ({}, 2, "cuda", False, {"disable_custom_all_reduce": True, "tp_size": 2}),
    ({"disable_custom_all_reduce": False}, 2, "cuda", False, {"disable_custom_all_reduce": False, "tp_size": 2}),
    ({}, 2, "cuda", True, {"disable_custom_all_reduce": True, "gpu_id_step": 0, "tp_size": 2}),
    ({"tp_size": 2, "pp_size": 1, "dp_size": 1}, 2, "cuda", False,
     {"disable_custom_all_reduce": True, "tp_size": 2, "pp_size": 1, "dp_size": 1}),
])  # fmt: skip
def test_a_gpu_server_gets_the_arguments_of_the_slice_and_our_loader_only(user, tp_size, device, shared, expected):
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
def test_our_loader_is_permitted_beside_the_users(theirs, expected):
    user = {"custom_weight_loader": theirs}
    assert server_arguments(user, tp_size=1, device_type="cuda")["custom_weight_loader"] == expected
    assert user == {"custom_weight_loader": theirs}


def test_a_cpu_server_gets_defaults_that_the_user_overrides():
    ours = server_arguments({}, tp_size=1, device_type="cpu")
    assert ours["device"] == "cpu" and ours["attention_backend"] == "torch_native" and ours["sleep_on_idle"] is True
    theirs = server_arguments({"dtype": "bfloat16", "sleep_on_idle": False}, tp_size=1, device_type="cpu")
    assert theirs == ours | {"dtype": "bfloat16", "sleep_on_idle": False}


@pytest.mark.parametrize("user, words", [
    *(({name: "x"}, f"does not take {name}='x'") for name in rules._REFUSED),
    ({"pp_size": 2}, "pp_size=2 is not supported"),
    ({"data_parallel_size": 4}, "data_parallel_size=4 is not supported"),
    *(({name: 2}, f"{name}=2 is not supported: weights are addressed") for name in rules._MUST_BE_ONE),
    *(({name: "x"}, f"{name}='x' is not supported: {why}") for name, why in rules._UNSUPPORTED.items()),
    *(({"load_format": kind}, f"load_format='{kind}' is not supported") for kind in rules._QUANTISED_FORMATS),
    ({"tp_size": 4}, r"tp_size=4\) contradicts init\(tp_size=2"),
    *(({"custom_weight_loader": value}, "custom_weight_loader must be a list of dotted names") for value in (5, True, [["a"]])),
    ({"mem_fraction_static": torch.tensor(float("nan"))}, "mem_fraction_static=nan cannot be written"),
    ({"mem_fraction_static": torch.tensor(1j)}, "is a complex, which is no value of a server argument"),
])  # fmt: skip
def test_unsupported_arguments_are_rejected_by_name_with_the_reason(user, words):
    with pytest.raises(ConfigError, match=words):
        server_arguments(user, tp_size=2, device_type="cuda")


def test_arguments_that_are_switched_off_are_accepted():
    user = {**dict.fromkeys(rules._MUST_BE_ONE, 1), "load_format": "dummy", "enable_dp_attention": False}
    assert server_arguments(user, tp_size=2, device_type="cuda").items() >= user.items()


@pytest.mark.parametrize(
    "name", [*rules._REFUSED, *rules._MUST_BE_ONE, *rules._UNSUPPORTED, "tp_size", "port", "nccl_port", "host", "other"]
)
def test_none_leaves_an_argument_out(name):
    """Also one that is refused, or that has a default here: scripts pass on what their own users have not set."""
    without = server_arguments({}, tp_size=2, device_type="cpu")
    assert server_arguments({name: None}, tp_size=2, device_type="cpu") == without
    assert "disable_overlap_schedule" not in server_arguments(
        {"disable_overlap_schedule": None}, tp_size=2, device_type="cpu"
    )


@pytest.mark.parametrize("name", ["port", "nccl_port"])
def test_a_port_is_a_number_of_one(name):
    assert server_arguments({name: "30000"}, tp_size=1, device_type="cuda")[name] == 30000
    for value in (-1, 65536, "abc", 1.5, True, ""):
        with pytest.raises(ConfigError, match=f"{name} must be"):
            server_arguments({name: value}, tp_size=1, device_type="cuda")


def test_a_set_has_the_same_order_in_every_process():
    """PEFT's target_modules is one; texts have another hash in each process, and the ranks' arguments are compared."""
    modules = {"q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "down_proj"}
    for given in (modules, frozenset(modules)):
        found = server_arguments({"lora_target_modules": given}, tp_size=1, device_type="cuda")
        assert found["lora_target_modules"] == sorted(modules)


def test_adapters_may_be_named_as_for_sglangs_engine():
    one = {"lora_name": "a", "lora_path": "/x"}
    for given, expected in (({"a": Path("/x")}, [one]), (one, one), ([one], [one]), (["a=/x"], ["a=/x"]), ({}, [])):
        found = server_arguments({"lora_paths": given}, tp_size=1, device_type="cuda")
        assert found["lora_paths"] == expected


def test_what_a_cpu_server_cannot_have_is_left_out_or_replaced(caplog):
    ours = server_arguments({}, tp_size=1, device_type="cpu")
    assert server_arguments({"enable_memory_saver": True}, tp_size=1, device_type="cpu") == ours
    assert "there is none on a CPU" in caplog.text
    assert server_arguments({"enable_memory_saver": True}, tp_size=1, device_type="cuda")["enable_memory_saver"] is True
    for lora in ({"enable_lora": True}, {"lora_paths": ["a=b"]}):
        assert server_arguments(lora, tp_size=1, device_type="cpu")["lora_backend"] == "torch_native"
        assert "lora_backend" not in server_arguments(lora, tp_size=1, device_type="cuda")
        theirs = server_arguments(lora | {"lora_backend": "triton"}, tp_size=1, device_type="cpu")
        assert theirs["lora_backend"] == "triton"
    assert "lora_backend" not in ours


class Kind(Enum):
    BF16 = torch.bfloat16


@pytest.mark.parametrize("value, plain", [
    (torch.bfloat16, "bfloat16"), (Kind.BF16, "bfloat16"), (Path("/a/b"), "/a/b"), ((1, Path("c")), [1, "c"]),
    ({"x": torch.float16}, {"x": "float16"}), (torch.tensor(4), 4), (np.float32(0.5), 0.5), (torch.device("cuda:1"), "cuda"),
    (True, True), (0.4, 0.4), ("text", "text"),
])  # fmt: skip
def test_values_are_taken_as_they_are_written_in_python(value, plain):
    found = server_arguments({"some_argument": value}, tp_size=1, device_type="cuda")["some_argument"]
    assert found == plain and type(found) is type(plain)


@pytest.mark.parametrize("value", [object(), lambda: 0, torch.zeros(2), b"bytes"])
def test_a_value_that_no_argument_can_have_is_refused(value):
    with pytest.raises(ConfigError, match=f"some_argument=.*is a {type(value).__name__}"):
        server_arguments({"some_argument": value}, tp_size=1, device_type="cuda")


def test_a_key_that_json_cannot_have_is_refused():
    assert server_arguments({"a": {1: 2, None: 3}}, tp_size=1, device_type="cuda")["a"] == {1: 2, None: 3}
    with pytest.raises(ConfigError, match="is a tuple"):
        server_arguments({"a": {(1, 2): 3}}, tp_size=1, device_type="cuda")


def test_a_weight_cache_is_refused_unless_it_is_off():
    assert server_arguments({"weight_cache_mode": "off"}, tp_size=1, device_type="cuda")["weight_cache_mode"] == "off"
    for on in ("daemon", "client"):
        with pytest.raises(ConfigError, match=f"weight_cache_mode='{on}' is not supported"):
            server_arguments({"weight_cache_mode": on}, tp_size=1, device_type="cuda")


def test_one_process_for_the_tokenizer_is_sglangs_default():
    assert server_arguments({"tokenizer_worker_num": 1}, tp_size=1, device_type="cuda")["tokenizer_worker_num"] == 1
    with pytest.raises(ConfigError, match="tokenizer_worker_num=2 is not supported: SGLang takes no key"):
        server_arguments({"tokenizer_worker_num": 2}, tp_size=1, device_type="cuda")


@pytest.mark.parametrize("value", ["a\0b", "\ud800", float("nan"), ["a\0b"], {"\ud800": 1}, {"a": "\0"}])
def test_what_no_command_line_can_have_is_refused(value):
    with pytest.raises(ConfigError, match="some_argument=.* cannot be written on a command line"):
        server_arguments({"some_argument": value}, tp_size=1, device_type="cuda")


@pytest.mark.parametrize(("name", "off"), [
    *((name, off) for name in rules._UNSUPPORTED for off in (None, False)), *rules._OFF.items(), ("cpu_offload_gb", 0),
])  # fmt: skip
def test_what_leaves_an_unsupported_argument_off_is_taken(name, off):
    """The defaults, which scripts write out; their argument is one of the installed release."""
    assert server_arguments({name: off}, tp_size=1, device_type="cuda").get(name) == off
    if off is not None and off is not False:
        assert name.replace("_", "-") in find_installed(os.environ).arguments()


@pytest.mark.parametrize("elsewhere, ours", rules._ELSEWHERE.items())
def test_names_of_other_engines_are_answered_with_sglangs(elsewhere, ours):
    """Against the installed release, so that a renamed argument is noticed."""
    installed = find_installed(os.environ)
    assert ours.replace("_", "-") in installed.arguments()
    if elsewhere.replace("_", "-") not in installed.arguments():
        with pytest.raises(ConfigError, match=f"has no argument {elsewhere}") as caught:
            check_installed({elsewhere: 1}, installed)
        assert caught.value.hint == f"this release has {ours}"


@pytest.mark.parametrize("arguments, argv", [
    ({}, []),
    ({"mem_fraction_static": 0.4}, ["--mem-fraction-static", "0.4"]),
    ({"tp_size": 1, "seed": 0}, ["--tp-size", "1", "--seed", "0"]),  # not treated as True and False
    ({"enable_lora": True, "disable_custom_all_reduce": False, "chat_template": None}, ["--enable-lora"]),
    ({"lora_target_modules": ["q_proj", "k_proj"]}, ["--lora-target-modules", "q_proj", "k_proj"]),
    ({"cuda_graph_bs": (1, 2)}, ["--cuda-graph-bs", "1", "2"]),
    ({"json_model_override_args": {"a": [1]}}, ["--json-model-override-args", '{"a": [1]}']),
    ({"lora_paths": ["a=/x", {"lora_name": "b", "lora_path": "/y"}]},
     ["--lora-paths", "a=/x", '{"lora_name": "b", "lora_path": "/y"}']),
    ({"served_model_name": "a b"}, ["--served-model-name", "a b"]),
])  # fmt: skip
def test_arguments_become_a_command_line(arguments, argv):
    assert to_argv(arguments) == argv
