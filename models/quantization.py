"""int8 linears: a quarter of the bytes to read for each token, and sums that are exact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import kernels

logger = logging.getLogger("parley")

LANES = 16  # outputs whose weights stand together in memory


class Int8Linear(nn.Module):
    """Linears of one input: int8 weights, a scale for each output; activations of 15 bits, a scale for each row.

    Activations are two bytes, since one costs 4% of perplexity (outliers in a row leave the others no steps) and
    two 0.4%; few rows are bound by reading weights, so the second is almost free. Sums are exact in int32, up to
    60,000 inputs, so no row of a batch changes another by a bit. Runs on the CPU, with our kernels loaded.
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
            for rows in torch.split(linear.weight.detach(), 1024):  # float32 copies of a whole head are large
                here = torch.arange(start, start + len(rows))
                self.scale[here] = rows.float().abs().amax(1).clamp(min=1e-12) / 127
                whole = (rows.float() / self.scale[here, None]).round().to(torch.int8).view(-1, inputs // 4, 4)
                # The kernel wants them 128 larger, and unsigned.
                self.weight[here // LANES, :, here % LANES] = whole.view(torch.uint8).bitwise_xor(128)
                start += len(rows)
            if linear.bias is not None:
                self.bias[start - linear.out_features : start] = linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        result: Tensor = torch.ops.parley.int8_linear(rows, self.weight, self.scale, self.bias, self.outputs)
        return result.to(x.dtype).view(*x.shape[:-1], self.outputs)


@dataclass(eq=False)
class Shared:
    """Several linears as one, and its result while they take their shares of it."""

    all: Int8Linear
    sizes: list[int]
    result: Tensor | None = None


class Share(nn.Module):
    """One of several linears that read the same tensor one after the other: the first computes for all.

    Queries, keys and values at once, gates with ups: a step's linears take 3.5 ms instead of 4.9, and 11 instead
    of 14.5 for 32 rows.
    """

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.first = index == 0
        self.last = index == len(shared.sizes) - 1
        self.start = sum(shared.sizes[:index])
        self.end = self.start + shared.sizes[index]
        self.all = shared.all if self.first else None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.all(x) if self.all is not None else self.shared.result  # type: ignore[assignment]
        self.shared.result = None if self.last else result
        return result[..., self.start : self.end]


def quantize(model: nn.Module, run: Callable[[], Any]) -> None:
    """Replace the model's linears by int8 ones, in place; those that cannot be stay, and the log says so once.

    `run` runs the model once on anything, to see which linears read the same tensor.
    """
    kept = {name for name, module in model.named_modules() if _is_odd(module)}
    groups = _groups(model, run)
    for group in groups:
        (_, _, first), *rest = group
        if first.in_features % 4 or first.weight.device.type != "cpu":
            kept |= {name for _, name, _ in group}
        elif not rest:
            setattr(group[0][0], group[0][1], Int8Linear(first))
        else:
            linears = [linear for _, _, linear in group]
            shared = Shared(Int8Linear(*linears), [linear.out_features for linear in linears])
            for index, (parent, name, _) in enumerate(group):
                setattr(parent, name, Share(shared, index))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # or what is left would keep the whole file of weights in memory
    if kept or not groups:
        logger.warning("not of a kind or size to be int8: %s", ", ".join(sorted(kept)) or "any linear of the model")


def fast() -> bool:
    """Whether this processor multiplies int8 faster than float32: it needs AVX-512 VNNI."""
    return kernels.loaded() is not None and bool(torch.cpu._is_vnni_supported())


def _is_odd(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear


def _groups(model: nn.Module, run: Callable[[], Any]) -> list[list[tuple[nn.Module, str, nn.Linear]]]:
    """Linears with their parents and names; together those of one parent that get the same tensor in a row."""
    groups: list[list[tuple[nn.Module, str, nn.Linear]]] = []
    inputs: list[Tensor] = []  # of each group, kept so that no other tensor takes its place in memory

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
    met = [linear for group in groups for _, _, linear in group]
    if len(set(met)) < len(met):  # some run more than once: too odd to share
        return [[place] for place in places]
    return groups + [[place] for place in places if place[2] not in met]  # experts that nothing was sent to
