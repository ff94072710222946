"""Records are complete and name nothing of the machine they were made on; every recorded result names a script that exists."""

import ast
import json
import math
import os
import re
import socket
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # behind everything: its scripts are no modules of the tests

import ab_trees
import gpu_trainers
import record

pytestmark = pytest.mark.quick

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
RESULTS = sorted(record.RESULTS.glob("*.json"))
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:python|torchrun --standalone --nproc-per-node \d+) ((?:benchmarks|examples)/\w+\.py|-m tpcolocate bench)(?: .*)?"
)
# Two folders from the root on: a place on some machine.  An endpoint, "/generate", has one.
FOLDER = re.compile(r"(?<![\w.:/-])/\w[\w.-]*/\w")


def made(**changes):
    arguments = {
        "metric": "a thing",
        "unit": "s",
        "samples": [0.3, 0.1, 0.2],
        "settings": {"tp_size": 2},
        "checks": {"equal": 3, "of": 3},
        "baseline": {"what": "another", **record.summary([0.1, 0.2])},
        "comparison": record.ratio_of_medians([0.2, 0.4], [0.1, 0.2]),
        "target": "under 1 s",
        "target_met": True,
        "load_before": os.getloadavg(),
        **changes,
    }
    return record.record("a_name", **arguments)


def faults(result):
    """What is wrong with a record."""
    found = [f"{name} is missing" for name in record.FIELDS if name not in result]
    if found:
        return found
    numbers = [result[name] for name in ("median", "minimum", "maximum")]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        found.append("no finite median, minimum and maximum")
    elif not result["minimum"] <= result["median"] <= result["maximum"]:
        found.append("the median is not between minimum and maximum")
    if not result["n"] > 0:
        found.append("nothing was measured")
    if result["samples"] is not None:
        if len(result["samples"]) != result["n"]:
            found.append("n is not the number of samples")
        elif not math.isclose(statistics.median(result["samples"]), result["median"], rel_tol=1e-4):
            found.append("the median is not that of the samples")
    if not result["commit"]:
        found.append("no commit")
    matched = COMMAND.fullmatch(result["command"])
    if matched is None:
        found.append(f"the command is none: {result['command']}")
    elif matched[1] != "-m tpcolocate bench" and not (ROOT / matched[1]).is_file():
        found.append(f"there is no script {matched[1]}")
    if not result["checks"]:
        found.append("nothing was checked")
    if {"python", "torch", "sglang", "tpcolocate"} - set(result["versions"]):
        found.append("versions are missing")
    if not {"cpu", "cores", "memory_gib", "gpus"} <= set(result["hardware"]):
        found.append("hardware is missing")
    text = json.dumps(result)
    if FOLDER.search(text):
        found.append(f"names a folder: {FOLDER.search(text)[0]}")
    if socket.gethostname() != "localhost" and re.search(rf"\b{re.escape(socket.gethostname())}\b", text):
        found.append("names the host")
    return found


def test_a_record_is_complete_and_valid_json(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "launch_latency.py"), "--launches", "3"])
    result = made()
    assert tuple(result) == record.FIELDS
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["n"], result["median"], result["minimum"], result["maximum"]) == (3, 0.2, 0.1, 0.3)
    assert result["samples"] == [0.3, 0.1, 0.2], "in the order in which they were taken"
    assert result["comparison"]["ratio_of_medians"] == 2.0
    assert faults({**result, "commit": "outside of git there is none"}) == []


@pytest.mark.parametrize("change, words", [
    ({"median": 5.0}, "not between"),
    ({"median": float("nan")}, "no finite"),
    ({"n": 2}, "number of samples"),
    ({"samples": [0.1, 0.1, 0.1]}, "that of the samples"),
    ({"commit": None}, "no commit"),
    ({"command": "python benchmarks/not_there.py --record"}, "no script"),
    ({"command": "python /somewhere/else/launch_latency.py"}, "none"),
    ({"checks": {}}, "nothing was checked"),
    ({"versions": {"python": "3.11"}}, "versions"),
    ({"hardware": {}}, "hardware"),
    ({"settings": {"model": "/models/some/thing"}}, "folder"),
])  # fmt: skip
def test_a_bad_record_is_seen(monkeypatch, change, words):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "launch_latency.py")])
    result = {**made(), "commit": "abc", **change}
    assert any(words in fault for fault in faults(result)), faults(result)


