"""Compiles our C++ code once for each machine, and loads the operators `torch.ops.parley.*` of kernels.cpp."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from models.engine.subprocesses import Subprocesses
from models.errors import KernelsUnavailableError, one_line
from models.private_files import check_program, others_can_write
from models.scratch import scratch_folder

KERNELS = Path(__file__).with_name("kernels.cpp")
LANES = 16  # numbers that a vector register of the kernels holds; the layouts of keys and weights depend on it
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++20", "-Wno-psabi", f"-DPARLEY_LANES={LANES}"]


def library_path(cache: Path, source: Path = KERNELS) -> Path:
    """The path of the compiled source in `cache`; its name changes with the source, the flags, torch and the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")  # x86, ARM
    texts = [path.read_text(encoding="utf-8") for path in (*_parts(source), *sorted(source.parent.glob("*.h")))]
    parts = "\n".join([*texts, str(torch.__version__), cpu, *FLAGS])
    return cache / f"{source.stem}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.so"


def build_library(cache: Path, source: Path = KERNELS, subprocesses: Subprocesses | None = None) -> Path:
    """The library of a source, compiled (in ten seconds) unless `cache` has it.

    One that others can write is compiled again. Raises KernelsUnavailableError and UntrustedPathError, and
    CompilationError after `subprocesses.stop`.
    """
    path = library_path(cache, source)
    if _is_built(path):
        return path
    compiler, subprocesses = find_compiler(), subprocesses or Subprocesses()
    with scratch_folder(cache, "kernels") as folder:
        if _is_built(path):  # another process has just made it
            return path
        unfinished = folder / path.name
        torch_home = Path(torch.__file__).parent
        includes = [f"-I{torch_home}/include", f"-I{torch_home}/include/torch/csrc/api/include"]
        libraries = [f"-L{torch_home}/lib", "-lc10", "-ltorch_cpu"]
        parts = {part: folder / f"{part.stem}.o" for part in _parts(source)}
        commands = [[compiler, *FLAGS, *includes, "-c", str(part), "-o", str(made)] for part, made in parts.items()]
        with ThreadPoolExecutor(len(parts)) as pool:  # two cores take ten seconds for the kernels, one takes twenty
            outcomes = list(pool.map(subprocesses.run, commands))
        link = [compiler, *FLAGS, *map(str, parts.values()), *libraries, "-o", str(unfinished)]
        if not any(code for code, _ in outcomes):
            outcomes.append(subprocesses.run(link))
        for code, stderr in outcomes:
            if code:
                raise KernelsUnavailableError(f"{compiler} failed: {_reason(stderr)}")
        unfinished.rename(path)  # atomic, since another process may load it at any time
    return path


def find_compiler() -> str:
    """The C++ compiler's name or path: g++, or what the variable CXX says. Raises KernelsUnavailableError."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise KernelsUnavailableError(f"there is no C++ compiler {compiler} (on Debian: apt-get install g++)")
    return compiler


def _parts(source: Path) -> list[Path]:
    """A source, and the others that belong to its library: what its name begins with, and then an underscore."""
    return [source, *sorted(source.parent.glob(f"{source.stem}_*.cpp"))]


def _is_built(path: Path) -> bool:
    return path.is_file() and not others_can_write(path)


def _reason(stderr: str) -> str:
    """The line of a compiler's or linker's output that says what is wrong."""
    # Lines that end with a colon name a function; collect2 says only that the linker failed.
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("collect2:")]
    lines = [line for line in lines if not line.endswith(":")]
    errors = [line for line in lines if "error:" in line]
    return one_line((errors or lines or ["it printed no reason"])[0])


def load_kernels(path: Path) -> None:
    """Load the kernels from a compiled library. Raises KernelsUnavailableError or UntrustedPathError."""
    if loaded_library():
        return
    load_library(path)
    torch.library.register_fake("parley::attention", _attention_shape)
    torch.library.register_fake("parley::linear", _linear_shape)
    torch.library.register_fake("parley::linear_of_experts", _linear_of_experts_shape)
    torch.library.register_fake("parley::unpack_rows", _unpack_rows_shape)


def load_library(path: Path) -> None:
    """Load a compiled library, unless others could have written it. Raises the errors of `load_kernels`."""
    try:
        check_program(path)
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise KernelsUnavailableError(f"{path} cannot be loaded: {one_line(error)}") from error


def loaded_library(source: Path = KERNELS) -> Path | None:
    """The library of a source, if this process has loaded it."""
    libraries = (Path(library) for library in torch.ops.loaded_libraries)
    return next((library for library in libraries if library.stem.startswith(f"{source.stem}-")), None)


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _linear_shape(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, formats: Sequence[int], columns: Sequence[int]
) -> Tensor:
    return x.new_empty(x.shape[0], sum(columns))


def _linear_of_experts_shape(
    x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None, format: int, columns: int
) -> Tensor:
    return x.new_empty(*experts.shape, columns)


def _unpack_rows_shape(weight: Tensor, rows: Tensor, format: int, columns: int, depth: int) -> Tensor:
    return rows.new_empty(rows.shape[0], depth, dtype=torch.float32)
