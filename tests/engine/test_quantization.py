from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

from models.engine.batch import Batch
from models.engine.quantization import (
    EXPERT_WEIGHTS,
    Place,
    QuantizedEmbedding,
    QuantizedLinear,
    not_quantized,
    put_quantized,
    quantizable,
    shares,
)
from models.engine.quantized_weight import Format, QuantizedWeight
from models.language.loader import load
from models.settings import Settings
from tests.support.any_batch import assert_equal_logits_in_any_batch
from tests.support.faulty import make_engine, slots_of
from tests.support.recurrent_models import LATENT, tiny_recurrent
from tests.support.tiny import SHAPE, prompts, tiny_gemma3, tiny_llama, tiny_model, to_int8

pytestmark = pytest.mark.compiler  # quantized weights need the kernels

Make = Callable[[], PreTrainedModel]

TEXT = Path(__file__).with_name("perplexity.txt")
PROMPT = torch.tensor(prompts(24))
ROUNDED = 0.02  # how far logits may be from those of the same weights in float32: activations are rounded to a byte


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def random_weight(outputs: int, inputs: int = 64, format: Format = Format.Q8_0, seed: int = 0) -> QuantizedWeight:
    return QuantizedWeight.of_numbers(random(outputs, inputs, seed=seed), format)


def numbers(weight: QuantizedWeight) -> Tensor:
    """The numbers of a weight, ([experts,] outputs, inputs)."""
    if weight.panels.dim() == 1:
        return weight.rows(torch.arange(weight.outputs))
    each = [QuantizedWeight(panels, weight.format, weight.outputs, weight.inputs) for panels in weight.panels]
    return torch.stack([numbers(one) for one in each])


def error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=PROMPT, use_cache=False).logits
    return result[0]


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """Quantize what can be quantized, and set the model's own weights to the numbers that are left."""
    weights = {}
    for name, place in quantizable(model).items():
        parameter = model.get_parameter(name)
        weights[name] = QuantizedWeight.of_numbers(place.oriented(parameter))
        place.oriented(parameter).copy_(numbers(weights[name]))
    return weights


def types_of(model: nn.Module, ending: str) -> set[type[nn.Module]]:
    """The types of the modules whose names end so."""
    return {type(module) for name, module in model.named_modules() if name.endswith(ending)}


