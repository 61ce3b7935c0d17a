from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from models.language.packed import formats
from tests.support.packed import (
    fp4_values,
    integers,
    pack_awq,
    pack_compressed,
    pack_fp4,
    pack_fp8,
    pack_gptq,
    pack_row,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def parts_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors by what they are."""
    return {name.removeprefix(prefix).lstrip("_.") or "weight": tensor for name, tensor in tensors.items()}


# Bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 96, 100])
def test_numbers_of_any_width_are_unpacked(bits: int, count: int) -> None:
    numbers = integers(bits, count)
    words = torch.tensor([pack_row(numbers.tolist(), bits)] * 2, dtype=torch.int32)
    assert torch.equal(formats.unpack_bits(words, bits, count), numbers.to(torch.uint8).repeat(2, 1))


def test_fp4_numbers_are_unpacked() -> None:
    numbers = torch.arange(16).repeat(2, 1)
    assert torch.equal(formats.unpack_fp4(pack_fp4(numbers)), fp4_values(numbers))


# GPTQ and AWQ


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_unpacked(bits: int) -> None:
    tensors, expected = pack_gptq("weight", bits, 64, 96, 32)
    config = {"bits": bits, "group_size": 32}
    assert torch.equal(formats.gptq(tensors, config), expected)
    del tensors["g_idx"]
    assert torch.equal(formats.gptq(tensors, config), expected)


@pytest.mark.parametrize("setting", ["checkpoint_format", "format"])
def test_the_second_version_of_gptq_keeps_its_zeros_as_they_are(setting: str) -> None:
    tensors, expected = pack_gptq("weight", 4, 64, 96, 32, zeros_less_one=False)
    assert torch.equal(formats.gptq(tensors, {"bits": 4, setting: "gptq_v2"}), expected)


def test_gptq_groups_may_have_any_order() -> None:
    tensors, expected = pack_gptq("weight", 4, 64, 96, 32)
    order = torch.randperm(96)
    numbers = formats.unpack_bits(tensors["qweight"].T, 4, 96)[:, order]
    shuffled = torch.tensor([pack_row(row, 4) for row in numbers.tolist()], dtype=torch.int32).T
    parts = tensors | {"qweight": shuffled, "g_idx": tensors["g_idx"][order]}
    assert torch.equal(formats.gptq(parts, {"bits": 4, "group_size": 32}), expected[:, order])


def test_gptq_with_one_group_is_unpacked() -> None:
    tensors, expected = pack_gptq("weight", 4, 64, 96, 96)
    del tensors["g_idx"]
    assert torch.equal(formats.gptq(tensors, {"bits": 4, "group_size": -1}), expected)


@pytest.mark.parametrize("named", [-1, 32, 40, None])
def test_the_groups_of_gptq_are_as_many_as_there_are_scales(named: int | None) -> None:
    tensors, expected = pack_gptq("weight", 4, 64, 96, 16)
    del tensors["g_idx"]
    assert torch.equal(formats.gptq(tensors, {"bits": 4, "group_size": named}), expected)


def test_the_last_group_of_gptq_may_be_smaller() -> None:
    tensors, _ = pack_gptq("weight", 4, 64, 96, 32)
    expected = formats.gptq(tensors | {"g_idx": torch.arange(96) // 40}, {"bits": 4, "group_size": 40})
    del tensors["g_idx"]
    assert torch.equal(formats.gptq(tensors, {"bits": 4, "group_size": 40}), expected)


def test_groups_of_gptq_that_do_not_fit_are_refused() -> None:
    tensors, _ = pack_gptq("weight", 4, 64, 96, 32)
    del tensors["g_idx"]
    tensors["scales"] = torch.rand(5, 64)
    with pytest.raises(ValueError, match="96 inputs cannot be in 5 groups"):
        formats.gptq(tensors, {"bits": 4, "group_size": 32})


def test_awq_is_unpacked() -> None:
    tensors, expected = pack_awq("weight", 64, 96, 32)
    assert torch.equal(formats.awq(tensors, {"bits": 4}), expected)


# Scales


@pytest.mark.parametrize(("outputs", "inputs"), [(128, 128), (256, 384), (200, 300), (64, 576)])
def test_fp8_in_blocks_is_unpacked(outputs: int, inputs: int) -> None:
    tensors, expected = pack_fp8("weight", outputs, inputs, 128)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert torch.equal(formats.scaled(parts_of(tensors, "weight"), config), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1), (64, 3)], ids=str)
def test_a_scale_for_all_for_rows_and_for_groups_is_applied(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, scale = (torch.randn(64, 96) * 20).to(dtype), torch.rand(shape)
    spread = scale.view(-1, 1) if scale.ndim == 1 else scale
    expected = weight.float() * (spread.repeat_interleave(32, 1) if shape == (64, 3) else spread)
    assert torch.equal(formats.scaled({"weight": weight, "scale": scale}, {}), expected)


def test_scales_of_three_dimensions_are_applied() -> None:
    weight, scale = torch.randn(2, 256, 128).to(torch.float8_e4m3fn), torch.rand(2, 2, 1)
    config = {"weight_block_size": [128, 128]}
    expected = weight.float() * scale.repeat_interleave(128, 1)
    assert torch.equal(formats.scaled({"weight": weight, "scale_inv": scale}, config), expected)


def test_scales_that_do_not_fit_are_refused() -> None:
    parts = {"weight": torch.randn(64, 96).to(torch.float8_e4m3fn), "scale": torch.rand(5, 7)}
    with pytest.raises(ValueError, match="do not fit a weight"):
        formats.scaled(parts, {})


def test_int8_with_zeros_is_unpacked() -> None:
    weight, scale, zeros = integers(8, 64, 96) - 128, torch.rand(64, 1), integers(8, 64, 1) - 128
    parts = {"weight": weight.to(torch.int8), "scale": scale, "zero_point": zeros.to(torch.int8)}
    assert torch.equal(formats.scaled(parts, {}), (weight - zeros) * scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [32, 132], ids=["groups", "rows"])
def test_packed_integers_of_compressed_tensors_are_unpacked(bits: int, symmetric: bool, group: int) -> None:
    inputs = 96 if group == 32 else 132
    tensors, expected = pack_compressed("weight", bits, 72, inputs, group, symmetric)
    assert torch.equal(formats.scaled(parts_of(tensors, "weight"), {}), expected)


def with_gaps(numbers: Tensor, bits: int) -> Tensor:
    """Rows packed as older versions of compressed-tensors do: no number lies across two words."""
    whole = 32 // bits
    rows = [[row[first : first + whole] for first in range(0, len(row), whole)] for row in numbers.tolist()]
    return torch.tensor([[pack_row(word, bits)[0] for word in row] for row in rows], dtype=torch.int32)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("columns", [11, 64, 100, 576])
def test_integers_with_gaps_between_them_are_refused(bits: int, columns: int) -> None:
    parts = {
        "packed": with_gaps(integers(bits, 8, columns), bits),
        "scale": torch.ones(8, 1),
        "shape": torch.tensor([8, columns]),
    }
    config = {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}
    with pytest.raises(ValueError, match=f"{columns} integers in .* words are packed in a way that is not known"):
        formats.scaled(parts, config)


def test_integers_of_bits_that_the_words_do_not_tell_are_those_of_the_configuration() -> None:
    tensors, expected = pack_compressed("weight", 4, 72, 5, 5, True)
    parts = parts_of(tensors, "weight")
    with pytest.raises(ValueError, match="5 integers in 1 words are packed in a way that is not known"):
        formats.scaled(parts, {})
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    assert torch.equal(formats.scaled(parts, config), expected)


def test_groups_of_compressed_tensors_may_have_any_order() -> None:
    tensors, _ = pack_compressed("weight", 4, 64, 96, 32, symmetric=False)
    parts = parts_of(tensors, "weight")
    group = torch.arange(96) // 32
    order = torch.randperm(96)
    expected = formats.scaled(parts, {})
    numbers = formats.unpack_bits(parts["packed"], 4, 96)[:, order]
    shuffled = torch.tensor([pack_row(row, 4) for row in numbers.tolist()], dtype=torch.int32)
    result = formats.scaled(parts | {"packed": shuffled, "g_idx": group[order].int()}, {})
    assert torch.equal(result, expected[:, order])


@pytest.mark.parametrize("names", [("packed", "global_scale"), ("weight", "scale_2")], ids=["compressed", "modelopt"])
def test_nvfp4_is_unpacked(names: tuple[str, str]) -> None:
    numbers, scale, whole = integers(4, 64, 96), torch.rand(64, 6).to(torch.float8_e4m3fn), torch.tensor([2.0])
    parts = {names[0]: pack_fp4(numbers), "scale": scale, names[1]: whole}
    factor = 0.5 if names[1] == "global_scale" else 2.0
    expected = fp4_values(numbers) * scale.float().repeat_interleave(16, 1) * factor
    assert torch.equal(formats.scaled(parts, {}), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_fp4_with_powers_of_two_is_unpacked(dtype: torch.dtype) -> None:
    numbers, exponents = integers(4, 64, 96), integers(3, 64, 3) + 124
    parts = {"weight": pack_fp4(numbers).view(dtype), "scale_inv": exponents.to(torch.uint8)}
    expected = fp4_values(numbers) * torch.exp2(exponents - 127.0).repeat_interleave(32, 1)
    assert torch.equal(formats.scaled(parts, {"quant_method": "fp8"}), expected)


# MXFP4 and bitsandbytes


def test_mxfp4_is_unpacked() -> None:
    numbers, exponents = integers(4, 2, 10, 3, 32), integers(3, 2, 10, 3) + 124
    parts = {"blocks": pack_fp4(numbers), "scales": exponents.to(torch.uint8)}
    expected = (fp4_values(numbers) * torch.exp2(exponents - 127.0)[..., None]).flatten(2).transpose(1, 2)
    assert torch.equal(formats.mxfp4(parts, {}), expected)


def bitsandbytes_parts(nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A random weight of 48 to 40, in blocks of 64, and the weight."""
    numbers, table = integers(4, 48 * 40), torch.sort(torch.randn(16)).values
    settings = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [48, 40]}
    maxima = torch.rand(30)
    parts = {"weight": (numbers[::2] << 4 | numbers[1::2]).to(torch.uint8)[:, None], "quant_map": table}
    if nested:
        codes, inner, map_ = integers(8, 30), torch.rand(2), torch.rand(256)
        settings |= {"nested_blocksize": 16, "nested_offset": 0.25, "nested_dtype": "float32"}
        maxima = map_[codes] * inner.repeat_interleave(16)[:30] + 0.25
        parts |= {"absmax": codes.to(torch.uint8), "nested_absmax": inner, "nested_quant_map": map_}
    else:
        parts["absmax"] = maxima
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    return parts, (table[numbers] * maxima.repeat_interleave(64)).view(48, 40)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_four_bits_is_unpacked(nested: bool) -> None:
    parts, expected = bitsandbytes_parts(nested)
    assert torch.equal(formats.bitsandbytes(parts, {}), expected)


def test_bitsandbytes_in_eight_bits_is_unpacked() -> None:
    weight, maxima = integers(8, 48, 40) - 128, torch.rand(48)
    parts = {"weight": weight.to(torch.int8), "SCB": maxima}
    torch.testing.assert_close(formats.bitsandbytes(parts, {}), weight / 127 * maxima[:, None])
