"""Blocks of GGUF with random numbers."""

from __future__ import annotations

import math

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

HALF_FLOATS = {  # where a block has half floats that scale its numbers
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


def random_blocks(
    kind: GGMLQuantizationType, shape: tuple[int, ...], seed: int = 0, scale: float = 0.01
) -> NDArray[numpy.uint8]:
    """Rows of blocks with random bits everywhere, and scales up to `scale`: uint8, (*shape[:-1], bytes of a row)."""
    source = numpy.random.default_rng(seed)
    length, size = GGML_QUANT_SIZES[kind]
    blocks = source.integers(0, 256, (*shape[:-1], shape[-1] // length, size), dtype=numpy.uint8)
    for start in HALF_FLOATS.get(kind.name, []):
        scales = source.uniform(-scale, scale, (*blocks.shape[:-1], 1)).astype(numpy.float16)
        blocks[..., start : start + 2] = scales.view(numpy.uint8)
    if kind == GGMLQuantizationType.MXFP4:
        blocks[..., 0] = source.integers(115, 130, blocks.shape[:-1]) + round(math.log2(scale / 0.01))
    return blocks.reshape(*shape[:-1], -1)
