"""Tiny models with random weights, and a tokenizer of bytes to go with them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from starlette.applications import Starlette
from tokenizers import Tokenizer, decoders, models as tokenizer_models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from models.chat import Chat

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


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A token a byte, three special tokens, a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        chat_template=TEMPLATE,
    )


def tiny_llama() -> PreTrainedModel:
    return tiny_model(LlamaConfig(**SHAPE))


def tiny_qwen3() -> PreTrainedModel:
    return tiny_model(Qwen3Config(**SHAPE))


def tiny_gemma3() -> PreTrainedModel:
    """Two of its three layers see 12 tokens back at most."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return tiny_model(Gemma3TextConfig(**SHAPE, sliding_window=12, layer_types=layers, query_pre_attn_scalar=16))


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Always the same weights, spread widely enough that no two logits are nearly equal."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@asynccontextmanager
async def opens_tiny(app: Starlette) -> AsyncIterator[Chat]:
    """What `create_app` takes to run on the tiny Llama."""
    app.state.tokenizer, app.state.model = tiny_tokenizer(), tiny_llama()
    observe = app.state.metrics.step.observe
    async with Chat.running(app.state.tokenizer, app.state.model, app.state.settings, observe) as chat:
        yield chat
