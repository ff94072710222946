"""LoRA adapters: their names in one form, the checks against the served model, and the requests; no server."""

import base64
import copy
import io
import math
import pickle
from enum import StrEnum

import peft
import pytest
import torch
from test_api import Captured, refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tpcolocate.errors import ConfigError, RequestError, WeightsMismatchError
from tpcolocate.server.api import LoraLimits, ServerApi
from tpcolocate.server.releases import release
from tpcolocate.weights.lora import adapter_of, check_adapter, check_served, make_adapter
from tpcolocate.weights.sources.model_spec import ModelSpec, read_spec

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

R, HIDDEN, KV, WIDE = 2, 8, 4, 12
OUT = {"q_proj": HIDDEN, "k_proj": KV, "v_proj": KV, "o_proj": HIDDEN, "gate_proj": WIDE, "up_proj": WIDE}
PATH = {name: f"model.layers.{{}}.{'mlp' if name in ('gate_proj', 'up_proj') else 'self_attn'}.{name}" for name in OUT}
SPEC = ModelSpec(
    {
        "model.embed_tokens.weight": (20, HIDDEN),
        "lm_head.weight": (20, HIDDEN),
        **{PATH[name].format(i) + ".weight": (out, HIDDEN) for i in range(2) for name, out in OUT.items()},
        **{f"model.layers.{i}.input_layernorm.weight": (HIDDEN,) for i in range(2)},
    },
    "somewhere",
)
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


def tensors(*names, layers=(0, 1), adapter=""):
    found = {}
    for i in layers:
        for name in names:
            stem = f"base_model.model.{PATH[name].format(i)}"
            found[f"{stem}.lora_A{adapter}.weight"] = torch.randn(R, HIDDEN)
            found[f"{stem}.lora_B{adapter}.weight"] = torch.randn(OUT[name], R)
    return found


GOOD = tensors("q_proj", "v_proj")
A, B = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
)


@pytest.mark.parametrize("given", [
    GOOD,
    {name.removeprefix("base_model.model."): tensor for name, tensor in GOOD.items()},
    {name.replace(".weight", ".default.weight"): tensor for name, tensor in GOOD.items()},
    {name.replace(".layers.", "._checkpoint_wrapped_module.layers."): tensor for name, tensor in GOOD.items()},
], ids=["saved", "without a prefix", "of a state dict", "wrapped"])  # fmt: skip
def test_all_forms_of_names_become_those_that_peft_saves(given):
    adapter = make_adapter(given, CONFIG)
    assert list(adapter.tensors) == list(GOOD)
    assert all(adapter.tensors[name] is tensor for name, tensor in zip(GOOD, given.values()))
    assert set(adapter.modules()) == {PATH[name].format(i) for i in range(2) for name in ("q_proj", "v_proj")}


class Kind(StrEnum):
    LORA = "LORA"


