"""Writes tiny models of transformers as llama.cpp's converter would: its names, its settings, its changes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PAIRS = {  # whose queries and keys the converter brings into pairs
    "arcee",
    "baichuan",
    "deci",
    "granite",
    "granitemoe",
    "internlm2",
    "llama",
    "minicpm",
    "mistral3",
    "olmo",
    "smollm3",
    "xverse",
}


def tiny_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """A model whose every parameter is random, also those that models begin with as ones and zeros."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SHAPE | settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "act_fn" not in name and name not in model.all_tied_weights_keys:
                tensor.add_(torch.randn(tensor.shape) * (0.1 if "norm" in name or tensor.ndim < 2 else 0.05))
    return model


def write_model(path: Path, model: PreTrainedModel, architecture: str, **metadata: Any) -> Path:
    """Write a model in float32. `metadata` has further settings, or other values; without a value one is left out."""
    values = {
        "general.architecture": architecture,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"{architecture}.{name}": value for name, value in _settings(model, architecture).items()},
    }
    values |= {
        name if "." in name and name.split(".")[0] in ("xielu", "split") else f"{architecture}.{name}": value
        for name, value in metadata.items()
    }
    tensors = {name: tensor.float().contiguous().numpy() for name, tensor in _tensors(model, architecture)}
    write_gguf(path, values, tensors)
    return path


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, Any], kinds: dict[str, Any] | None = None
) -> Path:
    """Write a file of these values; None is not written. Arrays of the kinds given are bytes."""
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _settings(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """What the converter takes from the configuration of a model."""
    whole: Any = model.config
    # The layers of Gemma 4 differ, and their configurations are apart.
    config = whole.per_layer_config["sliding_attention"] if architecture == "gemma4" else whole
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    local, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    eps = {
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": next(
            (
                getattr(config, name)
                for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
                if getattr(config, name, None)
            ),
            None,
        ),
    }
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 128),
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "attention.key_length": head_dim if getattr(config, "head_dim", None) else None,
        "attention.value_length": head_dim if getattr(config, "head_dim", None) else None,
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
        "rope.dimension_count": round(rope.get("partial_rotary_factor", 1.0) * head_dim) if rope else None,
        **eps,
    }
    if architecture == "gemma4":
        return values | _gemma4(config, whole.per_layer_config["full_attention"])
    return values | _scaling(rope, architecture) | _of_architecture(config, architecture)


def _scaling(rope: dict[str, Any], architecture: str) -> dict[str, Any]:
    """How positions are scaled; what Llama 3.1 and long contexts need is in tensors."""
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "longrope":
        return {
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.attn_factor": rope.get("attention_factor"),
        }
    if kind != "yarn":
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_attn_factor": rope.get("attention_factor"),
        "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
        "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        "rope.scaling.yarn_log_multiplier": rope.get("mscale_all_dim"),
        "attention.temperature_scale": rope.get("llama_4_scaling_beta"),
    }


