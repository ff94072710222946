"""``python -m tpcolocate``."""

import os
import sys

from tpcolocate.doctor.command import main

if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the exit of the interpreter: a check that is past its deadline may still be in a call of a library.
    os._exit(status)
