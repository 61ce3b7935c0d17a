"""What llama.cpp's converter does to tensors, reverted: each function knows one kind of change.

A `Change` gets the name of a parameter in the model, its source by name (None if the file has no tensor of that name),
and the settings. It returns the source that gives the model's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from models.language.gguf.settings import ModelSettings
from models.language.gguf.tensors import Source

Change = Callable[[str, Source | None, ModelSettings], Source | None]


def pairs(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """Rows of queries and keys lie in the pairs that are rotated together: (0, half), (1, half + 1) ... of a head."""
    if source is None or not name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        return source
    order = torch.arange(source.shape[0]).view(-1, settings.head_dim // 2, 2)
    return source.take(order.transpose(1, 2).flatten())


def by_head(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """All queries, then all keys, then all values; the model has the three of each head together."""
    if source is None or ".query_key_value." not in name:
        return source
    return source.take(torch.arange(source.shape[0]).view(3, -1, settings.head_dim).transpose(0, 1).flatten())


def by_group(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """All queries, all keys, all values; the model has them together for each group of heads that share keys."""
    if source is None or ".query_key_value." not in name:
        return source
    heads, groups = settings.need("attention.head_count"), settings.get("attention.head_count_kv", 1)
    rows = torch.arange(source.shape[0]).view(-1, settings.head_dim)
    parts = [part.reshape(groups, -1, settings.head_dim) for part in torch.split(rows, [heads, groups, groups])]
    return source.take(torch.cat(parts, 1).flatten())


def transposed(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """Linears are (out, in); GPT-2's are (in, out)."""
    if source is None or not name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return source
    return replace(source, transposed=True)


def norms_plus_one(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """Norms are stored plus one."""
    return source and (replace(source, change=_minus_one) if name.endswith("norm.weight") else source)


def norm_of_each_head(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """One tensor of all heads' norms, which are parameters of their own in StableLM."""
    parent, found, head = name.removesuffix(".weight").partition("_layernorm.norms.")
    if not found:
        return source
    layer, letter = parent.split(".")[-3], parent[-1]
    stored = settings.tensor(f"blk.{layer}.attn_{letter}_norm.weight")
    return Source((stored,), change=lambda values: values[int(head)])


def gpt_oss_experts(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """Experts are (out, in), with gate and up apart; the model has (in, out), with gate and up in turns."""
    if name.endswith("experts.down_proj"):
        return source and replace(source, transposed=True)
    if source is None or ".experts.gate_up_proj" not in name:
        return source
    if not name.endswith("_bias"):
        return replace(source.take(_in_turns(source.shape[-2])), transposed=True)
    turns = _in_turns(source.shape[-1])
    return replace(source, change=lambda values: values[:, turns])


def convolution(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """Kernels of convolutions have no dimension for the channels of a group, of which there is one."""
    if source is None or not name.endswith(("conv.conv.weight", "conv1d.weight")):
        return source
    return replace(source, change=lambda values: values.unsqueeze(1))


def decay(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """Mamba's A is stored, and the model has the logarithm of -A."""
    return source and (replace(source, change=_log_of_negative) if name.endswith(".A_log") else source)


def correction_matrix(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """The correction of the experts' scores is a vector; in Ernie, it is a matrix of one row."""
    if source is None or not name.endswith("e_score_correction_bias"):
        return source
    return replace(source, change=lambda values: values.view(1, -1))


def xielu(name: str, source: Source | None, settings: ModelSettings) -> Source | None:
    """The numbers of Apertus' activations are in the metadata, one for each layer."""
    before, found, field = name.partition(".act_fn.")
    if not found:
        return source
    numbers = settings.metadata.get(f"xielu.{field}")
    if numbers is None:
        return None
    number = numbers[int(before.split(".")[-2])] if isinstance(numbers, list) else numbers
    shape = (1,) if field.startswith("alpha") else ()
    return Source((), change=lambda values: torch.full(shape, number))


def _in_turns(rows: int) -> Tensor:
    """The order that takes a row of the first half and one of the second in turns."""
    return torch.arange(rows).view(2, -1).T.flatten()


def _minus_one(values: Tensor) -> Tensor:
    return values - 1


def _log_of_negative(values: Tensor) -> Tensor:
    return torch.log(-values)
