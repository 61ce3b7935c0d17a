"""Recurrent layers (Mamba, gated delta nets, short convolutions) over the slots of a state cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.engine.state_cache import Run, StateCache, States

WRITERS = {"update_conv_state", "update_recurrent_state"}  # by these, layers of transformers keep states in a `Cache`
CACHE_ARGUMENTS = ("cache_params", "past_key_values")
SCAN = 32  # tokens that Mamba 2 scans at once, on a CPU: a short chunk of a prompt would be padded to its 256


class Memory:
    """The states of a run, in the place of transformers' `Cache`: a recurrent layer reads and writes them there."""

    def __init__(self, states: States) -> None:
        self.states = states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a convolution, (rows, channels, width); None at the beginning of a sequence."""
        return self.states.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A recurrent state, (rows, ...); None at the beginning of a sequence."""
        return self.states.get(("recurrent", state_idx))

    def update_conv_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Keep the last inputs of a convolution. Returns all that are known: the kept ones and the new ones."""
        before = self.states.get(("conv", state_idx))
        if before is None:
            width = conv_kernel_size or new.shape[-1]
            inputs = nn.functional.pad(new, (max(0, width - new.shape[-1]), 0))
        else:
            width = before.shape[-1]
            inputs = torch.cat([before, new], -1)
        self.states["conv", state_idx] = inputs[..., -width:]
        return inputs

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep a recurrent state."""
        self.states["recurrent", state_idx] = new
        return new

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether earlier states are kept as well: they are not."""
        return False


class RecurrentLayer(nn.Module):
    """A recurrent layer of transformers that computes each sequence of a step with the state of its slot.

    Its places in the cache are made at the first step, with the shapes and dtypes that the layer chooses.
    """

    def __init__(self, layer: nn.Module, cache: StateCache) -> None:
        super().__init__()
        self.layer = layer
        self.cache = cache
        self.states: States = {}
        self.continues = False  # whether the layer can compute several tokens at once after a state
        self.signature = inspect.signature(layer.forward)
        self.cache_argument = next(name for name in CACHE_ARGUMENTS if name in self.signature.parameters)
        cache.layers.append(self.states)
        size = getattr(layer, "chunk_size", None)
        if isinstance(size, int) and all(parameter.device.type == "cpu" for parameter in layer.parameters()):
            cast(Any, layer).chunk_size = min(size, SCAN)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the tokens of a step, (1, tokens, ...). Outside of a step, do what the layer itself does."""
        if not self.cache.runs:
            return self.layer(*args, **kwargs)
        arguments = self.signature.bind(*args, **kwargs).arguments
        return _join([self._compute(run, arguments) for run in self.cache.runs])

    def _compute(self, run: Run, arguments: dict[str, Any]) -> Any:
        """The output for the tokens of a run, (1, tokens of the run, ...)."""
        sizes = next(iter(arguments.values())).shape[:2]  # (1, tokens)
        here = slice(run.start, run.start + run.rows * run.count)
        part = _map(arguments, sizes, lambda tensor: tensor[0, here].view(run.rows, run.count, *tensor.shape[2:]))
        places = run.read
        memory = Memory({} if places is None else {name: state[places] for name, state in self.states.items()})
        if places is None or run.count == 1 or self.continues:
            output = self._call(part, memory)
        else:
            tokens = [_map(part, (1, run.count), itemgetter((slice(None), [i]))) for i in range(run.count)]
            output = _join([self._call(token, memory) for token in tokens])
        if not self.states:
            self._attach(_map(part, (run.rows, run.count), _noise_like), memory.states)
        for name, state in memory.states.items():
            self.states[name][run.write] = state
        return _map(output, (run.rows, run.count), lambda tensor: tensor.flatten(0, 1)[None])

    def _call(self, arguments: dict[str, Any], memory: Memory) -> Any:
        """The output of the layer itself, (rows, count, ...). The states in the memory become those after it."""
        bound = inspect.BoundArguments(self.signature, arguments | {self.cache_argument: memory})
        return self.layer(*bound.args, **bound.kwargs)

    def _attach(self, arguments: dict[str, Any], states: States) -> None:
        """Add places for the states that the layer has left. Then find out whether it continues from each of them."""
        for name, state in states.items():
            self.cache.add(self.states, name, state)
        self.continues = all(self._depends_on(name, arguments, states) for name in states)

    def _depends_on(self, name: tuple[str, int], arguments: dict[str, Any], states: States) -> bool:
        """Whether the output for several tokens, of any numbers, depends on a state before them: Mamba 1 ignores it."""
        copies: list[States] = [{key: state.clone() for key, state in states.items()} for _ in range(2)]
        copies[1][name] = -1 - copies[1][name]
        outputs = [self._call(arguments, Memory(copy)) for copy in copies]
        return not all(map(torch.equal, _tensors(outputs[0]), _tensors(outputs[1])))


def replace_recurrent_layers(model: nn.Module, cache: StateCache) -> None:
    """Make the recurrent layers of a model keep their states in a cache, also if another one had them before."""
    for name, child in model.named_children():
        if isinstance(child, RecurrentLayer):
            child = child.layer
        if _keeps_state(type(child)):
            setattr(model, name, RecurrentLayer(child, cache))
        else:
            replace_recurrent_layers(child, cache)


def has_recurrent_layers(model: nn.Module) -> bool:
    """Whether a model has layers that `replace_recurrent_layers` would replace, or has replaced."""
    return any(isinstance(module, RecurrentLayer) or _keeps_state(type(module)) for module in model.modules())


def _keeps_state(kind: type[nn.Module]) -> bool:
    """Whether a class, or one that it inherits from, has a method that writes states to a cache."""
    methods = [method for base in kind.__mro__ for method in vars(base).values() if inspect.isfunction(method)]
    return any(not WRITERS.isdisjoint(inspect.unwrap(method).__code__.co_names) for method in methods)


def _map(value: Any, sizes: tuple[int, int], function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor in a value, also in a tuple or dict, whose first two sizes are these."""
    if isinstance(value, Tensor):
        return function(value) if value.shape[:2] == sizes else value
    if isinstance(value, dict):
        return {key: _map(item, sizes, function) for key, item in value.items()}
    return tuple(_map(item, sizes, function) for item in value) if isinstance(value, tuple) else value


def _noise_like(tensor: Tensor) -> Tensor:
    """Random numbers, the same ones in each call, in the place of activations; token ids stay."""
    numbers = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(tensor) if tensor.is_floating_point() else tensor


def _join(outputs: list[Any]) -> Any:
    """Outputs for successive tokens as one: tensors, or tuples of tensors."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple):
        return tuple(_join(list(parts)) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs, 1)


def _tensors(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [output]
