"""A packed checkpoint: which tensors make up a weight, in the formats that Parley reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import ModelError, one_line
from models.language.packed import formats
from models.language.packed.formats import PLAIN, Parts

TABLES = (torch.int64, torch.bool)  # of buffers; no format packs weights in them
# The algorithms of ModelOpt that `formats.scaled` undoes.
MODELOPT = {None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4"}
OF_ACTIVATIONS = re.compile(r".+\.(((input|output|activation|[qkv])_(global_)?scale(_ub)?)|input_zero_point)")


@dataclass(frozen=True)
class Format:
    """A format of packed weights: how the tensors of a weight are named, and how they become the weight.

    `suffixes` are what the names of the tensors have in place of the weight's own ending. A weight is packed if it has
    all tensors of one of the `sets`.
    """

    unpack: Callable[[Parts, Mapping[str, Any]], Tensor]
    suffixes: Mapping[str, str]
    sets: tuple[frozenset[str], ...]

    def split(self, name: str) -> tuple[str, str]:
        """The weight that a tensor belongs to, and which part of it the tensor is."""
        for suffix, ending in self.suffixes.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix) + ending, suffix[1:]
        return name, "weight"


WORDS = dict.fromkeys((".qweight", ".qzeros", ".scales", ".g_idx"), ".weight")
SCALED = Format(
    formats.scaled,
    dict.fromkeys(
        ("_packed", "_global_scale", "_scale_inv", "_scale_2", "_scale", "_zero_point", "_shape", "_g_idx"), ""
    ),
    (frozenset({"packed", "scale"}), frozenset({"weight", "scale"}), frozenset({"weight", "scale_inv"})),
)
FORMATS: Mapping[str, Format] = {
    "gptq": Format(formats.gptq, WORDS, (frozenset({"qweight", "qzeros", "scales"}),)),
    "awq": Format(formats.awq, WORDS, (frozenset({"qweight", "qzeros", "scales"}),)),
    "fp8": SCALED,
    "fbgemm_fp8": SCALED,
    "modelopt": SCALED,
    "compressed-tensors": SCALED,
    "mxfp4": Format(formats.mxfp4, dict.fromkeys(("_blocks", "_scales"), ""), (frozenset({"blocks", "scales"}),)),
    "bitsandbytes": Format(
        formats.bitsandbytes,
        {
            **dict.fromkeys((".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"), ""),
            **dict.fromkeys((".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"), ""),
            **dict.fromkeys((".SCB", ".weight_format"), ".weight"),
        },
        (frozenset({"weight", "absmax", "quant_map"}), frozenset({"weight", "SCB"})),
    ),
}


class PackedCheckpoint:
    """The tensors of a checkpoint whose weights are packed, as plain ones; `names` are their names.

    `config` is the `quantization_config` of config.json, `stored` are the names of the tensors in the files, and `read`
    returns one of them. Nothing is read before `tensor` is called. Raises ModelError for a format that is not read.
    """

    def __init__(self, config: Mapping[str, Any], stored: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._config = config
        self._format = _format(config)
        self._read = read
        weights: dict[str, dict[str, str]] = defaultdict(dict)
        for name in stored:
            if not OF_ACTIVATIONS.fullmatch(name):
                weight, part = self._format.split(name)
                weights[weight][part] = name
        self._packed = {
            weight: parts
            for weight, parts in weights.items()
            if any(needed <= parts.keys() for needed in self._format.sets)
        }
        plain = {name for weight, parts in weights.items() if weight not in self._packed for name in parts.values()}
        self.names = frozenset(self._packed.keys() | plain)

    def tensor(self, name: str) -> Tensor:
        """A weight: in float32 if it was packed, else as it is stored. Raises ModelError."""
        parts = self._packed.get(name)
        if parts is None:
            return plain(name, self._read(name))
        try:
            return self._format.unpack({part: self._read(stored) for part, stored in parts.items()}, self._config)
        except (ValueError, KeyError, RuntimeError, StopIteration) as error:
            method = self._config.get("quant_method")
            raise ModelError(f"{name} cannot be unpacked from {method}: {one_line(error, 100)}") from error


def plain(name: str, weight: Tensor) -> Tensor:
    """A weight that is not packed. Raises ModelError if its numbers are of a kind that needs scales."""
    if weight.dtype not in (*PLAIN, *TABLES):
        raise ModelError(
            f"{name} is packed as {weight.dtype} without what is needed to unpack it: download all files of the model "
            "again, or choose another version of it"
        )
    return weight


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config.json, if its weights are packed."""
    places = (config, config.get("text_config") or {})
    found: list[Mapping[str, Any]] = [
        place["quantization_config"] for place in places if place.get("quantization_config")
    ]
    return found[0] if found else None


def _algorithms(config: Mapping[str, Any]) -> set[str | None]:
    """The algorithms of ModelOpt that a `quantization_config` names: for all layers, or for each one."""
    algorithm = config.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        return {algorithm}
    return {layer.get("quant_algo") for layer in (config.get("quantized_layers") or {}).values()}


def _format(config: Mapping[str, Any]) -> Format:
    """The format that a `quantization_config` names. Raises ModelError."""
    method = config.get("quant_method")
    variant = str(config.get("checkpoint_format") or config.get("format") or config.get("version") or "").lower()
    bits = config.get("bits", config.get("w_bit"))
    unknown = None
    if method not in FORMATS:
        unknown = f"{method}"
    elif method == "gptq" and (variant not in ("", "gptq", "gptq_v2") or bits not in (2, 3, 4, 8)):
        unknown = f"gptq ({variant}, {bits} bits)"
    elif method == "gptq" and config.get("pack_dtype") not in (None, "int32"):
        unknown = f"gptq in {config['pack_dtype']}"
    elif method == "awq" and (variant not in ("", "gemm") or bits != 4):
        unknown = f"awq ({variant}, {bits} bits)"
    elif method == "modelopt" and (algorithms := _algorithms(config) - MODELOPT):
        unknown = f"modelopt ({min(map(str, algorithms))})"
    elif (sparsity := config.get("sparsity_config") or {}) and sparsity.get("format") not in (None, "dense"):
        unknown = f"{method} with sparse weights"
    elif config.get("transform_config"):
        unknown = f"{method} with transformed weights"
    if unknown:
        raise ModelError(
            f"its weights are quantized with {unknown}, which Parley does not read: choose another version of the "
            f"model, in GGUF, {', '.join(FORMATS)} or not quantized"
        )
    return FORMATS[str(method)]
