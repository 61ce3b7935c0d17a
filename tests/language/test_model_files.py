from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.errors import ModelError
from models.language.model_files import WHEEL_SHA256, check_space, find_model, model_label
from models.settings import EMBEDDED, Settings
from tests.support.tiny_gguf import write_tiny_gguf

LOCK = "model.lock"  # all that a failed download leaves in the cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def settings(model: Path | str | None) -> Settings:
    return Settings(model=str(model) if model else None)


def found(model: Path | str | None, cache: Path) -> Path:
    """The file or folder that is found for a model."""
    return find_model(settings(model), cache)


def refusal(model: Path | str | None, cache: Path) -> str:
    """The message of the error that finding a model raises."""
    with pytest.raises(ModelError) as raised:
        find_model(settings(model), cache)
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


@pytest.mark.parametrize("name", ["tiny.gguf", "sha256-0123abc", "model.bin", "noending"])
def test_a_gguf_file_of_any_name_is_used_as_it_is(gguf: Path, cache: Path, name: str) -> None:
    file = gguf.rename(gguf.with_name(name))
    assert found(file, cache) == file
    assert not cache.exists()


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("Hello")
    assert refusal(file, cache).startswith(f"PARLEY_MODEL={file}: it is a file, but no GGUF")


# The cache


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "another model"])
def test_copies_that_earlier_versions_made_are_deleted(gguf: Path, cache: Path, embedded: bool) -> None:
    copies = [f"{EMBEDDED}-{WHEEL_SHA256[:12]}-float32", "tiny-0123456789ab-bfloat16"]
    others = ["compiled", "tiny-0123456789ab", "my-float32", f"{EMBEDDED}-{WHEEL_SHA256[:12]}.gguf"]
    for name in [*copies, *others[:-1]]:
        (cache / name).mkdir(parents=True)
        (cache / name / "model.safetensors").write_bytes(b"weights")
    (cache / others[-1]).write_bytes(b"GGUF")
    (cache / "notes-0123456789ab-float16").write_text("a file")
    cache.chmod(0o700)
    found(None if embedded else gguf, cache)
    assert names(cache) == sorted([*others, "notes-0123456789ab-float16"])


def test_the_embedded_model_is_the_file_in_the_cache(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    file = cache / f"{EMBEDDED}-{WHEEL_SHA256[:12]}.gguf"
    file.write_bytes(b"GGUF")
    assert found(None, cache) == file
    assert names(cache) == [file.name]


def test_a_cache_that_cannot_be_written_is_refused(cache: Path) -> None:
    cache.write_text("a file in its place")
    assert f"the model cannot be kept in {cache}: " in refusal(None, cache)


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
