"""Packs numbers as the formats of packed checkpoints do, one by one and slowly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
AWQ = [0, 2, 4, 6, 1, 3, 5, 7]  # the output in each place of a word


def pack_row(numbers: Sequence[int], bits: int) -> list[int]:
    """Numbers one after another from the lowest bit on, as signed words of 32 bits."""
    joined = sum(number << index * bits for index, number in enumerate(numbers))
    words = [joined >> 32 * index & 0xFFFFFFFF for index in range(-(-len(numbers) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def pack_rows(numbers: Tensor, bits: int) -> Tensor:
    """Each row packed: (rows, numbers) to (rows, words)."""
    return torch.tensor([pack_row(row, bits) for row in numbers.tolist()], dtype=torch.int32)


def integers(bits: int, *shape: int) -> Tensor:
    """Random integers of some bits."""
    return torch.randint(0, 1 << bits, shape)


def pack_gptq(
    weight: str, bits: int, outputs: int, inputs: int, group: int, zeros_less_one: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a random weight in GPTQ, and the weight."""
    numbers, zeros = integers(bits, outputs, inputs), integers(bits, inputs // group, outputs)
    scales = torch.rand(inputs // group, outputs).half()
    tensors = {
        "qweight": pack_rows(numbers, bits).T.contiguous(),
        "qzeros": pack_rows((zeros - int(zeros_less_one)) % (1 << bits), bits),
        "scales": scales,
        "g_idx": torch.arange(inputs, dtype=torch.int32) // group,
    }
    expected = (numbers - zeros.T.repeat_interleave(group, 1)) * scales.T.repeat_interleave(group, 1).float()
    return {f"{weight.removesuffix('weight')}{name}": tensor for name, tensor in tensors.items()}, expected


def pack_awq(weight: str, outputs: int, inputs: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a random weight in AWQ, and the weight."""
    numbers, zeros = integers(4, inputs, outputs), integers(4, inputs // group, outputs)
    scales = torch.rand(inputs // group, outputs).half()
    order = [8 * word + place for word in range(outputs // 8) for place in AWQ]
    tensors = {"qweight": pack_rows(numbers[:, order], 4), "qzeros": pack_rows(zeros[:, order], 4), "scales": scales}
    expected = (numbers - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0).float()
    return {f"{weight.removesuffix('weight')}{name}": tensor for name, tensor in tensors.items()}, expected.T


def pack_fp8(weight: str, outputs: int, inputs: int, block: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a random weight in blocks of FP8, and the weight."""
    values = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-outputs // block), -(-inputs // block)) + 0.5
    spread = scales.repeat_interleave(block, 0)[:outputs].repeat_interleave(block, 1)[:, :inputs]
    return {weight: values, f"{weight}_scale_inv": scales}, values.float() * spread


def pack_compressed(
    weight: str, bits: int, outputs: int, inputs: int, group: int, symmetric: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a random weight in the format pack-quantized of compressed-tensors, and the weight."""
    half = 1 << bits - 1
    numbers, scales = integers(bits, outputs, inputs), torch.rand(outputs, inputs // group)
    zeros = torch.full(scales.shape, half) if symmetric else integers(bits, *scales.shape)
    tensors = {
        f"{weight}_packed": pack_rows(numbers, bits),
        f"{weight}_scale": scales,
        f"{weight}_shape": torch.tensor([outputs, inputs]),
    }
    if not symmetric:
        tensors[f"{weight}_zero_point"] = pack_rows(zeros.T, bits).T.contiguous()
    expected = (numbers - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
    return tensors, expected


def pack_fp4(numbers: Tensor) -> Tensor:
    """Numbers from 0 to 15, two in a byte, the first one low."""
    return (numbers[..., ::2] | numbers[..., 1::2] << 4).to(torch.uint8)


def fp4_values(numbers: Tensor) -> Tensor:
    return torch.tensor(FP4)[numbers]