@pytest.mark.parametrize("config", [
    CONFIG,
    {**CONFIG, "peft_type": Kind.LORA, "target_modules": {"v_proj", "q_proj"}, "r": 2.0, "runtime_config": object()},
    {k: v for k, v in CONFIG.items() if k not in ("peft_type", "bias")},
    {**CONFIG, "target_modules": r".*\.(q|v)_proj"},
    {**CONFIG, "target_modules": "all-linear"},
    peft.LoraConfig(r=R, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
], ids=["json", "python", "short", "pattern", "all-linear", "peft"])  # fmt: skip
def test_the_configuration_for_the_server_is_json_with_names_of_modules(config):
    import json

    sent = make_adapter(GOOD, config).config_for_server
    assert json.loads(json.dumps(sent)) == sent
    assert {name: sent[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")} == {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip


@pytest.mark.parametrize("changes, words", [
    ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
    ({"r": 0}, "r=0"),
    ({"r": None}, "r=None"),
    ({"r": True}, "r=True"),
    ({"r": 2.5}, "r=2.5"),
    ({"lora_alpha": None}, "lora_alpha=None"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"use_dora": True}, "use_dora"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"lora_bias": True}, "lora_bias"),
    *(({"init_lora_weights": how}, "init_lora_weights") for how in ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga")),
])  # fmt: skip
def test_configurations_that_sglang_ignores_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        make_adapter(GOOD, {**CONFIG, **changes})


@pytest.mark.parametrize("how", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_as_it_was_are_taken(how):
    assert make_adapter(GOOD, {**CONFIG, "init_lora_weights": how}).rank == R


@pytest.mark.parametrize("config", [None, "adapter_config.json", [CONFIG]])
def test_a_configuration_must_be_a_mapping(config):
    with pytest.raises(ConfigError, match=f"config must be a mapping .* got {type(config).__name__}"):
        make_adapter(GOOD, config)


@pytest.mark.parametrize("given, error, words", [
    ({}, ConfigError, "no tensors"),
    ({**GOOD, "base_model.model.model.norm.weight": torch.ones(1)}, WeightsMismatchError, "model.norm.weight"),
    ({**GOOD, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(1)}, WeightsMismatchError, "embedding_A"),
    ({**GOOD, A: 3}, WeightsMismatchError, "q_proj.lora_A"),
    ({**GOOD, 3: torch.ones(1)}, WeightsMismatchError, ": 3"),
    ({**tensors("q_proj", adapter=".one"), **tensors("q_proj", adapter=".two")}, ConfigError, "one, two"),
])  # fmt: skip
def test_names_that_are_not_those_of_one_adapter_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        make_adapter(given, CONFIG)


@pytest.mark.parametrize("given, config, words", [
    ({**GOOD, A: GOOD[A][:, 1:]}, {}, r"q_proj.lora_A has shape \(2, 7\), expected \(2, 8\) \(r=2, according to somewhere\)"),
    ({**GOOD, A: GOOD[A][1:]}, {}, r"lora_A has shape \(1, 8\), expected \(2, 8\)"),
    ({**GOOD, A: GOOD[A].T}, {}, r"lora_A has shape \(8, 2\)"),
    ({**GOOD, A: GOOD[A][None]}, {}, r"lora_A has shape \(1, 2, 8\)"),
    ({**GOOD, B: GOOD[B][1:]}, {}, r"lora_B has shape \(7, 2\), expected \(8, 2\)"),
    ({**GOOD, A: GOOD[A].int()}, {}, "lora_A is torch.int32"),
    (GOOD, {"r": 4}, r"lora_A has shape \(2, 8\), expected \(4, 8\)"),
    ({k: v for k, v in GOOD.items() if k != B}, {}, "q_proj has no lora_B"),
    (tensors("q_proj", "v_proj", layers=(0, 1)) | {A.replace(".0.", ".5."): GOOD[A], B.replace(".0.", ".5."): GOOD[B]}, {},
     "no linear layer model.layers.5.self_attn.q_proj"),
    ({name.replace("self_attn.q_proj", "input_layernorm"): GOOD[name] for name in (A, B)}, {}, "no linear layer model.layers.0.input_layernorm"),
    (tensors("q_proj", "v_proj", layers=(0,)), {}, "no tensors: model.layers.1.self_attn.q_proj; model.layers.1.self_attn.v_proj"),
    (GOOD, {"target_modules": ["q_proj", "v_proj", "o_proj"]}, "no tensors: model.layers.0.self_attn.o_proj"),
])  # fmt: skip
def test_adapters_that_do_not_fit_the_served_model_are_refused(given, config, words):
    with pytest.raises(WeightsMismatchError, match=words):
        check_adapter(make_adapter(given, {**CONFIG, **config}), SPEC)


@pytest.mark.parametrize("config", [
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    {"target_modules": r".*layers\.0.*(q|v)_proj"},
    {"target_modules": ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]},
])  # fmt: skip
def test_an_adapter_may_be_configured_for_some_layers_only(config):
    check_adapter(make_adapter(tensors("q_proj", "v_proj", layers=(0,)), {**CONFIG, **config}), SPEC)


def test_adapters_on_experts_are_refused():
    given = {name.replace("self_attn.q_proj", "mlp.experts.3.up_proj"): tensor for name, tensor in GOOD.items()}
    with pytest.raises(ConfigError, match="adapters on experts"):
        check_adapter(make_adapter(given, CONFIG), SPEC)


@pytest.mark.parametrize("has, gets", [
    (("q_proj",), ("k_proj", "v_proj")),
    (("k_proj",), ("q_proj", "v_proj")),
    (("q_proj", "v_proj"), ("k_proj",)),
    (("q_proj", "k_proj", "v_proj"), ()),
    (("up_proj",), ("gate_proj",)),
    (("o_proj",), ()),
])  # fmt: skip
def test_the_missing_parts_of_a_fused_projection_are_zeros(has, gets):
    given = {name: tensor.double() for name, tensor in tensors(*has).items()}
    completed = check_adapter(make_adapter(given, {**CONFIG, "target_modules": list(has)}), SPEC)
    added = {name: tensor for name, tensor in completed.tensors.items() if name not in given}
    assert {name: tuple(tensor.shape) for name, tensor in added.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors(*gets).items()
    }
    assert all(not tensor.any() and tensor.dtype == torch.double for tensor in added.values())
    assert completed.config_for_server["target_modules"] == sorted([*has, *gets])


def test_without_a_spec_only_ranks_are_checked_and_missing_projections_refused():
    complete = tensors("q_proj", "k_proj", "v_proj")
    assert check_adapter(make_adapter(complete, CONFIG), None).tensors == complete
    with pytest.raises(WeightsMismatchError, match=r"expected \(4, any\)"):
        check_adapter(make_adapter(complete, {**CONFIG, "r": 4}), None)
    with pytest.raises(ConfigError, match="but not model.layers.0.self_attn.k_proj, and the served"):
        check_adapter(make_adapter(GOOD, CONFIG), None)


@pytest.mark.parametrize("max_rank, modules, words", [
    (1, None, "r=2 exceeds the server's max_lora_rank=1"),
    (None, ["o_proj"], "not started for adapters on q_proj, v_proj"),
    (2, ["q_proj"], None),  # SGLang serves q, k and v as one
    (64, ["k_proj", "down_proj"], None),
    (2, ["all"], None),
    (2, {"model.layers.0.self_attn.v_proj"}, None),
    (None, None, None),
])  # fmt: skip
def test_adapters_beyond_the_servers_limits_are_refused(max_rank, modules, words):
    adapter = make_adapter(GOOD, CONFIG)
    if words is None:
        check_served(adapter, max_rank=max_rank, target_modules=modules)
    else:
        with pytest.raises(ConfigError, match=words):
            check_served(adapter, max_rank=max_rank, target_modules=modules)


# --- models ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, KV)

    def forward(self, x):
        return self.q_proj(x), self.v_proj(x)


def wrapped(**adapters):
    [(first, config), *others] = adapters.items()
    model = peft.get_peft_model(Model(), config, adapter_name=first)
    for name, config in others:
        model.add_adapter(name, config)
    return model


def lora(**changes):
    return peft.LoraConfig(**{"r": R, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})


def test_a_models_adapter_has_the_tensors_that_peft_saves(tmp_path):
    from safetensors.torch import load_file

    model = wrapped(default=lora())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for form in (model, torch.compile(model)):
        adapter = adapter_of(form, None)
        assert adapter.tensors.keys() == saved.keys()
        assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in saved.items())
    assert {adapter.tensors[name].data_ptr() for name in saved} <= {p.data_ptr() for p in model.parameters()}


def test_one_of_several_adapters_must_be_named():
    model = wrapped(one=lora(), two=lora(r=4))
    assert adapter_of(model, "one").rank == 2 and adapter_of(model, "two").rank == 4
    for name in (None, "three", 1, ["one"]):
        with pytest.raises(ConfigError, match="the model has no adapter named") as caught:
            adapter_of(model, name)
        assert "one, two" in caught.value.hint


def test_a_model_without_adapters_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match="Model has no PEFT adapters") as caught:
        adapter_of(Model(), None)
    assert "get_peft_model" in caught.value.hint


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def test_the_scale_is_what_the_layers_have():
    model = wrapped(default=lora(lora_alpha=3), other=lora(lora_alpha=5))
    assert adapter_of(model, "default").config["lora_alpha"] == 3
    for layer in layers_of(model):
        layer.set_scale("default", 0.5)
    served = adapter_of(model, "default").config_for_server
    assert served["lora_alpha"] / served["r"] == layers_of(model)[0].scaling["default"] == 0.5 * 3 / R
    assert adapter_of(model, "other").config["lora_alpha"] == 5
    with peft.helpers.rescale_adapter_scale(model, 4):
        assert adapter_of(model, "default").config["lora_alpha"] == 4 * 0.5 * 3
    assert adapter_of(model, "default").config["lora_alpha"] == 0.5 * 3