def quantized_experts(model: nn.Module) -> list[nn.Module]:
    """The modules whose expert weights are all quantized."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "down_proj")
        and all(isinstance(getattr(module, name, None), QuantizedWeight | None) for name in EXPERT_WEIGHTS)
    ]


# Linears and embeddings


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_linear_computes_what_its_weights_and_bias_say(bias: bool) -> None:
    weight, x = random_weight(48), random(5, 64)
    biases = random(48, seed=1) if bias else None
    expected = nn.functional.linear(x, numbers(weight), biases)
    assert error(QuantizedLinear([weight], biases)(x), expected) < ROUNDED


def test_a_linear_of_several_formats_gives_their_results_one_after_the_other() -> None:
    weights, x = [random_weight(40), random_weight(7, format=Format.Q4_1), random_weight(33, seed=1)], random(5, 64)
    joined = QuantizedLinear(weights, random(80))
    assert torch.equal(joined(x), torch.cat([QuantizedLinear([weight])(x) for weight in weights], 1) + random(80))


def test_inputs_of_any_rank_and_layout_keep_their_shape() -> None:
    linear = QuantizedLinear([random_weight(48)], random(48))
    x = random(64, 3, 5).permute(2, 1, 0)
    assert torch.equal(linear(x), linear(x.reshape(15, 64)).view(5, 3, 48))
    assert linear(x[0, 0]).shape == (48,)
    assert linear(x[:0]).shape == (0, 3, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_result_is_the_rounded_float32_result(dtype: torch.dtype) -> None:
    weight, x, bias = random_weight(48), random(6, 64).to(dtype), random(48).to(dtype)
    result = QuantizedLinear([weight], bias)(x)
    assert result.dtype == dtype
    assert torch.equal(result, QuantizedLinear([weight], bias.float())(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 8.0])
def test_an_embedding_gives_the_rows_of_its_ids(scale: float | None, dtype: torch.dtype) -> None:
    weight, ids = random_weight(100), torch.tensor([[99, 0, 0], [5, 41, 7]])
    expected = numbers(weight)[ids] * (scale or 1)
    assert torch.equal(QuantizedEmbedding(weight, dtype, scale)(ids), expected.to(dtype))


# Numbers that are not finite, or hardly


@pytest.mark.parametrize("format", [Format.Q8_0, Format.Q4_1], ids=lambda format: format.name)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 63])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_other_rows_alone(
    format: Format, number: float, place: int
) -> None:
    linear, x = QuantizedLinear([random_weight(48, format=format)]), random(9, 64)
    expected = linear(x)
    x[4, place] = number
    result = linear(x)
    assert result[4].isnan().all()
    assert torch.equal(result[:4], expected[:4])
    assert torch.equal(result[5:], expected[5:])


@pytest.mark.parametrize("format", [Format.Q8_0, Format.Q4_1], ids=lambda format: format.name)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_make_their_group_nan(format: Format, number: float) -> None:
    original = random(3, 96)
    original[1, 40] = number
    result = numbers(QuantizedWeight.of_numbers(original, format))
    assert result.isnan().nonzero().tolist() == [[1, column] for column in range(32, 64)]


@pytest.mark.parametrize("format", [Format.Q8_0, Format.Q4_1], ids=lambda format: format.name)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e30])
def test_weights_too_small_or_large_for_their_scales_become_finite(format: Format, size: float) -> None:
    original = random(3, 64) * size
    result = numbers(QuantizedWeight.of_numbers(original, format))
    assert result.isfinite().all()
    assert (result.abs() <= original.abs().max()).all()


def test_a_scale_of_mxfp4_beyond_half_floats_becomes_finite() -> None:
    blocks = torch.full((1, 17), 0x70, dtype=torch.uint8)  # 0 and 6, 16 times each
    blocks[0, 0] = 250
    assert numbers(QuantizedWeight.of_blocks(blocks, 39)).isfinite().all()


# Models


def tiny_gpt2() -> PreTrainedModel:
    return tiny_model(GPT2Config(vocab_size=SHAPE["vocab_size"], n_embd=64, n_head=4, n_layer=2, n_positions=128))


def tiny_mixtral() -> PreTrainedModel:
    return tiny_model(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))


def tiny_qwen3_moe(**changes: Any) -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    return tiny_model(Qwen3MoeConfig(**SHAPE | experts | changes))


def tiny_gpt_oss(**changes: Any) -> PreTrainedModel:
    """Transposed experts with biases and interleaved gates."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = tiny_model(
        GptOssConfig(**SHAPE | experts | changes, sliding_window=12, layer_types=kinds, rope_parameters=rope)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj_bias"):
                parameter.copy_(random(*parameter.shape))
    return model


def tiny_deepseek() -> PreTrainedModel:
    """Latent attention, and a shared expert beside the others."""
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    return tiny_model(DeepseekV3Config(**SHAPE | LATENT | experts | {"q_lora_rank": 32, "head_dim": None}))


def tiny_nemotron_h() -> PreTrainedModel:
    """Experts without a gate."""
    return tiny_recurrent("nemotron_h", moe_intermediate_size=64, moe_shared_expert_intermediate_size=64)


dense = [tiny_llama, tiny_gemma3, tiny_gpt2]
sparse = [tiny_mixtral, tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek, tiny_nemotron_h]


@pytest.mark.parametrize("make", [*dense, *sparse])
def test_a_quantized_model_differs_by_the_rounding_of_activations_only(make: Make) -> None:
    model = make()
    weights = round_weights(model)
    expected = logits(model)
    put_quantized(model, weights)
    result = logits(model)
    errors = torch.stack([(result - expected).norm(dim=1) / expected.norm(dim=1)])
    assert errors.median() < ROUNDED  # of most tokens: some choose another expert, since two are nearly as good
    assert not torch.equal(result, expected)
    assert not_quantized(model) == []


