from __future__ import annotations

import itertools

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from models.engine.quantized_weight import BLOCK_TYPES, Format, QuantizedWeight
from tests.support import gguf_blocks

pytestmark = pytest.mark.compiler

EXACT = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"}
STEPS = 127

all_types = pytest.mark.parametrize("type", [GGMLQuantizationType(type) for type in BLOCK_TYPES], ids=lambda t: t.name)
all_formats = pytest.mark.parametrize("format", list(Format), ids=lambda format: format.name)


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def random_blocks(type: GGMLQuantizationType, outputs: int, inputs: int) -> Tensor:
    return torch.from_numpy(gguf_blocks.random_blocks(type, (outputs, inputs)))


def values(type: GGMLQuantizationType, blocks: Tensor) -> Tensor:
    return torch.from_numpy(dequantize(blocks.numpy(), type))


def numbers(weight: QuantizedWeight) -> Tensor:
    return weight.rows(torch.arange(weight.outputs))


def weight_of(format: Format, outputs: int, inputs: int) -> QuantizedWeight:
    type = next(type for type, kept in BLOCK_TYPES.items() if kept == format)
    return QuantizedWeight.of_blocks(random_blocks(GGMLQuantizationType(type), outputs, inputs), type)


def linear(x: Tensor, *weights: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    panels, formats = [weight.panels for weight in weights], [int(weight.format) for weight in weights]
    result: Tensor = torch.ops.parley.linear(x, panels, bias, formats, [weight.outputs for weight in weights])
    return result


def rounded(x: Tensor) -> Tensor:
    """Activations as the kernel rounds them: to a byte in groups of 32, or to two in groups that stand out."""
    groups = x.double().view(len(x), -1, 32)
    tops = groups.abs().amax(-1, keepdim=True).clamp(min=1e-20)
    outstanding = tops > 1.5 * tops.square().mean(1, keepdim=True).sqrt()
    unit = torch.where(outstanding, tops / STEPS / 128, tops / STEPS)
    return ((groups / unit).round() * unit).view(x.shape)


def error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@all_types
def test_blocks_keep_their_numbers(type: GGMLQuantizationType) -> None:
    blocks = random_blocks(type, 40, 512)
    expected, result = values(type, blocks), numbers(QuantizedWeight.of_blocks(blocks, type))
    if type.name in EXACT:
        assert torch.equal(result, expected)
    else:  # products of two scales are rounded to half floats
        assert (result - expected).abs().max() < 5e-4 * expected.abs().max()


@all_formats
def test_a_format_says_how_many_bits_a_weight_takes(format: Format) -> None:
    weight = weight_of(format, 64, 512)
    assert weight.panels.nbytes * 8 == weight.count * format.bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_any_dtype_become_the_nearest_of_eight_bits(dtype: torch.dtype) -> None:
    original = random(70, 256).to(dtype)
    groups = original.double().view(70, -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / STEPS).float().half().double()
    expected = ((groups / scale).round().clamp(-STEPS, STEPS) * scale).view(70, 256)
    result = numbers(QuantizedWeight.of_numbers(original)).double()
    assert (result - expected).abs().max() < 1e-2 * scale.max()


def test_four_bits_are_fitted_better_than_between_least_and_most() -> None:
    original = random(64, 512)
    groups = original.view(64, -1, 32)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    simple = (((groups - least) / (most - least) * 15).round() / 15 * (most - least) + least).view(64, 512)
    fitted = numbers(QuantizedWeight.of_numbers(original, Format.Q4_1))
    assert error(fitted, original) < 0.98 * error(simple, original)


@pytest.mark.parametrize("format", [Format.Q8_0, Format.Q4_1], ids=lambda format: format.name)
def test_equal_numbers_and_zeros_stay(format: Format) -> None:
    original = torch.zeros(3, 64)
    original[1] = 0.5
    assert torch.allclose(numbers(QuantizedWeight.of_numbers(original, format)), original, atol=1e-3)


@all_formats
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 23])
def test_a_result_is_that_of_rounded_inputs_and_the_weights(format: Format, rows: int) -> None:
    weight, x = weight_of(format, 40, 512), random(rows, 512)
    assert error(linear(x, weight), rounded(x) @ numbers(weight).double().T) < 1e-5


