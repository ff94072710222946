"""What differs between SGLang releases, and what is done about it before anything is sent.

That the table is true is shown by ``tests/contracts``, from the releases' own source.
"""

import ast
from pathlib import Path

import pytest
from packaging.version import Version

import tpcolocate
from tpcolocate.errors import ConfigError
from tpcolocate.server.api import ServerApi
from tpcolocate.server.http import ServerClient
from tpcolocate.server.releases import (
    ENDPOINTS,
    OLDEST,
    RENAMED,
    Span,
    check_draft_model,
    other_spelling,
    release,
)

pytestmark = pytest.mark.quick

NO_DRAFT = {"disable_draft_model": True}
TARGET = {"selector": "target"}


@pytest.mark.parametrize("version, session, per_rank, target_only", [
    ("0.5.9", False, False, {}),
    ("0.5.10", False, False, NO_DRAFT),
    ("0.5.10.post1", False, False, NO_DRAFT),
    ("0.5.16", False, False, NO_DRAFT),
    ("0.5.17", False, True, NO_DRAFT),
    ("0.5.20", False, True, NO_DRAFT),
    ("0.5.21", True, True, TARGET),
    ("0.5.21.dev12+gabc", True, True, TARGET),
    ("0.5.21rc1", True, True, TARGET),
    ("0.5.23", True, True, TARGET),
    ("0.6.0", True, True, TARGET),
])  # fmt: skip
def test_features_by_version(version, session, per_rank, target_only):
    row = release(version)
    assert (row.version, row.weight_session, row.lora_payload_per_rank) == (version, session, per_rank)
    assert row.target_only() == target_only


@pytest.mark.parametrize("version", ["0.5.8", "0.4.10", "unknown", "", "None"])
def test_others_are_refused_with_what_to_use(version):
    with pytest.raises(ConfigError, match=str(OLDEST)) as caught:
        release(version)
    assert version in str(caught.value)


@pytest.mark.parametrize("span, inside, outside", [
    (Span(), ["0.5.9", "0.5.9.post1", "9"], ["0.5.8"]),
    (Span("0.5.21"), ["0.5.21", "0.6"], ["0.5.20.post1"]),
    (Span("0.5.10", "0.5.21"), ["0.5.10", "0.5.20.post1"], ["0.5.9", "0.5.21"]),
])  # fmt: skip
def test_a_span_begins_with_its_first_release_and_ends_before_its_last(span, inside, outside):
    assert all(Version(version) in span for version in inside)
    assert not any(Version(version) in span for version in outside)


@pytest.mark.parametrize("version, path, names, words, hint", [
    ("0.5.20", "/begin_weight_update", {}, "SGLang 0.5.20 has no /begin_weight_update", "0.5.21 and newer"),
    ("0.5.20", "/update_weights_from_tensor", TARGET, "of SGLang 0.5.20 has no field 'selector'", "0.5.21 and newer"),
    ("0.5.21", "/update_weights_from_tensor", NO_DRAFT, "of SGLang 0.5.21 has no field 'disable_draft_model'",
     "0.5.10 up to before 0.5.21"),
    ("0.5.9", "/flush_cache", {"timeout": 3}, "has no field 'timeout'", "0.5.10 and newer"),
    ("0.5.23", "/destroy_weights_update_group", {"group": "a"}, "has no field 'group' and would ignore it", "it takes group_name"),
    ("0.5.23", "/end_weight_update", {"x": 1}, "has no field 'x'", "it takes nothing"),
    ("0.5.17", "/load_lora_adapter_from_tensors", {"serialized_tensors": ""}, "has no field 'serialized_tensors'", "before 0.5.17"),
])  # fmt: skip
def test_what_a_release_lacks_is_an_error_that_names_it(version, path, names, words, hint):
    with pytest.raises(ConfigError, match=words) as caught:
        release(version).check(path, names)
    assert hint in caught.value.hint


