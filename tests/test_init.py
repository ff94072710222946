"""`init` on real ranks: slices, owners, and the same error on every rank."""

import fcntl
import json
import multiprocessing
import os
import time
from dataclasses import asdict

import pytest
import torch
from harness import run_ranks

import tpcolocate
from tpcolocate import errors

pytestmark = pytest.mark.quick

TIMEOUT_S = 40.0
UUIDS = [f"GPU-{i:08x}-1111-2222-3333-444444444444" for i in range(8)]


def place(rank, tp_size, device, timeout_s=TIMEOUT_S):
    """Call init() as a training script does, and return all that is visible of the result."""
    import torch.distributed as dist

    tp = tp_size[rank] if isinstance(tp_size, list) else tp_size
    where = device[rank] if isinstance(device, list) else device
    with tpcolocate.init(tp, device=where, timeout_s=timeout_s) as colo:
        total = None
        if colo.group is not None:
            number = torch.tensor([10.0**rank])
            dist.all_reduce(number, group=colo.group)
            total = number.item()
        return {
            "tp_rank": colo.tp_rank,
            "slice": colo.slice_ranks,
            "owner": colo.owner_rank,
            "is_owner": colo.is_owner,
            "visible": colo.visible_devices,
            "group_sum": total,
            "job": colo.job,
            "sizes": (colo.world_size, colo.tp_size),
        }


def shared_list(value):
    """All ranks see one list, and each takes the entry at its rank, as under plain torchrun."""
    return {"CUDA_VISIBLE_DEVICES": value}, lambda world: [f"cuda:{rank}" for rank in range(world)]


def one_each(*values):
    """Each rank sees only its own device, as cuda:0; some launchers do this."""
    return lambda rank: {"CUDA_VISIBLE_DEVICES": values[rank]}, lambda world: ["cuda:0"] * world


CASES = [
    # id, ranks, tp_size, environment and devices, slices in tp order, their owners, visible devices of each slice
    ("unset", 2, 2, ({}, lambda world: ["cuda:0", "cuda:1"]), [(0, 1)], [0], [("0", "1")]),
    ("shared-3,1", 2, 2, shared_list("3,1"), [(0, 1)], [1], [("3", "1")]),
    ("shared-0,1", 2, 2, shared_list("0,1"), [(0, 1)], [0], [("0", "1")]),
    ("one-each-3-1", 2, 2, one_each("3", "1"), [(0, 1)], [1], [("3", "1")]),
    ("uuids-without-inventory", 2, 2, shared_list(f"{UUIDS[5]},{UUIDS[2]}"), [(0, 1)], [1], [(UUIDS[5], UUIDS[2])]),
    ("one-uuid-each", 2, 2, one_each(UUIDS[1], UUIDS[0]), [(0, 1)], [1], [(UUIDS[1], UUIDS[0])]),
    ("swapped-indices", 2, 2, ({"CUDA_VISIBLE_DEVICES": "4,6"}, lambda world: ["cuda:1", "cuda:0"]), [(0, 1)], [1], [("6", "4")]),
    ("6,4,5,7-tp2", 4, 2, shared_list("6,4,5,7"), [(0, 1), (2, 3)], [1, 2], [("6", "4"), ("5", "7")]),
    ("6,4,5,7-tp4", 4, 4, shared_list("6,4,5,7"), [(0, 1, 2, 3)], [1], [("6", "4", "5", "7")]),
    ("unaligned-1,2-3,0", 4, 2, shared_list("1,2,3,0"), [(0, 1), (2, 3)], [0, 3], [("1", "2"), ("3", "0")]),
    ("eight-tp2", 8, 2, shared_list("7,6,5,4,3,2,1,0"), [(0, 1), (2, 3), (4, 5), (6, 7)], [1, 3, 5, 7], [("7", "6"), ("5", "4"), ("3", "2"), ("1", "0")]),
    ("eight-tp4-one-each", 8, 4, one_each(*"42617035"), [(0, 1, 2, 3), (4, 5, 6, 7)], [3, 5], [("4", "2", "6", "1"), ("7", "0", "3", "5")]),
    ("cpu-tp2", 4, 2, ({}, lambda world: ["cpu"] * world), [(0, 1), (2, 3)], [0, 2], [(), ()]),
]  # fmt: skip


