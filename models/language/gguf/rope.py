"""The positions of a model: rotary embeddings, and how they are scaled beyond the context of the training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from models.language.gguf.settings import ModelSettings

DEFAULT_BASE = 10000.0  # llama.cpp's, as are the other defaults here


def rope_parameters(settings: ModelSettings) -> dict[str, Any]:
    """transformers' `rope_parameters`. Raises ModelError for a scaling that is unknown."""
    parameters = unscaled(settings, settings.positive("rope.freq_base", DEFAULT_BASE))
    if "rope_factors_short.weight" in settings.tensors:
        return parameters | _longrope(settings)
    kind = settings.get("rope.scaling.type")
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1.0))
    if kind is None and factor:  # files of 2023 have a factor only
        kind = "linear"
    if kind in ("none", "longrope") or factor in (0, 1):  # a longrope without its factors scales nothing
        return parameters
    if kind == "linear":
        return parameters | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return parameters | _yarn(settings, factor)
    raise settings.unsupported(f"rope.scaling.type is {kind}")


def unscaled(settings: ModelSettings, base: float) -> dict[str, Any]:
    """The parameters of rotary embeddings that are not scaled."""
    rotated = settings.get("rope.dimension_count", settings.head_dim)
    return {
        "rope_type": "default",
        "rope_theta": base,
        "partial_rotary_factor": _share(rotated, settings.head_dim),
    }


def divided_frequencies(factors: Tensor, base: float) -> Tensor:
    """The inverse frequencies of Llama 3.1 and its like, of which a file has only the factors that divide them."""
    exponents = torch.arange(len(factors), dtype=torch.float32) / len(factors)
    return 1.0 / (base**exponents * factors)


def _yarn(settings: ModelSettings, factor: float) -> dict[str, Any]:
    original = settings.get("rope.scaling.original_context_length", settings.need("context_length"))
    attention = settings.get("rope.scaling.yarn_attn_factor")
    if attention is None:
        attention = (1 + 0.1 * math.log(factor)) * settings.get("rope.scaling.attn_factor", 1.0)
    if settings.get("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise settings.unsupported("rope.scaling.yarn_ext_factor is not 1")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
        "beta_fast": settings.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": settings.get("rope.scaling.yarn_beta_slow", 1.0),
    }


def _longrope(settings: ModelSettings) -> dict[str, Any]:
    context = settings.need("context_length")
    original = settings.get("rope.scaling.original_context_length", context)
    scale = context / original
    attention = settings.get("rope.scaling.attn_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    short, long = (settings.tensor(f"rope_factors_{length}.weight").values().tolist() for length in ("short", "long"))
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "factor": scale,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def _share(rotated: int, head_dim: int) -> float:
    """The share of a head's dimensions that is rotated, such that `int(head_dim * share)` is exact."""
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, 1)
