"""A compiled twin of a model, made while the model itself answers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental import _config as shapes
from transformers import PreTrainedModel


def compiled_twin(model: PreTrainedModel, cache: Path) -> PreTrainedModel:
    """A model with the same tensors, whose layers torch compiles when they are first called, for any number of tokens.

    Layers, not the whole: one layer's program serves all of its kind, so it takes seconds instead of minutes, and
    costs a step 1 ms of 9. `cache` is where torch keeps programs for the next start; a first one takes 15 s.
    """
    from torch._inductor import config as inductor  # takes a second, which a start need not wait for

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)  # not in /tmp, where others might write
    inductor.compile_threads = 1  # no pool of processes, which would stay
    inductor.size_asserts = inductor.alignment_asserts = False  # 0.5 ms of a step of 10
    shapes.use_duck_shape = False  # or a number of tokens that equals another size would be taken for it
    tensors = [tensor for module in model.modules() for tensor in _tensors(module)]
    twin: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for layer in _layers(twin):
        layer.compile(fullgraph=True, dynamic=True, options={"guard_filter_fn": _needed})
    return twin


def _needed(guards: Sequence[torch._dynamo.types.GuardFilterEntry]) -> list[bool]:
    """Which guards tell one kind of layer from another; the rest hold by construction, and would take 1 ms a step."""
    return [guard.guard_type in ("TYPE_MATCH", "CONSTANT_MATCH", "EQUALS_MATCH") for guard in guards]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
