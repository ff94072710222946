"""The error tree: documented, picklable, and derived from the standard errors."""

import copy
import inspect
import pickle

import pytest

from tpcolocate import errors

pytestmark = pytest.mark.quick

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_every_error_pickles_with_all_attributes(cls):
    error = cls(
        "boom 7",
        hint="turn it off",
        rank=3,
        slice_ranks=(2, 3),
        device="GPU-abc",
        url="http://127.0.0.1:1",
        details="tail",
    )
    error.add_note("first seen in bucket 4")
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(copied) is cls
        assert str(copied) == str(error)
        assert vars(copied) == vars(error)
        assert copied.__notes__ == ["first seen in bucket 4"]


def test_the_text_contains_value_context_and_hint():
    text = str(errors.DeviceError("index 4 is out of range", hint="use 0..3", rank=1, slice_ranks=(0, 1)))
    assert text == "index 4 is out of range [rank 1, slice ranks 0,1]\n  -> use 0..3"


def test_request_error_keeps_its_status():
    assert pickle.loads(pickle.dumps(errors.RequestError("no", status=400))).status == 400


@pytest.mark.parametrize(
    "cls, standard",
    [
        (errors.ConfigError, ValueError),
        (errors.DeadlineError, TimeoutError),
        (errors.RankLostError, ConnectionError),
        (errors.EngineDeadError, ConnectionError),
        (errors.LaunchError, RuntimeError),
        (errors.WeightsMismatchError, ValueError),
    ],
)
def test_errors_derive_from_standard_ones(cls, standard):
    assert issubclass(cls, standard) and issubclass(cls, errors.TpColocateError)


def test_the_tree_in_the_docstring_names_every_class():
    for cls in ALL:
        assert cls.__name__ in errors.__doc__, cls


class Unprintable:
    def __repr__(self):
        raise ZeroDivisionError


UNUSUAL = [10**5000, "x" * 10**6, [[1] * 1000] * 1000, Unprintable(), [Unprintable()], "\ud800"]


@pytest.mark.parametrize("value", UNUSUAL, ids=range(len(UNUSUAL)))
def test_every_value_can_be_shown_in_a_message(value):
    text = errors.shown(value)
    assert 0 < len(text) < 200
    text.encode()
