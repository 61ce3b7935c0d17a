"""Loads the weights of a model tensor by tensor, and quantizes them on the way: no model is ever whole in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from models.engine.quantization import Place, put_quantized, quantizable
from models.engine.quantized_weight import BLOCK_TYPES, Format, QuantizedWeight
from models.errors import ModelError
from models.language.adapter import Adapter
from models.language.gguf.gguf_file import GGUFFile
from models.language.gguf.tensors import PLAIN, Source

METHOD = "parley"  # the name in transformers' registries

Quantize = Callable[[str, Place, Tensor], QuantizedWeight]


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
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device,
        trust_remote_code=trust_remote_code,
        quantization_config=None if format is None else ParleyConfig(_round_to(format, adapter)),
        output_loading_info=True,
    )
    model = _complete(*loaded)
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
    parameters = {
        name: StoredParameter(source, name in quantized and name not in kept) for name, source in sources.items()
    }
    quantization = None if format is None else ParleyConfig(_blocks_of(sources, format), kept)
    model = _complete(
        *kind.from_pretrained(
            None,
            config=config,
            state_dict=parameters,
            dtype=dtype,
            device_map=device,
            quantization_config=quantization,
            output_loading_info=True,
        )
    )
    for name, source in buffers.items():
        model.get_buffer(name).copy_(source.values())
    model.generation_config.eos_token_id = sorted(file.stop_token_ids())
    return model


class StoredParameter:
    """A parameter in a file, as transformers' loader takes it: read when it is indexed, or empty, if we read it."""

    def __init__(self, source: Source, is_ours: bool) -> None:
        self._source = source
        self._is_ours = is_ours

    def __getitem__(self, index: object) -> Tensor:
        return torch.empty(0) if self._is_ours else self._source.values()


@register_quantization_config(METHOD)
class ParleyConfig(QuantizationConfigMixin):
    """Tells transformers to quantize with us while it loads.

    `quantize` makes the quantized weight of a parameter from its name, its place and its tensor. Parameters in `kept`
    are not quantized.
    """

    def __init__(self, quantize: Quantize, kept: frozenset[str] = frozenset()) -> None:
        self.quant_method: Any = METHOD
        self.quantize = quantize
        self.kept = kept

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


@register_quantizer(METHOD)
class ParleyQuantizer(HfQuantizer):
    """Quantizes each parameter when it is loaded, and puts our modules in place when all are."""

    quantization_config: ParleyConfig
    is_trainable = False

    def __init__(self, quantization_config: ParleyConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.places: dict[str, Place] = {}
        self.weights: dict[str, QuantizedWeight] = {}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.places

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantization(self)

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        kept = self.quantization_config.kept
        self.places = {name: place for name, place in quantizable(model).items() if name not in kept}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        put_quantized(model, self.weights)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model


class _Quantization(ConversionOps):
    """Quantizes one parameter. The model's own stays without data until our module replaces it."""

    def __init__(self, quantizer: ParleyQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        quantize = self.quantizer.quantization_config.quantize
        self.quantizer.weights[full_layer_name] = quantize(
            full_layer_name, self.quantizer.places[full_layer_name], tensor
        )
        kwargs["missing_keys"].discard(full_layer_name)
        return {}


def _round_to(format: Format, adapter: Adapter | None = None) -> Quantize:
    """Rounds numbers to a format, but those of heads and embeddings to 8 bits: replies suffer most from theirs."""

    def quantize(name: str, place: Place, tensor: Tensor) -> QuantizedWeight:
        tensor = adapter.changed(name, tensor) if adapter else tensor
        return QuantizedWeight.of_numbers(
            place.oriented(tensor).contiguous(), Format.Q8_0 if place.is_outer else format
        )

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


def _complete(model: PreTrainedModel, loading: Mapping[str, Any]) -> PreTrainedModel:
    if missing := loading["missing_keys"]:
        raise ModelError(f"{len(missing)} weights are missing, first {min(missing)}: download it again")
    return model
