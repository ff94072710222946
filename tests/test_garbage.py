"""The garbage collector is paused for a step, whatever comes of it, and stays off where it was off."""

import gc

import pytest

from tpcolocate.garbage import collector_paused

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def collector():
    yield
    gc.enable()


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_is_as_before_also_after_an_error(is_on):
    if not is_on:
        gc.disable()
    with pytest.raises(RuntimeError), collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled(), "not turned on by a step inside of another"
        raise RuntimeError
    assert gc.isenabled() == is_on
