"""Applies to every test: a clean environment, nothing left behind, GPU tests only where there is a GPU."""

import gc
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import footprint
import harness
import pytest
import pytest_timeout
from hypothesis import settings

_GPU_COMMAND = "make test PYTEST_ARGS='-m gpu', on a machine with CUDA devices and a CUDA build of SGLang"
# Tests with these run last: the fixtures are processes that import for seconds, started by the first test of their module.
STARTED_EARLY = {"reader", "fresh_interpreter"}
_NO_GPU = "no CUDA device here"
# Where processes share the tests, file by file, these go first, the longest one at the head: a long file that was
# begun last would leave the other processes without work.
LONGEST_FIRST = (
    "test_engine.py",
    "test_sync_transcript.py",
    "test_engine_calls.py",
    "test_examples.py",
    "test_fault_matrix.py",
    "test_trl.py",
    "test_faults.py",
    "test_elastic.py",
    "test_snippets.py",
    "test_peer_reads.py",
    "test_trainers.py",
    "test_engine_restart.py",
    "test_engine_releases.py",
    "test_bench.py",
    "test_doctor_command.py",
    "test_docs.py",
    "test_transfer.py",
    "test_kernels.py",
    "test_engine_checkpoints.py",
)
# Their tests wait for most of their time, for deadlines and ends of processes: they go beside the first long ones, whose
# work the cores have meanwhile.  At the end they would leave the cores idle.
WAITING = (
    "test_supervisor.py",
    "test_launch.py",
    "test_init.py",
    "test_http.py",
    "test_agreement.py",
    "test_share.py",
    "test_client.py",
    "test_gpu_matrix.py",
    "test_evidence.py",
    "test_connection.py",
    "test_runtime_folder.py",
    "test_doctor.py",
)
FIRST = (*LONGEST_FIRST[:2], *WAITING, *LONGEST_FIRST[2:])
# Its sitecustomize.py makes the starts of servers on the CPU three times as fast.
FORKED_SERVER = Path(__file__).with_name("forked_server")


def pytest_configure():
    gc.disable()  # until all modules are imported: a fifth of the time of that
    # Before any test module imports torch.  Ranks, servers and references share the cores of a small machine: threads
    # that spin while they wait for each other cost several times what they save.
    os.environ["OMP_NUM_THREADS"] = "1"
    # The time that one example takes depends on the other processes of the machine; pytest-timeout bounds the test.
    settings.register_profile("tpcolocate", deadline=None)
    settings.load_profile("tpcolocate")


@pytest.hookimpl(trylast=True)  # after -m and -k have deselected theirs
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: bool(STARTED_EARLY & set(item.fixturenames)))
    if hasattr(config, "workerinput"):  # in a process of pytest-xdist
        places = {name: place for place, name in enumerate(FIRST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if gpu_items and not _has_cuda():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, sched):
    """Run a test that ended its process no second time: another process gets the rest of the file, not this test.

    pytest-xdist would start it again in one process after the other; a test that hangs ends each at its timeout.
    """
    for tests in sched.workqueue.values():
        if crashitem in tests:
            tests[crashitem] = True


def pytest_sessionstart(session):
    if hasattr(session.config, "workerinput"):
        # What it prints before it ends the process: a process of pytest-xdist has no standard output.
        timeout_timer = pytest_timeout.timeout_timer

        def dump_to_stderr(item, settings):
            item.config.get_terminal_writer()._file = sys.__stderr__
            timeout_timer(item, settings)

        pytest_timeout.timeout_timer = dump_to_stderr


def pytest_collection_finish():
    # What the modules have imported stays: a collection that looks through it takes most of a second.
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter):
    skips = terminalreporter.stats.get("skipped", [])
    skipped = sum(_NO_GPU in str(report.longrepr) for report in skips)
    if skipped:
        terminalreporter.write_line(
            f"GPU tests: {skipped} not run (no CUDA device here); run them with {_GPU_COMMAND}", yellow=True
        )


def _has_cuda():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _session_ground(request, tmp_path_factory):
    """Scrub the environment before any other fixture of the session; look for leftovers at its end.

    Temporary files go to a folder of the session: servers and launchers that a test kills leave logs there.  It is removed
    at the end, and kept if a test has failed.
    """
    harness.keep_gpu_environment(os.environ)
    # Made before: pytest keeps its own, and multiprocessing removes its own when the process ends.
    tmp_path_factory.getbasetemp()
    multiprocessing.util.get_temp_dir()
    temporary = tempfile.mkdtemp(prefix="tpct-")  # short, because sockets are made in it
    os.chmod(temporary, 0o1777)  # as that of the system, for tests with several users
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", temporary)
        patch.setattr(tempfile, "tempdir", temporary)
        for name in list(os.environ):
            if harness.is_scrubbed(name) and name != "OMP_NUM_THREADS":
                patch.delenv(name)
        patch.setenv("PYTHONPATH", str(FORKED_SERVER), prepend=os.pathsep)
        footprint.tag_session()
        before = footprint.Footprint.now()
        yield
        found = footprint.leftovers(before)
        footprint.end_leftovers(before)
        os.environ.pop(footprint.SESSION_TAG)
    if not request.session.testsfailed and not found:
        shutil.rmtree(temporary, ignore_errors=True)
    if found:
        pytest.fail("the tests have left behind:\n" + "\n".join(found), pytrace=False)


@pytest.fixture
def short_path():
    """A folder for sockets, whose paths may have 107 bytes: `tmp_path` grows with the number of pytest's session."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


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
    before = footprint.Footprint.now()
    yield
    found = footprint.leftovers(before)
    if found:
        footprint.end_leftovers(before)
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
