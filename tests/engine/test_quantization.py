from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from models.engine.batch import Batch
from models.engine.quantization import Int8Linear, LinearPart, quantize
from models.language.loader import load
from models.settings import Settings
from tests.support.faulty import make_engine
from tests.support.tiny import tiny_gemma3, tiny_llama, to_int8

pytestmark = pytest.mark.compiler  # int8 linears need the kernels

TEXT = Path(__file__).with_name("perplexity.txt")
PROMPT = torch.tensor([[3, 100, 7, 42, 200, 5, 77, 8]])
STEPS = 127 * 128  # of an activation, in each direction

all_linears = pytest.mark.parametrize(
    ("inputs", "outputs", "bias"),  # with the outputs of each linear
    [
        (64, (48,), False),
        (64, (48,), True),
        (4, (1,), True),
        (60, (33,), True),  # neither a multiple of 16
        (576, (100, 20, 20), False),
        (92, (7, 50), True),
        (576, (31,), False),
    ],
    ids=lambda value: {True: "bias", False: "no bias"}[value] if isinstance(value, bool) else str(value),
)


def new_linears(inputs: int, outputs: tuple[int, ...], bias: bool) -> list[nn.Linear]:
    torch.manual_seed(inputs)
    return [nn.Linear(inputs, count, bias) for count in outputs]


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def whole_numbers(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers from -steps to steps, and the size of a step of each row."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / steps
    return (x / scale).round().long(), scale.double()


def assert_exact(x: Tensor, linear: nn.Linear) -> None:
    """Assert that the int8 result is that of whole numbers, up to the last bits of a float32."""
    result = Int8Linear(linear)(x).double()
    (steps, step), (weights, weight) = whole_numbers(x, STEPS), whole_numbers(linear.weight.detach(), 127)
    expected = (steps @ weights.T) * step * weight.T
    size = (steps.abs() @ weights.abs().T) * step * weight.T
    if linear.bias is not None:
        expected, size = expected + linear.bias.detach(), size + linear.bias.detach().abs()
    assert ((result - expected).abs() <= 1e-6 * size + 1e-37).all()


def types_of(model: nn.Module, ending: str) -> list[type[nn.Module]]:
    """The types of the modules whose names end so."""
    return [type(module) for name, module in model.named_modules() if name.endswith(ending)]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=PROMPT, use_cache=False).logits
    return result[0]


@all_linears
def test_the_error_is_at_most_half_a_step_of_each_weight_and_input(
    inputs: int, outputs: tuple[int, ...], bias: bool
) -> None:
    linears, x = new_linears(inputs, outputs, bias), random(9, inputs)
    weight = torch.cat([linear.weight.detach() for linear in linears]).double()
    expected = torch.cat([linear(x).detach() for linear in linears], 1)
    result = Int8Linear(*linears)(x)
    half_weight = weight.abs().amax(1) / 127 / 2
    half_input = x.double().abs().amax(1, keepdim=True) / STEPS / 2
    weight_error = x.double().abs().sum(1, keepdim=True) * half_weight
    input_error = half_input * (weight.abs().sum(1) + inputs * half_weight)
    assert ((result - expected).abs() <= weight_error + input_error + 1e-5).all()
    assert result.shape == (9, sum(outputs))


@all_linears
def test_sums_of_rounded_weights_and_inputs_are_exact(inputs: int, outputs: tuple[int, ...], bias: bool) -> None:
    for linear in new_linears(inputs, outputs, bias):
        assert_exact(random(5, inputs), linear)


@pytest.mark.usefixtures("two_threads")
@all_linears
def test_a_row_is_equal_to_the_bit_in_any_batch(inputs: int, outputs: tuple[int, ...], bias: bool) -> None:
    linear, x = Int8Linear(*new_linears(inputs, outputs, bias)), random(23, inputs)
    x[3] *= 1000
    alone = torch.cat([linear(row[None]) for row in x])
    for start, end in itertools.combinations((0, 1, 2, 4, 7, 11, 16, 23), 2):
        assert torch.equal(linear(x[start:end]), alone[start:end])


def test_joined_linears_give_the_bits_of_each() -> None:
    linears, x = new_linears(64, (48, 7, 33), True), random(6, 64)
    joined = Int8Linear(*linears)(x)
    assert torch.equal(joined, torch.cat([Int8Linear(linear)(x) for linear in linears], 1))


