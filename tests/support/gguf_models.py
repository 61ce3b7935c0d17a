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
    config: Any = model.config
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
            stored = names.get_name(part, (".weight", ".bias"))
            assert stored, f"{part} has no name in a GGUF file of {architecture}"
            yield stored, values
    yield from _rope_tensors(config)
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
    groups = getattr(config, "num_key_value_heads", heads)
    if architecture in PAIRS and re.search(r"[qk]_proj\.(weight|bias)$", name):
        count = heads if "q_proj" in name else groups
        halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
        return [(name, halves.swapaxes(1, 2).reshape(tensor.shape))]
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
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=-2)
        parent = name.removesuffix("gate_up_proj").replace("block_sparse_moe", "mlp")
        return [(f"{parent}gate_proj.weight", gate), (f"{parent}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(name.replace("block_sparse_moe", "mlp") + ".weight", tensor)]
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
