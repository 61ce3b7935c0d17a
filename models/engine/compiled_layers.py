"""The layers of a model, compiled by torch while the engine goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.engine.subprocesses import Subprocesses
from models.errors import CompilationError
from models.private_files import make_private_folder

TOKENS = (1, 13)  # a step of one token has a program of its own, and one program serves all others
VARIANTS = 64  # programs: layers of different kinds have their own


class CompiledLayers:
    """The decoder layers of a model as programs that compute all between two products at once (torch.compile).

    Layers of one kind share a program. The attention is one operator, into which the compiler does not look. Raises
    CompilationError if the model has no list of layers.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "inductor") -> None:
        self.layers = _find_layers(model)
        self._programs = [torch.compile(layer.forward, dynamic=True, backend=backend) for layer in self.layers]

    def make(self, run: Callable[[int], Tensor], cache: Path, subprocesses: Subprocesses) -> None:
        """Make the programs. `run` runs the model on so many tokens. Takes some seconds, and can run in any thread.

        `cache` is a folder for what torch keeps for later starts. Raises CompilationError if `subprocesses` is stopped.
        """
        make_private_folder(cache)  # torch's own choice is a folder that other users could make first
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        hooks = [
            layer.register_forward_pre_hook(_runs_too(program, subprocesses), with_kwargs=True)
            for layer, program in zip(self.layers, self._programs, strict=True)
        ]
        try:
            with (
                torch._dynamo.config.patch(recompile_limit=VARIANTS),
                torch._inductor.config.patch(compile_threads=1),  # else its processes stay, up to 32 of them
                torch.inference_mode(),
            ):
                for tokens in TOKENS:
                    run(tokens)
        finally:
            for hook in hooks:
                hook.remove()

    def use(self) -> None:
        """Let the layers be computed by their programs from now on."""
        for layer, program in zip(self.layers, self._programs, strict=True):
            layer._compiled_call_impl = program


def _runs_too(program: Callable[..., Any], subprocesses: Subprocesses) -> Callable[..., None]:
    """A hook that runs a layer's program before the layer itself, with what it is called with, in this thread only."""
    thread = get_ident()

    # Another thread, which may see the hook while it is added or removed, may call it without options.
    def hook(layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any] | None = None) -> None:
        if get_ident() == thread:
            subprocesses.check()
            program(*arguments, **(options or {}))

    return hook


def only_compiled() -> Any:
    """Within this context, layers for which no program was made run as they are: nothing is compiled meanwhile."""
    return torch.compiler.set_stance("eager_on_recompile")


def _find_layers(model: PreTrainedModel) -> list[nn.Module]:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(found) != 1:
        raise CompilationError("it has no single list of layers")
    return list(found[0])
