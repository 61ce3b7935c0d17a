"""transformers' configuration of the model in a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from models.errors import ModelError, one_line
from models.language.gguf.architectures import Kind
from models.language.gguf.rope import rope_parameters
from models.language.gguf.settings import ModelSettings

logger = logging.getLogger("parley")


def make_config(kind: Kind, settings: ModelSettings) -> PreTrainedConfig:
    """The configuration. Raises ModelError."""
    if settings.get("attention.causal", True) is False:
        raise settings.unsupported("it does not write text")
    special = {"model_type": kind.model_type} | kind.settings(settings)
    model_type = special.pop("model_type")
    try:
        config_class = CONFIG_MAPPING[model_type]
        known = {field.name for field in fields(config_class)} | config_class.attribute_map.keys()
        common = {name: read(settings) for name, read in COMMON.items() if name in known and name not in special}
        config = AutoConfig.for_model(model_type, **common | special)
    except ModelError:
        raise
    except Exception as error:  # the configurations check their values, each with errors of its own
        raise ModelError(f"{settings.path} cannot be loaded: {one_line(error)}") from error
    if unknown := settings.unknown():
        logger.warning(
            "%s has settings that Parley does not know, so replies may be worse than they should: %s",
            settings.path,
            ", ".join(unknown),
        )
    return config


def _key_heads(settings: ModelSettings) -> int:
    return int(settings.positive("attention.head_count_kv", settings.need("attention.head_count")))


def _head_dim(settings: ModelSettings) -> int:
    if (values := settings.get("attention.value_length", settings.head_dim)) != settings.head_dim:
        raise settings.unsupported(f"its heads have keys of {settings.head_dim} and values of {values}")
    return settings.head_dim


def _epsilon(settings: ModelSettings) -> float:
    names = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    name = next((name for name in names if settings.get(name) is not None), names[0])
    return float(settings.positive(name))


COMMON: dict[str, Callable[[ModelSettings], Any]] = {  # settings that many configurations have, by their names there
    "vocab_size": lambda settings: settings.tensor("token_embd.weight").shape[0],
    "max_position_embeddings": lambda settings: settings.need("context_length"),
    "hidden_size": lambda settings: settings.need("embedding_length"),
    "intermediate_size": lambda settings: settings.need("feed_forward_length"),
    "num_hidden_layers": lambda settings: settings.layers,
    "num_attention_heads": lambda settings: settings.positive("attention.head_count"),
    "num_key_value_heads": _key_heads,
    "head_dim": _head_dim,
    "rms_norm_eps": _epsilon,
    "layer_norm_eps": _epsilon,
    "layer_norm_epsilon": _epsilon,
    "norm_epsilon": _epsilon,
    "norm_eps": _epsilon,
    "sliding_window": lambda settings: None,
    "rope_parameters": rope_parameters,
    "tie_word_embeddings": lambda settings: "output.weight" not in settings.tensors,
    "attention_bias": lambda settings: settings.has("attn_q.bias"),
    "use_bias": lambda settings: settings.has("attn_q.bias"),
    "mlp_bias": lambda settings: settings.has("ffn_up.bias"),
    "bos_token_id": lambda settings: settings.metadata.get("tokenizer.ggml.bos_token_id"),
    "eos_token_id": lambda settings: settings.metadata.get("tokenizer.ggml.eos_token_id"),
    "pad_token_id": lambda settings: settings.metadata.get("tokenizer.ggml.padding_token_id"),
}