def test_a_record_without_a_field_is_seen():
    result = made()
    for name in record.FIELDS:
        assert faults({key: value for key, value in result.items() if key != name}) == [f"{name} is missing"]


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        made(samples=[])


def test_many_samples_are_summarised():
    assert made(samples=[float(i) for i in range(1, 1002)])["samples"] is None


@pytest.mark.parametrize("argv, environment, command", [
    (["benchmarks/x.py", "--record"], {}, "python benchmarks/x.py --record"),
    (["benchmarks/x.py"], {"TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "4"}, "torchrun --standalone --nproc-per-node 4 benchmarks/x.py"),
    (["benchmarks/x.py", "--model", "/models/secret/tiny"], {}, "python benchmarks/x.py --model tiny"),
    (["/usr/bin/pytest", "-q"], {}, "python pytest -q"),
])  # fmt: skip
def test_the_command_is_what_one_would_type(monkeypatch, argv, environment, command):
    monkeypatch.chdir(ROOT)
    assert record.command(argv, environment) == command


def test_the_ratio_has_an_interval_around_it():
    theirs = [1.0 + 0.01 * (i % 7) for i in range(80)]
    found = record.ratio_of_medians([1.5 * value for value in theirs], theirs)
    assert found["low"] <= found["ratio_of_medians"] == 1.5 <= found["high"]
    noisy = record.ratio_of_medians([1.0 + (i * 37 % 101) / 101 for i in range(80)], theirs)
    assert noisy["low"] < noisy["ratio_of_medians"] < noisy["high"]
    assert noisy == record.ratio_of_medians([1.0 + (i * 37 % 101) / 101 for i in range(80)], theirs), (
        "the same each time"
    )
    with pytest.raises(ValueError):
        record.ratio_of_medians([1.0], [1.0, 2.0])


def test_published_where_it_is_named_and_only_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    record.publish(made(), write=False)
    assert not (tmp_path / "results").exists()
    record.publish(made(), write=True)
    [file] = (tmp_path / "results").iterdir()
    assert file.name == "a_name.json" and json.loads(file.read_text())["name"] == "a_name"
    assert json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")["name"] == "a_name"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_recorded_result_is_complete(path):
    result = json.loads(path.read_text())
    assert faults(result) == []
    assert result["name"] == path.stem


def test_the_page_lists_every_recorded_result():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert RESULTS, "there are results"
    assert [path.name for path in RESULTS if path.name not in page] == []
    assert [name for name in re.findall(r"results/(\w+\.json)", page) if not (record.RESULTS / name).exists()] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_outside_of_git_the_commit_may_be_given(monkeypatch):
    def no_git(*arguments):
        raise OSError("no git here")

    monkeypatch.setattr(record, "_git", no_git)
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    assert record.commit() is None
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    assert record.commit() == "abc"


def test_two_trees_sync_in_pairs_whose_order_alternates():
    made = ab_trees.steps("ab", ["plain", "fsdp2"], 3)
    assert [letter for letter, what, module in made if (what, module) == ("sync", "plain")] == list("abbaab")
    for letter in "ab":
        own = [what for one, what, _ in made if one == letter]
        assert own == [*2 * ["prepare", "sync", "sync", "sync", "check"]]


ROW = {
    "model": "dense", "trainer": "plain", "error": None, "stale": [9.0, 3.0], "gap": [0.1, 0.2], "mean_gap": [0.02, 0.03],
    "outstanding": [0, 0], "left_mib": 0.1, "unverified": [], "tensors": 25,
}  # fmt: skip


@pytest.mark.parametrize("change, verdict", [
    ({}, "ok"),
    ({"gap": [0.1, 0.7]}, "WRONG"),
    ({"gap": [0.1, float("nan")]}, "WRONG"),
    ({"mean_gap": [0.02, 0.8]}, "WRONG"),
    ({"outstanding": [0, 1]}, "LEAKS"),
    ({"left_mib": 150.0}, "LEAKS"),
    ({"unverified": ["a"]}, "unverified"),
    ({"error": "SyncError: no"}, "FAILED"),
    ({"error": "WeightsMismatchError: no"}, "FAILED"),
    ({"model": "experts", "trainer": "state_dict", "error": "WeightsMismatchError: no"}, "refused"),
])  # fmt: skip
def test_a_trainer_is_judged_by_its_gaps_and_by_what_it_leaves(change, verdict):
    row = {**ROW, **change}
    assert gpu_trainers.judge(row, "cuda") == verdict
    assert gpu_trainers.line_of({**row, "verdict": verdict})
