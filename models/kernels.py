"""Our C++, compiled once for a machine: the operators `torch.ops.parley.*` of `kernels.cpp`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++20", "-Wno-psabi"]


class KernelsUnavailable(Exception):
    """The kernels cannot be had on this machine; the message says why."""


def library(cache: Path, source: Path = SOURCE) -> Path:
    """Where in `cache` the compiled source is, or would be: another file for another text, torch or processor."""
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    mark = "\n".join([source.read_text(encoding="utf-8"), str(torch.__version__), flags, *FLAGS])
    return cache / f"{source.stem}-{hashlib.sha256(mark.encode()).hexdigest()[:16]}.so"


def build(cache: Path, source: Path = SOURCE) -> Path:
    """Compile a source if `cache` has it not (ten seconds); return the library. Raises KernelsUnavailable."""
    path = library(cache, source)
    if path.is_file():
        return path
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise KernelsUnavailable(f"there is no C++ compiler {compiler} (on Debian: apt-get install g++)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as folder:
        made = Path(folder) / path.name
        home = Path(torch.__file__).parent
        folders = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include", f"-L{home}/lib"]
        command = [compiler, *FLAGS, *folders, str(source), "-o", str(made), "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise KernelsUnavailable(f"{compiler} failed: {(errors or ['it says nothing'])[0].strip()[:300]}")
        made.rename(path)  # whole or not at all: another process may load it at any time
    return path


def load(path: Path) -> None:
    """Make the operators of a compiled library known to this process. Raises KernelsUnavailable."""
    if loaded():
        return
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise KernelsUnavailable(f"{path} cannot be loaded: {error}") from error
    torch.library.register_fake("parley::attention", _attention_shape)
    torch.library.register_fake("parley::int8_linear", _int8_linear_shape)


def loaded(source: Path = SOURCE) -> Path | None:
    """The library of a source, if it was loaded."""
    libraries = (Path(library) for library in torch.ops.loaded_libraries)
    return next((library for library in libraries if library.stem.startswith(f"{source.stem}-")), None)


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _int8_linear_shape(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], columns)
