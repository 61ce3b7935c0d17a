from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.errors import ModelError
from models.language.model_files import check_space, find_model, model_label
from models.settings import EMBEDDED, Settings
from tests.support.process import processes
from tests.support.tiny import TEMPLATE
from tests.support.tiny_gguf import convert, write_tiny_gguf

LOCK = "model.lock"  # all that a failed conversion leaves in the cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def settings(model: Path | str | None) -> Settings:
    return Settings(model=str(model) if model else None)


def found(model: Path | str | None, cache: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder that is found for a model."""
    return Path(find_model(settings(model), dtype, cache))


def refusal(model: Path | str | None, cache: Path) -> str:
    """The message of the error that finding a model raises."""
    with pytest.raises(ModelError) as raised:
        find_model(settings(model), torch.float32, cache)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Folders and Hub ids


def test_a_folder_with_a_model_is_used_as_it_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert found(tmp_path, cache) == tmp_path
    assert not cache.exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path, cache: Path) -> None:
    assert "the folder holds no model, config.json is missing" in refusal(tmp_path, cache)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "missing.gguf", "~/no-such-folder-here"])
def test_a_path_that_does_not_exist_is_refused(model: str, cache: Path) -> None:
    assert refusal(model, cache) == f"PARLEY_MODEL={model}: there is no such file or folder"


def test_any_other_name_is_looked_for_on_the_hub(cache: Path) -> None:
    message = refusal("no id/of the Hub", cache)
    assert message.startswith(
        "PARLEY_MODEL=no id/of the Hub: there is no such file or folder here, and no such model on"
    )


@pytest.mark.parametrize(("model", "name"), [(None, EMBEDDED), ("a/b", "PARLEY_MODEL=a/b")], ids=["embedded", "hub"])
def test_errors_name_the_model_or_the_setting(model: str | None, name: str) -> None:
    assert model_label(settings(model)) == name


# GGUF files


def test_a_gguf_file_is_converted_once(gguf: Path, cache: Path) -> None:
    folder = found(gguf, cache)
    assert folder.parent == cache
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert found(gguf, cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert names(cache) == sorted([LOCK, folder.name])


@pytest.mark.parametrize("name", ["sha256-0123abc", "model.bin", "noending"])
def test_a_gguf_file_of_any_name_is_converted(gguf: Path, cache: Path, name: str) -> None:
    folder = found(gguf.rename(gguf.with_name(name)), cache)
    assert (folder / "model.safetensors").is_file()


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("Hello")
    assert refusal(file, cache).startswith(f"PARLEY_MODEL={file}: it is a file, but no GGUF")


def test_a_changed_gguf_file_is_converted_again(gguf: Path, cache: Path) -> None:
    folder = found(gguf, cache)
    os.utime(gguf, (1, 1))
    assert found(gguf, cache) != folder


def test_a_gguf_file_is_converted_for_each_dtype(gguf: Path, cache: Path) -> None:
    folders = {dtype: found(gguf, cache, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, folder in folders.items():
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype


def test_a_converted_model_has_its_weights_and_its_chat_template(gguf: Path, cache: Path) -> None:
    folder = found(gguf, cache)
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    expected = original.state_dict()
    assert converted.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_is_used_later(gguf: Path, cache: Path) -> None:
    printed, stderr = processes.Pipe(duplex=False)
    process = processes.Process(target=convert, args=(gguf, cache, stderr))
    process.start()
    stderr.close()
    with printed, open(printed.fileno(), closefd=False) as lines:
        assert "Converting" in lines.readline()
        process.kill()
        process.join()
    assert list(cache.glob("unfinished-*"))
    assert not list(cache.glob("tiny-*"))
    folder = found(gguf, cache)
    assert names(cache) == sorted([LOCK, folder.name])


def test_a_broken_gguf_file_is_refused_and_leaves_nothing(gguf: Path, cache: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:5000])
    assert "tiny.gguf cannot be converted" in refusal(gguf, cache)
    assert names(cache) == [LOCK]


def test_a_cache_that_cannot_be_written_is_refused(gguf: Path, cache: Path) -> None:
    cache.write_text("a file in its place")
    assert f"the model cannot be kept in {cache}: " in refusal(gguf, cache)


def test_too_little_space_on_the_disk_is_told_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"GB free, and the model needs about 1000000000\.0 GB"):
        check_space(tmp_path, 10**18)


def test_enough_space_on_the_disk_is_accepted(tmp_path: Path) -> None:
    check_space(tmp_path, 1)


# The embedded model


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip finds no packages."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_embedded_model_is_refused_with_advice(cache: Path) -> None:
    message = refusal(None, cache)
    assert "check the network" in message
    assert "PARLEY_MODEL" in message
    assert names(cache) == [LOCK]
