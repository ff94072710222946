"""Contracts with TRL: what its trainers pass to ``VLLMGeneration``, and what they use of it.

The release that is installed is checked by ``make test``; others, the newest on the index too, by ``make contracts``.
A release is read, and a step of training is run with it in a process of its own.
"""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fetch
import pytest

from tpcolocate.trl.arguments import KEYWORDS, OBJECTS
from tpcolocate.trl.generation import SGLangGeneration

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).resolve().parent
PROBE_TIMEOUT_S = 240
# Its log-probabilities are a Triton kernel without a way for CPUs.  The probe gets as far as generating.
NEED_A_GPU = {"1.15.0"}
NEWEST = fetch.newest(project="trl")


def folder_of(version):
    """Return the folder that holds the package ``trl`` of a release."""
    if version == fetch.TRL_INSTALLED:
        return Path(metadata.distribution("trl").locate_file(""))
    return fetch.folder_of(version, project="trl")


def releases():
    """Return all releases as test parameters; those that must be fetched are marked ``contracts``."""
    versions = [*fetch.TRL_PINNED, fetch.TRL_INSTALLED]
    versions += ["newest"] if NEWEST is None else [] if NEWEST in versions else [NEWEST]
    fetched = pytest.mark.contracts
    return [pytest.param(each, marks=() if each == fetch.TRL_INSTALLED else fetched) for each in versions]


every_release = pytest.mark.parametrize("version", releases(), scope="module")


def trees(version):
    """Return path -> syntax tree for the modules of a release that know ``VLLMGeneration``, but the one that has it."""
    folder = folder_of(version) / "trl"
    if not folder.is_dir():
        pytest.fail(f"TRL {version} is not in {folder.parent}: make contracts fetches it", pytrace=False)
    sources = {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.py"))}
    sources.pop("generation/vllm_generation.py")
    return {name: ast.parse(source) for name, source in sources.items() if "VLLMGeneration" in source}


def calls_of(tree, name):
    """Return the calls of a function, or of a method, by its last name."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and name in (getattr(node.func, "id", None), getattr(node.func, "attr", None))
    ]


def is_generation(node):
    return isinstance(node, ast.Attribute) and node.attr == "vllm_generation"


def test_the_installed_release_is_the_pinned_one():
    assert metadata.version("trl") == fetch.TRL_INSTALLED


@every_release
def test_trainers_pass_keywords_that_are_known(version):
    built = [(name, call) for name, tree in trees(version).items() for call in calls_of(tree, "VLLMGeneration")]
    assert {"trainer/grpo_trainer.py", "trainer/rloo_trainer.py"} <= {name for name, _ in built}
    for name, call in built:
        assert not call.args and {keyword.arg for keyword in call.keywords} <= KEYWORDS, name
        assert set(OBJECTS) <= {keyword.arg for keyword in call.keywords}, name


@every_release
def test_the_constructor_takes_keywords_that_are_known(version):
    source = (folder_of(version) / "trl/generation/vllm_generation.py").read_text()
    (found,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "VLLMGeneration"]
    (constructor,) = [n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    arguments = constructor.args
    names = {argument.arg for argument in [*arguments.args, *arguments.kwonlyargs]} - {"self"}
    assert names <= KEYWORDS and arguments.vararg is None and arguments.kwarg is None


@every_release
def test_trainers_use_what_our_generation_has(version):
    server_mode = {"vllm_client"}
    for name, tree in trees(version).items():
        used = {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_generation(node.value)
        }  # fmt: skip
        assert used - server_mode <= {each for each in dir(SGLangGeneration) if not each.startswith("_")}, name


@every_release
def test_trainers_read_nothing_of_the_engine_but_its_context_length(version):
    for name in trees(version):
        for read in re.findall(r"vllm_generation\.llm\b([\w.]*)", (folder_of(version) / "trl" / name).read_text()):
            assert read == ".llm_engine.model_config.max_model_len", name


@every_release
def test_trainers_pass_to_generate_what_it_takes_and_unpack_four(version):
    for name, tree in trees(version).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                call = node.value
                if getattr(call.func, "attr", None) == "generate" and is_generation(call.func.value):
                    assert len(node.targets[0].elts) == 4, name
                    assert not call.args, name
                    assert {k.arg for k in call.keywords} <= {"prompts", "images", "num_generations", "profiler"}, name


@every_release
def test_trainers_do_not_look_for_vllm_while_they_are_imported(version):
    """Inside of the block they would be answered that it is there, and import it."""
    for name, tree in trees(version).items():
        if calls_of(tree, "VLLMGeneration"):
            outside = [n for n in tree.body if not isinstance(n, (ast.ClassDef, ast.FunctionDef))]
            assert not [call for node in outside for call in calls_of(node, "is_vllm_available")], name


# --- a step of training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(tiny_model_dir, tmp_path_factory):
    """Return the results of the probe of a release, which is run once."""
    found = {}

    def of(version):
        if version not in found:
            out = tmp_path_factory.mktemp("trl-probe")
            path = [folder_of(version), HERE.parents[1], *filter(None, [os.environ.get("PYTHONPATH")])]
            done = subprocess.run(
                [sys.executable, str(HERE / "trl_probe.py"), str(tiny_model_dir()), str(out / "found.json")],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TRL_EXPERIMENTAL_SILENCE": "1"},
                capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            found[version] = json.loads((out / "found.json").read_text())
        return found[version]

    return of


@every_release
def test_trainers_train_on_our_generation(version, probed):
    found = probed(version)
    assert found["version"] == version and Path(found["file"]).is_relative_to(folder_of(version))
    names = set(found) - {"version", "file"}
    assert {"grpo", "rloo"} <= names and ("distillation" in names or version == "1.8.0")
    for name in names:
        result = found[name]
        assert "error" not in result, f"{name} of TRL {version}:\n{result['error']}"
        assert result["is_ours"]
        assert result["trains"] or version in NEED_A_GPU
        turn = ["wake", "sync", "wake", "generate", "sleep"]
        assert result["calls"] == ["sleep", *turn * ((len(result["calls"]) - 2) // len(turn)), "shutdown"]
    if found["grpo"]["trains"]:
        assert "sampling/sampling_logp_difference/max" in found["grpo"]["logged"]
        assert "sampling/importance_sampling_ratio/mean" in found["grpo"]["logged"]
