"""Where the weights of a model lie in GGUF files, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from models.errors import ModelError, one_line
from models.language.file_version import FileVersion

PLAIN = {  # kinds that torch knows
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.I8: torch.int8,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I64: torch.int64,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Nothing is read before it is asked for, and nothing stays mapped or cached."""

    path: Path
    name: str
    shape: tuple[int, ...]  # in torch's order
    kind: GGMLQuantizationType
    offset: int  # bytes from the beginning of the file
    size: int  # bytes
    version: FileVersion  # whose header was read

    @property
    def row_bytes(self) -> int:
        """The bytes of a row, which are whole blocks."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    def read(self) -> Tensor:
        """The bytes as they are stored: uint8 of (*shape[:-1], row_bytes). Raises ModelError."""
        try:  # a plain read: pages of a memory map would count as memory of the process
            with self.path.open("rb") as file:
                data = numpy.fromfile(file, numpy.uint8, self.size, offset=self.offset)
                self.version.check(file.fileno())
                if data.size < self.size:  # numpy says nothing of an error of the disk
                    raise OSError("the disk gives less than the file has")
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {one_line(error)}") from error
        return torch.from_numpy(data).view(*self.shape[:-1], self.row_bytes)

    def values(self) -> Tensor:
        """The values: float32 of `shape`."""
        data = self.read()
        if dtype := PLAIN.get(self.kind):
            return data.view(dtype).float()
        try:
            return torch.from_numpy(dequantize(data.numpy(), self.kind)).view(self.shape)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: {self.name} is stored as {self.kind.name}, which Parley cannot read: use a file of "
                "another quantization, such as Q4_K_M or Q8_0"
            ) from error


@dataclass(frozen=True)
class Source:
    """Where a parameter of the model comes from: join the parts, take the rows, transpose, change; in this order.

    Without a `change`, the parameter can be kept quantized: blocks never span two rows.
    """

    parts: tuple[StoredTensor, ...]  # joined along `dim`; none if `change` makes the values from nothing
    dim: int = 0
    rows: Tensor | None = None  # the rows of the joined matrix to take, in this order (dimension -2; of a vector, 0)
    transposed: bool = False  # the parameter is a matrix, or matrices, of (in, out); the file has (out, in)
    change: Callable[[Tensor], Tensor] | None = None  # on float32 values

    def take(self, rows: Tensor) -> Source:
        """The same, with its rows in another order, or fewer of them."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter; if there is a `change`, the shape before it."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        if self.rows is not None:
            shape[-2 if len(shape) > 1 else 0] = len(self.rows)
        if self.transposed:
            shape[-2:] = shape[-1], shape[-2]
        return tuple(shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(part.size for part in self.parts)

    def blocks(self) -> Tensor:
        """The bytes of the rows, uint8, (..., out, bytes), if all parts are of one kind. Raises ModelError."""
        parts = [part.read() for part in self.parts]
        blocks = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
        return blocks if self.rows is None else blocks.index_select(-2, self.rows)

    def values(self) -> Tensor:
        """The parameter: float32, of its final shape. Raises ModelError."""
        parts = [part.values() for part in self.parts]
        values = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim) if parts else torch.empty(0)
        if self.rows is not None:
            values = values.index_select(-2 if values.ndim > 1 else 0, self.rows)
        if self.transposed:
            values = values.transpose(-1, -2).contiguous()
        return values if self.change is None else self.change(values)


def stored_size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """How many bytes a tensor takes in a file. Raises ValueError for a row that is not whole blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(f"a row of {shape[-1] if shape else 0} values is not whole blocks of {block}")
    return math.prod(shape) // block * size
