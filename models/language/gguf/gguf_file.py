"""A model in one GGUF file, or in several that belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from models.errors import ModelError
from models.language.gguf.architectures import ARCHITECTURES, Kind
from models.language.gguf.configuration import make_config
from models.language.gguf.header import Header, read_header
from models.language.gguf.parameters import find_sources
from models.language.gguf.settings import ModelSettings
from models.language.gguf.stop_tokens import stop_token_ids
from models.language.gguf.tensors import Source, StoredTensor
from models.language.gguf.tokenizer import build_tokenizer

PART_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFFile:
    """What a GGUF file holds. Only headers are read before a tensor is asked for."""

    def __init__(self, path: Path) -> None:
        """Read the headers. Any part of a split file stands for all. Raises ModelError."""
        parts = _read_parts(Path(path))
        self.path = parts[0].path
        self.metadata: Mapping[str, Any] = parts[0].metadata
        self.tensors: Mapping[str, StoredTensor] = {name: part.tensors[name] for part in parts for name in part.tensors}
        self._parts = parts
        self._kind = _find_kind(self.path, self.metadata.get("general.architecture"))
        self._settings = ModelSettings(self.path, self.metadata, self.tensors)

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """A hash of the first part's header, so of the tokenizer and the settings, but not of the weights."""
        return self._parts[0].digest

    def config(self) -> PreTrainedConfig:
        """The configuration of the causal language model. Raises ModelError."""
        _check_layers(self._settings)
        return make_config(self._kind, self._settings)

    def sources(self, model: PreTrainedModel) -> dict[str, Source]:
        """Where each parameter and buffer of a model of this configuration comes from, by its name in `state_dict`.

        Tied weights appear once, under the name of the embedding: call the model's `tie_weights` when it is filled. The
        model may be on the meta device. Raises ModelError if tensors are missing, or left over.
        """
        return find_sources(self._kind, self._settings, model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template. Raises ModelError."""
        return build_tokenizer(self.path, self.metadata)

    def stop_token_ids(self) -> set[int]:
        """The tokens that end a reply: of a turn, of a message, of the text."""
        return stop_token_ids(self.metadata)


def _find_kind(path: Path, architecture: str | None) -> Kind:
    """What the architecture of a file needs. Raises ModelError if it is unknown."""
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: Parley cannot run the architecture {architecture} from a GGUF file: use a folder of the model "
            "with safetensors"
        )
    return ARCHITECTURES[architecture]


def _check_layers(settings: ModelSettings) -> None:
    """Raise ModelError if a file has not as many layers as it says: to build them all could take for ever."""
    if settings.layers < 1:
        raise ModelError(f"{settings.path} is broken: none of its layers is for text; get another file")
    if not any(name.startswith(f"blk.{settings.layers - 1}.") for name in settings.tensors):
        raise ModelError(
            f"{settings.path} is incomplete: it has no tensor of the last of its {settings.layers} layers; download it "
            "again, with all its parts"
        )


def _read_parts(path: Path) -> list[Header]:
    """The headers of all parts of a file, in their order."""
    header = read_header(path)
    count = header.metadata.get("split.count", 0)
    if count <= 1:
        return [header]
    name = PART_NAME.fullmatch(path.name)
    if not name or int(name["count"]) != count:
        raise ModelError(
            f"{path} is part {header.metadata.get('split.no', 0) + 1} of {count}, and its name does not end in "
            f"-00001-of-{count:05}.gguf: give all parts their names back"
        )
    paths = [path.with_name(f"{name['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise ModelError(
            f"{path} is one of {count} parts, and beside it is no {', no '.join(missing)}: download all parts"
        )
    parts = [header if part == path else read_header(part) for part in paths]
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise ModelError(f"{part.path} is not part {number + 1} of {count}, as its name says: download it again")
    names = [name for part in parts for name in part.tensors]
    expected = header.metadata.get("split.tensors.count", len(names))
    if len(names) != len(set(names)) or len(names) != expected:
        raise ModelError(f"the parts of {path} do not belong together: download all of them again")
    return parts
