"""The headers of GGUF files, whole and broken ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from models.errors import ModelError
from models.language.gguf.header import read_header
from tests.support.gguf_models import write_gguf

VALUES: dict[str, tuple[GGUFValueType, Any]] = {
    "a.uint8": (GGUFValueType.UINT8, 250),
    "a.int8": (GGUFValueType.INT8, -3),
    "a.uint16": (GGUFValueType.UINT16, 65_000),
    "a.int16": (GGUFValueType.INT16, -30_000),
    "a.uint32": (GGUFValueType.UINT32, 4_000_000_000),
    "a.int32": (GGUFValueType.INT32, -2_000_000_000),
    "a.uint64": (GGUFValueType.UINT64, 2**63 + 1),
    "a.int64": (GGUFValueType.INT64, -(2**62)),
    "a.float32": (GGUFValueType.FLOAT32, 1e-5),
    "a.float64": (GGUFValueType.FLOAT64, 0.1),
    "a.bool": (GGUFValueType.BOOL, True),
    "a.string": (GGUFValueType.STRING, "字 <|end|>\n"),
    "a.numbers": (GGUFValueType.ARRAY, [1, 2, 3]),
    "a.bools": (GGUFValueType.ARRAY, [True, False]),
    "a.strings": (GGUFValueType.ARRAY, ["a", "", "é"]),
    "a.nested": (GGUFValueType.ARRAY, [[1, 2], [3]]),
}
MATRIX = numpy.arange(64, dtype="float32").reshape(2, 32)
PREFIX = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"  # one value follows


def small_file(path: Path, **metadata: Any) -> Path:
    return write_gguf(path, {"general.architecture": "llama", **metadata}, {"x.weight": MATRIX})


def test_a_value_of_each_type_is_read_as_it_was_written(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, (kind, value) in VALUES.items():
        writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_header(tmp_path / "model.gguf").metadata
    assert {key: metadata[key] for key in VALUES} == {key: value for key, (_, value) in VALUES.items()}


def test_a_tensor_is_where_the_header_says(tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.gguf")
    tensor = read_header(path).tensors["x.weight"]
    assert (tensor.shape, tensor.kind, tensor.size) == ((2, 32), GGMLQuantizationType.F32, 256)
    assert path.read_bytes()[tensor.offset : tensor.offset + tensor.size] == MATRIX.tobytes()


def test_another_alignment_moves_the_tensors(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("x.weight", MATRIX)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_header(tmp_path / "model.gguf").tensors["x.weight"]
    assert tensor.offset % 256 == 0
    assert tensor.values().tolist() == MATRIX.tolist()


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf", name="abc", numbers=[1, 2, 3], words=["a", "b"]).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(4, len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf is cut off: download it again"):
            read_header(cut)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is cut off"),
        (b"PK\x03\x04 a zip file", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is of GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is of GGUF version"),  # of a machine with the other byte order
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "is cut off"),
        (PREFIX + struct.pack("<IQ", 8, 2**62), "is cut off"),  # a string longer than any memory
        (PREFIX + struct.pack("<IIQ", 9, 5, 2**60), "is cut off"),
        (PREFIX + struct.pack("<I", 99), "99 is not a valid GGUFValueType"),
        (PREFIX + struct.pack("<IQ", 8, 2) + b"\xff\xfe", "codec can't decode"),
        (PREFIX + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6, "nested too deeply"),
    ],
)
def test_a_file_that_is_broken_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason) as refusal:
        read_header(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: FileNotFoundError"):
        read_header(tmp_path / "model.gguf")


def test_a_quantization_that_is_unknown_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.gguf")
    content = bytearray(path.read_bytes())
    place = content.index(b"x.weight") + len(b"x.weight") + 4 + 16
    content[place : place + 4] = struct.pack("<I", 250)
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.weight is stored in a way that Parley does not know \(type 250\)"):
        read_header(path)


def test_a_row_that_is_not_whole_blocks_is_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.gguf")
    content = bytearray(path.read_bytes())
    place = content.index(b"x.weight") + len(b"x.weight") + 4
    content[place : place + 8] = struct.pack("<Q", 31)
    content[place + 16 : place + 20] = struct.pack("<I", GGMLQuantizationType.Q8_0)
    path.write_bytes(content)
    with pytest.raises(ModelError, match="a row of 31 values is not whole blocks of 32"):
        read_header(path)


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (0, r"y\.weight and x\.weight lie in the same place"),
        (224, r"x\.weight and y\.weight lie in the same place"),
        (257, r"y\.weight does not begin at a multiple of 32 bytes"),
    ],
)
def test_tensors_that_lie_where_they_cannot_are_refused(tmp_path: Path, offset: int, reason: str) -> None:
    path = tmp_path / "model.gguf"
    tensors = {"x.weight": MATRIX, "y.weight": MATRIX[:1], "z.weight": MATRIX}
    content = bytearray(write_gguf(path, {"general.architecture": "llama"}, tensors).read_bytes())
    place = content.index(b"y.weight") + len(b"y.weight") + 4 + 16 + 4
    assert content[place : place + 8] == struct.pack("<Q", 256)
    content[place : place + 8] = struct.pack("<Q", offset)
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"is a broken GGUF file: ValueError: {reason}; download it again"):
        read_header(path)


def test_the_digest_changes_with_the_metadata_but_not_with_the_weights(tmp_path: Path) -> None:
    first = read_header(small_file(tmp_path / "a.gguf", name="a"))
    other = read_header(small_file(tmp_path / "b.gguf", name="b"))
    weights = write_gguf(tmp_path / "c.gguf", {"general.architecture": "llama", "name": "a"}, {"x.weight": MATRIX + 1})
    assert first.digest == read_header(weights).digest
    assert first.digest != other.digest
