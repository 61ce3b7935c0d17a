"""Models that were written as llama.cpp's converter does, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.language.gguf.gguf_file import GGUFFile
from tests.support.gguf_models import tiny_model, write_model

TOKENS = torch.tensor([[3, 17, 92, 41, 8, 8, 63, 29, 55, 1, 77, 12, 90, 34, 6, 21, 48, 70, 9, 66]])
DIM16 = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FOUR = {"num_hidden_layers": 4}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.6, 1.7, 1.9, 2.0],
    "long_factor": [float(n) for n in range(1, 9)],
    "attention_factor": 1.19,
}

LATENT = EXPERTS | {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
LATENT_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
GATED_DELTA = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "rope_parameters": PARTIAL["rope_parameters"] | {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 6,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

# architecture of the file, transformers' type, its configuration, further metadata
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("llama", "llama", DIM16, {}),
    ("llama", "llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}, {}),
    ("llama", "llama", {"tie_word_embeddings": True}, {}),
    ("llama", "mixtral", EXPERTS | DIM16, {"rope.dimension_count": 16}),
    ("llama", "qwen2", {}, {}),
    ("llama", "llama", {"rope_parameters": LLAMA3}, {}),
    ("llama", "llama", {"rope_parameters": LINEAR}, {}),
    ("llama", "llama", {"rope_parameters": YARN}, {}),
    ("llama", "llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}}, {}),
    ("mistral3", "llama", DIM16, {}),
    (
        "mistral3",
        "ministral3",
        DIM16
        | {
            "rope_parameters": YARN
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
        },
        {},
    ),
    ("qwen2", "qwen2", {}, {}),
    ("qwen2moe", "qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 48}, {}),
    ("qwen3", "qwen3", {"head_dim": 32}, {}),
    ("qwen3moe", "qwen3_moe", EXPERTS | DIM16 | {"norm_topk_prob": True}, {}),
    ("gemma", "gemma", DIM16 | {"tie_word_embeddings": True}, {}),
    (
        "gemma2",
        "gemma2",
        FOUR
        | {
            "head_dim": 32,
            "sliding_window": 6,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        {},
    ),
    (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": 6,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "tie_word_embeddings": True,
        },
        {},
    ),
    (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"attention.sliding_window_pattern": [True, False]},
    ),
    ("phi2", "phi", PARTIAL | {"num_key_value_heads": 4}, {}),
    ("phi3", "phi3", {"original_max_position_embeddings": 128}, {}),
    ("phi3", "phi3", {"original_max_position_embeddings": 128, "sliding_window": 6}, {}),
    ("phi3", "phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONG}, {}),
    ("phimoe", "phimoe", EXPERTS | {"rope_parameters": LONG | {"short_mscale": 1.19, "long_mscale": 1.19}}, {}),
    ("phimoe", "phimoe", EXPERTS | {"attention_bias": True, "lm_head_bias": True}, {}),
    ("starcoder2", "starcoder2", {}, {}),
    ("gpt2", "gpt2", {"tie_word_embeddings": True}, {}),
    ("gptneox", "gpt_neox", PARTIAL, {}),
    ("gptneox", "gpt_neox", PARTIAL | {"use_parallel_residual": False}, {}),
    ("falcon", "falcon", {"num_kv_heads": 1, "multi_query": True, "tie_word_embeddings": True}, {}),
    ("falcon", "falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, {}),
    ("falcon", "falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, {}),
    ("bloom", "bloom", {"tie_word_embeddings": True}, {}),
    ("mpt", "mpt", {"max_seq_len": 128, "tie_word_embeddings": True}, {}),
    ("stablelm", "stablelm", PARTIAL, {}),
    ("stablelm", "stablelm", PARTIAL | {"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True}, {}),
    ("nemotron", "nemotron", PARTIAL | DIM16, {}),
    (
        "mamba",
        "mamba",
        {"intermediate_size": 128, "state_size": 8, "time_step_rank": 4, "tie_word_embeddings": True},
        {},
    ),
    ("command-r", "cohere", {"logit_scale": 0.3, "tie_word_embeddings": True}, {}),
    ("command-r", "cohere", {"logit_scale": 0.3, "use_qk_norm": True, "tie_word_embeddings": True}, {}),
    ("cohere2", "cohere2", FOUR | {"logit_scale": 0.3, "sliding_window": 6, "tie_word_embeddings": True}, {}),
    (
        "gpt-oss",
        "gpt_oss",
        DIM16 | EXPERTS | {"sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {},
    ),
    ("gpt-oss", "gpt_oss", DIM16 | EXPERTS | {"rope_parameters": YARN | {"truncate": False}}, {}),
    ("lfm2", "lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, {}),
    ("glm4", "glm4", PARTIAL | DIM16, {}),
    ("chatglm", "glm", PARTIAL | DIM16, {}),
    ("smollm3", "smollm3", FOUR, {}),
    ("olmo", "olmo", {"clip_qkv": 0.3}, {}),
    ("olmo2", "olmo2", {}, {}),
    ("olmo2", "olmo3", FOUR | {"sliding_window": 6, "layer_types": SLIDING}, {}),
    (
        "olmo2",
        "olmo3",
        FOUR
        | {
            "sliding_window": 6,
            "layer_types": SLIDING,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {},
    ),
    ("olmoe", "olmoe", EXPERTS, {}),
    ("exaone", "llama", DIM16, {}),
    ("exaone4", "exaone4", FOUR | {"sliding_window": 6, "layer_types": SLIDING}, {}),
    ("exaone4", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}, {}),
    ("hunyuan-dense", "hunyuan_v1_dense", DIM16, {}),
    ("hunyuan-moe", "hunyuan_v1_moe", DIM16 | {"num_experts": 4, "moe_topk": 2}, {}),
    (
        "granite",
        "granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0},
        {},
    ),
    (
        "granitemoe",
        "granitemoe",
        EXPERTS | {"attention_multiplier": 0.2, "logits_scaling": 2.0, "intermediate_size": 32},
        {},
    ),
    (
        "granitemoe",
        "granitemoeshared",
        EXPERTS | {"attention_multiplier": 0.2, "intermediate_size": 32, "shared_intermediate_size": 48},
        {"expert_shared_feed_forward_length": 48},
    ),
    ("minicpm", "granite", {"attention_multiplier": 0.25, "rope_parameters": LONG}, {}),
    (
        "minicpm",
        "granite",
        {"attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.9, "logits_scaling": 2.0},
        {},
    ),
    ("ernie4_5", "ernie4_5", DIM16, {}),
    (
        "ernie4_5-moe",
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
        {},
    ),
    ("seed_oss", "seed_oss", DIM16 | {"attention_out_bias": False}, {}),
    (
        "apertus",
        "apertus",
        {},
        {"xielu.alpha_p": [0.2, 0.3], "xielu.alpha_n": [0.4, 0.5], "xielu.beta": 0.5, "xielu.eps": -1e-6},
    ),
    ("arcee", "arcee", DIM16, {}),
    (
        "dots1",
        "dots1",
        EXPERTS
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "layer_types": ["full_attention"] * 2,
        },
        {},
    ),
    (
        "glm4moe",
        "glm4_moe",
        PARTIAL
        | DIM16
        | EXPERTS
        | {
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 1.5,
        },
        {},
    ),
    ("deepseek2", "deepseek_v2", LATENT | {"q_lora_rank": None, "topk_method": "greedy"}, {}),
    (
        "deepseek2",
        "deepseek_v2",
        LATENT | {"q_lora_rank": 24, "topk_method": "greedy", "rope_parameters": LATENT_YARN},
        {},
    ),
    ("deepseek2", "deepseek_v3", LATENT | {"q_lora_rank": 24, "n_group": 2, "norm_topk_prob": True}, {}),
    ("minimax-m2", "minimax_m2", PARTIAL | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    ("qwen35", "qwen3_5_text", FOUR | GATED_DELTA, {}),
    ("qwen35moe", "qwen3_5_moe_text", FOUR | GATED_DELTA | EXPERTS | {"shared_expert_intermediate_size": 48}, {}),
    (
        "gemma4",
        "gemma4_text",
        GEMMA4
        | {
            "num_hidden_layers": 6,
            "layer_types": SLIDING[1:] * 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
        {},
    ),
    (
        "gemma4",
        "gemma4_text",
        GEMMA4
        | EXPERTS
        | {
            "num_hidden_layers": 3,
            "layer_types": SLIDING[1:],
            "hidden_size_per_layer_input": 0,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "final_logit_softcapping": 3.0,
        },
        {},
    ),
    ("baichuan", "llama", {"num_hidden_layers": 32, "num_key_value_heads": 4}, {}),
    ("internlm2", "llama", {}, {}),
    ("xverse", "llama", {}, {}),
    ("deci", "llama", {}, {}),
]


def read_back(path: Path) -> PreTrainedModel:
    """The model of a file, filled with the values of its sources."""
    file = GGUFFile(path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(file.config(), dtype=torch.float32)  # type: ignore[no-untyped-call]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(file.config(), dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        for name, source in file.sources(empty).items():
            assert places[name].shape == source.values().shape
            places[name].copy_(source.values())
    return model


@pytest.mark.parametrize(
    ("architecture", "model_type", "config", "metadata"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_of_each_architecture_gives_the_logits_of_the_original(
    tmp_path: Path, architecture: str, model_type: str, config: dict[str, Any], metadata: dict[str, Any]
) -> None:
    original = tiny_model(model_type, **config)
    if architecture == "apertus":
        with torch.no_grad():
            for layer, (positive, negative) in enumerate([(0.2, 0.4), (0.3, 0.5)]):
                activation = original.get_submodule(f"model.layers.{layer}.mlp.act_fn")
                activation.get_parameter("alpha_p").fill_(positive)
                activation.get_parameter("alpha_n").fill_(negative)
    path = write_model(tmp_path / "model.gguf", original, architecture, **metadata)
    with torch.inference_mode():
        expected, logits = original(input_ids=TOKENS).logits, read_back(path)(input_ids=TOKENS).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
