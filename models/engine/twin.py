"""A small twin of a model: its classes and its configuration, with few and narrow layers and random weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128  # tokens
WINDOW = 8  # positions that a layer with a window attends to
NARROW = 32  # the width of an inner layer


def make_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The twin of a model, in float32 on the CPU; takes some hundredths of a second.

    Raises any error if the model's classes do not take the small sizes.
    """
    return build(type(model), small(model.config))


def build(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, the same ones in each call."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        spread(model)
    model.train(False)
    return model


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration with some layers of each kind, few heads and experts, short windows. Everything else stays.

    So the head size stays, on which rotary embeddings depend in many ways.
    """
    values = copy.deepcopy(config.to_dict())
    values.pop("quantization_config", None)
    return type(config).from_dict(_shrunk(values))


@torch.no_grad()
def spread(model: PreTrainedModel) -> None:
    """Make all weights so large that each matters. New ones are near zero, so that attention would be nearly flat."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        elif spread := float(parameter.std()):
            parameter.mul_(1.5 / spread / parameter.shape[-1] ** 0.5)


@dataclass(frozen=True)
class _Sizes:
    """What other sizes depend on: the number of layers, those that stay, the number of heads before and after."""

    layers: int
    chosen: list[int]
    heads: int
    few: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> _Sizes:
        """The sizes of a configuration. Two heads, or four if pairs of them share keys."""
        numbers = {name: value for name, value in values.items() if type(value) is int}
        layers = max((value for name, value in numbers.items() if re.fullmatch(LAYERS, name)), default=0)
        key_heads = [value for name, value in numbers.items() if re.fullmatch(KEY_HEADS, name)]
        heads = max((value for name, value in numbers.items() if re.fullmatch(HEADS, name)), default=1)
        shared = bool(key_heads) and 1 < min(key_heads) < heads
        return cls(layers, _chosen_layers(values, layers), heads, 4 if shared else 2)

    def below(self, limit: int) -> int:
        """How many of the chosen layers are below a number."""
        return sum(layer < limit for layer in self.chosen)

    def share(self, value: int) -> int:
        """The part of a width, or of a number of heads of another kind, that belongs to the heads that stay."""
        if self.heads == 1:
            return min(value, 2 * NARROW)
        if self.heads <= self.few:
            return value
        if value % self.heads == 0:
            return value // self.heads * self.few
        return -(-value * self.few // self.heads // 16) * 16  # the heads have a size of their own


def _chosen_layers(values: dict[str, Any], layers: int) -> list[int]:
    """Some layers: the first two, one of each kind, and a whole period where kinds follow one."""
    kinds: list[list[Any]] = [[] for _ in range(layers)]  # what tells a layer from others
    first = 2
    for name, value in values.items():
        if _is_for_each_layer(value, layers):
            marks = list(value)
        elif _names_layers(name, value):
            marks = [layer in value or str(layer) in value for layer in range(layers)]
        elif type(value) is int and re.fullmatch(BOUNDARIES, name):
            marks = [layer < value for layer in range(layers)]
        elif type(value) is int and name == SHARING:
            marks = [layer < layers - value for layer in range(layers)]
        else:
            if type(value) is int and re.fullmatch(PERIODS, name):
                first = max(first, value)
            continue
        for kind, mark in zip(kinds, marks, strict=True):
            kind.append(mark)
    return [layer for layer in range(layers) if layer < first or kinds[layer] not in kinds[:layer]]


def _is_for_each_layer(value: Any, layers: int) -> bool:
    """Whether a list has the kind of each layer. There are few kinds; else it has a number for each layer."""
    return isinstance(value, (list, tuple)) and len(value) == layers and len({repr(part) for part in value}) <= 4


def _names_layers(name: str, value: Any) -> bool:
    """Whether a list, or the keys of a mapping, are the numbers of some layers."""
    return (
        isinstance(value, (list, tuple, dict))
        and re.search("layer|idx|indices", name) is not None
        and all(re.fullmatch(r"\d+", str(number)) for number in value)
    )


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    sizes = _Sizes.of(values)
    return {name: _shrunk_value(name, value, sizes) for name, value in values.items()}


def _shrunk_value(name: str, value: Any, sizes: _Sizes) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == sizes.layers:
        return [_shrunk_value(name, value[layer], sizes) for layer in sizes.chosen]
    if _names_layers(name, value):
        places = {layer: place for place, layer in enumerate(sizes.chosen)}
        if isinstance(value, dict):
            return {str(places[int(layer)]): part for layer, part in value.items() if int(layer) in places}
        return [places[layer] for layer in value if layer in places]
    if isinstance(value, dict) and "model_type" in value:  # a configuration of its own, such as that of the text
        return _shrunk(value)
    if type(value) is int:
        rule = next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, name)), None)
        return rule(value, sizes) if rule else value
    return value


def _at_most(limit: int) -> Callable[[int, _Sizes], int]:
    return lambda value, sizes: min(value, limit)


LAYERS = r"((num|n|encoder|decoder|num_encoder|num_decoder)_)?(hidden_)?(layers?|blocks)|num_layers_per_stack"
HEADS = r"(?!\w*(key_value|kv|mamba))(\w+_)?(n|num)_(\w+_)?heads?|((encoder|decoder)_)?attention_heads"
KEY_HEADS = r"(\w+_)?(key_value|kv)_(n_)?heads"
BOUNDARIES = r"first_k_dense_replace|num_dense_layers|max_window_layers"  # the first layers are of another kind
SHARING = "num_kv_shared_layers"  # the last ones use the keys and values of others
PERIODS = r"\w*(period|pattern|interval|every_n_layers|layer_group_size|sparse_step|layer_step)"
WIDTHS = r"(attention_)?hidden_size|d_model|n_embd|emb(edding)?_(dim|size)|word_\w+_dim|\w*mamba\w*_heads|mamba_d_ssm"
INNER_WIDTHS = r"\w*(intermediate|ffn_hidden)_size\w*|\w*ffn_dim|[nd]_inner|d?ff|dim_ff|hidden_size_per\w+"

RULES: dict[str, Callable[[int, _Sizes], int]] = {  # how a number becomes smaller, by a pattern of its name
    r"\w*vocab(_size\w*)?": _at_most(VOCABULARY),
    r"\w+_token_id": _at_most(VOCABULARY - 1),
    SHARING: lambda value, sizes: len(sizes.chosen) - sizes.below(sizes.layers - value),
    BOUNDARIES: lambda value, sizes: sizes.below(value),
    LAYERS: lambda value, sizes: min(value, len(sizes.chosen)),
    KEY_HEADS: lambda value, sizes: sizes.few if value == sizes.heads else min(value, 2),
    HEADS: lambda value, sizes: min(value, sizes.few),
    WIDTHS: lambda value, sizes: sizes.share(value),
    INNER_WIDTHS: _at_most(NARROW),
    r"num_experts_per_tok(en)?|moe_(top_?)?k|top_k_experts|n_group|num_expert_group|(mamba_)?n_?groups": _at_most(2),
    r"(moe_)?(num|n)_(routed_|local_)?experts": _at_most(8),
    "topk_group": _at_most(1),
    r"sliding_window(_size)?|attention_(chunk|window)_size|window_size|local_attention": _at_most(WINDOW),
}
