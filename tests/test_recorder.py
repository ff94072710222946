"""Recorded spans and memory, who waits for whom, and the figures of them."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tpcolocate import ConfigError, Recorder, Recording, plot
from tpcolocate.recorder import Memory, Span, Wait, find_waits
from tpcolocate.report import RankReport, SyncReport

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

COLO = SimpleNamespace(rank=1, slice_ranks=(1, 0), device=torch.device("cpu"))


def recording(rank, *spans, ranks=(0, 1), memory=()):
    return Recording(rank, ranks, tuple(Span(*span) for span in spans), tuple(memory))


def test_spans_and_memory_are_recorded(tmp_path):
    recorder = Recorder(COLO)
    with recorder.span("generate"):
        pass
    with pytest.raises(KeyError), recorder.span("sync", collective=True):
        raise KeyError
    made = recorder.recording
    assert [(span.name, span.collective) for span in made.spans] == [("generate", False), ("sync", True)]
    assert made.spans[0].begin <= made.spans[0].end <= made.spans[1].begin <= made.spans[1].end
    assert len(made.memory) == 4 and all(sample.trainer_bytes > 1 << 20 for sample in made.memory)
    made.save(tmp_path / "1.json")
    assert Recording.load(tmp_path / "1.json") == made
    recorder.clear()
    assert recorder.recording == Recording(1, (1, 0))


def test_a_file_that_is_no_whole_recording_is_named(tmp_path):
    path = tmp_path / "1.json"
    recording(0, ("sync", 1.0, 2.0)).save(path)
    whole = path.read_text()
    for text in (whole[:-9], "", "[]", "{}", '{"rank": 0}', whole.replace("begin", "start"), "\N{EURO SIGN}"):
        path.write_text(text, encoding="cp1252")
        with pytest.raises(ConfigError, match="1.json is not a whole recording"):
            Recording.load(path)


def test_spans_are_ranges_of_a_profile():
    with torch.profiler.profile() as profile, Recorder(COLO).span("train"):
        torch.ones(1)
    assert "tpcolocate/train" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("recordings, waits", [
    ([recording(0, ("sync", 1, 5, True)), recording(1, ("sync", 3, 5, True))], [Wait(0, "sync", 1, 3, 1)]),
    ([recording(0, ("sync", 1, 5, False)), recording(1, ("sync", 3, 5, False))], []),
    ([recording(0, ("sync", 1, 2, True)), recording(1, ("sync", 3, 5, True))], [Wait(0, "sync", 1, 2, 1)]),
    ([recording(0, ("sync", 1, 5, True)), recording(1, ("sleep", 3, 5, True))], []),
    (
        [recording(0, ("s", 1, 3, True), ("s", 6, 9, True)), recording(1, ("s", 2, 3, True), ("s", 5, 9, True))],
        [Wait(0, "s", 1, 2, 1), Wait(1, "s", 5, 6, 0)],
    ),
    ([recording(0, ("s", 1, 5, True), ranks=(0,)), recording(1, ("s", 3, 5, True), ranks=(1,))], []),
    ([recording(0, ("s", 1, 5, True), ranks=(1, 0)), recording(1, ("s", 2, 5, True))], [Wait(0, "s", 1, 2, 1)]),
])  # fmt: skip
def test_ranks_wait_for_the_last_of_their_slice(recordings, waits):
    assert find_waits(recordings) == waits


def step(rank, *, late=0.0, ranks=(0, 1)):
    begin = 100.0
    spans = [
        ("generate", begin, begin + 4 + late), ("sleep", begin + 4 + late, begin + 6.5, True),
        ("train", begin + 6.5, begin + 11), ("sync", begin + 11, begin + 11.6, True),
    ]  # fmt: skip
    gib = 1 << 30
    memory = [Memory(begin + t, own * gib, used * gib, 80 * gib) for t, own, used in ((0, 16, 70), (6.5, 16, 20), (11, 60, 64), (11.6, 16, 70))]  # fmt: skip
    return recording(rank, *spans, ranks=ranks, memory=memory)


def texts(figure):
    axes = figure.axes[0]
    legend = [text.get_text() for each in figure.legends for text in each.get_texts()]
    return [text.get_text() for text in (*axes.texts, *axes.get_yticklabels())] + legend


def test_the_timeline_shows_ranks_spans_and_waits(tmp_path):
    figure = plot.timeline([step(1, late=2.0), step(0)])
    shown = texts(figure)
    assert shown[0] == "waits for 1"
    assert {"rank 0", "rank 1", "generate", "sleep", "train", "sync", "waits for another rank"} <= set(shown)
    figure.savefig(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


@pytest.mark.parametrize("on_gpu", [True, False])
def test_memory_shows_trainer_and_server(tmp_path, on_gpu):
    made = step(0)
    if not on_gpu:
        made = recording(0, ("train", 100, 111), memory=[Memory(each.at, each.trainer_bytes) for each in made.memory])
    figure = plot.memory(made)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert ("server and other processes" in labels) is on_gpu
    assert "train" in texts(figure)
    figure.savefig(tmp_path / "memory.png")


def test_phases_of_a_sync(tmp_path):
    parts = tuple(
        RankReport(rank, {"prepare": 0.002, "push": 0.01 + rank / 100}, *[0] * 3, 0.0, *[0] * 5) for rank in (0, 1)
    )
    report = SyncReport(0, "3", 1 << 30, 4, 2, 0.02, "ipc", "config", 3, {}, 4, (), 256, (), (), None, parts)
    figure = plot.sync(report)
    assert {"rank 0", "rank 1", "prepare", "push", "20.0"} <= set(texts(figure))
    figure.savefig(tmp_path / "sync.png")


def test_nothing_recorded():
    for draw in (lambda: plot.timeline([recording(0)]), lambda: plot.memory(recording(0)), lambda: plot.timeline([])):
        with pytest.raises(ConfigError, match="no"):
            draw()


def test_one_recording_is_drawn_as_a_list_of_it():
    assert "rank 0" in texts(plot.timeline(step(0)))


@pytest.mark.parametrize("draw, given, words", [
    (plot.timeline, None, "recordings must be a list"), (plot.timeline, ["events-0.json"], "a recording must be a Recording"),
    (plot.timeline, [Recorder(COLO)], "a recording must be a Recording"), (plot.memory, [recording(0)], "recording must be a Recording"),
    (plot.memory, Recorder(COLO), "recording must be a Recording"), (plot.sync, None, "report must be what sync_weights"),
    (plot.bench, "bench.json", "results must be the content of a file"), (plot.bench, {}, "results must be the content of a file"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_named(draw, given, words):
    with pytest.raises(ConfigError, match=words):
        draw(given)


def test_without_matplotlib_that_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plot.timeline([step(0)])


def test_the_figures_do_not_choose_a_backend():
    assert "matplotlib.pyplot" not in sys.modules
