"""The weights in a folder of safetensors files, each read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from models.errors import ModelError
from models.language.file_version import FileVersion
from models.language.packed.checkpoint import PackedCheckpoint, plain, quantization_of


class StoredWeight:
    """A weight, as transformers' loader takes it: read when it is indexed."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: object) -> Tensor:
        return self._read()


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """The weights of the model in a folder, by their names in its files; packed ones are made plain.

    Empty if the folder has no safetensors files. Raises ModelError.
    """
    files = _files(folder)
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    versions = {path: FileVersion(path) for path in {*files.values()}}
    read = {name: partial(_read, path, versions[path], name) for name, path in files.items()}
    if quantization := quantization_of(config) or _quantization_of_modelopt(folder):
        if not files:
            raise ModelError(f"it has no weights: model.safetensors is missing in {folder}")
        packed = PackedCheckpoint(quantization, files, lambda name: read[name]())
        return {name: StoredWeight(partial(packed.tensor, name)) for name in packed.names}
    return {name: StoredWeight(partial(_read_plain, read[name], name)) for name in files}


def _quantization_of_modelopt(folder: Path) -> Mapping[str, Any] | None:
    """What ModelOpt's own file says about packed weights, like `quantization_config`. Raises ModelError."""
    file = folder / "hf_quant_config.json"
    if not file.is_file():
        return None
    try:
        return {"quant_method": "modelopt", **json.loads(file.read_text(encoding="utf-8"))["quantization"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file.name} is damaged: download it again") from error


def _files(folder: Path) -> dict[str, Path]:
    """The file of each weight. As in transformers, a file with all of them counts first. Raises ModelError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        return {}
    try:
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / place for name, place in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index.name} is damaged: download it again") from error
    if missing := sorted({path.name for path in files.values() if not path.is_file()}):
        raise ModelError(f"{len(missing)} files are missing in {folder}, first {missing[0]}: download them")
    return files


def _read_plain(read: Callable[[], Tensor], name: str) -> Tensor:
    return plain(name, read())


def _read(path: Path, version: FileVersion, name: str) -> Tensor:
    version.check()
    # The file is opened for each tensor: pages of a mapped file count as memory of the process, and so go soon.
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name).clone()
    version.check()
    return tensor
