"""A LoRA adapter: small changes to the weights of a base model, in PEFT's format. They are merged while weights load.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from models.errors import InvalidRequestError, InvalidValueError, ModelError
from models.language.hub import fetch_model
from models.validation import convert

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT writes it before the names of the base model
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))  # of linears, of embeddings
BEYOND_LORA = (  # settings of PEFT that change a weight by more than a product of two matrices
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "layer_replication", "arrow_config"),
    *("trainable_token_indices", "alora_invocation_tokens", "kasa_config", "monteclora_config"),
)
KEEPS_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # values of init_lora_weights; others change the base
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"

Alpha = Annotated[float, Meta(gt=-1e9, lt=1e9, description="a number")]  # NaN is outside of all bounds
Name = Annotated[str | None, Meta(description="text")]
Patterns = Meta(description="an object with patterns of names and numbers")


class LoraConfig(Struct, frozen=True):
    """What merging reads of adapter_config.json. The tensors tell the rest, such as ranks and names of modules."""

    lora_alpha: Alpha = 8
    alpha_pattern: Annotated[dict[str, Alpha] | None, Patterns] = None
    use_rslora: Annotated[bool | None, Meta(description="true or false")] = False
    base_model_name_or_path: Name = None
    revision: Name = None


class Adapter:
    """A LoRA adapter in a folder. Its base model is in the same folder, in another one, or on the Hub.

    Whoever loads the base model calls `changed` for each parameter, in any order, and then `check_used`.
    """

    def __init__(self, folder: Path, config: LoraConfig, file: Any) -> None:
        self.folder = folder
        self._config = config
        self._file = file  # an open safetensors file
        self._keys = {key.removeprefix(PREFIX): key for key in file.keys()}  # noqa: SIM118  # it is no dict
        self._unused = {*self._keys}

    @classmethod
    def of(cls, folder: Path) -> Adapter | None:
        """The adapter in a folder; None if there is none. Raises ModelError."""
        if not (folder / CONFIG).is_file():
            return None
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            file: Any = safe_open(folder / WEIGHTS, framework="pt")
        except FileNotFoundError as error:
            raise ModelError(f"the adapter in {folder} has no weights: {WEIGHTS} is missing") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"the adapter in {folder} cannot be read ({error}): download it again") from error
        if not isinstance(config, dict):
            raise ModelError(f"the adapter in {folder} cannot be read ({CONFIG} is no object): download it again")
        if reason := _unsupported(config):
            raise ModelError(f"the adapter in {folder} cannot be merged: {reason}; Parley merges plain LoRA adapters")
        try:
            return cls(folder, _checked(config), file)
        except InvalidRequestError as error:
            raise ModelError(f"the adapter in {folder} cannot be merged: in {CONFIG}, {error}") from error

    def find_base(self) -> Path:
        """The folder of the base model, which is downloaded if it is on the Hub. Raises ModelError."""
        if (self.folder / "config.json").is_file() and any(any(self.folder.glob(one)) for one in MODEL_WEIGHTS):
            return self.folder
        name = self._config.base_model_name_or_path
        if not name:
            raise ModelError(f"the adapter in {self.folder} names no base model: put it into the folder of its base")
        for path in (Path(name).expanduser(), self.folder / name):
            if (path / "config.json").is_file():
                return path
        try:
            return fetch_model(name, self._config.revision)
        except ModelError as error:
            raise ModelError(
                f"{name}, the base model of the adapter in {self.folder}: {error}; or put the adapter into the folder "
                "of its base"
            ) from error

    def load_tokenizer(self, base: Path, **options: Any) -> PreTrainedTokenizerBase:
        """The tokenizer, and its chat template: those beside the adapter, else those of its base."""
        own = any((self.folder / name).is_file() for name in TOKENIZER_FILES)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder if own else base, **options)
        template = self.folder / TEMPLATE
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        elif own and not tokenizer.chat_template:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(base, **options).chat_template
        return tokenizer

    def touches(self, name: str) -> bool:
        """Whether the adapter changes the parameter of this name."""
        return not self._keys.keys().isdisjoint(_tensor_names(name))

    def changed(self, name: str, weight: Tensor, transposed: bool = False) -> Tensor:
        """The parameter of this name with what the adapter adds, in float32, or what it puts in its place.

        `transposed` is whether its inputs come first, as in a Conv1D. The adapter's own `fan_in_fan_out` does not
        count: PEFT too goes by the kind of module. A parameter that the adapter does not touch is returned as it is.
        Raises ModelError.
        """
        for replacement in _replacements(name):
            if (new := self._take(replacement)) is not None:
                self._check_shape(name, new, weight)
                weight = new.to(weight.device)
        module = name.removesuffix(".weight")
        for down_name, up_name in PAIRS:
            down, up = self._take(f"{module}.{down_name}"), self._take(f"{module}.{up_name}")
            if down is None and up is None:
                continue
            if down is None or up is None or down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                raise ModelError(f"the adapter in {self.folder} is damaged at {name}: download it again")
            rank = down.shape[0]
            change = up.float() @ down.float() * self._scale(module, rank)  # (outputs, inputs)
            if transposed or down_name == "lora_embedding_A":
                change = change.T
            self._check_shape(name, change, weight)
            weight = weight.float() + change.to(weight.device)
        return weight

    def merge(self, model: PreTrainedModel) -> None:
        """Change the other parameters and buffers of a loaded model in place. Raises ModelError."""
        for pair in model.all_tied_weights_keys.items():
            if name := next(filter(self.touches, pair), None):
                raise ModelError(
                    f"the adapter in {self.folder} changes {name}, which the base model uses twice, for its "
                    "embeddings and its head: merge it with PEFT"
                )
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # biases may be buffers
                if self.touches(name):
                    module = model.get_submodule(name.rpartition(".")[0])
                    tensor.copy_(self.changed(name, tensor, isinstance(module, Conv1D)))
        self.check_used()

    def check_used(self) -> None:
        """Raise ModelError if something of the adapter has found no parameter."""
        if self._unused:
            raise ModelError(
                f"the adapter in {self.folder} does not fit its base model: {len(self._unused)} of its tensors find no "
                f"place there, first {min(self._unused)}"
            )

    def _take(self, name: str) -> Tensor | None:
        """A tensor of the file, if it is there."""
        if name not in self._keys:
            return None
        self._unused.discard(name)
        tensor: Tensor = self._file.get_tensor(self._keys[name])
        return tensor

    def _scale(self, module: str, rank: int) -> float:
        patterns = self._config.alpha_pattern or {}
        alphas = (alpha for pattern, alpha in patterns.items() if re.match(_whole(pattern), module))
        return next(alphas, self._config.lora_alpha) / (sqrt(rank) if self._config.use_rslora else rank)

    def _check_shape(self, name: str, change: Tensor, weight: Tensor) -> None:
        if change.shape != weight.shape:
            raise ModelError(
                f"the adapter in {self.folder} does not fit its base model: {name} has the shape "
                f"{tuple(weight.shape)} there, and {tuple(change.shape)} in the adapter"
            )


def _replacements(name: str) -> tuple[str, str]:
    """The names under which an adapter may hold a whole parameter."""
    module, _, kind = name.rpartition(".")
    return name, f"{module}.base_layer.{kind}"


def _tensor_names(name: str) -> set[str]:
    """The names of all tensors of an adapter that change a parameter."""
    module = name.removesuffix(".weight")
    return {*_replacements(name), *(f"{module}.{part}" for pair in PAIRS for part in pair)}


def _whole(pattern: str) -> str:
    """What the whole name of a module matches if its end matches a pattern."""
    return rf"(.*\.)?({pattern})$"


def _checked(config: Mapping[str, Any]) -> LoraConfig:
    """The settings of an adapter. Raises InvalidRequestError, which names the wrong field."""
    checked = convert(config, LoraConfig)
    for pattern in checked.alpha_pattern or ():
        try:
            re.compile(_whole(pattern))
        except re.error as error:
            raise InvalidValueError(
                f"alpha_pattern has a pattern that is not valid: {pattern}", "alpha_pattern"
            ) from error
    return checked


def _unsupported(config: Mapping[str, Any]) -> str | None:
    """What an adapter has that cannot be merged."""
    if (kind := config.get("peft_type")) != "LORA":
        return f"its type is {kind}"
    if (bias := config.get("bias", "none")) != "none":
        return f"it has biases (bias={bias})"
    if extra := next((name for name in BEYOND_LORA if config.get(name)), None):
        return f"it uses {extra}"
    if (start := config.get("init_lora_weights", True)) not in KEEPS_THE_BASE:
        return f"it changes its base model too (init_lora_weights={start})"
    return None