@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_rank_stabilised_adapter_is_scaled_as_peft_does_it(scale):
    model = wrapped(default=lora(lora_alpha=3, use_rslora=True))
    for layer in layers_of(model):
        layer.set_scale("default", scale)
    of_model = adapter_of(model, "default").config_for_server
    of_tensors = make_adapter(
        GOOD, peft.LoraConfig(**{**CONFIG, "lora_alpha": 3, "use_rslora": True})
    ).config_for_server
    for served, expected in (of_model, layers_of(model)[0].scaling["default"]), (of_tensors, 3 / math.sqrt(R)):
        assert not served["use_rslora"] and served["lora_alpha"] / served["r"] == pytest.approx(expected)


def test_layers_that_are_scaled_differently_are_refused():
    model = wrapped(default=lora(lora_alpha=4))
    layers_of(model)[1].set_scale("default", 3)
    with pytest.raises(ConfigError, match="q_proj by 2; base_model.model.v_proj by 6") as caught:
        adapter_of(model, "default")
    assert "set_scale()" in caught.value.hint


def test_the_base_may_be_what_no_sync_takes():
    """Quantised in some form, or offloaded: an adapter is all that is sent."""
    model = wrapped(default=lora())
    for layer in layers_of(model):
        layer.base_layer.to("meta")
    assert adapter_of(model, None).modules().keys() == {"q_proj", "v_proj"}