@pytest.mark.parametrize("size", [1e-30, 1e-13, 1e-6, 1e4, 1e30])
def test_inputs_of_any_size_are_exact_or_vanish(size: float) -> None:
    (linear,) = new_linears(64, (24,), False)
    x = random(5, 64) * size
    assert_exact(x, linear)
    if size > 1e-10:
        torch.testing.assert_close(Int8Linear(linear)(x), linear(x).detach(), atol=0.02 * size, rtol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30])
def test_each_output_has_a_scale_of_its_own(size: float) -> None:
    (linear,) = new_linears(64, (24,), False)
    with torch.no_grad():
        linear.weight[5] *= size
    assert_exact(random(5, 64), linear)


def test_rows_and_weights_of_zeros_give_the_bias() -> None:
    (linear,) = new_linears(64, (24,), True)
    with torch.no_grad():
        linear.weight[3] = 0
    x = random(4, 64)
    x[1:3] = 0
    result = Int8Linear(linear)(x)
    assert torch.equal(result[1:3], linear.bias.detach().expand(2, -1))
    assert torch.equal(result[:, 3], linear.bias[3].detach().expand(4))


@pytest.mark.parametrize("inputs", [8192, 60_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(inputs: int, sign: int) -> None:
    linear = nn.Linear(inputs, 17, bias=False)
    with torch.no_grad():
        linear.weight[:] = 1
        linear.weight[1] = -1
        linear.weight[2, ::2] = -1
    x = torch.full((3, inputs), float(sign))
    x[1, ::2] *= -1
    x[2] = random(inputs)
    assert_exact(x, linear)
    assert Int8Linear(linear)(x)[0, :2].tolist() == pytest.approx([sign * inputs, -sign * inputs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_result_is_the_rounded_float32_result(dtype: torch.dtype) -> None:
    linears, x = [linear.to(dtype) for linear in new_linears(64, (48, 7), True)], random(6, 64).to(dtype)
    result = Int8Linear(*linears)(x)
    assert result.dtype == dtype
    assert torch.equal(result, Int8Linear(*(linear.float() for linear in linears))(x.float()).to(dtype))


def test_inputs_of_any_rank_and_layout_keep_their_shape() -> None:
    linear = Int8Linear(*new_linears(64, (48,), True))
    x = random(64, 3, 5).permute(2, 1, 0)
    assert torch.equal(linear(x), linear(x.reshape(15, 64)).view(5, 3, 48))
    assert linear(x[0, 0]).shape == (48,)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_a_quantized_model_has_nearly_the_same_logits(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    expected = logits(model)
    result = logits(to_int8(model))
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert (result - expected).abs().max() < 0.1 * expected.abs().max()
    assert not torch.equal(result, expected)


def test_linears_that_read_the_same_tensor_are_joined() -> None:
    model = to_int8(tiny_llama())
    for ending in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert types_of(model, ending) == [LinearPart] * 3
    for ending in ("o_proj", "down_proj", "lm_head"):
        assert set(types_of(model, ending)) == {Int8Linear}
    layer = model.model.layers[1]
    first, second, third = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
    assert first.linears is second.linears is third.linears
    assert first.joined.outputs == 64 + 32 + 32
    assert layer.mlp.gate_proj.linears is layer.mlp.up_proj.linears is not first.linears
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 3 * 4 + 1


def test_a_joined_result_is_freed_after_its_last_part() -> None:
    model = to_int8(tiny_llama())
    logits(model)
    parts = [module for module in model.modules() if isinstance(module, LinearPart)]
    assert parts
    assert all(part.linears.result is None for part in parts)


class FourLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = new_linears(16, (8, 8, 8, 8), True)


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
        self.parts = nn.ModuleList([nn.ModuleDict({"a": linear}) for linear in new_linears(16, (8, 8), True)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = (part["a"](x) for part in self.parts)  # type: ignore[index]
        result: Tensor = first - second
        return result


@pytest.mark.parametrize("make", [EqualTensors, NotInARow, OneAfterTheOther, Twice, OtherParents])
def test_linears_that_do_not_read_one_tensor_in_a_row_are_not_joined(make: type[nn.Module]) -> None:
    model, x = make(), random(5, 16)
    expected = model(x).detach()
    quantize(model, lambda: model(random(2, 16, seed=1)))
    assert not any(isinstance(module, LinearPart | nn.Linear) for module in model.modules())
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0)


class MixtureOfExperts(nn.Module):
    """A router, and three experts; a run uses one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, *experts = new_linears(16, (3, 8, 8, 8), True)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.experts[int(self.router(x).argmax())](x)
        return result


def test_experts_that_the_run_does_not_use_are_quantized_too() -> None:
    model = MixtureOfExperts()
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias[:] = torch.tensor([0.0, 1.0, 0.0])
    x = random(1, 16)
    expected = [expert(x).detach() for expert in model.experts]
    quantize(model, lambda: model(x))
    assert [type(expert) for expert in model.experts] == [Int8Linear] * 3
    for expert, result in zip(model.experts, expected, strict=True):
        torch.testing.assert_close(expert(x), result, atol=0.02, rtol=0)


class SixInputs(nn.Module):
    """A linear with 16 inputs, and two with six."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.narrow, self.thin = nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.even(x)
        result: Tensor = self.narrow(x) @ self.narrow.weight @ self.thin.weight.T + self.thin(x)
        return result


class DoubledLinear(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_linears_with_inputs_not_a_multiple_of_four_stay_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, x = SixInputs(), random(3, 16)
    expected = model(x).detach()
    with caplog.at_level(logging.WARNING, "parley"):
        quantize(model, lambda: model(x))
    assert [type(child) for child in model.children()] == [Int8Linear, nn.Linear, nn.Linear]
    assert caplog.messages == ["these linears are not quantized to int8: narrow, thin"]
    torch.testing.assert_close(model(x).detach(), expected, atol=0.05, rtol=0)


def test_a_subclass_of_linear_stays_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), DoubledLinear(16, 8)), random(3, 16)
    expected = model(x).detach()
    with caplog.at_level(logging.WARNING, "parley"):
        quantize(model, lambda: model(x))
    assert caplog.messages == ["these linears are not quantized to int8: 1"]
    assert [type(child) for child in model] == [Int8Linear, DoubledLinear]
    torch.testing.assert_close(model(x).detach(), expected, atol=0.05, rtol=0)


def test_a_model_without_linears_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Tanh()), random(3, 16)
    with caplog.at_level(logging.WARNING, "parley"):
        quantize(model, lambda: model(x))
    assert caplog.messages == ["these linears are not quantized to int8: all of the model"]


def test_a_model_of_which_all_linears_are_replaced_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "parley"):
        to_int8(tiny_llama())
    assert not caplog.records


def test_a_quantized_model_keeps_no_unused_memory() -> None:
    file = torch.zeros(1_000_000)  # the weights file, whose memory the weights of a model share
    norm = nn.LayerNorm(16)
    norm.weight = nn.Parameter(file[:16])
    model = nn.Sequential(nn.Linear(16, 16), norm)
    quantize(model, lambda: model(random(1, 16)))
    assert norm.weight.untyped_storage().nbytes() == 64


@torch.inference_mode()
def perplexity(quantize: str, tokens: int) -> float:
    """The perplexity of the embedded model on a text, in chunks, as the engine computes prompts."""
    tokenizer, model = load(Settings(device="cpu", quantize=quantize, compile=False))
    ids = tokenizer(TEXT.read_text(encoding="utf-8")).input_ids[:tokens]
    assert len(ids) == tokens
    runner, loss, chunk = make_engine(model, slots=1, context=tokens).runner, 0.0, 250
    for start in range(0, tokens, chunk):
        batch = Batch()
        batch.add(0, ids[start : start + chunk], start)
        batch.logits_at = list(range(len(batch.ids)))
        following = torch.tensor(ids[start + 1 : start + chunk + 1])
        loss += float(cross_entropy(runner.run_batch(batch)[: len(following)], following, reduction="sum"))
    return math.exp(loss / (tokens - 1))


@pytest.mark.slow
def test_int8_changes_the_perplexity_of_the_embedded_model_by_less_than_one_percent() -> None:
    assert perplexity("int8", 2000) == pytest.approx(perplexity("none", 2000), rel=0.01)
