"""Folders that a server can load a model from, and those that are refused before it is started."""

import os

import pytest

from tpcolocate.errors import ConfigError
from tpcolocate.server.model_folder import check_model_files, check_model_path

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../nowhere", "a/b/c", ""])
def test_a_path_that_can_only_be_a_folder_and_is_none_is_refused(path):
    with pytest.raises(ConfigError, match=f"there is no folder {path!r}"):
        check_model_path(path)


def test_folders_and_hub_ids_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "config.json").touch()
    (tmp_path / "a" / "b" / "c" / "params.json").touch()
    for path in (str(tmp_path), ".", "a/b/c", "gpt2", "Qwen/Qwen3-0.6B", "s3://bucket/a/b"):
        check_model_path(path)


@pytest.mark.parametrize("files, words", [
    ([], "save_pretrained"),
    (["model.safetensors"], "save_pretrained"),
    (["adapter_config.json", "adapter_model.safetensors"], "it is a PEFT adapter: launch its base model"),
    (["checkpoint-100/config.json", "checkpoint-200/config.json"], "such as '.*checkpoint-200'"),
])  # fmt: skip
def test_a_folder_without_a_model_is_refused(files, words, tmp_path):
    """SGLang finds it out in its own start, after many seconds and with a traceback."""
    for number, name in enumerate(files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime((tmp_path / name).parent, (number, number))
    with pytest.raises(ConfigError, match=rf"the folder '{tmp_path}' has no config.json\n.*{words}"):
        check_model_path(str(tmp_path))


@pytest.mark.parametrize("files, arguments, words", [
    (["model.safetensors"], {}, "no tokenizer\n.*save_pretrained.*tokenizer_path=.*skip_tokenizer_init=True"),
    (["model.safetensors"], {"skip_tokenizer_init": False, "tokenizer_path": None}, "no tokenizer"),
    (["tokenizer.json"], {}, "no weights .*\n.*load_format=\"dummy\""),
    (["tokenizer.json", "model.safetensors.index.json"], {"load_format": "auto"}, "no weights"),
    ([], {"skip_tokenizer_init": True}, "no weights"),
    ([], {"load_format": "dummy"}, "no tokenizer"),
])  # fmt: skip
def test_a_folder_without_tokenizer_or_weights_is_refused(files, arguments, words, tmp_path):
    """SGLang looks for the tokenizer once all weights are loaded."""
    for name in ("config.json", *files):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=words):
        check_model_files(str(tmp_path), arguments)


@pytest.mark.parametrize("files, arguments", [
    (["tokenizer.model", "pytorch_model.bin"], {}),
    (["vocab.txt", "model-00001-of-00002.safetensors"], {}),
    (["tokenization_own.py", "consolidated.00.pth"], {}),
    (["tekken.json", "consolidated.safetensors"], {}),
    ([], {"load_format": "dummy", "tokenizer_path": "/elsewhere"}),
    (["model.gguf"], {"load_format": "gguf", "skip_tokenizer_init": True}),
])  # fmt: skip
def test_folders_with_what_the_server_loads_are_taken(files, arguments, tmp_path):
    for name in ("config.json", *files):
        (tmp_path / name).touch()
    check_model_files(str(tmp_path), arguments)
    check_model_files("organisation/name", arguments)


def test_a_tokenizer_that_the_configuration_names_may_be_elsewhere(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["organisation/name--tokenization.Own", null]}}'
    )
    check_model_files(str(tmp_path), {"load_format": "dummy"})
