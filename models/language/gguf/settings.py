"""The settings of a model in the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import ModelError
from models.language.gguf.tensors import StoredTensor

# Settings that no configuration needs: what they say is in the tensors, or the same in all models of an architecture.
NEEDLESS = {
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "expert_shared_feed_forward_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "use_parallel_residual",
    "vocab_size",
}


class ModelSettings:
    """The settings by their names without the architecture's prefix, and the tensors, whose presence tells more."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self.architecture: str = metadata["general.architecture"]
        self._asked: set[str] = set()

    @property
    def layers(self) -> int:
        """The layers of the model, without those that predict further tokens, which Parley does not use."""
        return int(self.need("block_count")) - int(self.get("nextn_predict_layers", 0))

    @property
    def head_dim(self) -> int:
        """The width of a head's queries and keys; 0 if there is no attention."""
        heads = self.need("attention.head_count")
        return int(self.get("attention.key_length", self.need("embedding_length") // heads if heads else 0))

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or the default. The same value for each layer counts as one. Raises ModelError if they differ."""
        self._asked.add(name)
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.unsupported(f"{name} differs between layers")
            return value[0]
        return value

    def need(self, name: str) -> Any:
        """A setting that must be there. Raises ModelError."""
        if (value := self.get(name)) is None:
            raise ModelError(
                f"{self.path} is incomplete: {self.architecture}.{name} is missing; get another file of it"
            )
        return value

    def positive(self, name: str, default: Any = None) -> Any:
        """A setting, or the default, that must be a number above zero. Raises ModelError."""
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(f"{self.path} is broken: {self.architecture}.{name} is {value}; download it again")
        return value

    def each(self, name: str) -> list[Any] | None:
        """A setting of each layer; None if it is not there, or not a list."""
        self._asked.add(name)
        value = self.metadata.get(f"{self.architecture}.{name}")
        return value[: self.layers] if isinstance(value, list) else None

    def has(self, ending: str) -> bool:
        """Whether a tensor has this name, in any layer: `attn_q.bias`."""
        return any(name.endswith(f".{ending}") for name in self.tensors)

    def tensor(self, name: str) -> StoredTensor:
        """A tensor that must be there. Raises ModelError."""
        if name not in self.tensors:
            raise ModelError(f"{self.path} is incomplete: the tensor {name} is missing; download all of it again")
        return self.tensors[name]

    def unknown(self) -> list[str]:
        """The settings in the file that nobody has asked for yet, though they may matter."""
        names = (key.partition(".")[2] for key in self.metadata if key.startswith(f"{self.architecture}."))
        return sorted(name for name in names if name not in self._asked | NEEDLESS)

    def unsupported(self, what: str) -> ModelError:
        """The error of a file that Parley would run wrongly."""
        return ModelError(
            f"{self.path}: Parley cannot run this {self.architecture} model from a GGUF file, because {what}: use a "
            "folder of the model with safetensors"
        )
