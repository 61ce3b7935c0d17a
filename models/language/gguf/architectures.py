"""The table of architectures: what transformers' configuration must say, and how the tensors differ.

The facts are those of llama.cpp, which writes the files: its converter changes tensors, and what all models of an
architecture have in common is in its code only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.language.gguf import changes
from models.language.gguf.changes import Change
from models.language.gguf.rope import rope_parameters, unscaled
from models.language.gguf.settings import ModelSettings

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func: how the experts' weights are made


def _nothing(settings: ModelSettings) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Kind:
    """An architecture."""

    model_type: str  # transformers'
    settings: Callable[[ModelSettings], dict[str, Any]] = _nothing  # beyond those in configuration.py
    changes: tuple[Change, ...] = ()  # how the converter changed the tensors
    unused: str = ""  # tensors that the model does not need, or that a change reads, as an expression


def _llama(settings: ModelSettings) -> dict[str, Any]:
    if settings.get("expert_count"):
        return {"model_type": "mixtral", **_experts(settings)}
    if settings.has("attn_q.bias") and not settings.has("attn_output.bias"):
        return {"model_type": "qwen2"}  # a Llama with biases of queries, keys and values only
    return {}


def _ministral3(settings: ModelSettings) -> dict[str, Any]:
    """Mistral, or Ministral: there yarn does not change the scores, and queries grow with their positions."""
    if not settings.get("attention.temperature_scale"):
        return {"model_type": "llama"}
    rope = rope_parameters(settings)
    original = settings.get("rope.scaling.original_context_length", settings.need("context_length"))
    multiplier = settings.get("rope.scaling.yarn_log_multiplier")
    rope.pop("attention_factor", None)
    if multiplier:
        rope |= {"mscale": multiplier, "mscale_all_dim": multiplier}
    rope["llama_4_scaling_beta"] = settings.need("attention.temperature_scale")
    rope["original_max_position_embeddings"] = original
    return {"rope_parameters": rope}


def _experts(settings: ModelSettings, gate: int = SOFTMAX) -> dict[str, Any]:
    """Mixtures of experts: how many, and how wide. Raises ModelError if their weights are made in another way."""
    if settings.get("expert_gating_func", gate) != gate:
        raise settings.unsupported("its experts are weighed in another way")
    width = settings.get("expert_feed_forward_length", settings.get("feed_forward_length"))
    count = settings.need("expert_count")
    return {
        "num_experts": count,
        "num_local_experts": count,
        "n_routed_experts": count,
        "num_experts_per_tok": settings.need("expert_used_count"),
        "moe_intermediate_size": width,
        "norm_topk_prob": bool(settings.get("expert_weights_norm", False)),
    }


def _qwen2moe(settings: ModelSettings) -> dict[str, Any]:
    shared = settings.tensors.get("blk.0.ffn_up_shexp.weight")
    return _experts(settings) | {
        "shared_expert_intermediate_size": shared.shape[0] if shared else 0,
        "qkv_bias": settings.has("attn_q.bias"),
    }


def _qwen3moe(settings: ModelSettings) -> dict[str, Any]:
    return _experts(settings) | {"norm_topk_prob": True}


def _deepseek_experts(settings: ModelSettings, gate: int = SIGMOID) -> dict[str, Any]:
    """The experts of DeepSeek's kind: some layers are dense, some experts are shared, and groups limit the choice."""
    return _experts(settings, gate) | {
        "first_k_dense_replace": settings.get("leading_dense_block_count", 0),
        "n_shared_experts": settings.get("expert_shared_count", 0),
        "routed_scaling_factor": settings.get("expert_weights_scale", 1.0),
        "n_group": settings.get("expert_group_count", 1),
        "topk_group": settings.get("expert_group_used_count", 1),
        "use_qk_norm": settings.has("attn_q_norm.weight"),
    }


