from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from models.engine import attention, compilation, forward, joined_linears, model_runner, quantization, quantized_weight
from models.engine.compilation import _name, _sources, compile_program
from models.engine.model_runner import SlotForward
from models.engine.quantization import QuantizedLinear
from models.engine.quantized_weight import Format, QuantizedWeight
from models.engine.subprocesses import Subprocesses
from models.errors import CompilationError, UntrustedPathError
from tests.support.tiny import tiny_gpt_oss, tiny_llama, to_int8


class Scaled(nn.Module):
    """Has a weight with two names, a buffer, and a number that its repr does not show."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = self.tied = nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.shift = nn.Buffer(torch.ones(3), persistent=False)
        self.factor = factor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * self.weight * self.factor + self.tied + self.shift).sum(0) + y.sum(0)


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum().item())] if x.sum() > 0 else x


SIZES = (Dim("rows", min=2), Dim("others", min=1))
INPUTS = (torch.rand(5, 3), torch.rand(4, 3))


@pytest.fixture(scope="module")
def programs(program_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the program of `Scaled(2)`."""
    cache = tmp_path_factory.mktemp("programs")
    shutil.copy(program_library, cache)
    compile_program(Scaled(2), INPUTS, SIZES, "two", cache)
    return cache


@pytest.mark.compiler
@pytest.mark.slow
def test_a_program_computes_on_the_tensors_of_its_module_for_any_number_of_rows(programs: Path) -> None:
    module = Scaled(2)
    program = compile_program(module, INPUTS, SIZES, "two", programs)
    for rows, others in [(2, 1), (5, 4), (17, 3)]:
        x, y = torch.rand(rows, 3), torch.rand(others, 3)
        torch.testing.assert_close(program(x, y), module(x, y))
        module.weight.add_(1)
        module.shift.mul_(3)
        torch.testing.assert_close(program(x, y), module(x, y))