@pytest.mark.parametrize("make", sparse)
def test_experts_are_quantized(make: Make) -> None:
    model = make()
    layers = sum(hasattr(module, "is_transposed") for module in model.modules())
    assert layers
    assert len(quantized_experts(to_int8(model))) == layers


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_gpt_oss, tiny_deepseek])
def test_a_half_precision_model_stays_in_half_precision(make: Make) -> None:
    model = make()
    expected = logits(model)
    half = to_int8(make().to(torch.bfloat16))  # type: ignore[arg-type]
    assert half.get_input_embeddings()(PROMPT).dtype == torch.bfloat16
    assert error(logits(half).float(), expected) < 0.3


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("make", sparse)
def test_experts_give_a_token_the_same_bits_in_any_batch(make: Make) -> None:
    model = to_int8(make())
    experts = quantized_experts(model)[0]
    x, source = random(23, 64), torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 4, (23, 2), generator=source)
    routing = torch.rand(23, 2, generator=source)
    with torch.inference_mode():
        alone = torch.cat([experts(x[i : i + 1], chosen[i : i + 1], routing[i : i + 1]) for i in range(23)])
        for start, end in itertools.combinations((0, 1, 2, 4, 7, 11, 16, 23), 2):
            part = slice(start, end)
            assert torch.equal(experts(x[part], chosen[part], routing[part]), alone[part])


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe, tiny_gpt_oss])
def test_logits_of_quantized_experts_are_equal_to_the_bit_in_any_batch(make: Make) -> None:
    assert_equal_logits_in_any_batch(make_engine(to_int8(make()), slots=8, context=128))


# What is quantized, and what stays


def test_linears_embeddings_and_heads_are_replaced() -> None:
    model = to_int8(tiny_llama(), join=False)
    assert types_of(model, "proj") == types_of(model, "lm_head") == {QuantizedLinear}
    assert types_of(model, "embed_tokens") == {QuantizedEmbedding}
    assert model.get_input_embeddings().scale is None


def test_the_embedding_of_gemma_keeps_its_scale() -> None:
    assert to_int8(tiny_gemma3()).get_input_embeddings().scale == 8


def test_conv1d_becomes_a_linear_and_position_embeddings_stay() -> None:
    model = tiny_gpt2()
    assert types_of(model, "c_attn") == {Conv1D}
    to_int8(model, join=False)
    assert types_of(model, "c_attn") == types_of(model, "c_proj") == types_of(model, "c_fc") == {QuantizedLinear}
    assert model.get_submodule("transformer.h.0.attn.c_attn").sizes == [3 * 64]
    assert types_of(model, "wte") == {QuantizedEmbedding}
    assert types_of(model, "wpe") == {nn.Embedding}
    assert model.get_parameter("transformer.wpe.weight").dtype == torch.float32


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_and_embedding_share_one_weight(name: str) -> None:
    model = tiny_model(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    put_quantized(model, {name: QuantizedWeight.of_numbers(model.get_parameter(name))})
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert head.weights[0] is embedding.weight


@pytest.mark.parametrize(
    ("make", "stays"),
    [
        (lambda: tiny_qwen3_moe(moe_intermediate_size=48), True),  # 48 inputs of down_proj
        (lambda: tiny_qwen3_moe(moe_intermediate_size=64), False),
        (lambda: tiny_gpt_oss(hidden_size=48), True),  # 48 outputs of down_proj, 48 inputs of gate_up_proj
    ],
    ids=["48 inputs", "64 inputs", "48 outputs"],
)
def test_experts_are_quantized_as_a_whole_or_not_at_all(make: Make, stays: bool) -> None:
    names = [name for name in quantizable(make()) if name.endswith(EXPERT_WEIGHTS)]
    assert bool(names) is not stays
    model = make()
    expected = logits(model)
    assert error(logits(to_int8(model)), expected) < 0.1
    assert bool(quantized_experts(model)) is not stays
    assert any("experts" in name for name in not_quantized(model)) is stays


def test_layers_with_quantized_experts_and_others_stand_side_by_side() -> None:
    model = tiny_mixtral()
    weights = round_weights(model)
    expected = logits(model)
    put_quantized(model, {name: weight for name, weight in weights.items() if "layers.1.mlp.experts" not in name})
    assert len(quantized_experts(model)) == 2
    assert error(logits(model), expected) < ROUNDED
    assert not_quantized(model) == ["model.layers.*.mlp.experts"]


class DoubledLinear(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_odd_layers() -> PreTrainedModel:
    """A Llama with a linear of 80 inputs, and one of a subclass, in each layer."""
    model = tiny_model(LlamaConfig(**SHAPE | {"intermediate_size": 80}))
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = DoubledLinear
    return model


def test_linears_that_do_not_fit_and_subclasses_stay_and_are_named() -> None:
    model = with_odd_layers()
    expected = logits(model)
    to_int8(model)
    assert types_of(model, "down_proj") == {nn.Linear}
    assert types_of(model, "o_proj") == {DoubledLinear}
    assert types_of(model, "lm_head") == {QuantizedLinear}
    assert error(logits(model), expected) < 0.1
    assert not_quantized(model) == ["model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"]


def test_parameters_that_are_kept_are_not_named() -> None:
    model = with_odd_layers()
    to_int8(model)
    kept = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)}
    assert not_quantized(model, kept) == ["model.layers.*.self_attn.o_proj"]


