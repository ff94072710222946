"""The Dockerfile, which is not built here: what it names exists, and it agrees with the documentation."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tpcolocate.__main__ import main

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
PAGE = (ROOT / "docs/howto/docker.md").read_text()
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def instructions(text):
    """(keyword, rest) of each instruction, without comments and with continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in lines.splitlines() if line.strip()]


def copied():
    """Sources of the COPY instructions and where each goes, relative to the work folder."""
    for keyword, rest in instructions(TEXT):
        if keyword == "COPY":
            *sources, target = rest.split()
            for source in sources:
                yield source, Path(target) / source if target.endswith("/") else Path(target)


def docker_runs(text):
    """The options of each `docker run` in a text as {option: value}; an option without a value has an empty one."""
    for line in re.findall(r"docker run (.*)", text):
        words, found = shlex.split(line, comments=True), {}
        for word, following in zip(words, [*words[1:], "-"]):
            if word.startswith("-"):
                found[word] = "" if following.startswith("-") or word == "--rm" else following
            elif word.isupper() or word == "tpcolocate":
                break  # the image; what follows is the command
        yield found


def test_the_base_is_the_release_that_the_tests_run_and_the_page_names():
    ((_, image), *others) = [each for each in instructions(TEXT) if each[0] == "FROM"]
    release = re.search(r"^sglang==(.*)$", (ROOT / "requirements/engine-nodeps.txt").read_text(), re.MULTILINE)[1]
    assert not others and image == f"lmsysorg/sglang:v{release}"
    assert f"`{image}`" in PAGE and set(re.findall(r"lmsysorg/sglang:[\w.]+", PAGE)) == {image}


def test_it_says_that_sglang_is_unpatched_and_leaves_it_alone():
    assert "unpatched SGLang" in TEXT and "unpatched SGLang" in PAGE
    for keyword, rest in instructions(TEXT):
        assert keyword != "ADD" and not re.search(r"\b(patch|sed|git|sgl-workspace)\b", rest), rest


def test_what_it_copies_is_there_and_makes_the_whole_package(tmp_path):
    for source, target in copied():
        path = ROOT / source
        assert path.exists(), source
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tmp_path / target)
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr[-2000:]
    assert len(list(tmp_path.glob("tpcolocate-*.whl"))) == 1


def test_the_extras_it_installs_exist():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", TEXT)
    assert set(extras.split(",")) <= set(config["options.extras_require"])
    assert "sglang" not in extras.split(","), "the image has it"


def test_its_command_is_the_doctor(capsys, monkeypatch):
    ((_, command),) = [each for each in instructions(TEXT) if each[0] == "CMD"]
    python, option, module, *arguments = json.loads(command)
    assert (python, option, module) == ("python3", "-m", "tpcolocate")
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and f"tpcolocate {arguments[0]}" in capsys.readouterr().out


def test_the_flags_agree_with_the_page_and_with_what_the_doctor_advises():
    in_file, on_page = list(docker_runs(TEXT)), list(docker_runs(PAGE))
    assert len(in_file) == 1 and in_file[0] in on_page
    assert in_file[0] == {"--rm": "", "--gpus": "all", "--shm-size": "16g", "--ulimit": "nofile=65536"}
    values = {}
    for options in (*in_file, *on_page):
        for name, value in options.items():
            values.setdefault(name, set()).add(value)
    assert all(len(found) == 1 for found in values.values()), values
    advice = (ROOT / "tpcolocate/doctor/findings.py").read_text()
    for flag in re.findall(r"--(?:shm-size|ipc|pid) \w+|--ulimit nofile=\d+", advice):
        assert flag in PAGE, flag
