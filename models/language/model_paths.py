"""Looks at files and folders that may hold a model, before anything loads them."""

from __future__ import annotations

from pathlib import Path

from models.errors import ModelError

GGUF = b"GGUF"
LFS_POINTER = b"version https://git-lfs"


def check_file(path: Path) -> None:
    """Raise ModelError unless a file is a GGUF, by its first bytes: files of Ollama have no ending."""
    start = _first_bytes(path)
    if start.startswith(GGUF):
        return
    if start.startswith(LFS_POINTER):
        reason = "it is only a pointer of Git LFS: run git lfs pull in its folder"
    elif not start:
        reason = "it is an empty file: download it again"
    elif path.suffix != ".gguf" and (path.parent / "config.json").is_file():
        reason = f"it is one file of a model: set PARLEY_MODEL to its folder, {path.parent}"
    elif path.suffix == ".gguf":
        reason = "it is no GGUF file, though its name says so: download it again"
    else:
        reason = "it is a file, but no GGUF: give a GGUF file, a folder with a model, or a Hub id"
    raise ModelError(f"PARLEY_MODEL={path}: {reason}")


def check_folder(path: Path) -> None:
    """Raise ModelError if a folder clearly holds no model, or only pointers to one."""
    for weights in sorted(path.glob("*.safetensors")):
        if _first_bytes(weights).startswith(LFS_POINTER):
            raise ModelError(
                f"PARLEY_MODEL={path}: {weights.name} is only a pointer of Git LFS: run git lfs pull in the folder"
            )
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return
    if ggufs := sorted(file.name for file in path.glob("*.gguf")):
        raise ModelError(
            f"PARLEY_MODEL={path}: the folder holds GGUF files: set PARLEY_MODEL to one, such as {ggufs[0]}"
        )
    raise ModelError(f"PARLEY_MODEL={path}: the folder holds no model, config.json is missing")


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
