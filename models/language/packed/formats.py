"""How weights are packed: a function for each format, from the tensors of one weight to the weight in float32."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]  # the tensors of one weight, by what they are

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; the fourth bit is the sign
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where AWQ keeps each of eight neighbouring outputs in a word
WORD = 32
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights that are not packed


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The `count` numbers in each row of 32-bit words: (..., words) to (..., count), uint8.

    They follow each other from the lowest bit on, and may lie across two words.
    """
    padding = -words.shape[-1] % bits
    wide = torch.nn.functional.pad(words.long(), (0, padding)).reshape(*words.shape[:-1], -1, bits) & 0xFFFFFFFF
    numbers = []
    for index in range(WORD):
        word, shift = divmod(index * bits, WORD)
        number = wide[..., word] >> shift
        if shift + bits > WORD:
            number |= wide[..., word + 1] << WORD - shift
        numbers.append((number & (1 << bits) - 1).to(torch.uint8))
    return torch.stack(numbers, -1).flatten(-2)[..., :count]


def unpack_fp4(packed: Tensor) -> Tensor:
    """The two FP4 numbers of each byte, the low one first: (..., bytes) to (..., 2 * bytes)."""
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    return torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), -1).flatten(-2)


def gptq(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """GPTQ, as AutoGPTQ writes it: integers packed along the inputs, a scale and a zero for each group of inputs."""
    scales, bits = parts["scales"].float(), config["bits"]  # (groups, outputs)
    outputs, inputs = scales.shape[1], parts["qweight"].shape[0] * WORD // bits
    if "g_idx" in parts:
        group = parts["g_idx"].long()
    else:
        group = torch.arange(inputs) // _group_size(inputs, len(scales), config.get("group_size") or -1)
    numbers = unpack_bits(parts["qweight"].T, bits, inputs)  # (outputs, inputs)
    zeros = unpack_bits(parts["qzeros"], bits, outputs).int()  # (groups, outputs)
    if _name(config, "checkpoint_format", "format") != "gptq_v2":  # it keeps them less one
        zeros = zeros + 1 & (1 << bits) - 1
    return (numbers - zeros.T[:, group]) * scales.T[:, group]


def awq(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """AWQ in its format gemm: integers of 4 bits packed along the outputs, in an order of its own."""
    scales = parts["scales"].float()  # (groups, outputs)
    groups, outputs = scales.shape

    def numbers(words: Tensor) -> Tensor:
        return unpack_bits(words, 4, outputs).view(len(words), -1, 8)[..., AWQ_ORDER].flatten(-2).int()

    weight = numbers(parts["qweight"])  # (inputs, outputs)
    group = torch.arange(len(weight)) // (len(weight) // groups)
    return ((weight - numbers(parts["qzeros"])[group]) * scales[group]).T


def scaled(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """Integers, FP8 or FP4 with scales for the whole, for rows, groups or blocks.

    DeepSeek's FP8, FBGEMM, ModelOpt and compressed-tensors have this in common, and their tensors tell the rest.
    """
    if "weight" in parts and parts["weight"].dtype in PLAIN:  # whoever made it plain left its scales
        return parts["weight"].float()
    scale = _scale(parts)
    zeros = parts.get("zero_point")
    if "packed" in parts and parts["packed"].dtype == torch.int32:
        rows, columns = map(int, parts["shape"])
        bits = _bits(parts["packed"].shape[-1], columns, config)
        half = 1 << bits - 1
        weight = unpack_bits(parts["packed"], bits, columns).float() - half
        if zeros is not None and zeros.dtype == torch.int32:  # packed along the outputs
            zeros = unpack_bits(zeros.T, bits, rows).T.float() - half
    else:
        weight = parts["packed"] if "packed" in parts else parts["weight"]
        in_fp4 = weight.dtype == torch.uint8 or (weight.dtype == torch.int8 and config.get("quant_method") == "fp8")
        weight = unpack_fp4(weight.view(torch.uint8)) if in_fp4 else weight.float()
    group = parts.get("g_idx")
    blocks = _blocks(config)
    for tensor, combine in ((zeros, torch.sub), (scale, torch.mul)):
        if tensor is not None:
            if group is not None and bool((group >= 0).all()):
                tensor = tensor[:, group.long()]
            weight = combine(weight, _spread(tensor.float(), weight.shape, blocks))
    return weight


def mxfp4(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """MXFP4 of gpt-oss: (experts, outputs, groups, 16) bytes and a power of two for each group."""
    values = unpack_fp4(parts["blocks"]) * _power(parts["scales"])[..., None]
    return values.flatten(-2).transpose(-1, -2)  # (experts, inputs, outputs)


def bitsandbytes(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """bitsandbytes: int8 with a maximum for each row, or 4 bits of a table with a maximum for each block.

    The maxima may themselves be bytes of a table, with a maximum for each block of them.
    """
    if "SCB" in parts:
        return parts["weight"].float() * parts["SCB"].float()[:, None] / 127
    state = next(tensor for name, tensor in parts.items() if name.startswith("quant_state."))
    settings = json.loads(bytes(state.tolist()))
    maxima = parts["absmax"]
    if "nested_absmax" in parts:
        nested = parts["nested_absmax"].repeat_interleave(settings["nested_blocksize"])[: len(maxima)]
        maxima = parts["nested_quant_map"][maxima.long()] * nested + settings["nested_offset"]
    packed = parts["weight"].flatten()
    values = parts["quant_map"][torch.stack((packed >> 4, packed & 15), -1).flatten().long()]
    spread = maxima.repeat_interleave(settings["blocksize"])[: len(values)]
    shape: Sequence[int] = settings["shape"]
    return (values * spread)[: torch.Size(shape).numel()].view(*shape)


def _name(config: Mapping[str, Any], *names: str) -> Any:
    """The first of some settings that is there."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def _group_size(inputs: int, groups: int, named: int) -> int:
    """The inputs of a group: what the configuration says if that makes so many groups, which may not be so everywhere.

    Else all groups are alike. Raises ValueError if they cannot be.
    """
    if named > 0 and ceil(inputs / named) == groups:
        return named
    if inputs % groups:
        raise ValueError(f"{inputs} inputs cannot be in {groups} groups")
    return inputs // groups


def _bits(words: int, columns: int, config: Mapping[str, Any]) -> int:
    """The bits of integers that fill so many words of a row without a gap. Raises ValueError if that is not certain.

    Older versions of compressed-tensors leave a gap at the end of each word, unless whole integers fill it.
    """
    named = {weights["num_bits"] for weights in _weights(config) if weights.get("num_bits")}
    fitting = [bits for bits in named or range(1, 9) if ceil(columns * bits / WORD) == words]
    with_gaps = [bits for bits in fitting if WORD % bits and words == ceil(columns / (WORD // bits)) > 1]
    if len(fitting) != 1 or with_gaps:
        raise ValueError(f"{columns} integers in {words} words are packed in a way that is not known")
    return fitting[0]


def _power(exponents: Tensor) -> Tensor:
    """Two to the power of bytes with a bias of 127."""
    return torch.exp2(exponents.float() - 127)


def _scale(parts: Parts) -> Tensor | None:
    """The scales, with that of the whole weight if there is one."""
    scale = parts.get("scale_inv", parts.get("scale"))
    if scale is None:
        return None
    scale = _power(scale) if scale.dtype == torch.uint8 else scale.float()
    if "scale_2" in parts:
        scale = scale * parts["scale_2"].float()
    if "global_scale" in parts:
        scale = scale / parts["global_scale"].float()
    return scale


def _blocks(config: Mapping[str, Any]) -> list[Sequence[int]]:
    """The sizes of blocks, (outputs, inputs), that the configuration names."""
    blocks = [config.get("weight_block_size"), *(weights.get("block_structure") for weights in _weights(config))]
    return [block for block in blocks if block]


def _weights(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the configuration says about the weights of each of its groups."""
    groups = (config.get("config_groups") or {}).values()
    return [group.get("weights") or {} for group in groups if isinstance(group, Mapping)]  # else it is a preset


def _spread(scale: Tensor, shape: torch.Size, blocks: Sequence[Sequence[int]]) -> Tensor:
    """Scales of blocks, groups, rows or the whole, so that they can be multiplied with a weight of the shape."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1:
        scale = scale[:, None]
    for dimension in (-2, -1):
        size, count = shape[dimension], scale.shape[dimension]
        if count not in (1, size):
            sizes = [block[dimension] for block in blocks if ceil(size / block[dimension]) == count]
            if not sizes and size % count:
                raise ValueError(f"scales of the shape {tuple(scale.shape)} do not fit a weight of {tuple(shape)}")
            scale = scale.repeat_interleave((sizes or [size // count])[0], dimension).narrow(dimension, 0, size)
    return scale
