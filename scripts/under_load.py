"""Run a command beside busy processes, two for each core, and end these whatever happens.

python scripts/under_load.py [--processes N] COMMAND...
"""

import argparse
import os
import signal
import subprocess
import sys

# The kernel ends a busy process when its parent ends, even if that is killed.
BUSY = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**7): pass
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2 * len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("no command")
    busy = []
    try:
        arguments = [sys.executable, "-c", BUSY, str(os.getpid())]
        for _ in range(options.processes):
            busy.append(subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        print(f"{options.processes} busy processes run beside: {' '.join(options.command)}", file=sys.stderr)
        command = subprocess.Popen(options.command)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the command, too
        signal.signal(signal.SIGTERM, lambda *_: command.terminate())
        code = command.wait()
        return code if code >= 0 else 128 - code
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
