"""GGUF files with the shapes and types of models that people have: random weights, the embedded model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

Type = GGMLQuantizationType
HALF_FLOATS = {  # where a block has half floats that scale its numbers
    Type.Q4_0: (0,),
    Type.Q5_0: (0,),
    Type.Q8_0: (0,),
    Type.Q4_K: (0, 2),
    Type.Q6_K: (208,),
}


@dataclass(frozen=True)
class Shape:
    """The shape of a model, and the type of each of its tensors."""

    architecture: str
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    type_of: Callable[[str, int], Type]  # from the name of a tensor in a layer, and the layer; the layer is -1 outside
    tied: bool = True


def _q4_k_m(name: str, layer: int) -> Type:
    """The types in a Q4_K_M file of Qwen2.5 0.5B, whose rows are no multiple of 256, but for the largest ones."""
    if name in ("token_embd", "attn_v"):
        return Type.Q8_0
    if name == "ffn_down":
        return Type.Q6_K if layer % 2 else Type.Q4_K
    return Type.Q5_0


SHAPES = {
    "0.5B-Q4_K_M": Shape("qwen2", 24, 896, 4864, 14, 2, 151_936, _q4_k_m),
    "1.46B-Q4_0": Shape("llama", 24, 2048, 8192, 32, 8, 49_152, lambda name, layer: Type.Q4_0, tied=False),
    "7B-Q4_K_M": Shape(
        *("llama", 32, 4096, 11008, 32, 32, 49_152),
        lambda name, layer: Type.Q6_K if name in ("attn_v", "ffn_down", "output") and layer % 2 else Type.Q4_K,
        tied=False,
    ),
}


def write_model(path: Path, shape: Shape, tokenizer: Path) -> Path:
    """Write a file, unless it is there. `tokenizer` is a GGUF file whose tokenizer it gets, with more unused tokens."""
    if path.is_file():
        return path
    writer = GGUFWriter(path.with_suffix(".unfinished"), shape.architecture)
    _copy_tokenizer(writer, tokenizer, shape.vocabulary)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    source = numpy.random.default_rng(0)
    tensors = _tensors(shape)
    for name, sizes, type in tensors:
        data_type = numpy.dtype(numpy.float32 if type == Type.F32 else numpy.uint8)
        size = int(numpy.prod(_stored_shape(sizes, type))) * data_type.itemsize
        writer.add_tensor_info(name, _stored_shape(sizes, type), data_type, size, None if type == Type.F32 else type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, sizes, type in tensors:
        writer.write_tensor_data(_data(source, sizes, type))
    writer.close()
    path.with_suffix(".unfinished").rename(path)
    return path


def _copy_tokenizer(writer: GGUFWriter, path: Path, vocabulary: int) -> None:
    for field in GGUFReader(path).fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        contents, kind = field.contents(), field.types[0]
        more = vocabulary - len(contents) if field.name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type") else 0
        if more > 0 and field.name == "tokenizer.ggml.tokens":
            contents = [*contents, *(f"<unused{number}>" for number in range(more))]
        elif more > 0:
            contents = [*contents, *[5] * more]  # unused
        writer.add_key_value(field.name, contents, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_vocab_size(vocabulary)


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...], Type]]:
    """The name, the shape and the type of each tensor."""
    hidden, keys = shape.hidden, shape.hidden // shape.heads * shape.key_heads
    matrices = {
        "attn_q": (hidden, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (shape.inner, hidden),
        "ffn_up": (shape.inner, hidden),
        "ffn_down": (hidden, shape.inner),
    }
    outer = ["token_embd"] if shape.tied else ["token_embd", "output"]
    found: list[tuple[str, tuple[int, ...], Type]] = [
        (f"{name}.weight", (shape.vocabulary, hidden), shape.type_of(name, -1)) for name in outer
    ]
    found.append(("output_norm.weight", (hidden,), Type.F32))
    for layer in range(shape.layers):
        for name, sizes in matrices.items():
            found.append((f"blk.{layer}.{name}.weight", sizes, shape.type_of(name, layer)))
            if shape.architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                found.append((f"blk.{layer}.{name}.bias", sizes[:1], Type.F32))
        found += [(f"blk.{layer}.{name}.weight", (hidden,), Type.F32) for name in ("attn_norm", "ffn_norm")]
    return found


def _stored_shape(sizes: tuple[int, ...], type: Type) -> tuple[int, ...]:
    if type == Type.F32:
        return sizes
    length, size = GGML_QUANT_SIZES[type]
    return (*sizes[:-1], sizes[-1] // length * size)


def _data(source: numpy.random.Generator, sizes: tuple[int, ...], type: Type) -> NDArray[Any]:
    """Random blocks of weights around zero, about as large as those of a new model; ones for norms and biases."""
    if type == Type.F32:
        return numpy.ones(sizes, numpy.float32)
    _, size = GGML_QUANT_SIZES[type]
    blocks = source.integers(0, 256, (sizes[0], _stored_shape(sizes, type)[1] // size, size), dtype=numpy.uint8)
    scale = 0.02 / {Type.Q4_0: 5, Type.Q5_0: 10, Type.Q8_0: 74, Type.Q4_K: 150, Type.Q6_K: 1400}[type]
    for start in HALF_FLOATS[type]:
        factor = 7.5 if start else 1  # the minimum of Q4_K is taken away from numbers of 0 to 15
        numbers = numpy.full((*blocks.shape[:2], 1), scale * factor, numpy.float16)
        blocks[:, :, start : start + 2] = numbers.view(numpy.uint8)
    return blocks.reshape(sizes[0], -1)
