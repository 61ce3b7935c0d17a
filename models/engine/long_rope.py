"""LongRoPE: rotary embeddings with two sets of frequencies, for short and for long contexts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def short_context(model: PreTrainedModel) -> int | None:
    """Up to how many tokens a model has its short frequencies; None for a model without LongRoPE."""
    rope = _parameters(model.config.get_text_config(decoder=True))
    return rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None


def can_be_long(model: PreTrainedModel) -> bool:
    """Whether `choose_frequencies` knows all that the length of the context changes; Phi-3.5-MoE scales by it too."""
    return "long_mscale" not in _parameters(model.config.get_text_config(decoder=True))


@torch.no_grad()
def choose_frequencies(model: PreTrainedModel, context: int) -> None:
    """Give a model with LongRoPE the frequencies for a context, once and for all, as vLLM and llama.cpp do.

    transformers chooses by the longest sequence of a forward. So one sequence would change all others, and the keys
    that a sequence has cached would not fit its next ones.
    """
    short = short_context(model)
    if short is None or not can_be_long(model):
        return
    for module in model.modules():
        rotary: Any = module
        if _parameters(getattr(module, "config", None)).get("rope_type") == "longrope" and hasattr(module, "inv_freq"):
            length = short + 1 if context > short else None
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, rotary.inv_freq.device, seq_len=length)
            rotary.inv_freq.copy_(frequencies)
            rotary.rope_type = "chosen"  # so that transformers leaves the frequencies alone


def _parameters(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}
