"""The messages of both ends: what is encoded comes back, and what is not understood is refused with a reason."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tpcolocate.errors import SyncError
from tpcolocate.in_server.tpcolocate_receiver import protocol
from tpcolocate.in_server.tpcolocate_receiver.protocol import (
    Addressed,
    BucketResult,
    DryRun,
    DryRunResult,
    FindUnwritten,
    Greeting,
    Leave,
    LoadBucket,
    OpenSession,
    Probe,
    ProbeRanks,
    ProbeResult,
    ProgramResult,
    ProtocolError,
    RanksInReach,
    ReleaseStaging,
    Reply,
    RunProgram,
    UnwrittenParameters,
    WarmUp,
    WorkerError,
    addressed_to_all,
    decode_command,
    decode_envelope,
    decode_reply,
    decode_session,
    encode_command,
    encode_reply,
    to_json,
)
from tpcolocate.worker_errors import raise_worker_errors, worker_details, worker_error

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

HANDLE = {"kind": "file", "path": "/dev/shm/ä"}
COPIES = {"w": [[0, [4, 4], [4, 1], "float32"]]}
COMMANDS = [
    WarmUp([["w", [4, 4]]]),
    Probe(HANDLE, [1, -2]),
    ProbeRanks([[3, HANDLE, [1, -2]]]),
    DryRun([["w", "float32", [4, 4]]], []),
    DryRun([["w", "float32", [4, 4]]], [["v", [2]]]),
    LoadBucket(HANDLE, [1, -2], [["w", "float32", [4, 4], 0, 64]], watch=True, report_trace=True),
    RunProgram(
        ["a"], [["b", HANDLE]], [["p", 1, [["w", 0, None, None, "b", 0, "float32", [4, 1], 0, 1]]]], "p", False, True
    ),
    ReleaseStaging(),
    FindUnwritten(),
    Leave(),
]
RESULTS = [
    None,
    Greeting("GPU-1", "a1", "b2"),
    RanksInReach([0, 2], {"1": "RuntimeError: no"}),
    ProbeResult(None),
    DryRunResult(COPIES, None, []),
    DryRunResult(COPIES, ["head"], [["q", "kv"]]),
    BucketResult(["a"], ["b"], {"c": 3}, True, COPIES, None, {"load": 0.5}),
    ProgramResult([1, -(2**63)], {"load": 0.5}),
    UnwrittenParameters(["w"]),
]
ERROR = WorkerError("ValueError", "bad", "Traceback (most recent call last): ...")
name_of = lambda message: type(message).__name__


def test_every_message_is_tried():
    assert {type(command) for command in COMMANDS} == set(protocol._COMMANDS)
    assert {type(result) for result in RESULTS[1:]} == set(protocol._RESULTS)


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_a_command_comes_back_with_its_number_and_address(command):
    envelope = decode_envelope(encode_command(Addressed(3, command), 17))
    assert (envelope.number, envelope.for_tp_rank) == (17, 3)
    assert decode_command(envelope) == command


@pytest.mark.parametrize("result", RESULTS, ids=name_of)
@pytest.mark.parametrize("error", [None, ERROR], ids=["good", "failed"])
def test_a_reply_comes_back(result, error):
    reply = Reply(1, 17, error, True, 0.25, result)
    assert decode_reply(encode_reply(reply)) == reply


def test_an_opening_comes_back():
    opening = OpenSession("s", "ipc:///x", None, 1, 2, 3.0)
    assert decode_session(json.dumps(to_json(opening))) == opening


def test_what_has_a_default_may_be_missing():
    envelope = json.dumps({"number": 0, "for_tp_rank": 0, "command": {"kind": "RunProgram", "program": "p"}})
    assert decode_command(decode_envelope(envelope)) == RunProgram(program="p")
    reply = {"kind": "Reply", "tp_rank": 0, "number": None, "error": None, "opened": False, "seconds": 0.1}
    assert decode_reply(json.dumps(reply)) == Reply(0, None, None, False, 0.1)


def test_a_command_to_all_is_made_for_each():
    assert addressed_to_all(Leave(), 2) == {0: Addressed(0, Leave()), 1: Addressed(1, Leave())}


def enveloped(command):
    return json.dumps({"number": 0, "for_tp_rank": 0, "command": command})


REFUSED = [
    (decode_session, "{", "a message is not JSON: "),
    (decode_session, b"\xff", "a message is not JSON: "),
    (decode_session, "null", "None is no message"),
    (decode_session, "{}", "{} is no message"),
    (decode_session, '{"kind": "Leave"}', "kind 'Leave' is none of OpenSession"),
    (decode_envelope, "[]", r"\[\] is no message"),
    (decode_envelope, '{"number": 1}', "Envelope needs a field 'for_tp_rank'; needs a field 'command'"),
    (decode_envelope, '{"number": 1, "for_tp_rank": 0, "command": {}, "x": 1}', "Envelope has no field 'x'"),
    (decode_command, "3", "3 is no message"),
    (decode_command, "{}", "{} is no message"),
    (decode_command, '{"kind": ["WarmUp"]}', r"kind \['WarmUp'\] is none of WarmUp, Probe"),
    (decode_command, '{"kind": "Greeting"}', "kind 'Greeting' is none of WarmUp, Probe"),
    (decode_command, '{"kind": "Leave", "now": 1}', "Leave has no field 'now'"),
    (decode_command, '{"kind": "Probe", "handel": 1}',
     "Probe has no field 'handel'; needs a field 'handle'; needs a field 'checksum'"),
    (decode_reply, "[" * 100, "a message is not JSON: "),
    (decode_reply, "[1]", r"\[1\] is no message"),
    (decode_reply, '{"kind": "Reply", "result": {"kind": "Leave"}}', "kind 'Leave' is none of Greeting"),
    (decode_reply, '{"kind": "Reply", "error": "no"}', "'no' is no message"),
    (decode_reply, '{"kind": "Reply"}', "Reply needs a field 'tp_rank'; "),
]  # fmt: skip


@pytest.mark.parametrize("decode, text, words", REFUSED)
def test_what_is_not_understood_is_refused_with_a_reason(decode, text, words):
    with pytest.raises(ProtocolError, match=words):
        decode(decode_envelope(enveloped(json.loads(text))) if decode is decode_command else text)


def test_what_is_long_is_neither_copied_nor_gone_through():
    """Hundreds of checksums come with every sync."""

    class Numbers(list):
        def __iter__(self):
            raise AssertionError("gone through")

    checksums = Numbers(range(500))
    assert to_json(ProgramResult(checksums, {}))["checksums"] is checksums
    found = decode_reply(encode_reply(Reply(0, 0, None, True, 0.1, ProgramResult(list(range(500)), {}))))
    assert type(found.result.checksums) is list, "as json makes it"


def test_it_needs_the_standard_library_alone():
    folder = Path(protocol.__file__).parent
    script = "import sys, protocol; assert not {'torch', 'zmq', 'tpcolocate'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- in the trainer -------------------------------------------------------------------------------------------------


def test_a_workers_error_comes_with_its_traceback():
    good, bad = Reply(0, 1, None, True, 0.1), Reply(1, 1, ERROR, True, 0.1)
    error = worker_error(bad, "weights did not arrive", hint="sync again", rank=4)
    assert isinstance(error, SyncError) and error.message == "weights did not arrive: TP rank 1: ValueError: bad"
    assert (error.hint, error.rank) == ("sync again", 4)
    assert error.details == f"TP rank 1:\n{ERROR.traceback}" == worker_details(bad)
    assert str(error).endswith(ERROR.traceback)
    assert worker_details(good) is None
    raise_worker_errors({0: good}, "weights did not arrive")
    with pytest.raises(SyncError) as caught:
        raise_worker_errors(
            {0: good, 1: bad, 2: dataclasses.replace(bad, tp_rank=2)},
            "weights did not arrive",
            hint="sync again",
            rank=4,
        )
    assert str(caught.value) == str(error), "the first"


def test_a_reply_says_once_what_is_read_of_many_tensors():
    copies, other = [[0, [2, 3], [3, 1], "float32"]], [[6, [2, 3], [3, 1], "float32"]]
    traced = {"a": copies, "b": other, "c": copies}
    text = protocol.encode_reply(protocol.Reply(0, 1, None, True, 0.0, DryRunResult(traced)))
    assert text.count(b"float32") == 2
    found = protocol.decode_reply(text).result.traced
    assert found == traced and found["a"] is found["c"]
    with pytest.raises(protocol.ProtocolError, match="copies, names"):
        protocol.decode_reply(text.replace(b'["b"]', b"1"))
