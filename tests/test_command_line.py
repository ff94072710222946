"""``python -m tpcolocate``: bad options, and streams that are closed or whose reader has left."""

import io
import signal
import sys

import pytest

from tpcolocate import __main__ as command_line

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e12"])
@pytest.mark.parametrize(
    "command, option", [(["doctor"], "--timeout"), (["bench", "--model", "m", "--device", "cpu"], "--launch-timeout")]
)
def test_a_time_that_no_wait_can_take_is_a_usage_error(monkeypatch, capsys, command, option, seconds):
    monkeypatch.setattr(sys, "argv", ["tpcolocate", *command, f"{option}={seconds}"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    assert f"error: {option} must be a positive number of seconds, got" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed_from_the_start(monkeypatch, name):
    def main():
        print("the page", file=getattr(sys, name))
        return 1

    monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(command_line, "main", main)
    assert command_line.run() == 1
    getattr(sys, name).close()


class LeftPipe(io.StringIO):
    """As of ``| head -1``, once that has ended."""

    def flush(self):
        raise BrokenPipeError


@pytest.mark.parametrize("when", ["print", "flush"])
def test_a_reader_that_has_left_is_no_traceback(monkeypatch, when):
    def main():
        if when == "print":
            raise BrokenPipeError
        return 0

    monkeypatch.setattr(sys, "stdout", LeftPipe())
    monkeypatch.setattr(command_line, "main", main)
    assert command_line.run() == 128 + signal.SIGPIPE