def _of_architecture(config: Any, architecture: str) -> dict[str, Any]:
    """What the converter writes for some architectures only."""
    experts = {
        "expert_count": getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
    }
    deepseek = experts | {
        "leading_dense_block_count": getattr(config, "first_k_dense_replace", None),
        "expert_shared_count": getattr(config, "n_shared_experts", None),
        "expert_weights_scale": getattr(config, "routed_scaling_factor", None),
        "expert_weights_norm": getattr(config, "norm_topk_prob", None),
        "expert_gating_func": 2,
        "expert_group_count": getattr(config, "n_group", None),
        "expert_group_used_count": getattr(config, "topk_group", None),
    }
    heads = config.num_attention_heads if hasattr(config, "num_attention_heads") else 0
    window = {"attention.sliding_window": getattr(config, "sliding_window", None)}
    pattern = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
    scales = {
        "attention.scale": getattr(config, "attention_multiplier", None),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "residual_scale": getattr(config, "residual_multiplier", None),
        "logit_scale": getattr(config, "logits_scaling", None),
    }
    table: dict[str, dict[str, Any]] = {
        "llama": experts,
        "qwen2moe": experts,
        "qwen3moe": experts,
        "olmoe": experts,
        "phimoe": experts | {"attention.sliding_window": 0},
        "dots1": deepseek,
        "glm4moe": deepseek,
        "granite": scales,
        "granitemoe": scales | experts,
        "minicpm": {key: value for key, value in scales.items() if key != "attention.scale"},
        "gemma2": window
        | {
            "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
            "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        },
        "gemma3": window,
        "cohere2": window | {"logit_scale": getattr(config, "logit_scale", None)},
        "command-r": {"logit_scale": getattr(config, "logit_scale", None), "rope.scaling.type": "none"},
        "exaone4": window | {"attention.sliding_window_pattern": pattern},
        "olmo2": window | {"attention.sliding_window_pattern": pattern if any(pattern) else None},
        "phi3": {"attention.sliding_window": getattr(config, "sliding_window", None) or 0},
        "gpt-oss": window | experts | {"expert_feed_forward_length": config.intermediate_size}
        if architecture == "gpt-oss"
        else {},
        "bloom": {"feed_forward_length": 4 * config.hidden_size, "attention.head_count_kv": heads},
        "gpt2": {"feed_forward_length": 4 * config.hidden_size, "attention.head_count_kv": None},
        "gptneox": {"use_parallel_residual": getattr(config, "use_parallel_residual", None)},
        "falcon": {
            "attention.head_count_kv": getattr(config, "num_kv_heads", None),
            "rope.dimension_count": None,
            "feed_forward_length": 4 * config.hidden_size,
        },
        "olmo": {
            "attention.clamp_kqv": getattr(config, "clip_qkv", None),
            "attention.layer_norm_epsilon": 1e-5,
            "attention.layer_norm_rms_epsilon": None,
        },
        "mpt": {
            "feed_forward_length": 4 * config.hidden_size,
            "attention.head_count_kv": None,
            "attention.max_alibi_bias": 8.0,
            "context_length": getattr(config, "max_seq_len", None),
        },
        "ernie4_5-moe": {
            "expert_count": getattr(config, "moe_num_experts", None),
            "expert_used_count": getattr(config, "moe_k", None),
            "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
            "expert_shared_count": getattr(config, "moe_num_shared_experts", None),
            "leading_dense_block_count": getattr(config, "moe_layer_start_index", None),
            "interleave_moe_layer_step": getattr(config, "moe_layer_interval", None),
        },
        "hunyuan-moe": {
            "expert_count": getattr(config, "num_experts", None),
            "expert_used_count": getattr(config, "moe_topk", None),
            "expert_shared_count": 1,
        },
        "minimax-m2": experts | {"expert_feed_forward_length": getattr(config, "intermediate_size", None)},
        "deepseek2": _latent(config, deepseek) if architecture == "deepseek2" else {},
        "qwen35": _linear_attention(config) if architecture == "qwen35" else {},
        "qwen35moe": _linear_attention(config) | experts if architecture == "qwen35moe" else {},
        "mamba": {
            "attention.head_count": 0,
            "feed_forward_length": 0,
            "attention.layer_norm_rms_epsilon": getattr(config, "layer_norm_epsilon", None),
            "attention.layer_norm_epsilon": None,
            "ssm.inner_size": getattr(config, "intermediate_size", None),
            "ssm.state_size": getattr(config, "state_size", None),
            "ssm.conv_kernel": getattr(config, "conv_kernel", None),
            "ssm.time_step_rank": getattr(config, "time_step_rank", None),
        },
        "lfm2": {
            "attention.head_count_kv": [
                config.num_key_value_heads if kind == "full_attention" else 0
                for kind in getattr(config, "layer_types", None) or []
            ],
            "attention.layer_norm_rms_epsilon": getattr(config, "norm_eps", None),
            "shortconv.l_cache": getattr(config, "conv_L_cache", None),
        }
        if architecture == "lfm2"
        else {},
    }
    return table.get(architecture, {})


def _latent(config: Any, experts: dict[str, Any]) -> dict[str, Any]:
    rope = config.rope_parameters
    return experts | {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"] / 10 if "mscale_all_dim" in rope else None,
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else None,
    }


def _linear_attention(config: Any) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "full_attention_interval": 4,
        "rope.dimension_sections": [*config.rope_parameters["mrope_section"], 0],
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
    }


