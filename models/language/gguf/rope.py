"""The positions of a model: rotary embeddings and how they are scaled."""

from __future__ import annotations

import math
from typing import Any

from models.language.gguf.settings import ModelSettings

DEFAULT_BASE = 10000.0  # llama.cpp's


def rope_parameters(settings: ModelSettings, head_dim: int) -> dict[str, Any]:
    """transformers' `rope_parameters`. Raises ModelError for a scaling that is unknown."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": settings.get("rope.freq_base", DEFAULT_BASE)}
    rotated = settings.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        parameters["partial_rotary_factor"] = _share(rotated, head_dim)
    if "rope_factors_short.weight" in settings.tensors:
        return parameters | _longrope(settings)
    kind = settings.get("rope.scaling.type", "none")
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1.0))
    if kind == "none" and factor != 1:
        kind = "linear"  # files of 2023 have a factor only
    if kind in ("none", "longrope") or factor == 1:  # a longrope without factors scales nothing
        return parameters
    if kind == "linear":
        return parameters | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return parameters | _yarn(settings, factor)
    raise settings.unsupported(f"rope.scaling.type={kind}")


def _yarn(settings: ModelSettings, factor: float) -> dict[str, Any]:
    yarn = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": settings.get(
            "rope.scaling.original_context_length", settings.need("context_length")
        ),
        "beta_fast": settings.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": settings.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    attention = settings.get("rope.scaling.attn_factor", settings.get("rope.scaling.yarn_attn_factor"))
    if attention is not None:
        yarn["attention_factor"] = attention
    if settings.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise settings.unsupported("rope.scaling.yarn_ext_factor")
    return yarn


def _longrope(settings: ModelSettings) -> dict[str, Any]:
    context = settings.need("context_length")
    original = settings.get("rope.scaling.original_context_length", context)
    scale = context / original
    attention = settings.get("rope.scaling.attn_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope_type": "longrope",
        "short_factor": settings.tensors["rope_factors_short.weight"].values().tolist(),
        "long_factor": settings.tensors["rope_factors_long.weight"].values().tolist(),
        "factor": scale,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def _share(rotated: int, head_dim: int) -> float:
    """The share of a head's dimensions that is rotated, such that `int(head_dim * share)` is exact."""
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, 1)