def test_the_base_model_is_not_looked_up(monkeypatch):
    """PEFT asks the hub for its vocabulary, and adds the embeddings where the model's own is of another size."""
    from peft.utils import save_and_load

    model = wrapped(default=lora())
    model.peft_config["default"].base_model_name_or_path = "someone/something"
    monkeypatch.setattr(
        save_and_load, "check_file_exists_on_hf_hub", lambda *args, **kwargs: pytest.fail("asked the hub")
    )
    assert adapter_of(model, None).modules().keys() == {"q_proj", "v_proj"}


@pytest.mark.parametrize("has_spec", [True, False])
def test_a_model_that_transformers_names_otherwise_than_its_checkpoint(tmp_path, has_spec):
    """As most of those that take images."""
    import transformers

    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    text |= {"vocab_size": 64, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    spec = read_spec(str(tmp_path))
    own = {name for name, _ in model.named_parameters()}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in own - set(spec.shapes)

    def adapter(**changes):
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=R, target_modules=["q_proj"], **changes))
        return adapter_of(adapted, None, served=spec.shapes if has_spec else None)

    path = "model" if has_spec else "model.language_model"
    assert set(adapter().modules()) == {f"{path}.layers.{i}.self_attn.q_proj" for i in range(2)}
    if has_spec:
        check_adapter(adapter(), spec)