@all_formats
def test_a_group_that_stands_out_is_rounded_to_two_bytes(format: Format) -> None:
    weight, x = weight_of(format, 33, 512), random(7, 512)
    x[2, 64:96] *= 30
    x[5, 70] = 500
    result = linear(x, weight)
    assert error(result, rounded(x) @ numbers(weight).double().T) < 1e-5
    one_byte = x.view(7, -1, 32) / (unit := x.view(7, -1, 32).abs().amax(-1, keepdim=True) / STEPS)
    plain = (one_byte.round() * unit).view(x.shape) @ numbers(weight).T
    exact = x @ numbers(weight).T
    assert error(result[2], exact[2]) < 0.5 * error(plain[2], exact[2])


@pytest.mark.usefixtures("two_threads")
@all_formats
def test_a_row_is_equal_to_the_bit_in_any_batch(format: Format) -> None:
    weight, x = weight_of(format, 100, 256), random(23, 256)
    x[3] *= 1000
    x[::4, 40] = 50
    alone = torch.cat([linear(row[None], weight) for row in x])
    for start, end in itertools.combinations((0, 1, 2, 4, 7, 11, 16, 23), 2):
        assert torch.equal(linear(x[start:end], weight), alone[start:end])


@pytest.mark.usefixtures("two_threads")
def test_joined_weights_of_several_formats_give_the_bits_of_each() -> None:
    weights = [weight_of(format, outputs, 256) for format, outputs in zip(Format, range(31, 67, 4), strict=True)]
    x = random(6, 256)
    bias = random(sum(weight.outputs for weight in weights), seed=1)
    joined = linear(x, *weights, bias=bias)
    assert torch.equal(joined, torch.cat([linear(x, weight) for weight in weights], 1) + bias)


@pytest.mark.parametrize("size", [1e-30, 1e-13, 1e-6, 1e4, 1e30])
def test_inputs_of_any_size_are_exact_or_vanish(size: float) -> None:
    weight, x = weight_of(Format.Q8_0, 24, 64), random(5, 64) * size
    result = linear(x, weight)
    assert result.isfinite().all()
    if size > 1e-18:
        assert error(result / size, rounded(x) @ numbers(weight).double().T / size) < 1e-5


def test_rows_of_zeros_give_the_bias() -> None:
    weight, bias = weight_of(Format.Q4_1, 50, 64), random(50)
    assert torch.equal(linear(torch.zeros(3, 64), weight, bias=bias), bias.expand(3, -1))


def test_rows_of_a_matrix_are_unpacked_in_any_order() -> None:
    weight = weight_of(Format.Q5_1, 100, 64)
    wanted = torch.tensor([99, 0, 0, 33])
    assert torch.equal(weight.rows(wanted), numbers(weight)[wanted])


@pytest.mark.usefixtures("two_threads")
@all_formats
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_experts_compute_what_the_linear_of_each_does(format: Format, bias: bool) -> None:
    experts, outputs, inputs = 5, 64, 256
    matrices = [weight_of(format, outputs * experts, inputs).panels.view(experts, -1)[i] for i in range(experts)]
    x, chosen = random(9, inputs), torch.tensor([[0, 3], [3, 0], [4, 4], *[[3, 1]] * 6])
    biases = random(experts, outputs, seed=2) if bias else None
    result = torch.ops.parley.linear_of_experts(x, chosen, torch.stack(matrices), biases, int(format), outputs)
    for token, choices in enumerate(chosen.tolist()):
        for place, expert in enumerate(choices):
            one = None if biases is None else biases[expert]
            expected = torch.ops.parley.linear(x[token, None], [matrices[expert]], one, [int(format)], [outputs])
            assert torch.equal(result[token, place], expected[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: linear(random(2, 96), w), "as many bytes as its outputs and 96 inputs need"),
        (lambda w: linear(random(2, 60), w), "inputs in groups of 32"),
        (lambda w: linear(random(2, 64).double(), w), "must be contiguous float32"),
        (lambda w: linear(random(2, 64), w, bias=random(3)), "the bias must be contiguous float32 of 40"),
        (lambda w: w.rows(torch.tensor([40])), "row 40 is not one of 40"),
        (lambda w: w.rows(torch.tensor([-1])), "row -1 is not one of 40"),
        (lambda w: QuantizedWeight.of_blocks(torch.zeros(2, 19, dtype=torch.uint8), 2), "no blocks of 18"),
        (lambda w: QuantizedWeight.of_blocks(torch.zeros(2, 18, dtype=torch.uint8), 99), "type 99 cannot be packed"),
        (lambda w: QuantizedWeight.of_numbers(random(2, 48)), "groups of 32"),
        (lambda w: QuantizedWeight.of_numbers(random(2, 64), Format.Q5_0), "Q8_0 or Q4_1 only"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    weight = weight_of(Format.Q8_0, 40, 64)
    with pytest.raises(RuntimeError, match=message):
        call(weight)  # type: ignore[operator]