@pytest.mark.parametrize(
    "world, tp_size, setting, slices, owners, visible", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_slices_owners_and_device_lists(world, tp_size, setting, slices, owners, visible):
    env, devices = setting
    places = run_ranks(place, world, tp_size, devices(world), env=env)
    for ranks, owner, tokens in zip(slices, owners, visible, strict=True):
        for tp_rank, rank in enumerate(ranks):
            assert places[rank] == {
                "tp_rank": tp_rank,
                "slice": ranks,
                "owner": owner,
                "is_owner": rank == owner,
                "visible": tokens,
                # the group consists of exactly these ranks
                "group_sum": sum(10.0**r for r in ranks),
                "job": places[0]["job"],
                "sizes": (world, tp_size),
            }


def test_tp_1_creates_no_group_and_every_rank_is_an_owner():
    places = run_ranks(place, 2, 1, ["cuda:0", "cuda:1"], env={"CUDA_VISIBLE_DEVICES": "3,1"})
    assert [p["visible"] for p in places] == [("3",), ("1",)]
    assert all(p["is_owner"] and p["group_sum"] is None and p["slice"] == (rank,) for rank, p in enumerate(places))


def test_one_process_needs_no_torch_distributed():
    [alone] = run_ranks(place, 1, 1, "cpu", init_group=False)
    assert alone["is_owner"] and alone["sizes"] == (1, 1)


def test_tp_2_without_torch_distributed_is_an_error_with_a_hint():
    [outcome] = run_ranks(place, 1, 2, "cpu", init_group=False, expect_errors=True)
    assert isinstance(outcome.error, errors.ConfigError) and "torchrun" in str(outcome.error)


ERRORS = [
    ("world-not-divisible", 3, 2, "cpu", {}, errors.LayoutError, "tp_size=2 does not divide the 3 ranks"),
    ("disagreement", 2, [1, 2], "cpu", {}, errors.LayoutError, "tp_size=1 on ranks 0; tp_size=2 on ranks 1"),
    ("tp-zero", 2, 0, "cpu", {}, errors.ConfigError, "tp_size must be a positive integer, got 0"),
    ("tp-true", 2, True, "cpu", {}, errors.ConfigError, "tp_size must be a positive integer, got True"),
    ("index-out-of-range", 2, 2, ["cuda:0", "cuda:5"], {"CUDA_VISIBLE_DEVICES": "3,1"}, errors.DeviceError, "2 devices visible"),
    ("no-device-visible", 2, 2, ["cuda:0", "cuda:1"], {"CUDA_VISIBLE_DEVICES": ""}, errors.DeviceError, "CUDA_VISIBLE_DEVICES"),
    ("one-device-twice", 2, 2, "cuda:0", {"CUDA_VISIBLE_DEVICES": "3,1"}, errors.DeviceError, "used by rank 0 and by rank 1"),
    ("across-slices-too", 4, 2, ["cuda:0", "cuda:1", "cuda:1", "cuda:2"], {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, errors.DeviceError, "used by rank 1 and by rank 2"),
    ("repeated-entry", 2, 2, ["cuda:0", "cuda:1"], {"CUDA_VISIBLE_DEVICES": "3,3"}, errors.DeviceError, "3,3"),
    ("cpu-and-gpu", 2, 2, ["cpu", "cuda:0"], {"CUDA_VISIBLE_DEVICES": "3,1"}, errors.LayoutError, "kinds of device"),
    ("device-order", 2, 2, ["cuda:0", "cuda:1"], lambda rank: {"CUDA_VISIBLE_DEVICES": "3,1", "CUDA_DEVICE_ORDER": ["PCI_BUS_ID", "FASTEST_FIRST"][rank]},
     errors.LayoutError, "CUDA_DEVICE_ORDER"),
    ("nonsense-device", 2, 2, ["cpu", "toaster:1"], {}, errors.DeviceError, "toaster"),
    ("other-devices", 2, 2, ["xpu:0", "xpu:1"], {}, errors.DeviceError, "'xpu:0' is of no kind"),
    ("no-device-at-all", 2, 1, ["cpu", "meta"], {}, errors.DeviceError, "'meta' is of no kind"),
]  # fmt: skip


@pytest.mark.parametrize(
    "world, tp_size, device, env, kind, words", [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS]
)
def test_every_rank_gets_the_same_clear_error(world, tp_size, device, env, kind, words):
    outcomes = run_ranks(place, world, tp_size, device, env=env, expect_errors=True)
    texts = {str(outcome.error) for outcome in outcomes}
    assert len(texts) == 1, texts
    for outcome in outcomes:
        assert isinstance(outcome.error, kind), outcome
        assert words in str(outcome.error)
        assert outcome.seconds < TIMEOUT_S / 2, "reported, not timed out"


def silent(rank, tp_size, timeout_s):
    """Rank 1 never calls init()."""
    import torch.distributed as dist

    if rank == 1:
        # stays alive until the others have timed out; they end it through a key of the default store
        from datetime import timedelta

        dist.distributed_c10d._get_default_store().wait(["the others are done"], timedelta(seconds=120))
        return None
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{rank} comes", "1")
    store.wait(["0 comes", "2 comes"])  # these two are not late for each other
    started = time.monotonic()
    try:
        tpcolocate.init(tp_size, device="cpu", timeout_s=timeout_s)
    except errors.RankLostError as error:
        return time.monotonic() - started, str(error)
    finally:
        if rank == 0:
            dist.distributed_c10d._get_default_store().set("the others are done", "1")


def test_a_rank_that_never_calls_init_is_named():
    found = run_ranks(silent, 3, 3, 2.0, timeout_s=200)
    for rank in (0, 2):
        seconds, text = found[rank]
        assert 1.9 < seconds < 60
        assert "rank 1 did not call tpcolocate.init() within 2 s" in text


def late(rank):
    """Rank 1 comes once rank 0 has given up; then both come again."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["rank 0 gave up"])
    began = time.monotonic()
    try:
        tpcolocate.init(2, device="cpu", timeout_s=0.5 if rank == 0 else TIMEOUT_S)
    except errors.RankLostError as error:
        text, seconds = str(error), time.monotonic() - began
    if rank == 0:
        store.set("rank 0 gave up", "1")
    return text, seconds, place(rank, 2, "cpu")["slice"]


def test_a_rank_that_comes_late_to_init_has_the_error_of_the_others_and_all_may_call_it_again():
    first, second = run_ranks(late, 2)
    assert first[0] == second[0] and "rank 1 did not call tpcolocate.init() within 0.5 s" in first[0]
    assert second[1] < TIMEOUT_S / 2 and first[2] == second[2] == (0, 1)


def twice(rank):
    """Two jobs in sequence in the same processes, with different slices."""
    first = place(rank, 2, "cpu")
    second = place(rank, 4, "cpu")
    return first["slice"], second["slice"], first["job"] != second["job"]


def test_init_can_be_called_again():
    assert run_ranks(twice, 4) == [((0, 1) if rank < 2 else (2, 3), (0, 1, 2, 3), True) for rank in range(4)]


def under_torchs_checks(rank):
    """As with TORCH_DISTRIBUTED_DEBUG=DETAIL, with a rank that does not come in time."""
    import torch.distributed as dist

    dist.set_debug_level(dist.DebugLevel.DETAIL)
    store = dist.distributed_c10d._get_default_store()
    with tpcolocate.init(2, device="cpu", timeout_s=TIMEOUT_S) as colo:
        if rank == 1:
            store.wait(["rank 0 gave up"])
        with pytest.raises(errors.RankLostError, match="rank 1 is missing"):
            colo._slice.all_gather(rank, what="meet", timeout_s=1.0)
        if rank == 0:
            store.set("rank 0 gave up", "1")
        return colo._slice.all_gather(rank, what="meet again"), dist.get_debug_level().name


def test_ranks_watch_each_other_whatever_torch_checks_of_other_groups():
    assert run_ranks(under_torchs_checks, 2) == [([0, 1], "DETAIL")] * 2


def after_a_job_of_its_own(rank, folder):
    """Rank 0 has been in another job before, by itself."""
    import torch.distributed as dist

    if rank == 0:
        del os.environ["WORLD_SIZE"]
        dist.init_process_group("gloo", init_method=f"file://{folder}/alone", rank=0, world_size=1)
        tpcolocate.init(device="cpu").close()
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/both", rank=rank, world_size=2)
    with tpcolocate.init(2, device="cpu", timeout_s=10.0) as colo:
        return colo.slice_ranks


def test_ranks_meet_whatever_jobs_they_were_in_before(tmp_path):
    assert run_ranks(after_a_job_of_its_own, 2, str(tmp_path), init_group=False) == [(0, 1)] * 2


def without_shared_memory(rank):
    if rank == 1:
        os.readlink = lambda path: (_ for _ in ()).throw(FileNotFoundError(2, "No such file or directory", path))
    tpcolocate.init(2, device="cpu", timeout_s=TIMEOUT_S)


def test_a_host_that_lacks_something_is_the_same_error_on_all_ranks():
    outcomes = run_ranks(without_shared_memory, 2, expect_errors=True)
    for outcome in outcomes:
        assert isinstance(outcome.error, errors.ConfigError) and outcome.seconds < TIMEOUT_S / 2
        assert "lacks what tpcolocate needs" in outcome.error.message and "/proc/self/ns" in outcome.error.message


def job_of(rank, jobs, world):
    job = jobs[rank] if isinstance(jobs, list) else jobs
    with tpcolocate.init(world, device="cpu", timeout_s=TIMEOUT_S, job=job) as colo:
        return colo.job


def test_a_job_has_the_name_that_it_was_given():
    assert run_ranks(job_of, 2, "my.job-7", 2) == ["my.job-7"] * 2
    assert run_ranks(job_of, 2, None, 2, env={"TPCOLOCATE_JOB": "from_outside"}) == ["from_outside"] * 2
    assert run_ranks(job_of, 1, "mine", 1, env={"TPCOLOCATE_JOB": "from_outside"}, init_group=False) == ["mine"]


def test_a_variable_that_is_set_to_nothing_is_not_set_and_a_bad_one_is_named(monkeypatch):
    """As in a script that exports a variable which its caller has not set."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("TPCOLOCATE_JOB", "")
    with tpcolocate.init(device="cpu") as colo:
        assert colo.job.startswith(f"{os.getpid()}-")
    monkeypatch.setenv("TPCOLOCATE_JOB", "my job")
    for call in (lambda: tpcolocate.init(device="cpu"), tpcolocate.connect):
        with pytest.raises(errors.ConfigError, match="TPCOLOCATE_JOB='my job' is not the name of a job"):
            call()


@pytest.mark.parametrize("jobs, words", [
    (["a", "b"], "ranks 0 and 1 are of different jobs: 'a' and 'b'"),
    (["a", None], "ranks 0 and 1 are of different jobs: 'a' and None"),
    (["a", "../a"], "job='../a' is not the name of a job"),
    ("a" * 65, "is not the name of a job"),
    ("", "job='' is not the name of a job"),
    (7, "job=7 is not the name of a job"),
])  # fmt: skip
def test_a_job_name_that_cannot_work_is_an_error_on_all_ranks(jobs, words):
    outcomes = run_ranks(job_of, 2, jobs, 2, expect_errors=True)
    assert {type(outcome.error) for outcome in outcomes} == {errors.ConfigError}
    assert len({str(outcome.error) for outcome in outcomes}) == 1 and words in str(outcomes[0].error)


def test_a_child_of_multiprocessing_that_imports_the_script_is_no_job_of_its_own(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(errors.ConfigError, match="a child process of multiprocessing") as caught:
        tpcolocate.init(device="cpu")
    assert '__name__ == "__main__"' in caught.value.hint


def test_several_processes_without_a_process_group_are_refused():
    [outcome] = run_ranks(place, 1, 1, "cpu", init_group=False, env={"WORLD_SIZE": "2"}, expect_errors=True)
    assert isinstance(outcome.error, errors.ConfigError)
    assert "WORLD_SIZE=2, but torch.distributed is not initialised" in str(outcome.error)
    assert "init_process_group()" in outcome.error.hint


def warned(rank):
    """Rank 1 comes to init() once rank 0 has warned."""
    import logging

    import torch.distributed as dist

    from tpcolocate import groups

    store = dist.distributed_c10d._get_default_store()
    texts = []

    class Warnings(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())
            store.set("warned", "1")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "WARN_AFTER_S", 0.5)
        groups.logger.addHandler(Warnings())
        if rank == 1:
            store.wait(["warned"])
        tpcolocate.init(2, device="cpu", timeout_s=TIMEOUT_S).close()
    return texts


def test_a_rank_that_waits_in_init_names_those_that_are_missing():
    texts, none = run_ranks(warned, 2)
    assert "for rank 1 to call tpcolocate.init(); it waits until 40 s (timeout_s of init())" in texts[0] and none == []


@pytest.fixture
def announced(monkeypatch, tmp_path):
    """Return a function that announces a server of a job that listens."""
    from tpcolocate import discovery, rendezvous, runtime_folder
    from tpcolocate.processes import start_of, this_process

    monkeypatch.setattr(runtime_folder, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(discovery, "is_listening", lambda announcement: True)

    def announce(job, slice_index=0, nonce=None, pid=None):
        nonce = f"{job}-{slice_index}" if nonce is None else nonce
        url = f"http://{job}:1"
        process = this_process() if pid is None else (pid, start_of(pid) or 1)
        announcement = rendezvous.Announcement(url, "key", job, slice_index, (slice_index,), *process, nonce)
        path = rendezvous.path_for(nonce)
        path.parent.mkdir(mode=0o700)
        rendezvous.announce(path, announcement)

    return announce


def test_connect_takes_the_job_that_is_named(announced, monkeypatch, caplog):
    for job in ("a", "b"):
        announced(job)
    with pytest.raises(errors.RendezvousError, match="2 running servers"):
        tpcolocate.connect()
    assert tpcolocate.connect("a").url == "http://a:1"
    monkeypatch.setenv("TPCOLOCATE_JOB", "b")
    assert tpcolocate.connect().url == "http://b:1" and tpcolocate.connect("a").url == "http://a:1"
    assert caplog.messages == []
    with pytest.raises(errors.ConfigError, match="not the name of a job"):
        tpcolocate.connect("../b")


def test_connect_finds_a_job_of_another_container_until_its_supervisor_has_ended(announced):
    """One that shares network and /dev/shm with this one, but not the PID namespace."""
    from tpcolocate import rendezvous, runtime_folder

    announced("a", pid=2**22)  # of no process here
    folder = rendezvous.path_for("a-0").parent
    owner = runtime_folder.OwnerRecord(2**22, 1, "pid:[1]", "a-0", "/nowhere", "/nowhere/log")
    (folder / "owner.json").write_text(json.dumps(asdict(owner)))
    (folder / "processes.json").write_text('{"is_locked": true}')
    with open(folder / "processes.json", "rb") as held_by_its_supervisor:
        fcntl.flock(held_by_its_supervisor, fcntl.LOCK_SH)
        assert tpcolocate.connect("a").url == "http://a:1"
    with pytest.raises(errors.RendezvousError, match="no running server"):
        tpcolocate.connect("a")


def test_connect_without_a_job_warns_which_server_it_takes(announced, monkeypatch, caplog):
    announced("a")
    monkeypatch.setenv("TPCOLOCATE_JOB", "")
    assert tpcolocate.connect().url == "http://a:1"
    assert "takes the only server of this user, that of job a" in caplog.text


def test_connect_says_what_runs_instead_of_what_it_looks_for(announced):
    def refusal(*args, **kwargs):
        with pytest.raises(errors.RendezvousError) as caught:
            tpcolocate.connect(*args, **kwargs)
        return str(caught.value)

    assert "start that job first" in refusal("a") and "those that run" not in refusal("a")
    announced("a", 0)
    announced("a", 1)
    announced("b", 0)
    for text in (refusal("c"), refusal("a", slice_index=2)):
        assert "start that job" not in text and "name one of those that run" in text
        assert text.count("  job a, slice") == 2 and text.count("  job b, slice 0 (ranks 0)") == 1
    assert "no running server of this user in job a of slice 2" in refusal("a", slice_index=2)
    assert "name the job: connect(job)" in refusal() and "name the job" in refusal(slice_index=0)
    text = refusal("a")
    assert "2 running servers of this user in job a" in text and "name the slice: connect(job, slice_index=0)" in text
    assert "job b" not in text
    # A policy and a judge: no name tells them apart.
    announced("b", 0, nonce="judge")
    text = refusal("b", slice_index=0)
    assert "this slice has launched several: tpcolocate.Client(engine.url, api_key=engine.api_key)" in text
    # Two jobs that were started with one TPCOLOCATE_JOB.
    announced("a", 0, nonce="other", pid=os.getppid())
    for text in (refusal("a"), refusal("a", slice_index=0)):
        assert "several running jobs have one name: start each with its own" in text
        assert all(f"launched by process {pid}" in text for pid in (os.getpid(), os.getppid()))


def left_by_one(rank):
    import torch.distributed as dist

    began, found = time.monotonic(), []
    try:
        with tpcolocate.init(2, device="cpu", timeout_s=TIMEOUT_S) as colo:
            if rank == 1:
                raise ValueError("caught below")
            colo._slice.all_gather(None, what="sync weights")
    except (ValueError, errors.RankLostError) as error:
        found.append((type(error).__name__, str(error), time.monotonic() - began < TIMEOUT_S / 2))
    dist.barrier()  # both live on
    for call in (lambda: colo._slice.all_gather(None, what="sync weights"), lambda: colo.launch("model")):
        with pytest.raises(errors.ConfigError, match=r"after close\(\)"):
            call()
    return found


def test_a_rank_that_leaves_by_an_error_and_lives_on_is_not_waited_for():
    [(kind, text, soon)], other = run_ranks(left_by_one, 2)
    assert (kind, soon) == ("RankLostError", True) and "left `with init():` by an error" in text
    assert other == [("ValueError", "caught below", True)]
