from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.engine.joined_linears import LinearPart, join_linears
from models.engine.quantization import QuantizedLinear
from models.engine.quantized_weight import Format, QuantizedWeight
from tests.support.tiny import tiny_llama, to_int8

pytestmark = pytest.mark.compiler  # quantized weights need the kernels

PROMPT = torch.tensor([[3, 100, 7, 42, 200, 5, 77, 8]])


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def linear(seed: int, bias: bool = True, format: Format = Format.Q8_0) -> QuantizedLinear:
    weight = QuantizedWeight.of_numbers(random(32, 32, seed=seed), format)
    return QuantizedLinear([weight], random(32, seed=seed) if bias else None)


def types_of(model: nn.Module, ending: str) -> set[type[nn.Module]]:
    """The types of the modules whose names end so."""
    return {type(module) for name, module in model.named_modules() if name.endswith(ending)}


class FourLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(1), linear(2, bias=False)
        self.c, self.d = linear(3, format=Format.Q4_1), linear(4)


class SameTensor(FourLinears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x * 2)], -1)


class EqualTensors(FourLinears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x.clone()), self.c(x + 1), self.d(x * 2)], -1)


class NotInARow(FourLinears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x + 1), self.c(x), self.d(x * 2)], -1)


class OneAfterTheOther(FourLinears):
    """Its tensors live one after the other, maybe in the same memory."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x * 1), self.b(x * 2), self.c(x * 3), self.d(x * 4)], -1)


class Twice(FourLinears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.a(x + 1), self.d(x)], -1)


class OtherParents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.ModuleDict({"a": linear(seed)}) for seed in (1, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part["a"](x) for part in self.parts], -1)  # type: ignore[index]


def test_linears_that_read_the_same_tensor_one_after_the_other_are_joined() -> None:
    model, x = SameTensor(), random(5, 32)
    expected = model(x)
    join_linears(model, lambda: model(random(2, 32, seed=9)))
    assert [type(child) for child in model.children()] == [*[LinearPart] * 3, QuantizedLinear]
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x[:1]), expected[:1])


@pytest.mark.parametrize("make", [EqualTensors, NotInARow, OneAfterTheOther, Twice, OtherParents])
def test_other_linears_are_not_joined(make: type[nn.Module]) -> None:
    model, x = make(), random(5, 32)
    expected = model(x)
    join_linears(model, lambda: model(random(2, 32, seed=9)))
    assert not any(isinstance(module, LinearPart) for module in model.modules())
    assert torch.equal(model(x), expected)


def test_queries_keys_and_values_are_joined_and_gates_with_ups() -> None:
    model = to_int8(tiny_llama())
    for ending in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert types_of(model, ending) == {LinearPart}
    for ending in ("o_proj", "down_proj", "lm_head"):
        assert types_of(model, ending) == {QuantizedLinear}
    layer = model.model.layers[1]
    first, second, third = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
    assert first.linears is second.linears is third.linears
    assert first.joined.sizes == [64, 32, 32]
    assert layer.mlp.gate_proj.linears is layer.mlp.up_proj.linears is not first.linears
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 3 * 4 + 1


def test_a_joined_result_is_freed_after_its_last_part() -> None:
    model = to_int8(tiny_llama())
    with torch.inference_mode():
        model(input_ids=PROMPT, use_cache=False)
    parts = [module for module in model.modules() if isinstance(module, LinearPart)]
    assert parts
    assert all(part.linears.result is None for part in parts)


class Choosing(nn.Module):
    """Three linears, of which a run uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([linear(seed) for seed in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linears[int(x[0, 0]) % 3](x)
        return result


def test_linears_that_the_run_does_not_use_stay() -> None:
    model = Choosing()
    join_linears(model, lambda: model(torch.ones(1, 32)))
    assert [type(each) for each in model.linears] == [QuantizedLinear] * 3


def test_a_module_without_quantized_linears_stays() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    join_linears(model, lambda: model(random(1, 32)))
    assert isinstance(model[0], nn.Linear)
