"""A matrix whose numbers are stored in groups of 32, as in GGUF files: 4 to 8 bits each, and a scale for each group."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor, nn

GROUP = 32  # inputs that share a scale


class Format(IntEnum):
    """How the numbers are stored, as in native/linears.h.

    The names are GGUF's. Q6_16 and Q4_16 have a scale for each 16 inputs: they hold Q6_K and Q3_K. IQ4 and MXFP4 hold
    places in a table of 16 numbers.
    """

    Q4_0 = 0
    Q4_1 = 1
    Q5_0 = 2
    Q5_1 = 3
    Q8_0 = 4
    Q6_16 = 5
    Q4_16 = 6
    IQ4 = 7
    MXFP4 = 8

    @property
    def bits(self) -> float:
        """What a weight takes, with its share of the scales."""
        return BITS[self]


BITS = {
    Format.Q4_0: 4.5,
    Format.Q4_1: 5.0,
    Format.Q5_0: 5.5,
    Format.Q5_1: 6.0,
    Format.Q8_0: 8.5,
    Format.Q6_16: 7.0,
    Format.Q4_16: 5.0,
    Format.IQ4: 4.5,
    Format.MXFP4: 4.5,
}

# The types of GGUF's blocks that are kept, by their numbers there. Q4_K and Q5_K become Q4_1 and Q5_1: the product of
# their two scales is rounded to a half float, an error of 1% of a step. The others keep each number to the bit, but for
# Q3_K, Q6_K and IQ4_XS, whose products of scales are rounded too.
BLOCK_TYPES = {
    2: Format.Q4_0,
    3: Format.Q4_1,
    6: Format.Q5_0,
    7: Format.Q5_1,
    8: Format.Q8_0,
    11: Format.Q4_16,
    12: Format.Q4_1,
    13: Format.Q5_1,
    14: Format.Q6_16,
    20: Format.IQ4,
    23: Format.IQ4,
    39: Format.MXFP4,
}


class QuantizedWeight(nn.Module):
    """The weights of `outputs` outputs for `inputs` inputs each, in the layout of our kernels; no module to call.

    `panels` is uint8, (bytes,); of a stack of matrices, one for each expert, (experts, bytes).
    """

    def __init__(self, panels: Tensor, format: Format, outputs: int, inputs: int) -> None:
        super().__init__()
        self.panels = nn.Buffer(panels)
        self.format = format
        self.outputs = outputs
        self.inputs = inputs

    @classmethod
    def of_blocks(cls, blocks: Tensor, type: int) -> QuantizedWeight:
        """Blocks of GGUF, of a type in `BLOCK_TYPES`: uint8, ([experts,] outputs, bytes of a row).

        With experts, the outputs are a multiple of 32.
        """
        panels, format, inputs = torch.ops.parley.pack(blocks.reshape(-1, blocks.shape[-1]), type)
        return cls(panels.view(*blocks.shape[:-2], -1), Format(format), blocks.shape[-2], inputs)

    @classmethod
    def of_numbers(cls, numbers: Tensor, format: Format = Format.Q8_0) -> QuantizedWeight:
        """Numbers, ([experts,] outputs, inputs), rounded to Q8_0 or Q4_1; the inputs are a multiple of 32."""
        panels = torch.ops.parley.quantize(numbers.reshape(-1, numbers.shape[-1]).contiguous(), format)
        return cls(panels.view(*numbers.shape[:-2], -1), format, numbers.shape[-2], numbers.shape[-1])

    @property
    def count(self) -> int:
        """How many weights there are."""
        return self.outputs * self.inputs * (len(self.panels) if self.panels.dim() > 1 else 1)

    def rows(self, outputs: Tensor) -> Tensor:
        """The weights of some outputs of one matrix, in float32, (outputs, inputs)."""
        sizes = self.outputs, self.inputs
        result: Tensor = torch.ops.parley.unpack_rows(self.panels, outputs, int(self.format), *sizes)
        return result
