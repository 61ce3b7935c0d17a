"""A tiny Llama with random weights as a llama.cpp model file, in any of the format's types."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy
from gguf import GGMLQuantizationType, TokenType
from gguf.quants import dequantize, quantize

from tests.support.gguf_blocks import random_blocks
from tests.support.gguf_models import write_gguf
from tests.support.tiny import SHAPE, SPECIAL, TEMPLATE, tiny_tokenizer

PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
HEAD_SIZE = 16


def write_tiny_gguf(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    template: str | None = TEMPLATE,
    hidden: int = SHAPE["hidden_size"],
    inner: int = SHAPE["intermediate_size"],
    layers: int = 2,
    experts: int = 0,
    tied: bool = False,
    float32: Collection[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a Llama, or a Mixtral if there are experts, with the tiny tokenizer. Its matrices are of `kind`.

    Norms and routers are in float32, as llama.cpp's converter leaves them, and so are the tensors in `float32`.
    `changes` are those of its metadata.
    """
    tokens = _tokens()
    heads, key_heads = hidden // HEAD_SIZE, hidden // HEAD_SIZE // 2
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "llama.embedding_length": hidden,
        "llama.block_count": layers,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": key_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_SIZE,
        "llama.expert_count": experts or None,
        "llama.expert_used_count": 2 if experts else None,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": template,
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (len(tokens), hidden)
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (hidden,),
                "ffn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (key_heads * HEAD_SIZE, hidden),
                "attn_v": (key_heads * HEAD_SIZE, hidden),
                "attn_output": (hidden, hidden),
                **_feed_forward(hidden, inner, experts),
            }.items()
        }
    kinds = {
        name: kind
        for name, shape in shapes.items()
        if len(shape) > 1 and "ffn_gate_inp" not in name and name not in float32
    }
    tensors = {
        name: _tensor(kinds.get(name, GGMLQuantizationType.F32), shape, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return write_gguf(path, metadata | dict(changes or {}), tensors, kinds)


def _tokens() -> list[str]:
    ids = tiny_tokenizer().get_vocab()
    return [*sorted(ids, key=ids.__getitem__), "ab"]  # the token of the one merge that the format needs


def _feed_forward(hidden: int, inner: int, experts: int) -> dict[str, tuple[int, ...]]:
    if not experts:
        return {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    return {
        "ffn_gate_inp": (experts, hidden),
        "ffn_gate_exps": (experts, inner, hidden),
        "ffn_up_exps": (experts, inner, hidden),
        "ffn_down_exps": (experts, hidden, inner),
    }


def _tensor(kind: GGMLQuantizationType, shape: tuple[int, ...], seed: int) -> Any:
    """Random numbers, or random blocks, of such a size that outputs are about twice as large as inputs."""
    size = 2 / math.sqrt(shape[-1])
    if kind not in PLAIN:
        usual = dequantize(random_blocks(kind, (1, 4096), seed), kind).std()
        return random_blocks(kind, shape, seed, 0.01 * size / float(usual))
    numbers = numpy.random.default_rng(seed).standard_normal(shape).astype("float32")
    if len(shape) == 1:  # a norm
        return 1 + numbers / numpy.float32(10)
    return (
        numbers * numpy.float32(size)
        if kind == GGMLQuantizationType.F32
        else quantize(numbers * numpy.float32(size), kind)
    )
