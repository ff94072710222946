"""What differs between SGLang releases."""

import pytest

from tpcolocate.engine.releases import OLDEST, Release, release
from tpcolocate.errors import ConfigError

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("version, session, per_rank", [
    ("0.5.9", False, False),
    ("0.5.10.post1", False, False),
    ("0.5.16", False, False),
    ("0.5.17", False, True),
    ("0.5.20", False, True),
    ("0.5.21", True, True),
    ("0.5.21.dev12+gabc", True, True),
    ("0.5.21rc1", True, True),
    ("0.5.23", True, True),
    ("0.6.0", True, True),
])  # fmt: skip
def test_features_by_version(version, session, per_rank):
    assert release(version) == Release(version, weight_session=session, lora_payload_per_rank=per_rank)


@pytest.mark.parametrize("version", ["0.5.8", "0.4.10", "unknown", "", "None"])
def test_others_are_refused_with_what_to_use(version):
    with pytest.raises(ConfigError, match=str(OLDEST)) as caught:
        release(version)
    assert version in str(caught.value)