@pytest.mark.parametrize("module", [
    "visual.blocks.0.attn.qkv", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "multi_modal_projector.linear_1",
    "model.audio_tower.layers.0.fc1", "score", "transformer.h.0.attn.c_attn",
])  # fmt: skip
def test_adapters_where_sglang_finds_no_layer_are_refused(module):
    spec = ModelSpec({**SPEC.shapes, f"{module}.weight": (HIDDEN, HIDDEN)}, "somewhere")
    given = {f"{module}.lora_A.weight": torch.zeros(R, HIDDEN), f"{module}.lora_B.weight": torch.zeros(HIDDEN, R)}
    config = {**CONFIG, "target_modules": ["q_proj", "v_proj", module.rpartition(".")[2]]}
    with pytest.raises(ConfigError, match=f"{module}: SGLang serves adapters on the layers of a language model"):
        check_adapter(make_adapter({**GOOD, **given}, config), spec)


def test_ddp_is_unwrapped():
    class Fake(DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = wrapped(default=lora())
    assert adapter_of(Fake(model), None).tensors.keys() == adapter_of(model, None).tensors.keys()


# --- the request ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version, tp_size", [("0.5.9", 2), ("0.5.16", 1), ("0.5.17", 1), ("0.5.17", 2), ("0.5.21", 4)])
def test_each_release_gets_the_form_that_it_reads(version, tp_size):
    """Through 0.5.16 one payload, read by all TP ranks; then one each.  Both are a pickled dict (tp_worker.py)."""
    client = Captured(version)
    adapter = make_adapter(GOOD, CONFIG)
    ServerApi(client).load_lora("a", adapter.tensors, adapter.config_for_server, tp_size=tp_size, timeout_s=1)
    [(path, body)] = client.asked
    assert path == "/load_lora_adapter_from_tensors" and body["lora_name"] == "a"
    assert body["config_dict"] == adapter.config_for_server
    if release(version).lora_payload_per_rank:
        payloads = body["serialized_named_tensors"]
        assert len(payloads) == tp_size and "serialized_tensors" not in body
    else:
        payloads = [body["serialized_tensors"]]
        assert "serialized_named_tensors" not in body
    for payload in payloads:
        loaded = pickle.load(io.BytesIO(base64.b64decode(payload)))
        assert isinstance(loaded, dict) and loaded.keys() == GOOD.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in GOOD.items())


def test_a_view_is_sent_without_the_rest_of_its_memory():
    client = Captured("0.5.21")
    adapter = make_adapter({A: torch.randn(1000, HIDDEN)[:R]}, CONFIG).gathered(keep=True)
    ServerApi(client).load_lora("a", adapter, {}, tp_size=1, timeout_s=1)
    assert len(client.asked[0][1]["serialized_named_tensors"][0]) < 4000


def test_a_rank_that_does_not_keep_the_tensors_copies_none():
    assert make_adapter(GOOD, CONFIG).gathered(keep=False) == {}


@pytest.mark.parametrize("info, limits, at_start", [
    ({}, LoraLimits(), set()),
    ({"enable_lora": False}, None, set()),
    ({"enable_lora": None}, None, set()),
    ({"enable_lora": True}, LoraLimits(), set()),
    ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"], "max_loaded_loras": 3,
      "lora_paths": [{"lora_name": "x", "lora_path": "y"}, "z=/path"]},
     LoraLimits(8, frozenset({"q_proj"}), 3), {"x", "z"}),
    ({"enable_lora": True, "lora_paths": {"x": {}}}, LoraLimits(), {"x"}),
])  # fmt: skip
def test_limits_and_adapters_are_read_from_the_servers_info(info, limits, at_start):
    api = ServerApi(Captured("0.5.21", **info))
    assert api.lora_limits == limits and api.loras_at_start == at_start


def test_unloading_a_missing_adapter_may_be_permitted():
    missing = {"/unload_lora_adapter": refused("LoRA with name a does not exist")}
    ServerApi(Captured("0.5.21", missing)).unload_lora("a", missing_ok=True, timeout_s=1)
    with pytest.raises(RequestError, match="does not exist"):
        ServerApi(Captured("0.5.21", missing)).unload_lora("a", timeout_s=1)
    with pytest.raises(RequestError, match="incomplete unload"):
        busy = {"/unload_lora_adapter": refused("an incomplete unload")}
        ServerApi(Captured("0.5.21", busy)).unload_lora("a", missing_ok=True, timeout_s=1)
