from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from models.compilation import CompilationFailed, compiled


class Scaled(nn.Module):
    """A weight by its two names, a buffer, a number that no name tells."""

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
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the program of `Scaled(2)`."""
    cache = tmp_path_factory.mktemp("programs")
    compiled(Scaled(2), INPUTS, SIZES, "two", cache)
    return cache


def test_a_program_computes_on_the_modules_own_tensors_for_any_number_of_rows(programs: Path) -> None:
    module = Scaled(2)
    program = compiled(module, INPUTS, SIZES, "two", programs)
    for rows, others in [(2, 1), (5, 4), (17, 3)]:
        x, y = torch.rand(rows, 3), torch.rand(others, 3)
        torch.testing.assert_close(program(x, y), module(x, y))
        module.weight.add_(1)
        module.shift.mul_(3)
        torch.testing.assert_close(program(x, y), module(x, y))


def test_a_program_that_is_there_needs_no_compiler(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sorted(programs.iterdir())
    monkeypatch.setenv("CXX", "no-such-compiler")
    program = compiled(Scaled(2), INPUTS, SIZES, "two", programs)
    torch.testing.assert_close(program(*INPUTS), Scaled(2)(*INPUTS))
    assert sorted(programs.iterdir()) == made
    with pytest.raises(CompilationFailed, match="compiler"):
        compiled(Scaled(3), INPUTS, SIZES, "three", programs)
    assert sorted(programs.iterdir()) == made


def test_what_cannot_be_compiled_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CompilationFailed, match="data-dependent"):
        compiled(Untraceable(), INPUTS[:1], SIZES[:1], "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_program_is_refused(programs: Path, tmp_path: Path) -> None:
    (package,) = programs.glob("*.pt2")
    (tmp_path / package.name).write_bytes(b"cut off")
    with pytest.raises(CompilationFailed, match="archive"):
        compiled(Scaled(2), INPUTS, SIZES, "two", tmp_path)
