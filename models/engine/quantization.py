"""int8 linear layers: they read a quarter of the bytes for each token, and their sums are exact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.engine.native import build
from models.engine.native.build import LANES

logger = logging.getLogger("parley")


class Int8Linear(nn.Module):
    """One or more linears of the same input. Weights are int8 with a scale for each output.

    Activations have 15 bits in two bytes, and a scale for each row. One byte costs 4% of perplexity, since outliers
    leave few steps for the rest of a row; two bytes cost 0.4%. With few rows, the second byte is almost free: most of
    the time goes into reading weights. Sums are exact in int32 for up to 60,000 inputs, so the bits of a row do not
    depend on the other rows of a batch. Runs on a CPU with our kernels.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.outputs, inputs = sum(linear.out_features for linear in linears), linears[0].in_features
        blocks = -(-self.outputs // LANES)
        self.weight = nn.Buffer(torch.zeros(blocks, inputs // 4, LANES, 4, dtype=torch.uint8))
        self.scale = nn.Buffer(torch.ones(blocks * LANES))
        self.bias = nn.Buffer(torch.zeros(blocks * LANES))
        start = 0
        for linear in linears:
            for rows in torch.split(linear.weight.detach(), 1024):  # a float32 copy of a whole head is large
                here = torch.arange(start, start + len(rows))
                self.scale[here] = rows.float().abs().amax(1).clamp(min=1e-12) / 127
                rounded = (rows.float() / self.scale[here, None]).round().to(torch.int8).view(-1, inputs // 4, 4)
                # The kernel takes weights as unsigned bytes, with 128 added.
                self.weight[here // LANES, :, here % LANES] = rounded.view(torch.uint8).bitwise_xor(128)
                start += len(rows)
            if linear.bias is not None:
                self.bias[start - linear.out_features : start] = linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        result: Tensor = torch.ops.parley.int8_linear(rows, self.weight, self.scale, self.bias, self.outputs)
        return result.to(x.dtype).view(*x.shape[:-1], self.outputs)


@dataclass(eq=False)
class JoinedLinears:
    """Several linears that are computed as one. `result` is kept until each has taken its part."""

    joined: Int8Linear
    sizes: list[int]
    result: Tensor | None = None


class LinearPart(nn.Module):
    """One of several linears that read the same tensor one after the other: the first computes for all.

    Queries, keys and values are joined, and gates with ups. The linears of a step take 3.5 ms instead of 4.9; for 32
    rows, 11 ms instead of 14.5.
    """

    def __init__(self, linears: JoinedLinears, index: int) -> None:
        super().__init__()
        self.linears = linears
        self.first = index == 0
        self.last = index == len(linears.sizes) - 1
        self.start = sum(linears.sizes[:index])
        self.end = self.start + linears.sizes[index]
        self.joined = linears.joined if self.first else None  # its tensors belong to one module only

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.joined(x) if self.joined is not None else self.linears.result  # type: ignore[assignment]
        self.linears.result = None if self.last else result
        return result[..., self.start : self.end]


def quantize(model: nn.Module, run: Callable[[], Any]) -> None:
    """Replace the linears of a model with int8 ones, in place. The log names those that cannot be replaced.

    `run` runs the model once on any input, to find out which linears read the same tensor.
    """
    kept = {name for name, module in model.named_modules() if _is_subclass_of_linear(module)}
    groups = _groups(model, run)
    for group in groups:
        (_, _, first), *rest = group
        if first.in_features % 4 or first.weight.device.type != "cpu":
            kept |= {name for _, name, _ in group}
        elif not rest:
            setattr(group[0][0], group[0][1], Int8Linear(first))
        else:
            linears = [linear for _, _, linear in group]
            joined = JoinedLinears(Int8Linear(*linears), [linear.out_features for linear in linears])
            for index, (parent, name, _) in enumerate(group):
                setattr(parent, name, LinearPart(joined, index))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # else a few tensors keep the whole weights file in memory
    if kept or not groups:
        logger.warning("these linears are not quantized to int8: %s", ", ".join(sorted(kept)) or "all of the model")


def int8_is_faster() -> bool:
    """Whether this processor multiplies int8 faster than float32: it needs AVX-512 VNNI."""
    return build.loaded_library() is not None and bool(torch.cpu._is_vnni_supported())


def _is_subclass_of_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear


def _groups(model: nn.Module, run: Callable[[], Any]) -> list[list[tuple[nn.Module, str, nn.Linear]]]:
    """Groups of linears, with parents and names. Those of a group have one parent and read the same tensor in turn."""
    groups: list[list[tuple[nn.Module, str, nn.Linear]]] = []
    inputs: list[Tensor] = []  # the input of each group, kept so that no other tensor gets its address

    def note(parent: nn.Module, name: str) -> Callable[[nn.Linear, tuple[Tensor, ...]], None]:
        def hook(linear: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
            if groups and inputs[-1] is arguments[0] and groups[-1][0][0] is parent:
                groups[-1].append((parent, name, linear))
            else:
                groups.append([(parent, name, linear)])
                inputs.append(arguments[0])

        return hook

    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    hooks = [child.register_forward_pre_hook(note(parent, name)) for parent, name, child in places]
    with torch.inference_mode():
        run()
    for handle in hooks:
        handle.remove()
    called = [linear for group in groups for _, _, linear in group]
    if len(set(called)) < len(called):  # some run more than once, so the order has no meaning
        return [[place] for place in places]
    return groups + [[place] for place in places if place[2] not in called]  # such as idle experts
