"""Compiles a module to one program in another process; the module stays usable meanwhile."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import inspect
import os
import pickle
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, export

from models.engine import attention
from models.engine.native import build
from models.engine.quantized_weight import QuantizedWeight
from models.engine.subprocesses import Subprocesses
from models.errors import CompilationError
from models.private_files import check_program
from models.scratch import scratch_folder

SOURCE = build.KERNELS.with_name("program.cpp")

Program = Callable[..., Tensor]


def compile_program(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    sizes: tuple[Dim, ...],
    mark: str,
    cache: Path,
    subprocesses: Subprocesses | None = None,
) -> Program:
    """A program that computes what the module computes, on the same tensors.

    torch's AOTInductor turns the whole module into one C++ function: a step of the embedded model takes 4.4 ms. Python
    takes 10 ms to call one operator after another. `inputs` are an example; their first sizes may vary as `sizes` says.
    `mark` is anything else that the program depends on, such as the model's configuration. The first compilation takes
    a minute; `cache` is the folder of programs. Raises CompilationError, also after `subprocesses.stop`,
    KernelsUnavailableError and UntrustedPathError.
    """
    package, subprocesses = cache / _name(module, mark), subprocesses or Subprocesses()
    if not package.is_dir():
        _compile(module, inputs, sizes, package, subprocesses)
    if not build.loaded_library(SOURCE):
        build.load_library(build.build_library(cache, SOURCE, subprocesses))
    subprocesses.check()
    check_program(package)
    try:
        program, tensors = torch.classes.parley.Program(str(package)), _tensors(module)
        program.load({name: tensors[name].detach() for name in program.constants()})
        program.run(inputs)
    except (RuntimeError, KeyError) as error:
        raise CompilationError(str(error)) from error
    return lambda *arguments: program.run(arguments)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, each under all its names."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _name(module: nn.Module, mark: str) -> str:
    """A name with a hash of everything that affects the program."""
    shapes = [f"{name} {tensor.dtype} {tensor.shape}" for name, tensor in _tensors(module).items()]
    versions = [str(torch.__version__), transformers.__version__, str(torch.cpu.get_capabilities())]
    sources = [source.read_text(encoding="utf-8") for source in _sources(module)]
    # Panels of several formats have the same size, and the format is a constant in the program.
    formats = [part.format.name for part in module.modules() if isinstance(part, QuantizedWeight)]
    text = "\n".join([*versions, str(build.loaded_library()), mark, repr(module), *shapes, *formats, *sources])
    return f"step-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _sources(module: nn.Module) -> list[Path]:
    """The files whose code becomes the program, except those of torch and transformers: `_name` has their versions."""
    files = {attention.__file__, __file__}
    for kind in {kind for part in module.modules() for kind in type(part).__mro__}:
        if kind.__module__.partition(".")[0] not in ("torch", "transformers", "builtins"):
            with suppress(TypeError, OSError):  # a class that no file defines
                files.add(inspect.getfile(kind))
    return sorted(map(Path, files))


def _compile(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    sizes: tuple[Dim, ...],
    package: Path,
    subprocesses: Subprocesses,
) -> None:
    """Compile in another process: in this one, the compiler would hold the GIL and delay replies for a minute."""
    shapes = {id(tensor): _empty(tensor) for tensor in [*inputs, *_tensors(module).values()]}
    twin = copy.deepcopy((module, inputs), shapes)
    code, stderr = subprocesses.run(
        [sys.executable, "-m", __name__],
        pickle.dumps((*twin, sizes, build.loaded_library(), package)),
        os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if code:
        *_, lines = stderr.rpartition("Traceback")
        why = (line for line in lines.splitlines()[1:] if not line.startswith(" "))
        raise CompilationError(next(why, f"the compiler ended with {code}"))


def _empty(tensor: Tensor) -> Tensor:
    """A tensor of the same shape without data."""
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _compile_here() -> None:
    """The work of the other process: read a module without its data, write the package."""
    os.nice(19)  # replies have priority
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background of a shell ignore it
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG: end with the server, and clean up
    warnings.simplefilter("ignore")
    module, inputs, sizes, library, package = pickle.load(sys.stdin.buffer)
    if library:
        build.load_kernels(library)
    module.to_empty(device="cpu")
    inputs = tuple(torch.zeros_like(example, device="cpu") for example in inputs)
    with torch.no_grad():
        exported = export(module, inputs, dynamic_shapes=[{0: size} for size in sizes], strict=False)
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.precompile_headers": False,  # takes ten seconds, in a folder of /tmp that others can create
        "always_keep_tensor_constants": True,  # else small constants are compiled in, without their data
        "joint_graph_constant_folding": False,
        "cpp.threads": 1,  # for the operators between our kernels: a step of one row takes 4.4 ms, not 4.8
        "compile_threads": 1,
    }
    with scratch_folder(package.parent, "program") as folder:
        if package.is_dir():  # another process has just made it
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # before the import below
        from torch._inductor import aoti_compile_and_package

        archive = f"{folder}/{package.name}.pt2"
        made = aoti_compile_and_package(exported, package_path=archive, inductor_configs=options)
        # torch would unpack the archive at each start, and leave it in the temporary folder.
        with zipfile.ZipFile(made) as packed:
            packed.extractall(folder)
        (folder / package.name).rename(package)  # atomic, since another process may load it at any time


if __name__ == "__main__":
    _compile_here()
