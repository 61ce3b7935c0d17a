from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.engine.joined_linears import LinearPart, join_linears
from models.engine.quantization import QuantizedLinear
from models.engine.quantized_weight import Format, QuantizedWeight
from tests.support.tiny import prompts, tiny_llama, to_int8

pytestmark = pytest.mark.compiler  # quantized linears need the kernels

PROMPT = torch.tensor(prompts(8))


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def new_linear(seed: int, outputs: int = 8, format: Format = Format.Q8_0, bias: bool = True) -> QuantizedLinear:
    """A linear of 32 inputs."""
    weight = QuantizedWeight.of_numbers(random(outputs, 32, seed=seed), format)
    return QuantizedLinear([weight], random(outputs, seed=seed) if bias else None)


def types_of(model: nn.Module, ending: str) -> list[type[nn.Module]]:
    """The types of the modules whose names end so."""
    return [type(module) for name, module in model.named_modules() if name.endswith(ending)]


def test_linears_that_read_the_same_tensor_are_joined() -> None:
    model = to_int8(tiny_llama())
    for ending in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert types_of(model, ending) == [LinearPart] * 3
    for ending in ("o_proj", "down_proj", "lm_head"):
        assert set(types_of(model, ending)) == {QuantizedLinear}
    layer = model.model.layers[1]
    first, second, third = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
    assert first.linears is second.linears is third.linears
    assert first.joined.sizes == [64, 32, 32]
    assert layer.mlp.gate_proj.linears is layer.mlp.up_proj.linears is not first.linears
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 3 * 4 + 1


def test_a_joined_model_gives_the_same_bits() -> None:
    plain, joined = to_int8(tiny_llama(), join=False), to_int8(tiny_llama())
    assert not any(isinstance(module, LinearPart) for module in plain.modules())
    with torch.inference_mode():
        assert torch.equal(joined(PROMPT).logits, plain(PROMPT).logits)


def test_a_joined_model_has_the_weights_it_had() -> None:
    def sizes(model: nn.Module) -> list[int]:
        return sorted(module.panels.nbytes for module in model.modules() if isinstance(module, QuantizedWeight))

    assert sizes(to_int8(tiny_llama())) == sizes(to_int8(tiny_llama(), join=False))


def test_a_joined_result_is_freed_after_its_last_part() -> None:
    model = to_int8(tiny_llama())
    with torch.inference_mode():
        model(PROMPT)
    parts = [module for module in model.modules() if isinstance(module, LinearPart)]
    assert parts
    assert all(part.linears.computed is None for part in parts)


class SameTensor(nn.Module):
    """Calls all its linears with one tensor, one after the other."""

    def __init__(self, *linears: QuantizedLinear) -> None:
        super().__init__()
        self.linears = nn.ModuleDict({str(index): linear for index, linear in enumerate(linears)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears.values()], -1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (False, True, False)], ids=str)
def test_weights_of_several_formats_and_biases_are_joined_to_the_bit(biases: tuple[bool, ...]) -> None:
    formats, outputs = (Format.Q8_0, Format.Q4_1, Format.Q8_0), (40, 7, 33)
    linears = [new_linear(i, outputs[i], formats[i], biases[i]) for i in range(3)]
    model, x = SameTensor(*linears), random(2, 5, 32)
    expected = model(x)
    join_linears(model, lambda: model(random(1, 32)))
    assert [type(linear) for linear in model.linears.values()] == [LinearPart] * 3
    assert model.get_submodule("linears.0.joined").formats == list(formats)
    assert torch.equal(model(x), expected)


def test_joined_linears_are_joined_once_only() -> None:
    model, x = SameTensor(new_linear(0), new_linear(1)), random(5, 32)
    expected = model(x)
    for _ in range(2):
        join_linears(model, lambda: model(x))
    assert torch.equal(model(x), expected)


class FourLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (new_linear(seed) for seed in range(4))


class EqualTensors(FourLinears):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) + self.b(x.clone()) + self.c(x + 1) + self.d(x * 2)
        return result


class NotInARow(FourLinears):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) + self.b(x + 1) + self.c(x) + self.d(x * 2)
        return result


class OneAfterTheOther(FourLinears):
    """Its tensors live one after the other, maybe in the same memory."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x * 1) + self.b(x * 2) + self.c(x * 3) + self.d(x * 4)
        return result


class Twice(FourLinears):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) + self.b(x) + self.c(x) + self.a(x + 1) + self.d(x)
        return result


class OtherParents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.ModuleDict({"a": new_linear(seed)}) for seed in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = (part["a"](x) for part in self.parts)  # type: ignore[index]
        result: Tensor = first - second
        return result


@pytest.mark.parametrize("make", [EqualTensors, NotInARow, OneAfterTheOther, Twice, OtherParents])
def test_linears_that_do_not_read_one_tensor_in_a_row_are_not_joined(make: type[nn.Module]) -> None:
    model, x = make(), random(5, 32)
    expected = model(x)
    join_linears(model, lambda: model(random(2, 32, seed=1)))
    assert not any(isinstance(module, LinearPart) for module in model.modules())
    assert torch.equal(model(x), expected)


class Choice(nn.Module):
    """Three linears; a run uses one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([new_linear(seed) for seed in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linears[1](x)
        return result


def test_linears_that_the_run_does_not_use_stay() -> None:
    model, x = Choice(), random(5, 32)
    expected = [linear(x) for linear in model.linears]
    join_linears(model, lambda: model(x))
    for linear, result in zip(model.linears, expected, strict=True):
        assert torch.equal(linear(x), result)


class Fails(FourLinears):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) + self.b(x)
        raise ValueError(result.shape)


def test_a_run_that_fails_leaves_the_model_as_it_was() -> None:
    model = Fails()
    with pytest.raises(ValueError, match="5, 8"):
        join_linears(model, lambda: model(random(5, 32)))
    assert not any(isinstance(module, LinearPart) or module._forward_pre_hooks for module in model.modules())