def test_what_a_release_has_passes():
    for path, endpoint in ENDPOINTS.items():
        for version in ("0.5.9", "0.5.20", "0.5.23"):
            row = release(version)
            if row.has(path):
                row.check(path, {name: None for name in endpoint.fields if row.has(path, name)})
    release("0.5.9").check("/generate", {"whatever": 1})  # the server describes that one itself


class Recorded(ServerClient):
    """Answers as a server of one release, and keeps what was sent."""

    def __init__(self, version, **info):
        super().__init__("http://127.0.0.1:1")
        self.info = {"version": version, **info}
        self.sent = []

    def _exchange(self, method, path, body, **options):
        self.sent.append((path, body))
        return self.info if path == "/server_info" else {"success": True, "weight_version": "v"}


@pytest.mark.parametrize("version, expected", [("0.5.9", {}), ("0.5.20", NO_DRAFT), ("0.5.21", TARGET)])
def test_a_push_carries_what_the_release_takes_and_nothing_else(version, expected):
    client = Recorded(version)
    ServerApi(client).push(["a", "b"], load_format="flattened_bucket", timeout_s=1)
    [body] = [body for path, body in client.sent if path == "/update_weights_from_tensor"]
    common = {"serialized_named_tensors": ["a", "b"], "load_format": "flattened_bucket", "flush_cache": False}
    assert body == common | expected


def test_a_field_that_the_release_lacks_is_not_sent():
    client = Recorded("0.5.20")
    verbs = ServerApi(client)
    with pytest.raises(ConfigError, match="SGLang 0.5.20 has no field 'group'"):
        verbs.destroy_weights_update_group(group="mine", timeout_s=1)
    with pytest.raises(ConfigError, match="no field 'nothing'"):
        client.post("/flush_cache", timeout_s=1, params={"nothing": 1})
    assert [path for path, _ in client.sent] == ["/server_info"]


def test_a_draft_model_that_updates_would_reach_is_refused():
    with pytest.raises(ConfigError, match="speculative_algorithm='EAGLE' cannot be used with SGLang 0.5.9") as caught:
        ServerApi(Recorded("0.5.9", speculative_algorithm="EAGLE"))
    assert "0.5.10 or newer" in caught.value.hint
    for version in ("0.5.10", "0.5.20", "0.5.21"):
        ServerApi(Recorded(version, speculative_algorithm="EAGLE"))
    ServerApi(Recorded("0.5.9", speculative_algorithm=None))
    check_draft_model("x", "EAGLE", {"selector"})


@pytest.mark.parametrize("name, known, spelled", [
    ("stream_output", {"incremental-streaming-output"}, "incremental_streaming_output"),
    ("incremental_streaming_output", {"stream-output"}, "stream_output"),
    ("enable_prefill_cp", {"enable-nsa-prefill-context-parallel", "enable-prefill-context-parallel"},
     "enable_prefill_context_parallel or enable_nsa_prefill_context_parallel"),
    ("elastic_ep_rejoin", {"elastic-ep-join-mode"}, "elastic_ep_join_mode='recover'"),
    ("elastic_ep_join_mode", {"elastic-ep-rejoin"}, "elastic_ep_rejoin (for elastic_ep_join_mode='recover')"),
    ("stream_output", {"something-else"}, None),
    ("mem_fraction_static", {"incremental-streaming-output"}, None),
])  # fmt: skip
def test_the_other_spelling_of_an_argument(name, known, spelled):
    assert other_spelling(name, dict.fromkeys(known)) == spelled


def test_no_pair_stands_twice():
    assert len(set(RENAMED)) == len(RENAMED)


def test_every_endpoint_that_is_posted_to_is_in_the_table():
    """Found in the source: a path that is not in the table would be sent unchecked."""
    posted = set()
    for path in Path(tpcolocate.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "post" and node.args:
                if isinstance(node.args[0], ast.Constant) and str(node.args[0].value).startswith("/"):
                    posted.add(node.args[0].value)
    assert {"/update_weights_from_tensor", "/flush_cache"} <= posted
    assert posted - {"/generate"} <= set(ENDPOINTS)
