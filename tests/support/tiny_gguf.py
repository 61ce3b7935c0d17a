"""A tiny llama.cpp model file with random weights."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import numpy
import torch
from gguf import GGUFWriter, TokenType

from models.language.model_files import find_model
from models.settings import Settings
from tests.support.tiny import SHAPE, SPECIAL, TEMPLATE, tiny_tokenizer

LAYERS = 2
STDERR = 2


def write_tiny_gguf(path: Path, template: str | None = TEMPLATE) -> Path:
    """Write a Llama of two layers with the tiny tokenizer, in float32."""
    hidden, inner, heads, key_heads = (
        SHAPE[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    ids = tiny_tokenizer().get_vocab()
    tokens = [*sorted(ids, key=ids.__getitem__), "ab"]  # the token of the one merge that the format needs
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template:
        writer.add_chat_template(template)

    source = numpy.random.default_rng(0)
    key_size = hidden // heads * key_heads
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), hidden),
        "output.weight": (len(tokens), hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (hidden,),
            f"blk.{layer}.ffn_norm.weight": (hidden,),
            f"blk.{layer}.attn_q.weight": (hidden, hidden),
            f"blk.{layer}.attn_k.weight": (key_size, hidden),
            f"blk.{layer}.attn_v.weight": (key_size, hidden),
            f"blk.{layer}.attn_output.weight": (hidden, hidden),
            f"blk.{layer}.ffn_gate.weight": (inner, hidden),
            f"blk.{layer}.ffn_up.weight": (inner, hidden),
            f"blk.{layer}.ffn_down.weight": (hidden, inner),
        }
    for name, shape in shapes.items():
        writer.add_tensor(name, source.standard_normal(shape).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(gguf: Path, cache: Path, stderr: Connection) -> None:
    """Convert a file, in a process of its own; `stderr` gets what it prints."""
    os.dup2(stderr.fileno(), STDERR)
    find_model(Settings(model=str(gguf)), torch.float32, cache)
