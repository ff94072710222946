"""The bench as users run it, on the real engine, and what it makes of figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tpcolocate import ConfigError, plot
from tpcolocate.__main__ import main
from tpcolocate.bench import command
from tpcolocate.bench.page import render
from tpcolocate.bench.results import Measured, Results, conclusions

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 600.0
SERVER = {"skip_tokenizer_init": True, "context_length": 128}

GIB = 2**30
ONE = Measured(
    1, None, 30.0, 0.5, (0.02, 0.03, 0.04), (0.06, 0.09, 0.3), None, (2.0, 1.0, 4.0), 4000, 16 * GIB, 2**20, 3 * GIB
)
TWO = Measured(
    2, None, 40.0, 0.4, (0.02, 0.02, 0.02), (), "it needs CUDA devices", (4.0, 4.0, 4.0), 4000, 16 * GIB, 0, None
)
LOST = Measured(4, error="the server did not start")


def results(*measured, equal=None):
    return Results("model", "fsdp2", "NVIDIA H100", 4, {"torch": "2.11"}, {"rounds": 3}, measured, equal or {})


def run(*arguments, ranks=None, environ=None):
    launcher = [] if ranks is None else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *launcher, "-m", "tpcolocate", "bench", *arguments],
        env={**os.environ, "PYTHONPATH": path, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.engine
@pytest.mark.timeout(DEADLINE_S + 10)
def test_two_sizes_are_measured_under_fsdp2_and_drawn(tmp_path, tiny_model_dir, no_leftovers):
    done = run(
        "--model", str(tiny_model_dir()), "--device", "cpu", "--prompts", "3", "--prompt-length", "9", "--rounds", "2",
        "--max-new-tokens", "8", "--server-args", json.dumps(SERVER), "--json", str(tmp_path / "bench.json"),
        "--plot", str(tmp_path / "bench.png"),
        ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search("tp_size 1 +tp_size 2$", done.stdout, re.MULTILINE), done.stdout
    assert "6 of 6 greedy answers of tp_size 2 equal those of tp_size 1" in done.stdout
    assert done.stdout.count("weights [GiB]") == 1, "rank 0 alone prints"
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (
        found["trainer"] == "fsdp2"
        and found["num_ranks"] == 2
        and found["options"]["server_args"].items() >= SERVER.items()
    )
    for one, tp_size in zip(found["measured"], (1, 2), strict=True):
        assert one["tp_size"] == tp_size and one["error"] is None and one["num_tokens"] == 2 * 3 * 8
        assert len(one["sync_s"]) == len(one["generate_s"]) == 2 and min(one["sync_s"] + one["generate_s"]) > 0
        assert one["no_common_way"] == "it needs CUDA devices" and one["common_way_s"] == []
        assert one["num_bytes"] > 10**5 and one["launch_s"] > 1
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_a_size_that_does_not_start_is_reported_with_its_reason(tiny_model_dir, no_leftovers):
    arguments = json.dumps({"no_such_argument": 1})
    done = run("--model", str(tiny_model_dir()), "--device", "cpu", "--tp-sizes", "1", "--server-args", arguments)
    assert done.returncode == 1, done.stderr
    assert "* tp_size 1 was not measured: " in done.stdout and "no_such_argument" in done.stdout, done.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["--tp-sizes", "3"], "tp sizes [3] do not divide 1 ranks"), (["--model", "/nothing"], "/nothing"),
])  # fmt: skip
def test_what_cannot_be_measured_is_an_error_without_a_traceback(arguments, words, tiny_model_dir, no_leftovers):
    done = run("--model", str(tiny_model_dir()), "--device", "cpu", *arguments)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.quick
@pytest.mark.parametrize("arguments", [
    [], ["--model", "m", "--rounds", "0"], ["--model", "m", "--launch-timeout", "nan"],
    ["--model", "m", "--server-args", "[1]"], ["--model", "m", "--server-args", "{"],
    ["--model", "m", "--json", "/no/such/folder/x.json"], ["--model", "m", "--json", "/"], ["--model", "m", "--plot", "/no/x.png"],
    ["--model", "m", "--plot", "bench.xyz"],
])  # fmt: skip
def test_wrong_options_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tpcolocate", "bench", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "usage" in capsys.readouterr().err


@pytest.mark.quick
def test_a_file_that_is_there_and_cannot_be_written_is_refused(monkeypatch, capsys, tmp_path):
    path = tmp_path / "of_another_user.json"
    path.touch()
    monkeypatch.setattr(command.os, "access", lambda given, mode: given != path)
    monkeypatch.setattr(sys, "argv", ["tpcolocate", "bench", "--model", "m", "--json", str(path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "of_another_user.json cannot be written" in capsys.readouterr().err


@pytest.mark.quick
def test_files_that_cannot_be_written_in_the_end_are_an_error_after_the_page(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "_results", lambda *_: results(LOST))
    monkeypatch.delenv("RANK", raising=False)
    full = Path("/dev/full")
    arguments = ["--device", "cpu", "--json", str(full), "--plot", str(tmp_path / "bench.png")]
    monkeypatch.setattr(sys, "argv", ["tpcolocate", "bench", "--model", "m", *arguments])
    assert main() == 1
    written = capsys.readouterr()
    assert "the server did not start" in written.out and "bench: [Errno 28]" in written.err
    monkeypatch.setattr(command, "_results", lambda *_: results(ONE))
    assert main() == 1 and (tmp_path / "bench.png").exists(), "the other one is written"


@pytest.mark.quick
def test_the_page_and_what_follows_from_it():
    page = render(results(ONE, TWO, LOST, equal={2: (5, 6)}))
    rows = dict((line[:44].strip(), line[44:].split("  ")) for line in page.splitlines() if len(line) > 44)
    cells = {label: [cell.strip() for cell in found if cell.strip()] for label, found in rows.items()}
    assert cells[""] == ["tp_size 1", "tp_size 2"]
    assert cells["sync, median (range) [ms]"] == ["30.0 (20.0-40.0)", "20.0 (20.0-20.0)"]
    assert cells["the common way, median (range) [ms]"] == ["90.0 (60.0-300.0)", "not measured"]
    assert cells["tokens per second, all ranks"] == ["2000", "1000"]
    assert cells["memory left beside trainer and server [GiB]"] == ["3.0", "-"]
    assert "5 of 6 greedy answers of tp_size 2 equal those of tp_size 1" in page
    assert conclusions(results(ONE, TWO, LOST)) == [
        "tp_size 1: a sync takes 0.33 times as long as gathered tensors in SGLang's own buckets",
        "tp_size 1: 1.5% of a sync and a round of generation is the sync",
        "tp_size 2: 0.5% of a sync and a round of generation is the sync",
        "tp_size 1 generates 2.00 times as many tokens per second as tp_size 2",
        "use tp_size=1, unless the memory that a larger one leaves free is worth more to you",
        "tp_size 4 was not measured: the server did not start",
    ]


@pytest.mark.quick
def test_a_larger_size_that_generates_faster_is_recommended():
    slow = Measured(1, None, 30.0, 0.5, (0.02,), (), None, (8.0,), 4000, GIB, 0, None)
    assert conclusions(results(slow, TWO))[-1] == "use tp_size=2 for prompts like these"


@pytest.mark.quick
def test_the_figure_shows_both_ways_and_tokens(tmp_path):
    figure = plot.bench(results(ONE, TWO, LOST).to_dict())
    syncs, tokens = figure.axes
    heights = lambda axes: [bar.get_height() for bar in axes.patches]  # noqa: E731
    assert heights(syncs) == [30.0, 20.0, 90.0] and heights(tokens) == [2000.0, 1000.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()][1] == "gathered tensors, SGLang's buckets"
    figure.savefig(tmp_path / "bench.png")
    with pytest.raises(ConfigError, match="no size"):
        plot.bench(results(LOST).to_dict())
