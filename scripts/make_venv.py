"""Makes .venv: a pinned CPU build of the engine, the test tools, and this project, for Python 3.11 to 3.13.

Run by ``make venv`` (and by every target that needs the environment).  Does nothing when the environment
is current; starts over when the pins, this file or the checkout's path changed.  Standard library only.
"""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, ".stamp")
OTHER_ENGINE = os.path.join(VENV, "sglang-0.5.20")  # as requirements/engine-other-nodeps.txt pins it
OLDEST_ENGINE = os.path.join(VENV, "sglang-0.5.9")  # as requirements/engine-oldest-nodeps.txt pins it
SITE = os.path.join(VENV, "lib", "python{}.{}".format(*sys.version_info), "site-packages")
LOG = os.path.join(ROOT, "out", "setup.log")
PYTHONS = ((3, 11), (3, 12), (3, 13))
TAIL_LINES = 30

# pip would compile on one core; the last step but one does on all.
PIP = (
    VENV_PYTHON,
    "-m",
    "pip",
    "--no-input",
    "--disable-pip-version-check",
    "install",
    "--progress-bar",
    "off",
    "--no-compile",
)
# Packages have files that are no valid Python, such as templates: the exit status says nothing.
COMPILE = "import compileall, sys; [compileall.compile_dir(path, quiet=2, workers=0) for path in sys.argv[1:]]"
PINNED = PIP + ("-c", "requirements/constraints.txt")
STEPS = (
    ("virtual environment", (sys.executable, "-m", "venv", VENV)),
    ("torch", PINNED + ("-r", "requirements/torch.txt")),
    ("sglang", PIP + ("--no-deps", "-r", "requirements/engine-nodeps.txt")),
    (
        "torchvision",  # a wheel of 3.11 whatever Python this is, which pip does only into a folder
        PIP
        + ("--no-deps", "--python-version", "3.11", "--only-binary", ":all:", "--target", SITE)
        + ("-r", "requirements/torchvision.txt"),
    ),
    (
        "sglang, another release",
        PIP + ("--no-deps", "--target", OTHER_ENGINE, "-r", "requirements/engine-other-nodeps.txt"),
    ),
    (
        "sglang, the oldest",
        PIP + ("--no-deps", "--target", OLDEST_ENGINE, "-r", "requirements/engine-oldest-nodeps.txt"),
    ),
    ("what the engine imports", PINNED + ("-r", "requirements/engine.txt")),
    ("test tools", PINNED + ("-r", "requirements/tools.txt")),
    ("this project", PIP + ("--no-deps", "--no-build-isolation", "-e", ".")),
    ("compiling", (VENV_PYTHON, "-c", COMPILE, SITE, OTHER_ENGINE, OLDEST_ENGINE)),
    ("import check", (VENV_PYTHON, "-c", "import torch, torchvision, transformers, sglang, pytest, tpcolocate")),
)


def fingerprint():
    """Hashes all that decides what the environment holds; its path counts because a moved venv is broken."""
    digest = hashlib.sha256(repr((VENV, sys.version_info[:3])).encode())
    folder = os.path.join(ROOT, "requirements")
    for path in [os.path.abspath(__file__)] + sorted(os.path.join(folder, name) for name in os.listdir(folder)):
        with open(path, "rb") as file:
            digest.update(path.encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()


def is_current(expected):
    try:
        with open(STAMP) as file:
            return file.read().strip() == expected and os.access(VENV_PYTHON, os.X_OK)
    except OSError:
        return False


def discard_venv():
    if not os.path.lexists(VENV):
        return
    if os.path.islink(VENV) or not os.path.isfile(os.path.join(VENV, "pyvenv.cfg")):
        # A half-made venv has pyvenv.cfg from its first moment on: what lacks it was put there by somebody.
        sys.exit(f"{VENV} exists and is not a virtual environment: move it away")
    if os.path.exists(STAMP):
        os.unlink(STAMP)  # before the rest, so that an interrupted removal does not look finished
    for entry in list(os.scandir(VENV)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
    shutil.rmtree(VENV)  # with pyvenv.cfg last, so that an interrupted removal can go on


def run_step(label, command, log, lock):
    """Runs one step; shows its elapsed time, on one line that lives where a terminal allows it."""
    live = sys.stdout.isatty()
    started = time.monotonic()
    log.write(f"\n== {label}: {' '.join(command)}\n".encode())
    log.flush()
    if not live:
        print(f"  {label:24} ...", flush=True)
    # Variables that would lead the new interpreter to packages outside of the venv.
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_USER")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that all of it can be killed: venv and pip start processes of their own
        pass_fds=(lock,),  # a pip that outlives a killed set-up keeps the next one waiting
    )
    try:
        while True:
            try:
                code = process.wait(timeout=1 if live else None)
                break
            except subprocess.TimeoutExpired:
                print(f"\r  {label:24} {time.monotonic() - started:4.0f} s", end="", flush=True)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    start_of_line, verdict = "\r" if live else "", "" if code == 0 else "  FAILED"
    print(f"{start_of_line}  {label:24} {time.monotonic() - started:4.0f} s{verdict}", flush=True)
    return code


def print_tail():
    with open(LOG, errors="replace") as file:
        for line in file.readlines()[-TAIL_LINES:]:
            print("    " + line.rstrip())


def build(expected, lock):
    started = time.monotonic()
    print(f"Setting up .venv (some minutes, 3 GB or more; the whole log: {os.path.relpath(LOG, ROOT)})", flush=True)
    discard_venv()
    os.makedirs(os.path.dirname(LOG), exist_ok=True)
    with open(LOG, "wb") as log:
        for label, command in STEPS:
            code = run_step(label, command, log, lock)
            if code != 0:
                print_tail()
                sys.exit(f"Setting up .venv failed at {label!r} (exit status {code})")
    with open(STAMP + ".new", "w") as file:
        file.write(expected + "\n")
    os.replace(STAMP + ".new", STAMP)
    print(f"  ready after {time.monotonic() - started:.0f} s", flush=True)


def main():
    if sys.version_info[:2] not in PYTHONS:
        sys.exit(f"Python 3.11, 3.12 or 3.13 is needed (this is {sys.version.split()[0]})")
    # Two makes at once would build into each other; the folder itself is the lock, so nothing is left behind.
    lock = os.open(os.path.join(ROOT, "requirements"), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("Another set-up of .venv is running; waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    expected = fingerprint()
    if not is_current(expected):
        build(expected, lock)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the next make starts the set-up over")
