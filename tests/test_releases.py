"""The table of SGLang releases, and the checks before a request is sent.

The table itself is checked by ``tests/contracts`` against the source of the releases.
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
def test_unsupported_versions_are_rejected_with_a_hint(version):
    with pytest.raises(ConfigError, match=str(OLDEST)) as caught:
        release(version)
    assert version in str(caught.value)


@pytest.mark.parametrize("span, inside, outside", [
    (Span(), ["0.5.9", "0.5.9.post1", "9"], ["0.5.8"]),
    (Span("0.5.21"), ["0.5.21", "0.6"], ["0.5.20.post1"]),
    (Span("0.5.10", "0.5.21"), ["0.5.10", "0.5.20.post1"], ["0.5.9", "0.5.21"]),
])  # fmt: skip
def test_a_span_includes_since_and_excludes_until(span, inside, outside):
    assert all(Version(version) in span for version in inside)
    assert not any(Version(version) in span for version in outside)


@pytest.mark.parametrize("version, path, names, words, hint", [
    ("0.5.20", "/begin_weight_update", {}, "SGLang 0.5.20 has no /begin_weight_update", "0.5.21 or newer"),
    ("0.5.20", "/update_weights_from_tensor", TARGET, "of SGLang 0.5.20 has no field 'selector'", "0.5.21 or newer"),
    ("0.5.21", "/update_weights_from_tensor", NO_DRAFT, "of SGLang 0.5.21 has no field 'disable_draft_model'",
     "0.5.10 or newer, older than 0.5.21"),
    ("0.5.9", "/flush_cache", {"timeout": 3}, "has no field 'timeout'", "0.5.10 or newer"),
    ("0.5.23", "/destroy_weights_update_group", {"group": "a"}, "has no field 'group' and would ignore it", "its fields: group_name"),
    ("0.5.23", "/end_weight_update", {"x": 1}, "has no field 'x'", "its fields: none"),
    ("0.5.17", "/load_lora_adapter_from_tensors", {"serialized_tensors": ""}, "has no field 'serialized_tensors'", "older than 0.5.17"),
])  # fmt: skip
def test_a_missing_endpoint_or_field_is_an_error_that_names_the_release(version, path, names, words, hint):
    with pytest.raises(ConfigError, match=words) as caught:
        release(version).check(path, names)
    assert hint in caught.value.hint


def test_supported_requests_pass():
    for path, endpoint in ENDPOINTS.items():
        for version in ("0.5.9", "0.5.20", "0.5.23"):
            row = release(version)
            if row.has(path):
                row.check(path, {name: None for name in endpoint.fields if row.has(path, name)})
    release("0.5.9").check("/generate", {"whatever": 1})  # not in the table


class Recorded(ServerClient):
    """A client of a fake server of one release, which records what is sent."""

    def __init__(self, version, **info):
        super().__init__("http://127.0.0.1:1")
        self.info = {"version": version, **info}
        self.sent = []

    def _exchange(self, method, path, body, **options):
        self.sent.append((path, body))
        return self.info if path == "/server_info" else {"success": True, "weight_version": "v"}


@pytest.mark.parametrize("version, expected", [("0.5.9", {}), ("0.5.20", NO_DRAFT), ("0.5.21", TARGET)])
def test_a_push_has_exactly_the_fields_of_the_release(version, expected):
    client = Recorded(version)
    ServerApi(client).push(["a", "b"], load_format="flattened_bucket", timeout_s=1)
    [body] = [body for path, body in client.sent if path == "/update_weights_from_tensor"]
    common = {"serialized_named_tensors": ["a", "b"], "load_format": "flattened_bucket", "flush_cache": False}
    assert body == common | expected


def test_a_field_that_the_release_lacks_is_not_sent():
    client = Recorded("0.5.20")
    api = ServerApi(client)
    with pytest.raises(ConfigError, match="SGLang 0.5.20 has no field 'group'"):
        api.destroy_weights_update_group(group="mine", timeout_s=1)
    with pytest.raises(ConfigError, match="no field 'nothing'"):
        client.post("/flush_cache", timeout_s=1, params={"nothing": 1})
    assert [path for path, _ in client.sent] == ["/server_info"]


def test_a_draft_model_that_weight_updates_would_reach_is_rejected():
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


def test_no_pair_is_duplicated():
    assert len(set(RENAMED)) == len(RENAMED)


def test_every_endpoint_that_the_package_posts_to_is_in_the_table():
    """Requests to a path that is not in the table would not be checked."""
    posted = set()
    for path in Path(tpcolocate.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "post" and node.args:
                if isinstance(node.args[0], ast.Constant) and str(node.args[0].value).startswith("/"):
                    posted.add(node.args[0].value)
    assert {"/update_weights_from_tensor", "/flush_cache"} <= posted
    assert posted - {"/generate"} <= set(ENDPOINTS)
