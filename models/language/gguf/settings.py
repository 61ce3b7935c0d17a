"""The settings of a model in the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import ModelError
from models.language.gguf.tensors import StoredTensor

MISSING = object()


class ModelSettings:
    """The metadata of an architecture, by their names without its prefix, and the tensors, whose presence tells more."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self.architecture: str = metadata["general.architecture"]

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or the default. One value for each layer becomes a single one. Raises ModelError if they differ."""
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise self.unsupported(f"{name} differs between layers")
            value = value[0]
        return value

    def need(self, name: str) -> Any:
        """A setting that must be there. Raises ModelError."""
        if (value := self.get(name, MISSING)) is MISSING:
            raise ModelError(f"{self.path} is incomplete: {self.architecture}.{name} is missing; get another file of it")
        return value

    def layers(self, name: str, count: int, default: Any = None) -> list[Any]:
        """A setting that may have one value for each layer, as a list."""
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if not isinstance(value, list):
            return [value] * count
        if len(value) < count:
            raise ModelError(f"{self.path} is broken: {self.architecture}.{name} has {len(value)} values, not {count}")
        return value[:count]

    def has(self, name: str) -> bool:
        """Whether there is a tensor, in the first layer that has its kind: `attn_q.bias`."""
        return any(tensor.endswith(f".{name}") or tensor == name for tensor in self.tensors)

    def unsupported(self, what: str) -> ModelError:
        """The error of a file that Parley would run wrongly."""
        return ModelError(
            f"{self.path}: Parley cannot run this {self.architecture} model from a GGUF file ({what}): use a folder of "
            "the model with safetensors"
        )