@pytest.mark.compiler
@pytest.mark.slow
def test_a_cached_program_needs_no_compiler_and_another_one_does(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(programs.iterdir())
    monkeypatch.setenv("CXX", "no-such-compiler")
    program = compile_program(Scaled(2), INPUTS, SIZES, "two", programs)
    torch.testing.assert_close(program(*INPUTS), Scaled(2)(*INPUTS))
    assert sorted(programs.iterdir()) == before
    with pytest.raises(CompilationError, match="compiler"):
        compile_program(Scaled(3), INPUTS, SIZES, "three", programs)
    assert sorted(programs.iterdir()) == before


@pytest.mark.slow
def test_a_module_that_cannot_be_compiled_says_why_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(CompilationError, match="data-dependent"):
        compile_program(Untraceable(), INPUTS[:1], SIZES[:1], "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def copied_library(programs: Path, folder: Path) -> Path:
    """The library of a program that is copied to another folder."""
    (package,) = programs.glob("step-*")
    shutil.copytree(package, folder / package.name)
    (library,) = (folder / package.name).rglob("*.so")
    return library


@pytest.mark.compiler
@pytest.mark.slow
def test_a_damaged_program_is_refused(programs: Path, tmp_path: Path) -> None:
    library = copied_library(programs, tmp_path)
    library.write_bytes(b"cut off")
    with pytest.raises(CompilationError, match=library.name):
        compile_program(Scaled(2), INPUTS, SIZES, "two", tmp_path)


@pytest.mark.compiler
@pytest.mark.slow
def test_a_program_that_others_could_have_written_is_never_loaded(programs: Path, tmp_path: Path) -> None:
    library = copied_library(programs, tmp_path)
    library.chmod(0o666)
    with pytest.raises(UntrustedPathError, match="can be written by other users"):
        compile_program(Scaled(2), INPUTS, SIZES, "two", tmp_path)


@pytest.mark.compiler
@pytest.mark.slow
def test_a_program_leaves_nothing_in_the_temporary_folder(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = compile_program(Scaled(2), INPUTS, SIZES, "two", programs)
    program(*INPUTS)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_compilation_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    subprocesses = Subprocesses()
    stopper = threading.Timer(0.5, subprocesses.stop)
    stopper.start()
    with pytest.raises(CompilationError, match="the server stops"):
        compile_program(Scaled(2), INPUTS, SIZES, "two", tmp_path, subprocesses)
    stopper.join()
    with pytest.raises(CompilationError, match="the server stops"):
        compile_program(Scaled(2), INPUTS, SIZES, "two", tmp_path, subprocesses)
    assert list(tmp_path.glob("*-*")) == []


# The name of a program

ALWAYS = {Path(attention.__file__), Path(compilation.__file__)}


@contextmanager
def imported(file: Path) -> Iterator[ModuleType]:
    """The module that a file defines, imported as long as the context lasts."""
    spec = importlib.util.spec_from_file_location(f"imported_{file.stem}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_a_program_depends_on_the_files_of_its_modules_and_of_the_attention() -> None:
    assert set(_sources(Scaled(2))) == {*ALWAYS, Path(__file__)}
    assert set(_sources(nn.Sequential(nn.Linear(2, 2), Scaled(2)))) == {*ALWAYS, Path(__file__)}


def test_a_program_does_not_depend_on_files_of_torch_or_transformers() -> None:
    assert set(_sources(nn.Linear(2, 2))) == ALWAYS
    assert set(_sources(tiny_llama())) == ALWAYS


FORWARD = {*ALWAYS, Path(model_runner.__file__), Path(forward.__file__)}


def test_the_program_of_a_model_depends_on_no_other_file_of_the_project() -> None:
    assert set(_sources(SlotForward(tiny_llama(), native=False))) == FORWARD


@pytest.mark.compiler
def test_the_program_of_a_quantized_model_depends_on_the_files_of_our_modules_too() -> None:
    modules = {Path(str(module.__file__)) for module in (quantization, quantized_weight, joined_linears)}
    assert set(_sources(SlotForward(to_int8(tiny_llama()), native=False))) == FORWARD | modules
    experts = modules - {Path(str(joined_linears.__file__))}
    assert set(_sources(to_int8(tiny_gpt_oss(), join=False))) == ALWAYS | experts


def test_formats_of_one_size_have_programs_of_their_own() -> None:
    panels = torch.zeros(576, dtype=torch.uint8)
    weights = [QuantizedWeight(panels, format, 32, 32) for format in (Format.Q4_0, Format.IQ4, Format.MXFP4)]
    assert len({_name(nn.Sequential(QuantizedLinear([weight])), "") for weight in weights}) == 3


def test_a_class_without_a_file_is_no_source() -> None:
    interactive = type("Interactive", (nn.Linear,), {"__module__": "no_such_module"})
    assert set(_sources(interactive(2, 2))) == ALWAYS


def test_a_program_gets_another_name_when_a_file_of_its_modules_changes(tmp_path: Path) -> None:
    file = tmp_path / "doubling.py"
    file.write_text("from torch import nn\n\n\nclass Doubling(nn.Linear):\n    factor = 2\n")
    with imported(file) as module:
        doubling = module.Doubling(2, 2)
        before = _name(doubling, "")
        assert _name(doubling, "") == before
        file.write_text(file.read_text().replace("2\n", "3\n"))
        assert _name(doubling, "") != before


def test_a_program_has_a_name_for_each_mark_shape_and_dtype() -> None:
    modules = [nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 3), nn.Linear(2, 2, dtype=torch.bfloat16)]
    names = {_name(module, mark) for module in modules for mark in ("", "another")}
    assert len(names) == 2 * len(modules)


def test_the_name_of_a_program_does_not_depend_on_weights() -> None:
    module = Scaled(2)
    before = _name(module, "two")
    module.weight.add_(1)
    assert _name(module, "two") == before
