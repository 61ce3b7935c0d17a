from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Conv1D,
    GPT2Config,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from models.engine.batch import Batch
from models.engine.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    put_quantized,
    quantizable,
    shares,
)
from models.engine.quantized_weight import Format, QuantizedWeight
from models.language.loader import load
from models.settings import Settings
from tests.support.faulty import make_engine
from tests.support.tiny import SHAPE, tiny_gemma3, tiny_gpt_oss, tiny_llama, tiny_model

pytestmark = pytest.mark.compiler  # quantized weights need the kernels

TEXT = Path(__file__).with_name("perplexity.txt")
PROMPT = torch.tensor([[3, 100, 7, 42, 200, 5, 77, 8]])
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def weight(outputs: int, inputs: int, format: Format = Format.Q8_0, seed: int = 0) -> QuantizedWeight:
    return QuantizedWeight.of_numbers(random(outputs, inputs, seed=seed), format)


def numbers(weight: QuantizedWeight) -> Tensor:
    return weight.rows(torch.arange(weight.outputs))


def quantize(model: PreTrainedModel, format: Format = Format.Q8_0) -> PreTrainedModel:
    """The model itself, with all that can be quantized in a format."""
    places = quantizable(model).items()
    put_quantized(
        model,
        {
            name: QuantizedWeight.of_numbers(at.oriented(model.get_parameter(name)).contiguous(), format)
            for name, at in places
        },
    )
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=PROMPT, use_cache=False).logits
    return result[0]


def error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).detach().norm() / expected.detach().norm())


def tiny_gpt2() -> PreTrainedModel:
    return tiny_model(GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=128))


def tiny_mixtral(**changes: Any) -> PreTrainedModel:
    return tiny_model(MixtralConfig(**SHAPE | EXPERTS | changes))


def tiny_qwen3_moe() -> PreTrainedModel:
    return tiny_model(Qwen3MoeConfig(**SHAPE | EXPERTS, norm_topk_prob=True))


def tiny_qwen2_moe() -> PreTrainedModel:
    """Beside the experts that a router chooses, one that each token uses."""
    return tiny_model(Qwen2MoeConfig(**SHAPE | EXPERTS, shared_expert_intermediate_size=64))


def tiny_nemotron_h() -> PreTrainedModel:
    """Experts without a gate."""
    settings = {
        "layers_block_type": ["attention", "moe", "attention"],
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 64,
    }
    return tiny_model(NemotronHConfig(**SHAPE | EXPERTS | settings))


# Linears


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_result_is_the_rounded_float32_result(dtype: torch.dtype) -> None:
    linear, x = QuantizedLinear([weight(48, 64)], random(48)), random(6, 64).to(dtype)
    result = linear(x)
    assert result.dtype == dtype
    assert torch.equal(result, linear(x.float()).to(dtype))


def test_inputs_of_any_rank_and_layout_keep_their_shape() -> None:
    linear, x = QuantizedLinear([weight(48, 64)], random(48)), random(64, 3, 5).permute(2, 1, 0)
    assert torch.equal(linear(x), linear(x.reshape(15, 64)).view(5, 3, 48))
    assert linear(x[0, 0]).shape == (48,)


def test_a_bias_is_added_in_float32() -> None:
    bias = random(48).bfloat16()
    x = random(6, 64)
    assert torch.equal(QuantizedLinear([weight(48, 64)], bias)(x), QuantizedLinear([weight(48, 64)])(x) + bias.float())


def test_joined_linears_give_the_bits_of_each_with_and_without_a_bias() -> None:
    linears = [
        QuantizedLinear([weight(48, 64)], random(48)),
        QuantizedLinear([weight(7, 64, Format.Q4_1)]),
        QuantizedLinear([weight(33, 64)]),
    ]
    x = random(6, 64)
    joined = QuantizedLinear.joined(linears)
    assert torch.equal(joined(x), torch.cat([linear(x) for linear in linears], 1))
    assert QuantizedLinear.joined(linears[1:]).bias is None


# Embeddings


@pytest.mark.parametrize("scale", [None, 8.0], ids=["plain", "scaled"])
def test_an_embedding_gives_the_rows_of_its_weight(scale: float | None) -> None:
    stored = weight(50, 64)
    ids = torch.tensor([[3, 49, 0], [3, 3, 7]])
    result = QuantizedEmbedding(stored, scale)(ids)
    assert torch.equal(result, numbers(stored)[ids] * (scale or 1))


def test_the_embedding_of_gemma_keeps_its_scale() -> None:
    model = tiny_gemma3()
    expected = model.model.embed_tokens(PROMPT).detach()
    quantize(model)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert model.model.embed_tokens.scale == 8  # the root of the hidden size
    torch.testing.assert_close(
        model.model.embed_tokens(PROMPT), expected, atol=0.02 * float(expected.abs().max()), rtol=0
    )


def test_a_tied_head_and_embedding_share_one_weight() -> None:
    model = quantize(tiny_gemma3())
    assert model.lm_head.weights[0] is model.model.embed_tokens.weight


def test_a_weight_for_one_of_two_that_are_tied_is_for_both() -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        model = tiny_gemma3()
        put_quantized(model, {name: QuantizedWeight.of_numbers(model.get_parameter(name))})
        assert model.lm_head.weights[0] is model.model.embed_tokens.weight


