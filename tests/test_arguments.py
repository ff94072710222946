"""Server arguments: defaults, the user's, what is rejected, and the command line."""

import pytest

from tpcolocate.errors import ConfigError
from tpcolocate.server import arguments as rules
from tpcolocate.server.arguments import RECEIVER, server_arguments, to_argv

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
])  # fmt: skip
def test_unsupported_arguments_are_rejected_by_name_with_the_reason(user, words):
    with pytest.raises(ConfigError, match=words):
        server_arguments(user, tp_size=2, device_type="cuda")


def test_arguments_that_are_switched_off_are_accepted():
    user = {**dict.fromkeys(rules._MUST_BE_ONE, 1), **dict.fromkeys(rules._UNSUPPORTED), "load_format": "dummy"}
    user["enable_dp_attention"] = False
    assert server_arguments(user, tp_size=2, device_type="cuda").items() >= user.items()


@pytest.mark.parametrize("arguments, argv", [
    ({}, []),
    ({"mem_fraction_static": 0.4}, ["--mem-fraction-static", "0.4"]),
    ({"tp_size": 1, "seed": 0}, ["--tp-size", "1", "--seed", "0"]),  # not treated as True and False
    ({"enable_lora": True, "disable_custom_all_reduce": False, "chat_template": None}, ["--enable-lora"]),
    ({"lora_target_modules": ["q_proj", "k_proj"]}, ["--lora-target-modules", "q_proj", "k_proj"]),
    ({"cuda_graph_bs": (1, 2)}, ["--cuda-graph-bs", "1", "2"]),
    ({"json_model_override_args": {"a": [1]}}, ["--json-model-override-args", '{"a": [1]}']),
    ({"served_model_name": "a b"}, ["--served-model-name", "a b"]),
])  # fmt: skip
def test_arguments_become_a_command_line(arguments, argv):
    assert to_argv(arguments) == argv
