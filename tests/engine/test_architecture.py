from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DogeConfig,
    Gemma3Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
)

from models.engine.architecture import check_architecture
from models.engine.twin import make_twin, small, spread
from models.errors import UnsupportedModelError
from tests.support.faulty import both_attentions
from tests.support.tiny import SHAPE, tiny_gemma3, tiny_llama, tiny_model, tiny_qwen3, to_int8

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class Changed(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A Llama, and so its twin, whose modules of some name get changed arguments."""

    name: str
    hook: Hook

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for name, module in self.named_modules():
            if name.endswith(self.name):
                module.register_forward_pre_hook(self.hook, with_kwargs=True)


class Mixing(Changed):  # type: ignore[no-untyped-call]
    """Its tokens see the ones before them beside its attention, as in hybrid models."""

    name = "mlp"
    hook = staticmethod(lambda module, args, options: ((args[0] + 0.1 * args[0].roll(1, dims=1),), options))


class Counting(Changed):  # type: ignore[no-untyped-call]
    """Its rotary embeddings count the tokens of a forward, whatever their positions."""

    name = "rotary_emb"
    hook = staticmethod(
        lambda module, args, options: (args, options | {"position_ids": torch.arange(args[0].shape[1])[None]})
    )


class Unmasked(Changed):  # type: ignore[no-untyped-call]
    """Loses the mask on the way to its attention."""

    name = "self_attn"
    hook = staticmethod(lambda module, args, options: (args, options | {"attention_mask": None}))


class WithoutTwin(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Can be built in one size only."""

    def __init__(self, config: LlamaConfig) -> None:
        assert config.vocab_size == SHAPE["vocab_size"]
        super().__init__(config)


class MixingWithoutTwin(WithoutTwin, Mixing):  # type: ignore[no-untyped-call]
    pass


def of(kind: type[LlamaForCausalLM], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = kind._from_config(LlamaConfig(**SHAPE), dtype=dtype)  # type: ignore[no-untyped-call]
    spread(model)
    model.train(False)
    return model


@both_attentions
def test_right_models_pass_in_any_dtype(native: bool) -> None:
    for model in (tiny_llama(), tiny_qwen3(), tiny_gemma3(), tiny_model(StableLmConfig(**SHAPE))):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_architecture(model.to(dtype), native)  # type: ignore[arg-type]


@pytest.mark.compiler
def test_quantized_models_pass() -> None:
    check_architecture(to_int8(tiny_llama()))
    check_architecture(to_int8(of(WithoutTwin)))


@pytest.mark.parametrize("kind", [Mixing, Counting])
@both_attentions
def test_models_whose_tokens_do_more_than_attend_are_refused(kind: type[LlamaForCausalLM], native: bool) -> None:
    with pytest.raises(UnsupportedModelError, match="do more than attend"):
        check_architecture(of(kind), native)


def test_a_model_that_drops_its_masks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="masks by itself"):
        check_architecture(of(Unmasked))


def test_a_window_that_only_the_mask_has_is_kept() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    check_architecture(tiny_model(PhimoeConfig(**SHAPE | experts, sliding_window=12)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2), "attention interface"),
        (DogeConfig(**SHAPE, is_moe=False), "it computes with its attention masks"),
        (
            LlamaConfig(**SHAPE | {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}),
            "chunked_attention",
        ),
    ],
    ids=["bloom", "doge", "llama"],
)
def test_unknown_attention_is_refused_with_its_reason(config: PreTrainedConfig, reason: str) -> None:
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModelError, match=reason):
        check_architecture(model.eval())


def test_a_model_without_a_twin_is_checked_itself_in_any_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_architecture(of(WithoutTwin, dtype))
        with pytest.raises(UnsupportedModelError, match="do more than attend"):
            check_architecture(of(MixingWithoutTwin, dtype))


def test_the_check_changes_neither_the_configuration_nor_the_random_numbers() -> None:
    for model in (tiny_gemma3(), of(WithoutTwin)):
        before, state = model.config.to_dict(), torch.get_rng_state()
        check_architecture(model)
        assert model.config.to_dict() == before
        assert torch.equal(torch.get_rng_state(), state)


def test_a_twin_of_any_size_is_small_and_keeps_the_size_of_heads() -> None:
    config = LlamaConfig(hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    twin = make_twin(model)
    assert sum(parameter.numel() for parameter in twin.parameters()) < 2_000_000
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in twin.parameters()} == {"cpu"}
    assert twin.config.head_dim == 128
    assert (twin.config.num_attention_heads, twin.config.num_key_value_heads) == (4, 2)


def test_a_twin_has_a_layer_of_each_kind_and_the_models_other_settings() -> None:
    text = {"num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    config = small(Gemma3Config(text_config=text | {"hidden_size": 2560, "rope_parameters": None}))
    assert {"sliding_attention", "full_attention"} == set(config.text_config.layer_types)
    assert config.text_config.sliding_window == 8
    assert config.text_config.head_dim == 256
    oss = small(GptOssConfig(swiglu_limit=3.0))
    assert (oss.num_hidden_layers, oss.num_local_experts, oss.swiglu_limit) == (2, 8, 3.0)
