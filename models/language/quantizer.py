"""Quantizes weights while transformers loads them, one at a time: no model is ever whole in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from models.engine.quantization import Place, not_quantized, put_quantized, quantizable
from models.engine.quantized_weight import QuantizedWeight

logger = logging.getLogger("parley")

METHOD = "parley"  # the name in transformers' registries

Quantize = Callable[[str, Place, Tensor], QuantizedWeight]


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
        if names := not_quantized(model, self.quantization_config.kept):
            logger.warning("these layers are not quantized: %s", ", ".join(names))
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
