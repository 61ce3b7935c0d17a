"""Loads the weights of a model, tensor by tensor, from a folder or a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from models.engine.quantization import Place, quantizable
from models.engine.quantized_weight import BLOCK_TYPES, Format, QuantizedWeight
from models.errors import ModelError
from models.language.adapter import Adapter
from models.language.gguf.gguf_file import GGUFFile
from models.language.gguf.tensors import Source
from models.language.memory import check_memory, free_memory, size_of_weights
from models.language.model_config import read_generation_config
from models.language.quantizer import ParleyConfig, Quantize
from models.language.stored_weights import StoredWeight, stored_weights

REPORTS = "transformers.modeling_utils"  # the logger of its reports, of many lines

SizeOfCache = Callable[[PreTrainedModel], int]  # the bytes that a model's cache takes from the beginning

logger = logging.getLogger("parley")


def no_cache(model: PreTrainedModel) -> int:
    """The size of a cache that takes memory only as it fills."""
    return 0


def load_folder(
    folder: Path,
    adapter: Adapter | None,
    trust_remote_code: bool,
    format: Format | None,
    dtype: torch.dtype,
    device: str,
    size_of_cache: SizeOfCache = no_cache,
) -> PreTrainedModel:
    """The model in a folder, with an adapter merged. `format` is that of quantized weights; None quantizes none.

    `size_of_cache` tells what must have room beside the weights. Raises ModelError and the errors of transformers.
    """
    code = {"trust_remote_code": trust_remote_code}
    config, generation_config = AutoConfig.from_pretrained(folder, **code), read_generation_config(folder)
    weights = stored_weights(folder)
    _forget_packing(config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, **code)  # type: ignore[no-untyped-call]
    formats = {} if format is None else {name: _rounded(place, format) for name, place in quantizable(empty).items()}
    can_round = device == "cpu" and format is not Format.Q4_1
    check_memory(size_of_weights(empty, formats, dtype), free_memory(device), can_round, size_of_cache(empty))
    options = _options(_round_to(formats, adapter), formats, dtype, device)
    if weights:
        model = _from_pretrained(type(empty), None, config=config, state_dict=weights, **options)
    else:  # files of older formats
        model = _from_pretrained(AutoModelForCausalLM, folder, **code, **options)
    if generation_config:
        model.generation_config = generation_config
    if adapter:
        adapter.merge(model)
    return model


def load_gguf(
    file: GGUFFile, format: Format | None, dtype: torch.dtype, device: str, size_of_cache: SizeOfCache = no_cache
) -> PreTrainedModel:
    """The model in a GGUF file, with its blocks as they are; `format` is for what cannot stay; None keeps no blocks.

    `size_of_cache` tells what must have room beside the weights. Raises ModelError and the errors of transformers.
    """
    config = file.config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        empty = kind(config)
    sources = file.sources(empty)
    buffers = {name: sources.pop(name) for name, _ in empty.named_buffers() if name in sources}
    formats = {} if format is None else _formats(sources, quantizable(empty), format)
    check_memory(size_of_weights(empty, formats, dtype), free_memory(device), False, size_of_cache(empty))
    weights = {  # what is quantized is not read here, but as blocks
        name: StoredWeight(_nothing if name in formats else source.values) for name, source in sources.items()
    }
    options = _options(_blocks_of(sources, formats), formats, dtype, device)
    model = _from_pretrained(kind, None, config=config, state_dict=weights, **options)
    for name, source in buffers.items():
        model.get_buffer(name).copy_(source.values())
    model.generation_config.eos_token_id = sorted(file.stop_token_ids())
    return model


def _rounded(place: Place, format: Format) -> Format:
    """The format that a weight is rounded to: 8 bits for heads and embeddings, where replies suffer most."""
    return Format.Q8_0 if place.is_outer else format


def _round_to(formats: Mapping[str, Format], adapter: Adapter | None = None) -> Quantize:
    """Rounds numbers to the format of each weight, after an adapter has changed them."""

    def quantize(name: str, place: Place, tensor: Tensor) -> QuantizedWeight:
        tensor = place.oriented(adapter.changed(name, tensor, place.transposed) if adapter else tensor)
        if tuple(tensor.shape) != place.shape:
            raise _misshapen(name, tensor.shape, place.shape)
        return QuantizedWeight.of_numbers(tensor, formats[name])

    return quantize


def _formats(sources: Mapping[str, Source], places: Mapping[str, Place], format: Format) -> dict[str, Format]:
    """The formats of a GGUF file's weights in our layout: those of their blocks where these stay.

    What a file of other types has left in float32, such as routers, must be precise, and has no format; but all weights
    of experts have one.
    """
    types = {part.kind for source in sources.values() for part in source.parts}
    float32 = {GGMLQuantizationType.F32}
    formats = {}
    for name in places.keys() & sources.keys():  # of tied weights, the file has one
        source, place = sources[name], places[name]
        if (kept := _kept(source, place)) is not None:
            formats[name] = BLOCK_TYPES[kept]
        elif types == float32 or place.is_of_experts or {part.kind for part in source.parts} != float32:
            formats[name] = _rounded(place, format)
    return formats


def _kept(source: Source, place: Place) -> int | None:
    """The type of the blocks of a weight, if our layout can hold them as they are."""
    types = {part.kind for part in source.parts}
    plain = len(types) == 1 and not source.change and source.transposed == place.transposed
    return next((type for type in types if plain and type in BLOCK_TYPES), None)


def _blocks_of(sources: Mapping[str, Source], formats: Mapping[str, Format]) -> Quantize:
    """Keeps the blocks of GGUF files where our layout can, and rounds other weights."""
    rounded = _round_to(formats)

    def quantize(name: str, place: Place, tensor: Tensor) -> QuantizedWeight:
        source = sources[name]
        if (kept := _kept(source, place)) is not None:
            return QuantizedWeight.of_blocks(source.blocks(), kept)
        return rounded(name, place, source.values())

    return quantize


def _nothing() -> Tensor:
    return torch.empty(0)


def _forget_packing(config: PreTrainedConfig) -> None:
    """Remove what makes transformers unpack the weights, which are plain by now."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _options(quantize: Quantize, formats: Mapping[str, Format], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The options of `from_pretrained`."""
    options: dict[str, Any] = {"dtype": dtype, "device_map": device}
    return options | ({"quantization_config": ParleyConfig(quantize, formats)} if formats else {})


def _from_pretrained(kind: Any, *arguments: Any, **options: Any) -> PreTrainedModel:
    """`from_pretrained` of a class. Raises ModelError if weights are missing or have other shapes."""
    model: PreTrainedModel
    with _without_reports():
        model, found = kind.from_pretrained(
            *arguments, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if mismatched := found["mismatched_keys"]:
        raise _misshapen(*min(mismatched))
    if missing := found["missing_keys"]:
        raise ModelError(f"{len(missing)} weights are missing, first {min(missing)}: download it again")
    if unused := found["unexpected_keys"]:
        logger.warning("%d weights of the model are not used, first %s", len(unused), min(unused))
    return model


def _misshapen(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    return ModelError(
        f"{name} has the shape {tuple(stored)}, and {tuple(expected)} by config.json: download both again"
    )


@contextmanager
def _without_reports() -> Iterator[None]:
    """While the context lasts, transformers logs no tables about weights: our errors say it in a line."""
    reports = logging.getLogger(REPORTS)
    before = reports.disabled
    reports.disabled = True
    try:
        yield
    finally:
        reports.disabled = before
