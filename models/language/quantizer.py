"""Quantizes weights while transformers loads them, one at a time: no model is ever whole in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
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
    """Tells transformers to quantize the parameters with these names while it loads them.

    `quantize` makes the quantized weight of a parameter from its name, its place and its tensor.
    """

    def __init__(self, quantize: Quantize, names: Collection[str]) -> None:
        self.quant_method: Any = METHOD
        self.quantize = quantize
        self.names = frozenset(names)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


@register_quantizer(METHOD)
class ParleyQuantizer(HfQuantizer):
    """Quantizes each parameter when it is loaded, and puts our modules in place when all are.

    An error is kept until then: transformers would only log it, in many lines, and go on.
    """

    quantization_config: ParleyConfig
    is_trainable = False

    def __init__(self, quantization_config: ParleyConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.places: dict[str, Place] = {}
        self.weights: dict[str, QuantizedWeight] = {}
        self.error: Exception | None = None

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.places

    def take(self, name: str, tensor: Tensor) -> None:
        """Quantize the parameter of this name. After an error, nothing more."""
        try:
            if self.error is None:
                self.weights[name] = self.quantization_config.quantize(name, self.places[name], tensor)
        except Exception as error:
            self.error = error

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantization(self)

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        names = self.quantization_config.names
        places = quantizable(model)
        self.places = {name: place for name, place in places.items() if name in names}
        self.kept = places.keys() - names

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.error is not None:
            raise self.error
        put_quantized(model, self.weights)
        if names := not_quantized(model, self.kept):
            logger.warning("these layers are not quantized: %s", ", ".join(names))
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model


class _Quantization(ConversionOps):
    """Quantizes what a step of loading made: one parameter, or several if a stored tensor is split.

    The model's own parameter stays without data until our module replaces it.
    """

    def __init__(self, quantizer: ParleyQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *args: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        ours = input_dict.keys() & self.quantizer.places.keys()
        for name in ours:
            tensors = input_dict[name]
            self.quantizer.take(name, tensors[0] if isinstance(tensors, list) else tensors)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {name: tensors for name, tensors in input_dict.items() if name not in ours}