def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_tied_to_stays_its_own() -> None:
    model = tiny_gemma3()
    head, embedding = weight(SHAPE["vocab_size"], 64), weight(SHAPE["vocab_size"], 64, seed=1)
    put_quantized(model, {"lm_head.weight": head, "model.embed_tokens.weight": embedding})
    assert (model.lm_head.weights[0], model.model.embed_tokens.weight) == (head, embedding)


# Models


@pytest.mark.parametrize(
    "make",
    [
        tiny_llama,
        tiny_gemma3,
        tiny_gpt2,
        tiny_mixtral,
        tiny_qwen3_moe,
        tiny_qwen2_moe,
        tiny_nemotron_h,
        tiny_gpt_oss,
    ],
)
def test_a_quantized_model_has_nearly_the_same_logits(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    expected = logits(model)
    result = logits(quantize(model))
    kinds = {type(module) for module in model.modules()}
    assert QuantizedLinear in kinds
    assert not kinds & {Conv1D, nn.Embedding} - ({nn.Embedding} if make is tiny_gpt2 else set())  # of its positions
    assert error(result, expected) < 0.06
    assert not torch.equal(result, expected)


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe, tiny_qwen2_moe, tiny_nemotron_h, tiny_gpt_oss])
def test_all_experts_are_quantized(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 3)
    quantize(model)
    stacks = [part for part in model.modules() if isinstance(part, QuantizedWeight) and part.panels.dim() == 2]
    assert sum(stack.count for stack in stacks) == count > 0
    assert not any(
        parameter.dim() == 3 and "bias" not in name and "conv" not in name
        for name, parameter in model.named_parameters()
    )


def test_each_of_the_experts_gives_what_it_gave() -> None:
    """Also those that few tokens choose."""
    for make in (tiny_mixtral, tiny_gpt_oss):
        model = make()
        experts = next(module for module in model.modules() if hasattr(module, "has_gate"))
        with torch.no_grad():
            for name, parameter in experts.named_parameters():
                if name.endswith("_bias"):
                    parameter.copy_(random(*parameter.shape))
        x, shares = random(4, 64), torch.ones(4, 1)
        count = 4 if make is tiny_mixtral else 2
        chosen = [torch.full((4, 1), expert) for expert in range(count)]
        expected = [experts(x, each, shares).detach() for each in chosen]
        quantize(model)
        for each, before in zip(chosen, expected, strict=True):
            assert error(experts(x, each, shares), before) < 0.03


def test_routers_and_norms_stay_in_float32() -> None:
    model = quantize(tiny_mixtral())
    assert {name.split(".")[-2] for name, _ in model.named_parameters()} == {
        "gate",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }


@pytest.mark.parametrize("changes", [{"intermediate_size": 48}, {"hidden_size": 48}], ids=["inner", "outer"])
def test_experts_of_which_one_weight_does_not_fit_stay_as_a_whole(changes: dict[str, int]) -> None:
    model = tiny_mixtral(**changes)
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    expected = logits(model)
    quantize(model)
    assert [name for name, parameter in model.named_parameters() if parameter.dim() == 3] == experts
    assert error(logits(model), expected) < 0.06


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_subclasses_of_linear_stay() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.__class__ = Doubled
    expected = logits(model)
    assert "model.layers.1.mlp.up_proj.weight" not in quantizable(model)
    quantize(model)
    assert isinstance(model.model.layers[1].mlp.up_proj, Doubled)
    assert error(logits(model), expected) < 0.06


def test_linears_whose_inputs_are_not_in_groups_of_32_stay() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.gate_proj = nn.Linear(64, 80, bias=False)
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 80, bias=False)
    model.model.layers[0].mlp.down_proj = nn.Linear(80, 64, bias=False)
    expected = logits(model)
    quantize(model)
    mlp = model.model.layers[0].mlp
    assert [type(child) for child in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)] == [
        QuantizedLinear,
        QuantizedLinear,
        nn.Linear,
    ]
    assert error(logits(model), expected) < 0.06


def test_a_model_without_data_has_the_same_places() -> None:
    for make in (tiny_llama, tiny_gpt2, tiny_gpt_oss):
        with torch.device("meta"):
            empty = make()
        places = {name: place.shape for name, place in quantizable(make()).items()}
        assert {name: place.shape for name, place in quantizable(empty).items()} == places


def test_shares_count_each_weight_once_in_its_format() -> None:
    model = quantize(tiny_gemma3(), Format.Q4_1)
    layer = model.model.layers[0].self_attn
    layer.q_proj = QuantizedLinear([weight(64, 64)])
    counts = {"float32": sum(parameter.numel() for parameter in model.parameters()), "Q8_0": 64 * 64}
    counts["Q4_1"] = sum(math.prod(parameter.shape) for parameter in tiny_gemma3().parameters()) - sum(counts.values())
    found = shares(model)
    assert list(found) == ["Q4_1", "Q8_0", "float32"]
    assert found == pytest.approx({kind: count / sum(counts.values()) for kind, count in counts.items()})
    assert shares(tiny_llama().bfloat16()) == {"bfloat16": 1.0}


# The embedded model


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
@pytest.mark.usefixtures("two_threads")
def test_the_perplexity_of_the_embedded_model_is_within_half_a_percent_of_float32() -> None:
    assert perplexity("int8", 2000) == pytest.approx(perplexity("none", 2000), rel=0.005)