def _gemma4(config: Any, full: Any) -> dict[str, Any]:
    """The configurations are those of layers with a sliding window, and of others."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    shared = config.num_hidden_layers - config.num_kv_shared_layers
    widths = [config.intermediate_size * (1 if layer < shared else 2) for layer in range(config.num_hidden_layers)]
    return {
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.head_count_kv": [(config if slides else full).num_key_value_heads for slides in sliding],
        "attention.sliding_window": config.sliding_window,
        "expert_count": config.num_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "feed_forward_length": widths if config.use_double_wide_mlp else config.intermediate_size,
        "final_logit_softcapping": config.final_logit_softcapping,
        "expert_used_count": config.top_k_experts,
    }


def _tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the converter writes."""
    key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    config: Any = model.config
    names = get_tensor_name_map(key, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        for part, values in _convert(name, tensor, config, architecture):
            part = part.removeprefix("transformer.") if architecture == "bloom" else part
            stored = names.get_name(part, (".weight", ".bias", ".scale"))
            assert stored, f"{part} has no name in a GGUF file of {architecture}"
            yield stored, values
    yield from _rope_tensors(config.per_layer_config["full_attention"] if architecture == "gemma4" else config)
    if architecture == "stablelm" and config.qk_layernorm:
        for layer in range(config.num_hidden_layers):
            attention = model.get_submodule(f"model.layers.{layer}.self_attn")
            for letter in "qk":
                norms = attention.get_submodule(f"{letter}_layernorm.norms").state_dict()
                yield f"blk.{layer}.attn_{letter}_norm.weight", torch.stack(list(norms.values()))


def _rope_tensors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """The factors that divide the inverse frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"])
    full = rope.get("full_attention", {})
    if full.get("rope_type") == "proportional":
        rotated = int(config.head_dim * full["partial_rotary_factor"] / 2)
        yield "rope_freqs.weight", torch.tensor([1.0] * rotated + [1e30] * (config.head_dim // 2 - rotated))
    if rope.get("rope_type") != "llama3":
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for frequency in 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width):
        wavelength = 2 * math.pi / float(frequency)
        smooth = (context / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wavelength < context / high else factor if wavelength > context / low else between)
    yield "rope_freqs.weight", torch.tensor(factors)


def _convert(name: str, tensor: Tensor, config: Any, architecture: str) -> list[tuple[str, Tensor]]:
    """The names and values that the converter makes of a parameter."""
    heads = config.num_attention_heads
    groups = heads if architecture == "gemma4" else getattr(config, "num_key_value_heads", heads)
    if architecture in PAIRS and re.search(r"[qk]_proj\.(weight|bias)$", name):
        count = heads if "q_proj" in name else groups
        halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
        return [(name, halves.swapaxes(1, 2).reshape(tensor.shape))]
    if architecture.startswith("qwen35"):
        return _gated_delta(name, tensor, config)
    if architecture == "gemma4" and name.endswith(("layer_scalar", ".router.scale", "per_expert_scale")):
        layer = f"blk.{name.split('.')[2]}"
        stored = {"scalar": "layer_output_scale.weight", "router.scale": "ffn_gate_inp.scale"}
        ending = next((ending for ending in stored if name.endswith(ending)), None)
        return [(f"{layer}.{stored[ending] if ending else 'ffn_down_exps.scale'}", tensor)]
    if name.endswith("kv_b_proj.weight"):
        each = tensor.view(heads, -1, tensor.shape[-1])
        keys, values = torch.split(each, [config.qk_nope_head_dim, config.v_head_dim], 1)
        return [(name.replace("kv_b", "k_b"), keys.transpose(1, 2)), (name.replace("kv_b", "v_b"), values)]
    if architecture in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return [(name, tensor + 1)]
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return [(name, tensor.T)]
    if architecture in ("bloom", "gptneox") and "query_key_value" in name:
        each = tensor.reshape(heads, 3, config.hidden_size // heads, *tensor.shape[1:])
        return [(name, torch.cat([each[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)]))]
    if architecture == "falcon" and "query_key_value" in name:
        groups, width = config.num_kv_heads, config.hidden_size // heads
        each = tensor.view(groups, heads // groups + 2, width, config.hidden_size)
        q, k, v = each[:, :-2], each[:, [-2]], each[:, [-1]]
        return [(name, torch.cat([part.reshape(-1, config.hidden_size) for part in (q, k, v)]))]
    if architecture == "gpt-oss":
        return _gpt_oss(name, tensor)
    if architecture == "gemma4" and ".experts." in name:
        return [(f"{name}.weight", tensor)]
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return _experts(name, tensor)
    if name.endswith("shared_mlp.input_linear.weight"):
        layer = name.split(".")[2]
        return list(
            zip(
                (f"blk.{layer}.ffn_gate_shexp.weight", f"blk.{layer}.ffn_up_shexp.weight"), tensor.chunk(2), strict=True
            )
        )
    if architecture.startswith("granitemoe") and "router" in name:
        return [(name.replace("router", "router.layer"), tensor)]
    if name.endswith("e_score_correction_bias"):
        return [(f"blk.{name.split('.')[2]}.exp_probs_b.bias", tensor.flatten())]
    if name.endswith("A_log"):
        return [(name, -torch.exp(tensor))]
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        return [(name, tensor.squeeze(1))]
    if "act_fn" in name or (architecture == "stablelm" and "_layernorm.norms" in name):
        return []  # the numbers of activations are metadata; norms of heads are written together
    return [(name, tensor)]


def _gated_delta(name: str, tensor: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """Qwen 3.5: norms plus one, and the heads of values in turns over those of keys."""
    keys, heads, width = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    before = 2 * keys * config.linear_key_head_dim

    def in_turns(rows: Tensor, size: int) -> Tensor:
        parts = rows.reshape(keys, heads // keys, size, *rows.shape[1:])
        return parts.transpose(0, 1).reshape(rows.shape)

    if ".linear_attn." not in name:
        if name.endswith("norm.weight"):
            return [(name, tensor + 1)]
        return _experts(name, tensor) if ".experts." in name else [(name, tensor)]
    if name.endswith("A_log"):
        return [(name, -torch.exp(in_turns(tensor, 1)))]
    if name.endswith("dt_bias"):
        return [(f"blk.{name.split('.')[2]}.ssm_dt.bias", in_turns(tensor, 1))]
    if name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
        return [(name, in_turns(tensor, 1))]
    if name.endswith("in_proj_z.weight"):
        return [(name, in_turns(tensor, width))]
    if name.endswith("out_proj.weight"):
        return [(name, in_turns(tensor.T, width).T)]
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        rows = tensor.squeeze(1)
        return [(name, torch.cat([rows[:before], in_turns(rows[before:], width)]))]
    return [(name, tensor)]


def _experts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The gates of experts are apart from what they gate."""
    parent, _, matrix = name.replace("block_sparse_moe", "mlp").rpartition(".")
    if matrix == "down_proj":
        return [(f"{parent}.down_proj.weight", tensor)]
    gate, up = tensor.chunk(2, dim=-2)
    return [(f"{parent}.gate_proj.weight", gate), (f"{parent}.up_proj.weight", up)]


def _gpt_oss(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name.endswith("sinks"):
        return [(f"{name}.weight", tensor)]
    if "down_proj" in name:
        return (
            [(name.replace("down_proj_bias", "down_proj.bias"), tensor)]
            if name.endswith("_bias")
            else [(f"{name}.weight", tensor.transpose(-1, -2))]
        )
    if "gate_up_proj" in name:
        ending = "bias" if name.endswith("_bias") else "weight"
        parent = name.removesuffix("_bias").removesuffix("gate_up_proj")
        rows = tensor if ending == "bias" else tensor.transpose(-1, -2)
        dim = -1 if ending == "bias" else -2
        gate, up = (rows.index_select(dim, torch.arange(start, rows.shape[dim], 2)) for start in (0, 1))
        return [(f"{parent}gate_proj.{ending}", gate), (f"{parent}up_proj.{ending}", up)]
    return [(name, tensor)]
