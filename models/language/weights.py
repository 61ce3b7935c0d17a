"""Loads the weights of a model, tensor by tensor, from a folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from models.engine.quantization import Place, quantizable
from models.engine.quantized_weight import BLOCK_TYPES, Format, QuantizedWeight
from models.errors import ModelError
from models.language.adapter import Adapter
from models.language.gguf.gguf_file import GGUFFile
from models.language.gguf.tensors import PLAIN, Source
from models.language.quantizer import ParleyConfig, Quantize
from models.language.stored_weights import StoredWeight, stored_weights


def load_folder(
    folder: Path,
    adapter: Adapter | None,
    format: Format | None,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model in a folder, with an adapter merged. `format` is that of quantized weights; None quantizes none.

    Raises ModelError and the errors of transformers.
    """
    code = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **code)
    options: dict[str, Any] = {"dtype": dtype, "device_map": device}
    if format is not None:
        options["quantization_config"] = ParleyConfig(_round_to(format, adapter))
    if weights := stored_weights(folder):
        _forget_packing(config)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, **code)  # type: ignore[no-untyped-call]
        model = _load(type(empty), None, config=config, state_dict=weights, **options)
        with suppress(OSError):  # it has none
            model.generation_config = GenerationConfig.from_pretrained(folder)
    else:  # files of older formats
        model = _load(AutoModelForCausalLM, folder, **code, **options)
    if adapter:
        adapter.merge(model)
    return model


def load_gguf(file: GGUFFile, format: Format | None, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model in a GGUF file, with its blocks as they are; `format` is for what cannot stay; None keeps no blocks.

    Raises ModelError and the errors of transformers.
    """
    config = file.config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        empty = kind(config)
    sources = file.sources(empty)
    buffers = {name: sources.pop(name) for name, _ in empty.named_buffers() if name in sources}
    quantized = {} if format is None else quantizable(empty)
    kept = _plain(sources)
    ours = quantized.keys() - kept  # read as blocks, so not through transformers
    parameters = {name: StoredWeight(_nothing if name in ours else source.values) for name, source in sources.items()}
    options: dict[str, Any] = {"dtype": dtype, "device_map": device}
    if format is not None:
        options["quantization_config"] = ParleyConfig(_blocks_of(sources, format), kept)
    model = _load(kind, None, config=config, state_dict=parameters, **options)
    for name, source in buffers.items():
        model.get_buffer(name).copy_(source.values())
    model.generation_config.eos_token_id = sorted(file.stop_token_ids())
    return model


def _round_to(format: Format, adapter: Adapter | None = None) -> Quantize:
    """Rounds numbers to a format, but those of heads and embeddings to 8 bits: replies suffer most from theirs."""

    def quantize(name: str, place: Place, tensor: Tensor) -> QuantizedWeight:
        tensor = adapter.changed(name, tensor) if adapter else tensor
        return QuantizedWeight.of_numbers(place.oriented(tensor), Format.Q8_0 if place.is_outer else format)

    return quantize


def _blocks_of(sources: Mapping[str, Source], format: Format) -> Quantize:
    """Keeps the blocks of GGUF files where our kernels can, and rounds other weights."""
    rounded = _round_to(format)

    def quantize(name: str, place: Place, tensor: Tensor) -> QuantizedWeight:
        source = sources[name]
        kinds = {part.kind for part in source.parts}
        if (
            kinds <= BLOCK_TYPES.keys()
            and len(kinds) == 1
            and not source.change
            and source.transposed == place.transposed
        ):
            return QuantizedWeight.of_blocks(source.blocks(), kinds.pop())
        return rounded(name, place, source.values())

    return quantize


def _plain(sources: Mapping[str, Source]) -> frozenset[str]:
    """The weights that a quantized file has left in float32, such as routers, since they must be precise."""
    if all(part.kind in PLAIN for source in sources.values() for part in source.parts):
        return frozenset()
    return frozenset(name for name, source in sources.items() if all(part.kind == 0 for part in source.parts))


def _nothing() -> Tensor:
    return torch.empty(0)


def _forget_packing(config: PreTrainedConfig) -> None:
    """Remove what makes transformers unpack the weights, which are plain by now."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _load(kind: Any, *arguments: Any, **options: Any) -> PreTrainedModel:
    """`from_pretrained` of a class. Raises ModelError if weights are missing."""
    model: PreTrainedModel
    model, loading = kind.from_pretrained(*arguments, output_loading_info=True, **options)
    if missing := loading["missing_keys"]:
        raise ModelError(f"{len(missing)} weights are missing, first {min(missing)}: download it again")
    return model
