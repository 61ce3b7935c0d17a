"""A module as one compiled program, made by another process while the module itself answers."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, export

from models import kernels

SOURCE = Path(__file__).with_name("program.cpp")

Program = Callable[..., Tensor]


class CompilationFailed(Exception):
    """The compiler, or what it compiled, did not work; the message says why."""


def compiled(module: nn.Module, inputs: tuple[Tensor, ...], sizes: tuple[Dim, ...], mark: str, cache: Path) -> Program:
    """A program that does what the module does, with the same tensors.

    All of it is one function in C++ (torch's AOTInductor): a step of the embedded model takes 4.5 ms, where Python
    takes 10 to call one operator after another. `inputs` are an example, whose first sizes may vary as `sizes` say;
    `mark` tells what neither the module's structure nor our code does. The first time takes a minute; `cache` is
    where programs are kept, and what is there takes no time. Raises CompilationFailed and KernelsUnavailable.
    """
    package = cache / f"{_name(module, mark)}.pt2"
    if not package.is_file():
        _compile(module, inputs, sizes, package)
    if not kernels.loaded(SOURCE):
        torch.ops.load_library(kernels.build(cache, SOURCE))  # type: ignore[no-untyped-call]
    try:
        program, tensors = torch.classes.parley.Program(str(package)), _tensors(module)
        program.load({name: tensors[name].detach() for name in program.constants()})
        program.run(inputs)
    except (RuntimeError, KeyError) as error:
        raise CompilationFailed(str(error)) from error
    return lambda *arguments: program.run(arguments)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, each by all its names."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _name(module: nn.Module, mark: str) -> str:
    """Another one for another program."""
    sources = [source.read_text(encoding="utf-8") for source in sorted(Path(__file__).parent.glob("*.py"))]
    shapes = [f"{name} {tensor.dtype} {tensor.shape}" for name, tensor in _tensors(module).items()]
    versions = [str(torch.__version__), transformers.__version__, str(torch.cpu.get_capabilities())]
    whole = "\n".join([*versions, str(kernels.loaded()), mark, repr(module), *shapes, *sources])
    return f"step-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def _compile(module: nn.Module, inputs: tuple[Tensor, ...], sizes: tuple[Dim, ...], package: Path) -> None:
    """Compile in another process: in this one the compiler would hold the interpreter, and replies, for a minute."""
    shapes = {id(tensor): _empty(tensor) for tensor in [*inputs, *_tensors(module).values()]}
    twin = copy.deepcopy((module, inputs), shapes)
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((*twin, sizes, kernels.loaded(), package)),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        *_, lines = done.stderr.decode(errors="replace").rpartition("Traceback")
        why = (line for line in lines.splitlines()[1:] if not line.startswith(" "))
        raise CompilationFailed(next(why, f"it ended with {done.returncode}"))


def _empty(tensor: Tensor) -> Tensor:
    """One like it without numbers."""
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _compile_here() -> None:
    """What the other process does: read a module without its numbers, write the package."""
    os.nice(19)  # replies first
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG: end with the server, and tidy up
    warnings.simplefilter("ignore")
    module, inputs, sizes, library, package = pickle.load(sys.stdin.buffer)
    if library:
        kernels.load(library)
    module.to_empty(device="cpu")
    inputs = tuple(torch.zeros_like(example, device="cpu") for example in inputs)
    with torch.no_grad():
        exported = export(module, inputs, dynamic_shapes=[{0: size} for size in sizes], strict=False)
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.precompile_headers": False,  # ten seconds, and in a folder of /tmp that others can name
        "always_keep_tensor_constants": True,  # what is small would be compiled in, and has no numbers here
        "joint_graph_constant_folding": False,
        "cpp.threads": 1,  # of what is left between our kernels: a step of one row takes 4.4 ms instead of 4.8
        "compile_threads": 1,
    }
    package.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=package.parent) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # before the import below
        from torch._inductor import aoti_compile_and_package

        made = aoti_compile_and_package(exported, package_path=f"{folder}/{package.name}", inductor_configs=options)
        Path(made).rename(package)  # whole or not at all: another process may load it at any time


if __name__ == "__main__":
    _compile_here()
