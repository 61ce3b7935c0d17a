"""Linears that are not quantized are joined on a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.engine.joined_linears import LinearPart, join_linears
from tests.support.tiny import prompts, tiny_llama


class SameTensor(nn.Module):
    """Calls all its linears with one tensor, one after the other."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.linears = nn.ModuleDict({str(index): linear for index, linear in enumerate(linears)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears.values()], -1)


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def kinds(model: SameTensor) -> set[type[nn.Module]]:
    return {type(linear) for linear in model.linears.values()}


@pytest.mark.parametrize("bias", [False, True])
def test_linears_that_read_the_same_tensor_are_joined(bias: bool) -> None:
    model, x = SameTensor(*(nn.Linear(32, outputs, bias=bias) for outputs in (8, 5, 3))), random(4, 32)
    expected = model(x)
    join_linears(model, lambda: model(x), nn.Linear)
    assert kinds(model) == {LinearPart}
    torch.testing.assert_close(model(x), expected)


def test_two_threads_that_run_a_model_at_the_same_time_get_their_own_results() -> None:
    linears = [nn.Linear(32, outputs) for outputs in (8, 5, 3)]
    model, mine, other = SameTensor(*linears), random(4, 32), random(4, 32, seed=1)
    join_linears(model, lambda: model(mine), nn.Linear)
    turns = [(part, x) for part in model.linears.values() for x in (mine, other)]  # one after the other, here
    results = [part(x) for part, x in turns]
    expected = [linear(x) for linear in linears for x in (mine, other)]
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right)


def test_linears_of_which_only_some_have_a_bias_stay() -> None:
    model, x = SameTensor(nn.Linear(32, 8), nn.Linear(32, 8, bias=False)), random(4, 32)
    join_linears(model, lambda: model(x), nn.Linear)
    assert kinds(model) == {nn.Linear}


def test_linears_are_freed_before_the_last_ones_are_joined() -> None:
    model, (prompt,) = tiny_llama(), prompts(8)
    weights = [weakref.ref(each.weight) for each in model.modules() if isinstance(each, nn.Linear)]
    alive: list[int] = []

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts the weights that are not freed yet, whenever some are joined."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
            if func is torch.ops.aten.cat.default and args[0][0].shape[-1] == model.config.hidden_size:
                alive.append(sum(weight() is not None for weight in weights))
            return func(*args, **(kwargs or {}))

    with Counting():  # type: ignore[no-untyped-call]
        join_linears(model, lambda: model(torch.tensor([prompt])), nn.Linear)
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] <= alive[0] / 2
