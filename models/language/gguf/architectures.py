"""What each kind of model in a GGUF file needs to become one of transformers'.

The facts are those of llama.cpp's converter, which each entry of `ARCHITECTURES` reverts. The names of the tensors are
gguf-py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from models.errors import ModelError, one_line
from models.language.gguf.rope import rope_parameters
from models.language.gguf.settings import ModelSettings
from models.language.gguf.tensors import Source, StoredTensor

EXTRAS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight")  # read for the configuration


@dataclass(frozen=True)
class Kind:
    """How the files of an architecture differ from transformers' model."""

    model_type: str
    settings: Callable[[ModelSettings], dict[str, Any]] = lambda settings: {}
    permuted: bool = False  # the rows of queries and keys are in the order that pairs of neighbours are rotated in
    norm_offset: bool = False  # norms are stored plus one
    names: Mapping[str, str] = field(default_factory=dict)


def _gemma3(settings: ModelSettings) -> dict[str, Any]:
    layers = settings.need("block_count")
    window = settings.get("attention.sliding_window")
    period = settings.get("attention.sliding_window_pattern", 6)
    types = ["sliding_attention" if window and (layer + 1) % period else "full_attention" for layer in range(layers)]
    head_dim = settings.get("attention.key_length", 256)
    scale = settings.need("embedding_length") // settings.need("attention.head_count") if layers == 62 else head_dim
    full = rope_parameters(settings, head_dim)
    local = {"rope_type": "default", "rope_theta": settings.get("rope.freq_base_swa", 10000.0)}
    return {
        "sliding_window": window,
        "layer_types": types,
        "query_pre_attn_scalar": scale,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "final_logit_softcapping": settings.get("final_logit_softcapping"),
    }


ARCHITECTURES = {
    "llama": Kind("llama", permuted=True),
    "qwen2": Kind("qwen2"),
    "qwen3": Kind("qwen3"),
    "gemma3": Kind("gemma3_text", _gemma3, norm_offset=True),
}


class Architecture:
    """The kind of a file's model."""

    def __init__(self, kind: Kind, settings: ModelSettings) -> None:
        self.kind = kind
        self.settings = settings

    def config(self) -> PreTrainedConfig:
        """The configuration. Raises ModelError."""
        values = _common(self.settings) | self.kind.settings(self.settings)
        try:
            return AutoConfig.for_model(values.pop("model_type", self.kind.model_type), **values)
        except Exception as error:  # the configurations check their values, each with errors of its own
            raise ModelError(f"{self.settings.path} cannot be loaded: {one_line(error)}") from error

    def sources(self, model: PreTrainedModel) -> dict[str, Source]:
        """Where each parameter comes from. Raises ModelError."""
        tensors = self.settings.tensors
        sources, missing, used = {}, [], set()
        for name, shape in _parameters(model):
            stored = self._stored_name(name, model.config)
            if stored not in tensors:
                missing.append(stored)
                continue
            used.add(stored)
            sources[name] = source = self._source(stored, tensors[stored], model.config)
            if source.change is None and source.shape != shape:
                raise ModelError(
                    f"{self.settings.path} is broken: {stored} has the shape {source.shape}, and the model {shape}"
                )
        if missing:
            raise ModelError(f"{self.settings.path} is incomplete: {len(missing)} tensors are missing, first {missing[0]}")
        extra = [name for name in tensors if name not in used and not EXTRAS.fullmatch(name)]
        if extra:
            raise self.settings.unsupported(f"{len(extra)} tensors have no place in the model, first {extra[0]}")
        return sources | self._frequencies(model)

    def _stored_name(self, name: str, config: PreTrainedConfig) -> str:
        architecture = next(key for key, value in MODEL_ARCH_NAMES.items() if value == self.settings.architecture)
        names = get_tensor_name_map(architecture, config.num_hidden_layers)
        return names.get_name(name, (".weight", ".bias")) or name

    def _source(self, name: str, tensor: StoredTensor, config: PreTrainedConfig) -> Source:
        rows = None
        if self.kind.permuted and (match := re.search(r"\.attn_([qk])\.", name)):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            rows = _halves(heads, tensor.shape[0])
        change = _minus_one if self.kind.norm_offset and name.endswith("norm.weight") else None
        return Source((tensor,), rows=rows, change=change)

    def _frequencies(self, model: PreTrainedModel) -> dict[str, Source]:
        """The inverse frequencies of rotary embeddings, if the file has factors that divide them."""
        if (factors := self.settings.tensors.get("rope_freqs.weight")) is None:
            return {}
        name, frequencies = next((n, b) for n, b in model.named_buffers() if n.endswith("rotary_emb.inv_freq"))
        base = model.config.rope_parameters["rope_theta"]
        count = frequencies.shape[0]
        default = 1.0 / base ** (torch.arange(0, 2 * count, 2, dtype=torch.float32) / (2 * count))
        return {name: Source((factors,), change=lambda values: default / values)}


def find(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Architecture:
    """The architecture of a file. Raises ModelError if it is unknown."""
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{path}: Parley does not know the architecture {name} of GGUF files: use a folder of the model with safetensors"
        )
    return Architecture(ARCHITECTURES[name], ModelSettings(path, metadata, tensors))


def _common(settings: ModelSettings) -> dict[str, Any]:
    """The settings that nearly all configurations have."""
    hidden, heads = settings.need("embedding_length"), settings.need("attention.head_count")
    head_dim = settings.get("attention.key_length", hidden // heads)
    tokens = settings.metadata.get
    return {
        "vocab_size": settings.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": settings.need("context_length"),
        "hidden_size": hidden,
        "intermediate_size": settings.get("feed_forward_length"),
        "num_hidden_layers": settings.need("block_count") - settings.get("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": settings.get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(settings, head_dim),
        "tie_word_embeddings": "output.weight" not in settings.tensors,
        "attention_bias": settings.has("attn_q.bias"),
        "mlp_bias": settings.has("ffn_up.bias"),
        "bos_token_id": tokens("tokenizer.ggml.bos_token_id"),
        "eos_token_id": tokens("tokenizer.ggml.eos_token_id"),
        "pad_token_id": tokens("tokenizer.ggml.padding_token_id"),
    }


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of what a checkpoint of the model has; tied weights once."""
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield name, tuple(tensor.shape)


def _halves(heads: int, rows: int) -> Tensor:
    """The order of rows that brings pairs of neighbours (0, 1), (2, 3) ... of each head to its two halves."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _minus_one(values: Tensor) -> Tensor:
    return values - 1
