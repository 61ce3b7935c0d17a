"""Tiny models with random weights, and a tokenizer and prompts to go with them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
from starlette.applications import Starlette
from tokenizers import Tokenizer, decoders, models as tokenizer_models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from models.engine.joined_linears import join_linears
from models.engine.quantization import put_quantized, quantizable
from models.engine.quantized_weight import QuantizedWeight
from models.language.engine_chat import EngineChat

SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role == 'assistant' %}{{ raise_exception('it cannot begin') }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """One token for each byte, three special tokens, a chat template; and some words, which no text is encoded to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *words])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        chat_template=TEMPLATE,
    )


def tiny_llama() -> PreTrainedModel:
    return tiny_model(LlamaConfig(**SHAPE))


def tiny_qwen3(layers: int = 3) -> PreTrainedModel:
    return tiny_model(Qwen3Config(**SHAPE | {"num_hidden_layers": layers}))


def tiny_gemma3(layers: int = 3) -> PreTrainedModel:
    """All layers but the second attend to the last 12 tokens only."""
    shape = SHAPE | {"num_hidden_layers": layers}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"][:layers]
    return tiny_model(Gemma3TextConfig(**shape, sliding_window=12, layer_types=kinds, query_pre_attn_scalar=16))


def tiny_gemma2() -> PreTrainedModel:
    """Soft-capped scores; every other layer has a sliding window."""
    return tiny_model(Gemma2Config(**SHAPE, sliding_window=12, query_pre_attn_scalar=16, attn_logit_softcapping=5.0))


def tiny_gpt_oss() -> PreTrainedModel:
    """Attention sinks and a mixture of experts."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return tiny_model(GptOssConfig(**SHAPE | experts, sliding_window=12, layer_types=kinds, rope_parameters=rope))


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with always the same weights, so widely spread that no two logits are nearly equal."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def to_int8(model: PreTrainedModel, join: bool = True) -> PreTrainedModel:
    """The model itself, after its linears were replaced by int8 ones, and joined."""
    places = quantizable(model).items()
    put_quantized(
        model, {name: QuantizedWeight.of_numbers(place.oriented(model.get_parameter(name))) for name, place in places}
    )
    if join:
        join_linears(model, lambda: model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False))
    return model


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts of the given lengths, the same ones in each call."""
    source = random.Random(5)
    return [[source.randrange(len(SPECIAL), SHAPE["vocab_size"]) for _ in range(length)] for length in lengths]


@asynccontextmanager
async def opens_tiny(app: Starlette) -> AsyncIterator[EngineChat]:
    """What `create_app` takes to run on the tiny Llama."""
    app.state.tokenizer, app.state.model = tiny_tokenizer(), tiny_llama()
    state = app.state
    on_shrink, on_step = state.admission.shrink, state.metrics.step.observe
    async with EngineChat.opened(state.tokenizer, state.model, state.settings, on_shrink, on_step) as chat:
        yield chat
