"""Where each parameter of a model comes from in a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.tensor_mapping import TensorNameMap
from transformers import PreTrainedModel

from models.errors import ModelError
from models.language.gguf.architectures import Kind
from models.language.gguf.rope import divided_frequencies
from models.language.gguf.settings import ModelSettings
from models.language.gguf.tensors import Source

JOINED = {  # parameters of transformers that are several tensors in the file, or have another name than gguf-py knows
    "experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "experts.down_proj": ("ffn_down_exps.weight",),
    "experts.down_proj_bias": ("ffn_down_exps.bias",),
    "block_sparse_moe.router.weight": ("ffn_gate_inp.weight",),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "e_score_correction_bias": ("exp_probs_b.bias",),
    "self_attn.sinks": ("attn_sinks.weight",),
}
EXTRAS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.rope_freqs\.weight")


def find_sources(kind: Kind, settings: ModelSettings, model: PreTrainedModel) -> dict[str, Source]:
    """The sources by the parameters' names. Raises ModelError for tensors that are missing, left over or misshapen."""
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == settings.architecture)
    names = get_tensor_name_map(architecture, settings.layers)
    sources: dict[str, Source] = {}
    missing: list[str] = []
    for name, shape in _parameters(model):
        stored, source = _by_name(name, names, settings)
        for change in kind.changes:
            source = change(name, source, settings)
        if source is None:
            missing.append(stored)
            continue
        if source.change is None and source.shape != shape:
            raise ModelError(f"{settings.path} is broken: {stored} is {list(source.shape)}, not {list(shape)}")
        sources[name] = source
    _check(sources, missing, settings)
    return sources | _frequencies(settings, model)


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of what a checkpoint of the model has; tied weights once."""
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            yield name, tuple(tensor.shape)


def _by_name(name: str, names: TensorNameMap, settings: ModelSettings) -> tuple[str, Source | None]:
    """The name of a parameter in the file, and where it is; None if it is not there."""
    stored = _stored_names(name, names)
    if all(part in settings.tensors for part in stored):
        parts = tuple(settings.tensors[part] for part in stored)
        return stored[0], Source(parts, 0 if len(parts) == 1 else -1 if "bias" in name else -2)
    return stored[0], _fused(stored, settings)


def _stored_names(name: str, names: TensorNameMap) -> tuple[str, ...]:
    for ending, stored in JOINED.items():
        if name.endswith(ending):
            layer = re.search(r"\.(\d+)\.", name)
            return tuple(f"blk.{layer[1] if layer else 0}.{part}" for part in stored)
    inner = name.partition(".")[2]  # the converter knows some models without their head
    return (names.get_name(name, (".weight", ".bias")) or names.get_name(inner, (".weight", ".bias")) or name,)


def _fused(stored: tuple[str, ...], settings: ModelSettings) -> Source | None:
    """Queries, keys and values, which newer and older files have in one tensor, or in three, where others do not."""
    match = re.fullmatch(r"(blk\.\d+\.)attn_(q|k|v|qkv)\.(weight|bias)", stored[0])
    if match is None:
        fused = [stored[0].replace("ffn_gate_exps", "ffn_gate_up_exps")]
        return Source((settings.tensors[fused[0]],)) if fused[0] in settings.tensors else None
    layer, letter, ending = match.groups()
    if letter == "qkv":
        parts = [settings.tensors.get(f"{layer}attn_{each}.{ending}") for each in "qkv"]
        return Source(tuple(part for part in parts if part)) if all(parts) else None
    if (whole := settings.tensors.get(f"{layer}attn_qkv.{ending}")) is None:
        return None
    heads = settings.need("attention.head_count")
    groups = settings.get("attention.head_count_kv", heads)
    sizes = [count * settings.head_dim for count in (heads, groups, groups)]
    return Source((whole,), rows=torch.split(torch.arange(whole.shape[0]), sizes)["qkv".index(letter)])


def _check(sources: dict[str, Source], missing: list[str], settings: ModelSettings) -> None:
    """Raise ModelError if tensors are missing or left over."""
    if missing:
        raise ModelError(
            f"{settings.path} is incomplete: {len(missing)} tensors are missing, first {missing[0]}; download all "
            "of it again, with all its parts"
        )
    used = {part.name for source in sources.values() for part in source.parts}
    further = re.compile(rf"blk\.({'|'.join(map(str, range(settings.layers, settings.need('block_count'))))})\..*")
    extra = [
        name for name in settings.tensors if name not in used and not EXTRAS.fullmatch(name) and not further.match(name)
    ]
    if extra:
        raise settings.unsupported(f"{len(extra)} of its tensors have no place in the model, first {extra[0]}")


def _frequencies(settings: ModelSettings, model: PreTrainedModel) -> dict[str, Source]:
    """The inverse frequencies of the rotary embeddings, if the file has factors that divide them."""
    factors = settings.tensors.get("rope_freqs.weight", settings.tensors.get("blk.0.rope_freqs.weight"))
    if factors is None:
        return {}
    buffers = [name for name, _ in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    rope = model.config.rope_parameters
    if len(buffers) != 1 or rope.get("rope_type") != "default":
        raise settings.unsupported("its rotary positions are scaled in two ways")
    return {buffers[0]: Source((factors,), change=lambda values: divided_frequencies(values, rope["rope_theta"]))}
