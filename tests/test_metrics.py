"""Figures of syncs and rollouts as flat dicts, and targets for Prometheus."""

import json
import math
import os

import numpy as np
import pytest
import torch

import tpcolocate
from tpcolocate import rendezvous, runtime_folder
from tpcolocate.processes import this_process
from tpcolocate.report import RankReport, Stopwatch, SyncReport

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def answer(tokens=3, *, reason="stop", version="1", versions=None, prompt=10, cached=4, logprobs=None):
    info = {
        "finish_reason": None if reason is None else {"type": reason}, "weight_version": version,
        "prompt_tokens": prompt, "cached_tokens": cached, "completion_tokens": tokens,
    }  # fmt: skip
    if versions is not None:
        info["weight_versions"] = [{"version": each, "start": 0, "end": 1} for each in versions]
    if logprobs is not None:
        info["output_token_logprobs"] = [[value, 7, None] for value in logprobs]
    return {"text": "", "output_ids": [7] * tokens, "meta_info": info}


def part(rank, seconds, **numbers):
    names = ("own_bytes", "peer_bytes", "staged_bytes", "peak_extra_bytes", "allocated_bytes")
    return RankReport(rank, seconds, 3, 2, 1, 0.5, *(numbers.get(name, 0) for name in names))


def sync_report(*parts, version="7", seconds=2.0):
    return SyncReport(
        0, version, 100, 4, 2, seconds, "ipc", "config", 3, {"load": 0.25}, 4, ("u",), 256, ("w",), (), None, parts
    )


def test_a_sync_is_a_flat_dict_of_floats():
    report = sync_report(
        part(0, {"prepare": 1.0, "push": 0.5}, own_bytes=10, staged_bytes=1, allocated_bytes=5),
        part(1, {"prepare": 0.25, "release": 2.0}, own_bytes=20, peer_bytes=2, allocated_bytes=9),
    )
    values = report.metrics("x/")
    assert all(type(value) is float and name.startswith("x/sync/") for name, value in values.items())
    expected = {
        "seconds": 2, "bytes": 100, "bytes_per_second": 50, "tensors": 4, "own_bytes": 30, "peer_bytes": 2,
        "staged_bytes": 1, "allocated_bytes": 9, "handles_exported": 6, "handles_returned": 4, "phase/prepare": 1,
        "phase/push": 0.5, "phase/release": 2, "worker/load": 0.25, "weight_version": 7, "unverified": 1, "missing": 0,
        "warnings": 1,
    }  # fmt: skip
    assert {name: values[f"x/sync/{name}"] for name in expected} == expected
    json.dumps(values)


def test_every_key_is_documented():
    report = sync_report(part(0, {"push": 0.5}))
    documented = SyncReport.metrics.__doc__
    for name in report.metrics(""):
        name = name.removeprefix("sync/")
        assert f"``{name}``" in documented.replace("phase/NAME", "phase/push").replace("worker/STEP", "worker/load")
    assert all(name.startswith("tpcolocate/sync/") for name in report.metrics())


def test_a_version_that_is_no_number_and_no_time():
    values = sync_report(part(0, {}), version="step-7", seconds=0.0).metrics("")
    assert "sync/weight_version" not in values and values["sync/bytes_per_second"] == 0.0


def test_phases_are_ranges_of_a_profile():
    watch = Stopwatch()
    with torch.profiler.profile() as profile:
        with watch.phase("push"), watch.phase("inner"):
            torch.ones(2)
        with pytest.raises(KeyError), watch.phase("failing"):
            raise KeyError
    names = [event.key for event in profile.key_averages() if event.key.startswith("tpcolocate/")]
    assert sorted(names) == ["tpcolocate/sync/failing", "tpcolocate/sync/push"]


def test_rollouts_are_summarised():
    answers = [
        answer(2), answer(4, reason="length", version="2"), answer(9, reason="length", versions=["1", "2"]),
        answer(1, reason="abort", cached=8),
    ]  # fmt: skip
    values = tpcolocate.summarize(answers, prefix="")
    assert all(type(value) is float for value in values.values())
    expected = {
        "answers": 4, "tokens/mean": 4, "tokens/min": 1, "tokens/max": 9, "tokens/sum": 16, "prompt_tokens/mean": 10,
        "cached_tokens/sum": 20, "cached_rate": 0.5, "finish/stop": 0.25, "finish/length": 0.5, "finish/abort": 0.25,
        "truncated_rate": 0.5, "weight_versions": 2, "mixed_rate": 0.25, "weight_version/min": 1, "weight_version/max": 2,
    }  # fmt: skip
    assert {name.removeprefix("rollout/"): value for name, value in values.items()} == expected


