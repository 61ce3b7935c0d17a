"""Reads the header of one GGUF file: its metadata, and where its tensors are; of versions 2 and 3."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from models.errors import ModelError, one_line
from models.language.file_version import FileVersion
from models.language.gguf.tensors import StoredTensor, stored_size

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NESTING = 4  # arrays in arrays
DTYPES = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    size: int  # bytes before the weights

    @cached_property
    def digest(self) -> str:
        """A hash of the header, which changes with the tokenizer, the settings and the tensors' kinds and places."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            left = self.size
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()


def read_header(path: Path) -> Header:
    """Read the header of one file. Raises ModelError for a file that is broken, cut off or of an unknown version."""
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
    except EOFError as error:
        raise ModelError(f"{path} is cut off: download it again") from error
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
        raise ModelError(f"{path} is a broken GGUF file: {one_line(error)}; download it again") from error


def _read(path: Path, file: BinaryIO) -> Header:
    version = FileVersion(path, file.fileno())
    reader = _Reader(file)
    if reader.take(4) != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file")
    if (edition := reader.integer(4)) not in VERSIONS:
        raise ModelError(
            f"{path} is of GGUF version {edition}, and Parley reads 2 and 3: get a newer file of the model"
        )
    tensors, entries = reader.integer(8), reader.integer(8)
    metadata = {}
    for _ in range(entries):
        key = reader.string()
        metadata[key] = reader.value(GGUFValueType(reader.integer(4)))
    places = [_place(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    size = reader.position
    start = -(-size // alignment) * alignment
    stored: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in places:
        if name in stored:
            raise ValueError(f"two tensors have the name {name}")
        stored[name] = StoredTensor(path, name, shape, kind, start + offset, stored_size(shape, kind), version)
        if start + offset + stored[name].size > reader.size:
            raise EOFError
    _check_places(stored.values(), alignment)
    return Header(path, metadata, stored, size)


def _check_places(tensors: Iterable[StoredTensor], alignment: int) -> None:
    """Raise ValueError for tensors that lie across each other, or not where the alignment puts them."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset % alignment:
            raise ValueError(f"{tensor.name} does not begin at a multiple of {alignment} bytes")
        if tensor.offset < end:
            raise ValueError(f"{before} and {tensor.name} lie in the same place")
        end, before = tensor.offset + tensor.size, tensor.name


def _place(reader: _Reader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """The name, the shape, the kind and the offset of a tensor."""
    name = reader.string()
    if (dimensions := reader.integer(4)) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(reader.integer(8) for _ in range(dimensions))[::-1]  # the file's first dimension is torch's last
    try:
        kind = GGMLQuantizationType(reader.integer(4))
        GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"{reader.path}: {name} is stored in a way that Parley does not know (type {one_line(error).split()[1]}): "
            "use a file of another quantization, such as Q4_K_M or Q8_0"
        ) from error
    return name, shape, kind, reader.integer(8)


class _Reader:
    """Reads the values of a header one after another. Raises EOFError at the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.path = file.name
        self.position = 0
        self.size = os.fstat(file.fileno()).st_size
        self._file = file

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.position += count
        if self.position > self.size:  # before memory is taken for a length that cannot be right
            raise EOFError
        return self._file.read(count)

    def integer(self, width: int) -> int:
        """The next unsigned integer."""
        return int.from_bytes(self.take(width), "little")

    def string(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).decode()

    def value(self, kind: GGUFValueType, depth: int = 0) -> Any:
        """The next value: a number, a bool, a string, or a list of these."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.FLOAT32:  # 1e-05, not the double nearest to its bits, 9.999999747378752e-06
            return float(str(numpy.frombuffer(self.take(4), "<f4")[0]))
        if kind != GGUFValueType.ARRAY:
            return self._numbers(DTYPES[kind], 1)[0]
        if depth == MAX_NESTING:
            raise ValueError("arrays are nested too deeply")
        element, count = GGUFValueType(self.integer(4)), self.integer(8)
        if element in DTYPES:
            return self._numbers(DTYPES[element], count)
        return [self.value(element, depth + 1) for _ in range(count)]

    def _numbers(self, dtype: str, count: int) -> list[Any]:
        values: list[Any] = numpy.frombuffer(self.take(numpy.dtype(dtype).itemsize * count), dtype).tolist()
        return values
