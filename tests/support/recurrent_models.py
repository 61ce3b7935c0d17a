"""Tiny models with recurrent layers, of each family that transformers has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from tests.support.tiny import SHAPE, tiny_model

HALF = ["linear_attention", "full_attention", "linear_attention"]
DELTA: dict[str, Any] = {
    "layer_types": HALF,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
LATENT: dict[str, Any] = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LATENT | {"layer_types": HALF},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 16},
    "granitemoehybrid": MAMBA | EXPERTS | {"layer_types": HALF, "shared_intermediate_size": 48},
    "jamba": EXPERTS | {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 16},
    "kimi_linear": LATENT | {"layer_types": HALF, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "conv"], "sliding_window": 12},
    "mamba": {"state_size": 16},
    "mamba2": {"state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 2, "chunk_size": 64},
    "nemotron_h": EXPERTS
    | {
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 48,
    },
    "olmo_hybrid": DELTA | {"linear_num_key_heads": 4},
    "qwen3_5_moe_text": DELTA | EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA | EXPERTS,
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "mamba_d_state": 16,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "mamba_d_state": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 2,
        "chunk_size": 8,
        "num_key_value_heads": 4,
    },
    "zaya": EXPERTS | {"layer_types": ["hybrid"] * 3, "num_experts_per_tok": 1, "router_hidden_size": 16},
}
OTHERS: dict[str, dict[str, Any]] = {  # families whose layers keep states in ways of their own
    "minimax": EXPERTS | {"block_size": 8},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16},
    "rwkv": {},
    "xlstm": {"num_heads": 4, "num_blocks": 3, "chunk_size": 8, "autocast_kernel_dtype": "float32"},
}


def tiny_recurrent(family: str, **changes: Any) -> PreTrainedModel:
    """A model whose states remember: they would hardly change any token if they faded at once."""
    config = AutoConfig.for_model(family, **SHAPE | (FAMILIES | OTHERS)[family] | changes)
    model = tiny_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(-4)
    return model