@pytest.mark.parametrize("figures", [
    tpcolocate.summarize, tpcolocate.engine_logprobs, lambda answers: tpcolocate.logprob_gap(answers, [torch.zeros(3)] * 2),
])  # fmt: skip
def test_an_error_in_the_place_of_an_answer_is_named(figures):
    """The hint was to pass what generate() had returned, which it was."""
    answers = [answer(logprobs=[-1.0] * 3), tpcolocate.RequestError("/generate: 400: too long")]
    with pytest.raises(
        tpcolocate.ConfigError, match='answer 1 is an error, which on_error="return".*too long'
    ) as caught:
        figures(answers)
    assert "leave the errors out" in caught.value.hint


def test_one_answer_none_and_what_is_no_answer():
    assert tpcolocate.summarize(answer(5))["tpcolocate/rollout/tokens/max"] == 5
    assert tpcolocate.summarize([]) == {"tpcolocate/rollout/answers": 0.0}
    assert "weight_version/min" not in tpcolocate.summarize(answer(version="a"), prefix="")
    assert tpcolocate.summarize(answer(reason=None), prefix="")["rollout/finish/unfinished"] == 1
    for wrong in ("text", {"text": "a"}, [answer(), "text"]):
        with pytest.raises(tpcolocate.ConfigError, match="meta_info"):
            tpcolocate.summarize(wrong)


@pytest.mark.parametrize("padded", [False, True])
def test_the_gap_is_the_largest_difference(padded):
    answers = [answer(2, logprobs=[-1.0, -2.0]), answer(1, logprobs=[-3.0])]
    trainer = [torch.tensor([-1.0, -2.5]), torch.tensor([-2.0])]
    if padded:
        trainer = torch.nn.utils.rnn.pad_sequence(trainer, batch_first=True, padding_value=99.0).requires_grad_()
    values = tpcolocate.logprob_gap(answers, trainer, prefix="")
    assert values["gap/max"] == pytest.approx(1.0) and values["gap/mean"] == pytest.approx(0.5)
    assert values["gap/ratio/tokens"] == 3 and values["gap/ratio/max"] == pytest.approx(math.e)
    assert values["gap/ratio/sequence_max"] == pytest.approx(math.e)


def test_equal_policies_have_ratio_one():
    logprobs = torch.randn(3, 5)
    values = tpcolocate.importance_ratios(logprobs, logprobs.to(torch.bfloat16).float() * 0 + logprobs, prefix="")
    assert values == {
        "ratio/mean": pytest.approx(1), "ratio/max": 1, "ratio/ess": pytest.approx(1), "ratio/kl": 0, "ratio/tokens": 15,
        "ratio/nonfinite": 0, "ratio/sequence_max": 1, "ratio/sequence_ess": pytest.approx(1),
    }  # fmt: skip


def test_ratios_are_those_of_the_formulas():
    generator = torch.Generator().manual_seed(0)
    engine, trainer = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    values = tpcolocate.importance_ratios(engine, trainer, mask, prefix="")
    ratios = (trainer - engine)[mask].exp()
    assert values["ratio/mean"] == pytest.approx(float(ratios.mean()))
    assert values["ratio/ess"] == pytest.approx(float(ratios.sum() ** 2 / (ratios**2).sum() / ratios.numel()))
    assert values["ratio/kl"] == pytest.approx(float((engine - trainer)[mask].mean()))
    sequences = ((trainer - engine) * mask).sum(1).exp()
    assert values["ratio/sequence_ess"] == pytest.approx(float(sequences.sum() ** 2 / (sequences**2).sum() / 4))


def test_what_is_not_finite_is_counted_and_left_out():
    engine, trainer = torch.tensor([-1.0, -math.inf, -2.0]), torch.tensor([-1.0, -1.0, math.nan])
    values = tpcolocate.importance_ratios(engine, trainer, prefix="")
    assert values["ratio/nonfinite"] == 2 and values["ratio/tokens"] == 1 and values["ratio/max"] == 1
    huge = tpcolocate.importance_ratios(torch.tensor([-2000.0, -1.0]), torch.tensor([0.0, -1.0]), prefix="")
    assert huge["ratio/ess"] == pytest.approx(0.5) and huge["ratio/max"] == math.inf
    assert tpcolocate.logprob_gap([], [], prefix="")["gap/max"] == 0.0


