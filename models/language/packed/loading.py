"""Loads a packed checkpoint with transformers, as if its weights were plain."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from models.errors import ModelError
from models.language.packed.checkpoint import PackedCheckpoint, quantization_of


def is_packed(folder: Path) -> bool:
    """Whether config.json says that the weights in a folder are packed."""
    return bool(quantization_of(_read_config(folder)))


def load_packed(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False, **options: Any) -> Any:
    """What `from_pretrained` returns for the model in a folder, its weights unpacked to a dtype. Raises ModelError."""
    files = _open_files(folder)
    try:
        quantization = quantization_of(_read_config(folder)) or {}
        checkpoint = PackedCheckpoint(quantization, files, lambda name: files[name](name))
        weights = {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.names}
    except ModelError as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {error}") from error
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        kind: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))  # type: ignore[no-untyped-call]
    loaded: Any = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def _read_config(folder: Path) -> Mapping[str, Any]:
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _open_files(folder: Path) -> dict[str, Callable[[str], Tensor]]:
    """The names of the tensors in the safetensors files of a model, and what reads each. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    else:
        names = ["model.safetensors"]
    found: dict[str, Callable[[str], Tensor]] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"it has no weights: {name} is missing in {folder}")
        file: Any = safe_open(folder / name, framework="pt")
        found |= dict.fromkeys(file.keys(), file.get_tensor)
    return found
