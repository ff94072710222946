"""``python -m tpcolocate``."""

import argparse
import os
import signal
import sys
from contextlib import suppress

from tpcolocate.bench import command as bench
from tpcolocate.doctor import command as doctor


def main() -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m tpcolocate", description="Tools of tpcolocate.")
    commands = parser.add_subparsers(dest="command", required=True)
    check_machine = commands.add_parser(
        "doctor",
        help="check whether this machine can train and serve side by side",
        description="Check this machine, or with torchrun all ranks of a job. Exit status 1 if there is a problem.",
    )
    doctor.add_arguments(check_machine)
    measure = commands.add_parser(
        "bench",
        help="measure syncs and generation with a model of yours, at each size of the server",
        description="Measure with a model of yours, under torchrun on all ranks that it starts. Servers of each size are "
        "launched, synced, asked and ended, one size after another. Exit status 1 if no size could be measured.",
    )
    bench.add_arguments(measure)
    options = parser.parse_args()
    if options.command == "doctor":
        doctor.check(check_machine, options)
        return doctor.run(options)
    bench.check(measure, options)
    return bench.run(options)


def run() -> int:
    """Run the command with streams as they are, closed ones too, and return the exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed from the start
            setattr(sys, name, open(os.devnull, "w"))
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, such as head
        status = 128 + signal.SIGPIPE
    with suppress(OSError):
        sys.stderr.flush()
    return status


if __name__ == "__main__":
    # Without the exit of the interpreter: a check that is past its deadline may still be in a call of a library.
    os._exit(run())
