"""Applies to every test: a clean environment, nothing left behind, GPU tests only where there is a GPU."""

import os

import harness
import pytest
from hypothesis import settings

_GPU_COMMAND = "make test PYTEST_ARGS='-m gpu', on a machine with CUDA devices and a CUDA build of SGLang"
_gpu_tests_skipped = pytest.StashKey[int]()


def pytest_configure():
    # Before any test module imports torch.  Ranks, servers and references share the cores of a small machine: threads
    # that spin while they wait for each other cost several times what they save.
    os.environ["OMP_NUM_THREADS"] = "1"
    # The time that one example takes depends on the other processes of the machine; pytest-timeout bounds the test.
    settings.register_profile("tpcolocate", deadline=None)
    settings.load_profile("tpcolocate")


@pytest.hookimpl(trylast=True)  # after -m and -k have deselected theirs
def pytest_collection_modifyitems(config, items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if gpu_items and not _has_cuda():
        config.stash[_gpu_tests_skipped] = len(gpu_items)
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_terminal_summary(terminalreporter, config):
    skipped = config.stash.get(_gpu_tests_skipped, 0)
    if skipped:
        terminalreporter.write_line(
            f"GPU tests: {skipped} not run (no CUDA device here); run them with {_GPU_COMMAND}", yellow=True
        )


def _has_cuda():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _session_ground():
    """Scrub the environment before any other fixture of the session; look for leftovers at its end."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if harness.is_scrubbed(name) and name != "OMP_NUM_THREADS":
                patch.delenv(name)
        harness.tag_session()
        before = harness.Footprint.now()
        yield
        found = harness.leftovers(before)
        harness.end_leftovers(before)
        os.environ.pop(harness.SESSION_TAG)
    if found:
        pytest.fail("the tests have left behind:\n" + "\n".join(found), pytrace=False)


@pytest.fixture(autouse=True)
def _clean_environment(_session_ground):
    """Give every test the session's environment, whatever the test before it or the import of a library has set."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def no_leftovers():
    """Fail a test that leaves a process or an entry in /dev/shm."""
    before = harness.Footprint.now()
    yield
    found = harness.leftovers(before)
    if found:
        harness.end_leftovers(before)
        pytest.fail("left behind:\n" + "\n".join(found), pytrace=False)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Return a function with the keywords of ``make_tiny_model``; equal calls share a folder, which is read-only."""
    from tiny_models import make_tiny_model

    made = {}

    def make(**kwargs):
        key = tuple(sorted(kwargs.items()))
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp("tiny-model"), **kwargs)
        return made[key]

    return make