def test_a_place_turns_a_weight_so_that_the_inputs_come_last() -> None:
    place = quantizable(tiny_gpt2())["transformer.h.0.mlp.c_fc.weight"]
    assert place == Place(place.module, "weight", transposed=True)
    assert place.shape == (256, 64)
    assert quantizable(tiny_gpt_oss())["model.layers.0.mlp.experts.down_proj"].shape == (4, 64, 96)


def test_shares_sum_to_one_and_count_tied_weights_once() -> None:
    model = tiny_model(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    total, table = (
        sum(parameter.numel() for parameter in model.parameters()),
        SHAPE["vocab_size"] * SHAPE["hidden_size"],
    )
    name = "model.embed_tokens.weight"
    put_quantized(model, {name: QuantizedWeight.of_numbers(model.get_parameter(name), Format.Q4_1)})
    assert shares(model) == pytest.approx({"Q4_1": table / total, "float32": 1 - table / total})


def test_shares_count_each_expert() -> None:
    model = tiny_mixtral()
    total = sum(parameter.numel() for parameter in model.parameters())
    places = quantizable(model)
    quantized = sum(math.prod(place.shape) for place in places.values())
    expected = {"Q8_0": quantized / total, "float32": 1 - quantized / total}
    assert list(shares(to_int8(model))) == ["Q8_0", "float32"]
    assert shares(model) == pytest.approx(expected)


@torch.inference_mode()
def perplexity(quantize: str, tokens: int) -> float:
    """The perplexity of the embedded model on a text, in chunks, as the engine computes prompts."""
    tokenizer, model = load(Settings(device="cpu", quantize=quantize, compile=False))
    ids = tokenizer(TEXT.read_text(encoding="utf-8")).input_ids[:tokens]
    assert len(ids) == tokens
    runner, loss, chunk = slots_of(make_engine(model, slots=1, context=tokens)), 0.0, 250
    for start in range(0, tokens, chunk):
        batch = Batch()
        batch.add(0, ids[start : start + chunk], start)
        batch.logits_at = list(range(len(batch.ids)))
        following = torch.tensor(ids[start + 1 : start + chunk + 1])
        loss += float(cross_entropy(runner.run_batch(batch)[: len(following)], following, reduction="sum"))
    return math.exp(loss / (tokens - 1))


@pytest.mark.slow
def test_int8_changes_the_perplexity_of_the_embedded_model_by_less_than_half_a_percent() -> None:
    assert perplexity("int8", 2000) == pytest.approx(perplexity("none", 2000), rel=0.005)
