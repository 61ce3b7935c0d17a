from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import kernels
from models.kernels import KernelsUnavailable

ROOT = Path(__file__).parent.parent

# What a compiler is to `build`: it writes the file after -o, says how it went, and here notes that it was called.
WRITES = """#!/bin/sh
echo call >> "$(dirname "$0")/calls"
while [ "$1" != -o ]; do shift; done
echo "$(dirname "$0")" > "$2"
"""
FAILS = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo half > "$2"
echo "kernels.cpp: In function 'int main()':" >&2
echo "kernels.cpp:7:9: fatal error: torch/library.h: No such file" >&2
echo "kernels.cpp:8:9: error: another" >&2
exit 1
"""
FAILS_SILENTLY = "#!/bin/sh\nexit 3\n"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "made" / "cache"


def set_compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let CXX be a compiler that does what a script says; the file it notes its calls in."""
    compiler = folder / "c++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return folder / "calls"


def test_the_library_is_made_once_and_taken_from_the_cache_from_then_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = set_compiler(tmp_path, WRITES, monkeypatch)
    made = kernels.build(cache)
    assert made == kernels.library(cache)
    assert made.read_text() == f"{tmp_path}\n"
    assert kernels.build(cache) == made
    assert calls.read_text() == "call\n"
    assert list(cache.iterdir()) == [made]


def test_a_library_that_is_there_needs_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    kernels.library(cache).write_text("made on another day")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert kernels.build(cache).read_text() == "made on another day"


def test_another_library_in_the_cache_is_not_taken_for_this_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = set_compiler(tmp_path, WRITES, monkeypatch)
    cache.mkdir(parents=True)
    other = cache / "kernels-0123456789abcdef.so"
    other.write_text("of another source")
    assert kernels.build(cache) != other
    assert calls.exists()
    assert other.read_text() == "of another source"


def test_without_a_compiler_the_message_names_it_and_how_to_get_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelsUnavailable, match=r"no C\+\+ compiler g\+\+ \(on Debian: apt-get install g\+\+\)"):
        kernels.build(cache)
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(KernelsUnavailable, match="no C\\+\\+ compiler my-compiler"):
        kernels.build(cache)
    assert not cache.exists()


def test_a_compiler_that_fails_is_refused_with_its_first_error_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_compiler(tmp_path, FAILS, monkeypatch)
    with pytest.raises(KernelsUnavailable) as refused:
        kernels.build(cache)
    expected = "failed: kernels.cpp:7:9: fatal error: torch/library.h: No such file"
    assert str(refused.value) == f"{tmp_path}/c++ {expected}"
    assert list(cache.iterdir()) == []
    set_compiler(tmp_path, WRITES, monkeypatch)
    assert kernels.build(cache).is_file()


def test_a_compiler_that_fails_without_a_word_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_compiler(tmp_path, FAILS_SILENTLY, monkeypatch)
    with pytest.raises(KernelsUnavailable, match=r"c\+\+ failed: it says nothing"):
        kernels.build(cache)


def test_a_library_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    broken = tmp_path / "kernels-broken.so"
    broken.write_bytes(b"\x7fELF, or the beginning of one")
    script = (
        "import sys, pathlib\nfrom models import kernels\n"
        "try: kernels.load(pathlib.Path(sys.argv[1]))\n"
        "except kernels.KernelsUnavailable as error: print(error)\n"
        "print(kernels.loaded())"
    )
    command = [sys.executable, "-c", script, str(broken)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ)
    message, loaded = done.stdout.splitlines()
    assert message.startswith(f"{broken} cannot be loaded: ")
    assert loaded == "None"


def test_the_operators_tell_a_compiler_of_models_the_truth_about_shapes_and_what_they_write() -> None:
    numbers = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 5, size, generator=numbers) for heads, size in ((4, 12), (2, 12), (2, 20))
    )
    keys, values = torch.zeros(3, 2, 2, 12, 16), torch.zeros(3, 2, 32, 32)
    places = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 7, 8, 9])
    attention = torch.ops.parley.attention.default
    linear = torch.ops.parley.int8_linear.default
    weight = torch.randint(0, 256, (2, 3, 16, 4), dtype=torch.uint8, generator=numbers)
    for operator, arguments in (
        (attention, (query, key, value, keys, values, *places, None, 0.3, 0.0, 0)),
        (attention, (query, key, value, keys, values, *places, torch.zeros(4), 0.3, 5.0, 4)),
        (linear, (torch.randn(7, 12, generator=numbers), weight, torch.ones(32), torch.zeros(32), 21)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
