"""Linears, embeddings and experts whose weights stay quantized: a step reads a quarter of the bytes, or an eighth.

Runs on a CPU with our kernels. Activations are rounded to one byte, with a scale for each group of 32. Each row is
computed alone, so its bits do not depend on the other rows of a batch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from models.engine.native import build
from models.engine.quantized_weight import GROUP, QuantizedWeight
from models.engine.weight_readers import children_read

EXPERTS = "parley_experts"  # the name in transformers' registry
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class QuantizedLinear(nn.Module):
    """One or more linears of the same input, computed as one, with their results one after the other."""

    def __init__(self, weights: list[QuantizedWeight], bias: Tensor | None = None) -> None:
        super().__init__()
        self.weights = nn.ModuleList(weights)
        self.formats = [int(weight.format) for weight in weights]
        self.sizes = [weight.outputs for weight in weights]
        self.bias = None if bias is None else nn.Buffer(bias.detach().float())

    @classmethod
    def joined(cls, linears: list[QuantizedLinear]) -> QuantizedLinear:
        """Linears of the same input as one."""
        biases = [torch.zeros(sum(each.sizes)) if each.bias is None else each.bias for each in linears]
        has_bias = any(linear.bias is not None for linear in linears)
        weights = [weight for linear in linears for weight in linear.weights]
        return cls(weights, torch.cat(biases) if has_bias else None)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """Nothing but a dtype and a device, which some models ask for."""
        return torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        panels = [weight.panels for weight in self.weights]
        result: Tensor = torch.ops.parley.linear(rows, panels, self.bias, self.formats, self.sizes)
        return result.to(x.dtype).view(*x.shape[:-1], result.shape[-1])


class QuantizedEmbedding(nn.Module):
    """An embedding that unpacks the rows it is asked for. `scale` multiplies them, as Gemma's embedding does."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, scale: float | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.outputs, weight.inputs
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.rows(ids.flatten())
        rows = rows if self.scale is None else rows * self.scale
        return rows.to(self.dtype).view(*ids.shape, self.embedding_dim)


def quantized_experts(experts: nn.Module, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """An experts function of transformers' `ExpertsInterface`, over quantized weights.

    x is (tokens, hidden), `chosen` (tokens, choices), `shares` the same; the result is (tokens, hidden).
    """
    if not isinstance(experts.down_proj, QuantizedWeight):  # of a layer whose sizes do not fit
        return type(experts).forward.__wrapped__(experts, x, chosen, shares)  # type: ignore[attr-defined,no-any-return]
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _of_experts(experts, name, x, chosen)  # (tokens, choices, 2 * intermediate)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)  # type: ignore[operator]
    outer = _of_experts(experts, "down_proj", inner.flatten(0, 1), chosen.reshape(-1, 1)).view(*chosen.shape, -1)
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)  # type: ignore[operator]
    return (outer * shares.unsqueeze(-1)).sum(1).to(x.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, quantized_experts)


def _of_experts(experts: nn.Module, name: str, x: Tensor, chosen: Tensor) -> Tensor:
    """The linears of the chosen experts, (tokens, choices, outputs)."""
    weight: QuantizedWeight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias").float() if experts.has_bias else None
    result: Tensor = torch.ops.parley.linear_of_experts(
        x.float().contiguous(), chosen.contiguous(), weight.panels, bias, int(weight.format), weight.outputs
    )
    return result.to(x.dtype)


@dataclass(frozen=True)
class Place:
    """A parameter that can be quantized, in its module.

    `transposed` is whether its inputs come first, `is_outer` whether it is an embedding or the head.
    """

    module: nn.Module
    parameter: str
    transposed: bool = False
    is_outer: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """([experts,] outputs, inputs)."""
        return tuple(self.oriented(self.module.get_parameter(self.parameter)).shape)

    @property
    def is_of_experts(self) -> bool:
        return self.parameter in EXPERT_WEIGHTS

    @property
    def fits(self) -> bool:
        """Whether our layout can hold the weight: inputs, and outputs of experts, come in groups."""
        *experts, outputs, inputs = self.shape
        return inputs % GROUP == 0 and (not experts or outputs % GROUP == 0)

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight with the inputs last."""
        return weight.transpose(-1, -2) if self.transposed else weight


def quantizable(model: PreTrainedModel) -> dict[str, Place]:
    """The parameters of a model, maybe without data, that can be quantized, by name."""
    found: dict[str, Place] = {}
    readers = {kind: children_read(kind) for kind in {type(module) for module in model.modules()}}
    read = {f"{path}.{name}.weight" for path, module in model.named_modules() for name in readers[type(module)]}
    outer = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    for path, module in model.named_modules():
        places = list(_places(module, module in outer))
        if all(place.fits for place in places):  # of all weights of experts or of none
            found |= {f"{path}.{place.parameter}": place for place in places}
    halves = {name for pair in model.all_tied_weights_keys.items() if read & {*pair} for name in pair}
    return {name: place for name, place in found.items() if name not in read | halves}


def put_quantized(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> None:
    """Put quantized weights, by the names of the parameters, in the place of those parameters."""
    for name, weight in _with_tied(model, weights).items():
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        if parameter in EXPERT_WEIGHTS:
            delattr(module, parameter)
            setattr(module, parameter, weight)
        elif isinstance(module, nn.Embedding):
            model.set_submodule(path, QuantizedEmbedding(weight, module.weight.dtype, _scale_of(module)))
        else:
            model.set_submodule(path, QuantizedLinear([weight], getattr(module, "bias", None)))
    if any(name.endswith(EXPERT_WEIGHTS) for name in weights):
        model.set_experts_implementation(EXPERTS)


def not_quantized(model: nn.Module, kept: Container[str] = ()) -> list[str]:
    """The linears and experts of a model that stay as they are, but for parameters in `kept`; * is any layer."""
    names = (
        path
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if (name in EXPERT_WEIGHTS if _has_experts(module) else name == "weight" and _is_linear(module))
        and f"{path}.{name}" not in kept
    )
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def _with_tied(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The weights, and one for both of tied parameters, unless the files have two that differ."""
    result = dict(weights)
    for name, twin in model.all_tied_weights_keys.items():
        one, other = result.get(name), result.get(twin)
        if one is not None and (other is None or torch.equal(one.panels, other.panels)):
            result[twin] = one
        elif other is not None and one is None:
            result[name] = other
    return result


def shares(model: nn.Module) -> dict[str, float]:
    """The share of a model's weights that is stored in each format or dtype, the largest first."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            counts[module.format.name] += module.count
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {kind: count / counts.total() for kind, count in counts.most_common()}


def is_faster() -> bool:
    """Whether quantized linears are faster here than float32: they need our kernels, and AVX2 or VNNI."""
    return build.loaded_library() is not None and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _places(module: nn.Module, is_outer: bool) -> Iterator[Place]:
    if type(module) is nn.Linear:
        yield Place(module, "weight", is_outer=is_outer)
    elif _has_scale(module) or (type(module) is nn.Embedding and is_outer):
        yield Place(module, "weight", is_outer=True)
    elif type(module) is Conv1D:
        yield Place(module, "weight", transposed=True)
    elif _has_experts(module):
        for name in EXPERT_WEIGHTS:
            if name in module._parameters:
                yield Place(module, name, bool(module.is_transposed))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _has_experts(module: nn.Module) -> bool:
    """Whether a module has the experts that transformers' functions take."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _has_scale(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")


def _scale_of(embedding: nn.Module) -> float | None:
    return float(embedding.embed_scale) if _has_scale(embedding) else None  # type: ignore[arg-type]
