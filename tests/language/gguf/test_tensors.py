"""Tensors of GGUF files, of each kind, and the parameters that are made of them."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from models.errors import ModelError
from models.language.gguf.header import read_header
from models.language.gguf.tensors import PLAIN, Source, StoredTensor
from tests.support.gguf_models import write_gguf

# Those that the gguf package cannot read: two that are for activations, in no file, and a new one.
UNREADABLE = {GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K, GGMLQuantizationType.Q1_0}
KINDS = [kind for kind in GGML_QUANT_SIZES if kind not in PLAIN and kind not in UNREADABLE]


def stored(path: Path, kind: GGMLQuantizationType, rows: int = 3) -> StoredTensor:
    """A tensor of random blocks, with scales that are small numbers."""
    block, size = GGML_QUANT_SIZES[kind]
    data = numpy.random.default_rng(0).integers(0, 60, (rows, 2 * size), dtype=numpy.uint8)
    write_gguf(path, {"general.architecture": "llama"}, {"x.weight": data}, {"x.weight": kind})
    tensor = read_header(path).tensors["x.weight"]
    assert tensor.shape == (rows, 2 * block)
    assert tensor.read().numpy().tobytes() == data.tobytes()
    return tensor


def numbers(path: Path, **tensors: torch.Tensor) -> dict[str, StoredTensor]:
    """Tensors in float32."""
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    return read_header(write_gguf(path, {"general.architecture": "llama"}, arrays)).tensors


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_of_a_quantization_are_those_of_the_gguf_package(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    tensor = stored(tmp_path / "model.gguf", kind)
    values = tensor.values()
    expected = dequantize(tensor.read().numpy(), kind)
    assert values.dtype == torch.float32
    assert values.shape == tensor.shape
    assert numpy.array_equal(values.numpy(), expected, equal_nan=True)
    assert numpy.isfinite(expected).any()


@pytest.mark.parametrize("kind", [kind for kind in PLAIN], ids=lambda kind: kind.name)
def test_values_of_a_plain_kind_are_its_numbers(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    expected = torch.tensor([[1, -2, 3, 4], [5, 6, 7, -8]]).to(PLAIN[kind])
    data = expected.view(torch.uint8).numpy()
    write_gguf(tmp_path / "model.gguf", {"general.architecture": "llama"}, {"x": data}, {"x": kind})
    tensor = read_header(tmp_path / "model.gguf").tensors["x"]
    assert tensor.values().tolist() == expected.float().tolist()


def test_a_kind_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"x\.weight is stored as Q8_K, which Parley cannot read: use a file of another"
    ):
        stored(tmp_path / "model.gguf", GGMLQuantizationType.Q8_K).values()


def test_a_file_that_has_been_cut_since_is_told(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-60])
    with pytest.raises(ModelError, match="has changed while it was read: start again"):
        tensor.read()


def test_a_file_that_has_been_replaced_since_is_told(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    stored(tmp_path / "other.gguf", GGMLQuantizationType.Q4_0).path.replace(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="has changed while it was read: start again"):
        tensor.read()


def test_nothing_of_a_file_stays_mapped(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    data, values = tensor.read(), tensor.values()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert len(data) == len(values)


def test_parts_are_joined_then_their_rows_are_taken_in_order(tmp_path: Path) -> None:
    parts = numbers(tmp_path / "model.gguf", a=torch.arange(4).view(2, 2), b=torch.arange(10, 14).view(2, 2))
    source = Source((parts["a"], parts["b"]), rows=torch.tensor([3, 0, 2]))
    assert source.shape == (3, 2)
    assert source.values().tolist() == [[12, 13], [0, 1], [10, 11]]


def test_rows_of_experts_are_those_of_each_matrix(tmp_path: Path) -> None:
    parts = numbers(tmp_path / "model.gguf", a=torch.arange(4).view(2, 1, 2), b=torch.arange(10, 14).view(2, 1, 2))
    source = Source((parts["a"], parts["b"]), dim=-2, rows=torch.tensor([1, 0]))
    assert source.shape == (2, 2, 2)
    assert source.values().tolist() == [[[10, 11], [0, 1]], [[12, 13], [2, 3]]]


def test_a_transposed_matrix_and_a_change_come_last(tmp_path: Path) -> None:
    part = numbers(tmp_path / "model.gguf", a=torch.arange(6).view(2, 3))["a"]
    source = Source((part,), transposed=True, change=lambda values: values - 1)
    assert source.shape == (3, 2)
    assert source.values().tolist() == [[-1, 2], [0, 3], [1, 4]]


def test_rows_taken_twice_are_taken_from_those_taken_first(tmp_path: Path) -> None:
    part = numbers(tmp_path / "model.gguf", a=torch.arange(4))["a"]
    source = Source((part,)).take(torch.tensor([3, 1, 0])).take(torch.tensor([2, 0]))
    assert source.values().tolist() == [0, 3]
