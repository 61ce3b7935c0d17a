from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import ModelError
from models.language.model_paths import check_file, check_folder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.mark.parametrize("name", ["model.gguf", "sha256-0123", "model.bin"])
def test_a_gguf_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00")
    check_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param("model.gguf", b"Hello", "it is no GGUF file, though its name says so", id="gguf-by-name"),
        pytest.param("model.gguf", b"", "it is an empty file", id="empty"),
        pytest.param("model.gguf", POINTER, "it is only a pointer of Git LFS: run git lfs pull", id="pointer"),
        pytest.param("page.html", b"<html>", "it is a file, but no GGUF: give a GGUF file, a folder", id="other"),
    ],
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as raised:
        check_file(tmp_path / name)
    assert str(raised.value).startswith(f"PARLEY_MODEL={tmp_path / name}: {reason}")


def test_a_file_of_a_model_names_its_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match=f"it is one file of a model: set PARLEY_MODEL to its folder, {folder}$"):
        check_file(folder / "model.safetensors")


def test_a_folder_with_a_model_or_an_adapter_is_accepted(folder: Path) -> None:
    check_folder(folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    check_folder(folder)


def test_a_folder_with_pointers_to_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"model.safetensors is only a pointer of Git LFS: run git lfs pull"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("tiny.gguf", r"the folder holds GGUF files: set PARLEY_MODEL to one, such as tiny\.gguf"),
        ("x", "config.json is"),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path: Path, file: str, reason: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(ModelError, match=reason):
        check_folder(tmp_path)