@pytest.mark.parametrize("answers, trainer, words", [
    ([answer(2)], [torch.zeros(2)], "return_logprob"),
    ([answer(2, logprobs=[-1, -1])], [torch.zeros(2), torch.zeros(2)], "1 answers"),
    ([answer(2, logprobs=[-1, -1])], [torch.zeros(5)], "2 generated tokens"),
    ([answer(2, logprobs=[-1, -1])], torch.zeros(1, 1), "2 generated tokens"),
])  # fmt: skip
def test_tensors_that_do_not_fit_the_answers(answers, trainer, words):
    with pytest.raises(tpcolocate.ConfigError, match=words):
        tpcolocate.logprob_gap(answers, trainer)


@pytest.mark.parametrize("trainer", [
    [[-1.0, -2.5], [-2.0]], [np.array([-1.0, -2.5]), np.array([-2.0])], np.array([[-1.0, -2.5], [-2.0, 0.0]]),
])  # fmt: skip
def test_the_trainers_numbers_may_be_lists_and_arrays(trainer):
    answers = [answer(2, logprobs=[-1.0, -2.0]), answer(1, logprobs=[-3.0])]
    assert tpcolocate.logprob_gap(answers, trainer, prefix="")["gap/max"] == 1.0
    assert tpcolocate.importance_ratios([-1.0, -2.0], np.array([-1.0, -2.0]), [1, 0], prefix="")["ratio/tokens"] == 1


def test_what_the_server_reports_as_not_finite_is_left_out():
    """JSON has null for it."""
    values = tpcolocate.logprob_gap(answer(2, logprobs=[None, -2.0]), torch.tensor([-1.0, -2.5]), prefix="")
    assert (values["gap/max"], values["gap/ratio/nonfinite"], values["gap/ratio/tokens"]) == (0.5, 1, 1)


@pytest.mark.parametrize("call", [
    lambda: tpcolocate.write_prometheus_targets(3),
    lambda: tpcolocate.summarize(None), lambda: tpcolocate.engine_logprobs(5),
    lambda: tpcolocate.logprob_gap([answer(1, logprobs=[-1.0])], None),
    lambda: tpcolocate.logprob_gap([answer(1, logprobs=[-1.0])], ["a"]),
    lambda: tpcolocate.importance_ratios("a", torch.zeros(1)), lambda: tpcolocate.importance_ratios(torch.zeros(1), None),
])  # fmt: skip
def test_arguments_of_other_types_are_refused(call):
    with pytest.raises(tpcolocate.ConfigError, match="must be"):
        call()


def test_shapes_that_differ():
    with pytest.raises(tpcolocate.ConfigError, match=r"\(2,\), \(3,\)"):
        tpcolocate.importance_ratios(torch.zeros(2), torch.zeros(3))


def test_running_servers_are_targets(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_folder, "SHARED_MEMORY", tmp_path)
    pid, started = this_process()
    for index, begun in enumerate((started, started, started - 1)):
        nonce = f"{pid}-{9 - index}"  # sorted by slice, not by name
        url = f"http://127.0.0.1:{3000 + index}"
        made = rendezvous.Announcement(url, "secret", "9-ab", index, (0, 1), pid, begun, nonce)
        rendezvous.path_for(nonce).parent.mkdir(mode=0o700)
        rendezvous.announce(rendezvous.path_for(nonce), made)
    path = tmp_path / "targets.json"
    written = tpcolocate.write_prometheus_targets(path, job="9-ab")
    assert json.loads(path.read_text()) == written and "secret" not in path.read_text()
    assert [each["targets"] for each in written] == [["127.0.0.1:3000"], ["127.0.0.1:3001"]]
    assert written[1]["labels"] == {"tpcolocate_job": "9-ab", "tpcolocate_slice": "1", "tpcolocate_ranks": "0,1"}
    assert os.stat(path).st_mode & 0o777 == 0o644
    assert tpcolocate.write_prometheus_targets(path, job="other") == [] == json.loads(path.read_text())
    assert not list(tmp_path.glob(".targets*"))
