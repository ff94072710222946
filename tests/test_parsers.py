"""What other processes wrote is a value or an error of the library, whatever it is."""

import json
from dataclasses import asdict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tpcolocate import devices, errors, rendezvous
from tpcolocate.groups import Host, Member, plan_slices
from tpcolocate.in_server.tpcolocate_receiver import protocol
from tpcolocate.placement import plan_roles

pytestmark = pytest.mark.quick

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["Any", "ConfigError", "self"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
NESTED = "[" * 100_000
MANY_DIGITS = "9" * 5000

ANNOUNCEMENT = asdict(rendezvous.Announcement("http://127.0.0.1:1", "key", "job", 0, (0, 1), 1, 2, "nonce"))
FACTS = {
    "kind": "cuda", "physical": {"token": "0", "index": 0, "uuid": None}, "order": "PCI_BUS_ID", "job": "1-ab",
    "job_name": None, "gloo": {"address": "127.0.0.1", "origin": "x"}, "version": "1", "shared": False,
}  # fmt: skip
ERROR = {"kind": "ConfigError", "message": "m", "hint": None}
MEMBER = asdict(Member(0, 1, 1, Host("boot", "net:[1]", "23", "a"), 7, 8, FACTS, ERROR))
REPLY = json.loads(
    protocol.encode_reply(
        protocol.Reply(
            0, 1, protocol.WorkerError("E", "m", "t"), True, 0.1, protocol.DryRunResult({"a": [[0, [1], [1], "i"]]})
        )
    )
)


@st.composite
def damaged(draw, valid):
    """A valid message in which one value, at any depth, is another or is missing."""
    if not isinstance(valid, dict) or not valid or draw(st.booleans()):
        return draw(VALUES)
    name = draw(st.sampled_from(sorted(valid)))
    if draw(st.integers(0, 4)) == 0:
        return {other: value for other, value in valid.items() if other != name}
    return {**valid, name: draw(damaged(valid[name]))}


@given(st.dictionaries(
    st.sampled_from(sorted({name for row in devices.VISIBILITY.values() for name in row.variables})),
    st.lists(st.sampled_from(["0", "1", "-1", "", "GPU-1", "MIG-", MANY_DIGITS, f"-{MANY_DIGITS}", "0-1"]) | st.text()).map(",".join),
), st.sampled_from(sorted(devices.VISIBILITY)), st.integers(-2, 5))  # fmt: skip
@example({"CUDA_VISIBLE_DEVICES": MANY_DIGITS}, "cuda", 0)
def test_lists_of_devices(environ, kind, index):
    try:
        devices.visible_tokens(environ, kind=kind)
        devices.resolve(index, environ, kind=kind)
    except errors.DeviceError:
        pass


@given(damaged(ANNOUNCEMENT).map(json.dumps) | st.text() | st.binary())
@example(NESTED)
@example('{"pid": ' + MANY_DIGITS + "}")
@example(json.dumps({**ANNOUNCEMENT, "pid": "self"}))
@example(json.dumps({**ANNOUNCEMENT, "pid": "\0"}))
@example(json.dumps({**ANNOUNCEMENT, "url": "http://[::1"}))
def test_announcements(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "announcement.json"
    path.touch(0o600)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    try:
        found = rendezvous.read(path)
        assert type(found.pid) is int and found.url.startswith("http://")
        found.writer_is_running()
    except errors.RendezvousError:
        pass


@given(damaged(REPLY).map(json.dumps) | st.text() | st.binary())
@example(NESTED)
@example(json.dumps({**REPLY, "kind": ["x"]}))
@example('{"kind": ' + "[" * 900 + "]" * 900 + "}")
def test_messages(content):
    for decode in (
        protocol.decode_session,
        protocol.decode_reply,
        lambda text: protocol.decode_command(protocol.decode_envelope(text)),
    ):
        try:
            decode(content)
        except protocol.ProtocolError:
            pass


@given(damaged(MEMBER).map(json.dumps) | st.text())
@example(NESTED)
@example(json.dumps({**MEMBER, "error": {**ERROR, "kind": "Any"}}))
@example(json.dumps({**MEMBER, "error": {"kind": "ConfigError"}}))
@example(json.dumps({**MEMBER, "error": None, "tp_size": 0}))
@example(json.dumps({**MEMBER, "error": None, "rank": 3}))
@example(json.dumps({**MEMBER, "error": None, "facts": {}}))
@example(json.dumps({**MEMBER, "error": None, "facts": {**FACTS, "physical": {"token": 1}}}))
def test_members(text):
    try:
        member = Member.from_json(text)
        member.is_running()
        plan_slices([member])
        plan_roles([member])
    except errors.ConfigError:
        pass


def test_a_job_without_ranks():
    with pytest.raises(errors.LayoutError, match="no ranks"):
        plan_slices([])