def _deepseek2(settings: ModelSettings) -> dict[str, Any]:
    """Latent attention: keys and values are made of one vector for all heads. V3 has sigmoid gates, V2 softmax."""
    sigmoid = settings.get("expert_gating_func") == SIGMOID or settings.has("exp_probs_b.bias")
    rotated = settings.need("rope.dimension_count")
    keys = settings.get("attention.key_length_mla", settings.get("attention.key_length"))
    multiplier = settings.get("rope.scaling.yarn_log_multiplier")
    rope = rope_parameters(settings) | {"partial_rotary_factor": 1.0}
    if rope["rope_type"] == "yarn":
        rope.pop("attention_factor")  # it is in the scale of the scores
        rope |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier} if multiplier else {}
    groups = settings.get("expert_group_count", 1)
    return _deepseek_experts(settings, SIGMOID if sigmoid else SOFTMAX) | {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_key_value_heads": settings.need("attention.head_count"),
        "q_lora_rank": settings.get("attention.q_lora_rank"),
        "kv_lora_rank": settings.need("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": settings.get("attention.value_length_mla", settings.get("attention.value_length")),
        "head_dim": rotated,
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "rope_parameters": rope,
    }


def _dots1(settings: ModelSettings) -> dict[str, Any]:
    return _deepseek_experts(settings) | {"layer_types": ["full_attention"] * settings.layers}


def _ernie_moe(settings: ModelSettings) -> dict[str, Any]:
    count = settings.need("expert_count")
    return {
        "moe_num_experts": count,
        "moe_k": settings.need("expert_used_count"),
        "moe_intermediate_size": settings.need("expert_feed_forward_length"),
        "moe_num_shared_experts": settings.get("expert_shared_count", 0),
        "moe_layer_start_index": settings.get("leading_dense_block_count", 0),
        "moe_layer_end_index": settings.layers - 1,
        "moe_layer_interval": settings.get("interleave_moe_layer_step", 1),
        "use_bias": settings.has("attn_q.bias"),
    }


def _hunyuan_moe(settings: ModelSettings) -> dict[str, Any]:
    return {"num_experts": settings.need("expert_count"), "moe_topk": settings.need("expert_used_count")}


def _minimax(settings: ModelSettings) -> dict[str, Any]:
    return _experts(settings, SIGMOID) | {"intermediate_size": settings.need("expert_feed_forward_length")}


def _qwen35(settings: ModelSettings) -> dict[str, Any]:
    """Most layers have linear attention, with a state instead of keys and values."""
    heads = settings.need("ssm.time_step_rank")
    sections = [section for section in settings.each("rope.dimension_sections") or [11, 11, 10] if section]
    return {
        "full_attention_interval": settings.get("full_attention_interval", 4),
        "linear_conv_kernel_dim": settings.need("ssm.conv_kernel"),
        "linear_key_head_dim": settings.need("ssm.state_size"),
        "linear_num_key_heads": settings.need("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": settings.need("ssm.inner_size") // heads,
        "rope_parameters": rope_parameters(settings) | {"mrope_section": sections, "mrope_interleaved": True},
    }


def _qwen35moe(settings: ModelSettings) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": settings.need("expert_shared_feed_forward_length")}
    return _qwen35(settings) | _experts(settings) | shared


def _windows(settings: ModelSettings, period: int) -> dict[str, Any]:
    """Which layers attend to a sliding window: all but the last of each period, unless the file says otherwise."""
    window = settings.get("attention.sliding_window")
    sliding = settings.each("attention.sliding_window_pattern")
    if sliding is None:
        period = settings.get("attention.sliding_window_pattern", period)
        sliding = [layer % period < period - 1 for layer in range(settings.layers)]
    types = ["sliding_attention" if window and slides else "full_attention" for slides in sliding]
    return {"sliding_window": window or None, "layer_types": types}


def _gemma2(settings: ModelSettings) -> dict[str, Any]:
    return _windows(settings, 2) | {
        "query_pre_attn_scalar": _gemma_scale(settings, 46),
        "attn_logit_softcapping": settings.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.get("final_logit_softcapping", 30.0),
    }


def _gemma3(settings: ModelSettings) -> dict[str, Any]:
    return _windows(settings, 6) | {
        "query_pre_attn_scalar": _gemma_scale(settings, 62),
        "attn_logit_softcapping": settings.get("attn_logit_softcapping"),
        "final_logit_softcapping": settings.get("final_logit_softcapping"),
        "rope_parameters": _two_ropes(settings, 10000.0),
    }


def _gemma_scale(settings: ModelSettings, largest: int) -> int:
    """What the scores are divided by the root of; the largest model, of 27B, has another value than the others."""
    if settings.layers == largest:
        return int(settings.need("embedding_length") // settings.need("attention.head_count"))
    return settings.head_dim


def _two_ropes(settings: ModelSettings, base: float) -> dict[str, Any]:
    """Layers with a sliding window have a base of their own, and are not scaled."""
    local = settings.positive("rope.freq_base_swa", base)
    return {"full_attention": rope_parameters(settings), "sliding_attention": unscaled(settings, local)}


def _gemma4(settings: ModelSettings) -> dict[str, Any]:
    """Layers with a window have heads of another width; the others rotate some dimensions, which factors tell."""
    sliding = settings.each("attention.sliding_window_pattern") or []
    heads = settings.each("attention.head_count_kv") or [settings.positive("attention.head_count_kv")] * settings.layers
    widths = settings.each("feed_forward_length") or [settings.need("feed_forward_length")]
    factors = settings.tensor("rope_freqs.weight").values()
    full = {"rope_type": "proportional", "partial_rotary_factor": (factors < 1e29).float().mean().item()}
    embedding = settings.tensors.get("per_layer_token_embd.weight")
    experts = settings.get("expert_count", 0)
    return _windows(settings, 6) | {
        "head_dim": settings.need("attention.key_length_swa"),
        "global_head_dim": settings.need("attention.key_length"),
        "num_key_value_heads": heads[sliding.index(True)],
        "num_global_key_value_heads": heads[sliding.index(False)],
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] != widths[0],
        "num_kv_shared_layers": settings.get("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": settings.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": embedding.shape[0] if embedding else 0,
        "attention_k_eq_v": f"blk.{sliding.index(False)}.attn_v.weight" not in settings.tensors,
        "final_logit_softcapping": settings.get("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": full | {"rope_theta": settings.positive("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": settings.positive("rope.freq_base_swa")},
        },
        "enable_moe_block": bool(experts),
        "num_experts": experts or None,
        "top_k_experts": settings.get("expert_used_count"),
        "moe_intermediate_size": settings.get("expert_feed_forward_length"),
    }


def _phi3(settings: ModelSettings) -> dict[str, Any]:
    original = settings.get("rope.scaling.original_context_length", settings.need("context_length"))
    return {
        "sliding_window": settings.get("attention.sliding_window") or None,
        "original_max_position_embeddings": original,
    }


def _phimoe(settings: ModelSettings) -> dict[str, Any]:
    rope = rope_parameters(settings)
    if rope["rope_type"] == "longrope":
        rope |= dict.fromkeys(("short_mscale", "long_mscale"), rope["attention_factor"])
    head = {"lm_head_bias": "output.bias" in settings.tensors}
    return _experts(settings) | _phi3(settings) | head | {"rope_parameters": rope}


def _gpt2(settings: ModelSettings) -> dict[str, Any]:
    return {"n_inner": settings.get("feed_forward_length")}


def _gptneox(settings: ModelSettings) -> dict[str, Any]:
    return {
        "use_parallel_residual": settings.get("use_parallel_residual", True),
        "attention_bias": settings.has("attn_qkv.bias"),
    }


def _falcon(settings: ModelSettings) -> dict[str, Any]:
    groups = settings.positive("attention.head_count_kv", 1)
    return {
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": groups != 1,
        "num_ln_in_parallel_attn": 2 if settings.has("attn_norm_2.weight") else 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": settings.has("attn_qkv.bias"),
        "ffn_hidden_size": settings.get("feed_forward_length"),
    }


def _mpt(settings: ModelSettings) -> dict[str, Any]:
    if (
        settings.has("attn_q_norm.weight")
        or "position_embd.weight" in settings.tensors
        or settings.has("attn_qkv.bias")
    ):
        raise settings.unsupported("it is a variant of MPT")
    heads = settings.need("attention.head_count")
    if settings.get("attention.head_count_kv", heads) != heads:
        raise settings.unsupported("its heads share keys")
    alibi = settings.get("attention.max_alibi_bias", 0)
    if not alibi:
        raise settings.unsupported("it has no ALiBi")
    clip = settings.get("attention.clamp_kqv")
    return {
        "max_seq_len": settings.need("context_length"),
        "expansion_ratio": settings.need("feed_forward_length") // settings.need("embedding_length"),
        "attn_config": {"alibi": True, "alibi_bias_max": int(alibi), "clip_qkv": clip},
    }


def _stablelm(settings: ModelSettings) -> dict[str, Any]:
    return {
        "use_parallel_residual": not settings.has("ffn_norm.weight"),
        "use_qkv_bias": settings.has("attn_q.bias"),
        "qk_layernorm": settings.has("attn_q_norm.weight"),
    }


def _mamba(settings: ModelSettings) -> dict[str, Any]:
    if settings.get("ssm.dt_b_c_rms"):
        raise settings.unsupported("it is a variant of Mamba")
    inner, hidden = settings.need("ssm.inner_size"), settings.need("embedding_length")
    return {
        "intermediate_size": inner,
        "expand": inner // hidden,
        "state_size": settings.need("ssm.state_size"),
        "conv_kernel": settings.need("ssm.conv_kernel"),
        "time_step_rank": settings.need("ssm.time_step_rank"),
    }


def _cohere(settings: ModelSettings) -> dict[str, Any]:
    return {"logit_scale": settings.need("logit_scale"), "use_qk_norm": settings.has("attn_q_norm.weight")}


def _cohere2(settings: ModelSettings) -> dict[str, Any]:
    return _windows(settings, 4) | {"logit_scale": settings.need("logit_scale")}


def _gpt_oss(settings: ModelSettings) -> dict[str, Any]:
    rope = rope_parameters(settings)
    rope |= {"truncate": False} if rope["rope_type"] == "yarn" else {}
    width = settings.need("expert_feed_forward_length")
    return _windows(settings, 2) | _experts(settings) | {"rope_parameters": rope, "intermediate_size": width}


def _lfm2(settings: ModelSettings) -> dict[str, Any]:
    heads = settings.each("attention.head_count_kv") or [settings.positive("attention.head_count_kv")] * settings.layers
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_L_cache": settings.need("shortconv.l_cache"),
        "conv_bias": settings.has("shortconv.in_proj.bias"),
        "block_auto_adjust_ff_dim": False,
    }


def _olmo2(settings: ModelSettings) -> dict[str, Any]:
    if not settings.get("attention.sliding_window"):
        return {}
    ropes = _two_ropes(settings, settings.get("rope.freq_base", 10000.0))
    return {"model_type": "olmo3", **_windows(settings, 4), "rope_parameters": ropes}


def _exaone4(settings: ModelSettings) -> dict[str, Any]:
    if settings.layers == 64 and not settings.get("attention.sliding_window"):  # the first files of the 32B
        sliding = [layer % 4 < 3 for layer in range(64)]
        types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
        return {"sliding_window": 4096, "layer_types": types}
    return _windows(settings, 4)


def _granite(settings: ModelSettings) -> dict[str, Any]:
    return {
        "attention_multiplier": settings.get("attention.scale", settings.head_dim**-0.5),
        "embedding_multiplier": settings.get("embedding_scale", 1.0),
        "residual_multiplier": settings.get("residual_scale", 1.0),
        "logits_scaling": settings.get("logit_scale", 1.0),
    }


def _granitemoe(settings: ModelSettings) -> dict[str, Any]:
    shared = settings.get("expert_shared_feed_forward_length", 0)
    kind = {"model_type": "granitemoeshared", "shared_intermediate_size": shared} if shared else {}
    return _granite(settings) | _experts(settings) | kind


def _minicpm(settings: ModelSettings) -> dict[str, Any]:
    """The scales are those of Granite; the first files have none."""
    return {
        "attention_multiplier": settings.head_dim**-0.5,
        "embedding_multiplier": settings.get("embedding_scale", 12.0),
        "residual_multiplier": settings.get("residual_scale", 1.4 / settings.layers**0.5),
        "logits_scaling": settings.get("logit_scale", settings.need("embedding_length") / 256),
    }


def _ernie(settings: ModelSettings) -> dict[str, Any]:
    return {"use_bias": settings.has("attn_q.bias")}


def _seed_oss(settings: ModelSettings) -> dict[str, Any]:
    return {"attention_out_bias": settings.has("attn_output.bias")}


def _olmo(settings: ModelSettings) -> dict[str, Any]:
    return {"clip_qkv": settings.get("attention.clamp_kqv")}


def _baichuan(settings: ModelSettings) -> dict[str, Any]:
    if settings.layers != 32:
        raise settings.unsupported("only the 7B has rotary positions")
    return {}


ARCHITECTURES = {
    "apertus": Kind("apertus", changes=(changes.xielu,)),
    "arcee": Kind("arcee", changes=(changes.pairs,)),
    "baichuan": Kind("llama", _baichuan, (changes.pairs,)),
    "bloom": Kind("bloom", changes=(changes.by_head,)),
    "chatglm": Kind("glm"),
    "cohere2": Kind("cohere2", _cohere2),
    "command-r": Kind("cohere", _cohere),
    "deci": Kind("llama", changes=(changes.pairs,)),
    "deepseek2": Kind("deepseek_v2", _deepseek2, (changes.latent_values,), r"blk\.\d+\.attn_k_b\.weight"),
    "dots1": Kind("dots1", _dots1),
    "ernie4_5": Kind("ernie4_5", _ernie),
    "ernie4_5-moe": Kind("ernie4_5_moe", _ernie_moe, (changes.correction_matrix,)),
    "exaone": Kind("llama"),
    "exaone4": Kind("exaone4", _exaone4),
    "falcon": Kind("falcon", _falcon, (changes.by_group,)),
    "gemma": Kind("gemma", changes=(changes.norms_plus_one,)),
    "gemma2": Kind("gemma2", _gemma2, (changes.norms_plus_one,)),
    "gemma3": Kind("gemma3_text", _gemma3, (changes.norms_plus_one,)),
    "gemma4": Kind("gemma4_text", _gemma4, unused=r"blk\.\d+\.attn_(k|v|k_norm)\.weight"),  # where layers share keys
    "glm4": Kind("glm4"),
    "glm4moe": Kind("glm4_moe", _deepseek_experts),
    "gpt-oss": Kind("gpt_oss", _gpt_oss, (changes.gpt_oss_experts,)),
    "gpt2": Kind("gpt2", _gpt2, (changes.transposed,)),
    "gptneox": Kind("gpt_neox", _gptneox, (changes.by_head,)),
    "granite": Kind("granite", _granite, (changes.pairs,)),
    "granitemoe": Kind("granitemoe", _granitemoe, (changes.pairs,)),
    "hunyuan-dense": Kind("hunyuan_v1_dense"),
    "hunyuan-moe": Kind("hunyuan_v1_moe", _hunyuan_moe),
    "internlm2": Kind("llama", changes=(changes.pairs,)),
    "lfm2": Kind("lfm2", _lfm2, (changes.convolution,)),
    "llama": Kind("llama", _llama, (changes.pairs,)),
    "mamba": Kind("mamba", _mamba, (changes.convolution, changes.decay)),
    "minicpm": Kind("granite", _minicpm, (changes.pairs,)),
    "minimax-m2": Kind("minimax_m2", _minimax),
    "mistral3": Kind("ministral3", _ministral3, (changes.pairs,)),
    "mpt": Kind("mpt", _mpt),
    "nemotron": Kind("nemotron", changes=(changes.norms_plus_one,)),
    "olmo": Kind("olmo", _olmo, (changes.pairs,)),
    "olmo2": Kind("olmo2", _olmo2),
    "olmoe": Kind("olmoe", _experts),
    "phi2": Kind("phi"),
    "phi3": Kind("phi3", _phi3),
    "phimoe": Kind("phimoe", _phimoe),
    "qwen2": Kind("qwen2"),
    "qwen2moe": Kind("qwen2_moe", _qwen2moe),
    "qwen3": Kind("qwen3"),
    "qwen35": Kind("qwen3_5_text", _qwen35, changes.GATED_DELTA),
    "qwen35moe": Kind("qwen3_5_moe_text", _qwen35moe, changes.GATED_DELTA),
    "qwen3moe": Kind("qwen3_moe", _qwen3moe),
    "seed_oss": Kind("seed_oss", _seed_oss),
    "smollm3": Kind("smollm3", changes=(changes.pairs,)),
    "stablelm": Kind("stablelm", _stablelm, (changes.norm_of_each_head,)),
    "starcoder2": Kind("starcoder2"),
    "xverse": Kind("llama", changes=(changes.pairs,)),
}
