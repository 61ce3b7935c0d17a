from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.engine.native import build
from models.errors import KernelsUnavailableError

ROOT = Path(__file__).parents[3]

# Compilers: each is called for the parts of the library, with -c, and then links them; it gets the path of the library
# after -o, and notes in the file "calls" that it linked.
WORKS = """#!/bin/sh
case " $* " in *" -c "*) exit 0;; esac
echo call >> "$(dirname "$0")/calls"
while [ "$1" != -o ]; do shift; done
echo "$(dirname "$0")" > "$2"
"""
WORKS_WHEN_RELEASED = """#!/bin/sh
case " $* " in *" -c "*) exit 0;; esac
echo call >> "$(dirname "$0")/calls"
while [ "$1" != -o ]; do shift; done
read line < "$(dirname "$0")/released"
echo "$line" > "$2"
"""
FAILS = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo half > "$2"
echo "kernels.cpp: In function 'int main()':" >&2
echo "kernels.cpp:7:9: fatal error: torch/library.h: No such file" >&2
echo "kernels.cpp:8:9: error: another" >&2
exit 1
"""
FAILS_TO_LINK = """#!/bin/sh
case " $* " in *" -c "*) exit 0;; esac
echo "/usr/bin/ld: cannot find -ltorch_cpu: No such file or directory" >&2
echo "collect2: error: ld returned 1 exit status" >&2
exit 1
"""
FAILS_WITHOUT_A_REASON = "#!/bin/sh\nexit 3\n"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache"


def set_compiler(folder: Path, script: str, environment: pytest.MonkeyPatch) -> Path:
    """Set CXX to a compiler with this script. Returns the file in which it notes its calls."""
    compiler = folder / "c++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    environment.setenv("CXX", str(compiler))
    return folder / "calls"


def files_in(cache: Path) -> set[str]:
    """The names of all files and folders but the lock, which stays for the next build."""
    return {path.name for path in cache.iterdir()} - {"kernels.lock"}


def test_the_library_is_compiled_once_and_then_taken_from_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = set_compiler(tmp_path, WORKS, monkeypatch)
    library = build.build_library(cache)
    assert library == build.library_path(cache)
    assert library.read_text() == f"{tmp_path}\n"
    assert build.build_library(cache) == library
    assert calls.read_text() == "call\n"
    assert files_in(cache) == {library.name}


def test_a_cached_library_needs_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    build.library_path(cache).write_text("compiled on another day")
    build.library_path(cache).chmod(0o644)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert build.build_library(cache).read_text() == "compiled on another day"


def test_a_library_that_others_can_write_is_compiled_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = set_compiler(tmp_path, WORKS, monkeypatch)
    cache.mkdir(parents=True)
    library = build.library_path(cache)
    library.write_text("by whom?")
    library.chmod(0o775)
    for _ in range(2):
        assert build.build_library(cache).read_text() == f"{tmp_path}\n"
    assert calls.read_text() == "call\n"


@pytest.mark.compiler
def test_a_library_is_closed_to_others_whatever_the_umask(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "sums.cpp"
    source.write_text("int one() { return 1; }")
    before = os.umask(0o002)  # the usual one where each user has a group
    try:
        library = build.build_library(cache, source)
    finally:
        os.umask(before)
    build.load_library(library)
    assert library.stat().st_mode & 0o077 == 0


def test_the_library_of_another_source_is_not_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = set_compiler(tmp_path, WORKS, monkeypatch)
    cache.mkdir(parents=True)
    other = cache / "kernels-0123456789abcdef.so"
    other.write_text("of another source")
    assert build.build_library(cache) != other
    assert calls.exists()
    assert other.read_text() == "of another source"


def test_a_changed_source_gets_a_library_of_its_own(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "sums.cpp"
    source.write_text("int one() { return 1; }")
    before = build.library_path(cache, source)
    assert before.stem.startswith("sums-")
    source.write_text("int two() { return 2; }")
    assert build.library_path(cache, source) != before


def test_headers_beside_a_source_count_and_other_files_do_not(cache: Path, tmp_path: Path) -> None:
    source, header = tmp_path / "sums.cpp", tmp_path / "numbers.h"
    source.write_text('#include "numbers.h"')
    header.write_text("int one() { return 1; }")
    before = build.library_path(cache, source)
    (tmp_path / "notes.txt").write_text("no header")
    assert build.library_path(cache, source) == before
    header.write_text("int two() { return 2; }")
    assert build.library_path(cache, source) != before


def test_without_a_compiler_the_message_says_how_to_get_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelsUnavailableError, match=r"no C\+\+ compiler g\+\+ \(on Debian: apt-get install g\+\+\)"):
        build.build_library(cache)
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(KernelsUnavailableError, match="no C\\+\\+ compiler my-compiler"):
        build.build_library(cache)
    assert not cache.exists()


def test_a_failed_compiler_is_reported_with_its_first_error_and_leaves_no_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_compiler(tmp_path, FAILS, monkeypatch)
    with pytest.raises(KernelsUnavailableError) as raised:
        build.build_library(cache)
    reason = "kernels.cpp:7:9: fatal error: torch/library.h: No such file"
    assert str(raised.value) == f"{tmp_path}/c++ failed: {reason}"
    assert files_in(cache) == set()
    set_compiler(tmp_path, WORKS, monkeypatch)
    assert build.build_library(cache).is_file()


def test_a_failed_linker_is_reported_with_its_own_reason(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_compiler(tmp_path, FAILS_TO_LINK, monkeypatch)
    with pytest.raises(KernelsUnavailableError) as raised:
        build.build_library(cache)
    reason = "/usr/bin/ld: cannot find -ltorch_cpu: No such file or directory"
    assert str(raised.value) == f"{tmp_path}/c++ failed: {reason}"


@pytest.mark.compiler
def test_a_real_linker_that_fails_is_reported_with_its_own_reason(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "hidden.cpp"
    source.write_text('__attribute__((visibility("hidden"))) int missing();\nint call() { return missing(); }\n')
    with pytest.raises(KernelsUnavailableError, match="missing") as raised:
        build.build_library(cache, source)
    assert "collect2" not in str(raised.value)
    assert files_in(cache) == set()


def test_a_compiler_that_fails_without_a_reason_is_reported(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_compiler(tmp_path, FAILS_WITHOUT_A_REASON, monkeypatch)
    with pytest.raises(KernelsUnavailableError, match=r"c\+\+ failed: it printed no reason"):
        build.build_library(cache)


def test_a_build_removes_the_folders_of_killed_builds_only(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_compiler(tmp_path, WORKS, monkeypatch)
    for name in ("unfinished-kernels-abc", "unfinished-kernels-def", "unfinished-model-ghi", "unfinished-program-jkl"):
        (cache / name).mkdir(parents=True)
        (cache / name / "half").touch()
    library = build.build_library(cache)
    assert files_in(cache) == {library.name, "unfinished-model-ghi", "unfinished-program-jkl"}
    assert (cache / "unfinished-model-ghi" / "half").exists()


@contextmanager
def waiting_for_a_lock() -> Iterator[threading.Event]:
    """An event that is set as soon as a thread has to wait for a lock."""
    waiting, logger = threading.Event(), logging.getLogger("filelock")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "not acquired" in record.getMessage():
                waiting.set()

    handler, level = Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield waiting
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_two_builds_at_the_same_time_compile_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = set_compiler(tmp_path, WORKS_WHEN_RELEASED, monkeypatch)
    os.mkfifo(tmp_path / "released")
    released = os.open(tmp_path / "released", os.O_RDWR)
    try:
        with waiting_for_a_lock() as waiting, ThreadPoolExecutor(2) as pool:
            builds = [pool.submit(build.build_library, cache) for _ in range(2)]
            second_waits = waiting.wait(timeout=60)
            os.write(released, b"compiled\n" * 2)  # for both, so that a failed test ends
            libraries = {each.result() for each in builds}
    finally:
        os.close(released)
    assert second_waits
    assert libraries == {build.library_path(cache)}
    assert calls.read_text() == "call\n"
    assert files_in(cache) == {build.library_path(cache).name}


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "kernels-broken.so"
    broken.write_bytes(b"\x7fELF, or the beginning of one")
    # In a process of its own, since this one may have loaded the kernels.
    script = (
        "import pathlib, sys\n"
        "from models.engine.native import build\n"
        "from models.errors import KernelsUnavailableError\n"
        "try: build.load_kernels(pathlib.Path(sys.argv[1]))\n"
        "except KernelsUnavailableError as error: print(error)\n"
        "print(build.loaded_library())"
    )
    command = [sys.executable, "-c", script, str(broken)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    message, loaded = process.stdout.splitlines()
    assert message.startswith(f"{broken} cannot be loaded: OSError: ")
    assert loaded == "None"


# The operators

TOKENS, HEADS, KEY_HEADS, SIZE, VALUE_SIZE, SLOTS, BLOCKS = 5, 4, 2, 12, 20, 3, 2


def attention_arguments() -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(1, HEADS, TOKENS, SIZE, generator=numbers),
        "key": torch.randn(1, KEY_HEADS, TOKENS, SIZE, generator=numbers),
        "value": torch.randn(1, KEY_HEADS, TOKENS, VALUE_SIZE, generator=numbers),
        "keys": torch.zeros(SLOTS, KEY_HEADS, BLOCKS, SIZE, build.LANES),
        "values": torch.zeros(SLOTS, KEY_HEADS, BLOCKS * build.LANES, 2 * build.LANES),
        "slots": torch.tensor([0, 0, 1, 1, 1]),
        "positions": torch.tensor([0, 1, 7, 8, 9]),
        "sinks": None,
        "scale": 0.3,
        "softcap": 0.0,
        "window": 0,
    }


def panels(outputs: int, *experts: int) -> Tensor:
    """Panels of 8 bits for 64 inputs, with small scales."""
    numbers = torch.randn(*experts, outputs, 64, generator=torch.Generator().manual_seed(0)).flatten(0, -2)
    result: Tensor = torch.ops.parley.quantize(numbers, 4)
    return result.view(*experts, -1)


def linear_arguments() -> dict[str, Any]:
    """Two weights, of 8 bits."""
    return {
        "x": torch.randn(7, 64, generator=torch.Generator().manual_seed(0)),
        "weights": [panels(40), panels(32)],
        "bias": torch.zeros(72),
        "formats": [4, 4],
        "columns": [40, 32],
    }


def expert_arguments() -> dict[str, Any]:
    """Three experts, of which each row chooses two."""
    return {
        "x": torch.randn(7, 64, generator=torch.Generator().manual_seed(0)),
        "experts": torch.tensor([[0, 1], [1, 2]]).repeat(4, 1)[:7],
        "weight": panels(32, 3),
        "bias": torch.zeros(3, 32),
        "format": 4,
        "columns": 32,
    }


def row_arguments() -> dict[str, Any]:
    return {"weight": panels(40), "rows": torch.tensor([39, 0, 0]), "format": 4, "columns": 40, "depth": 64}


def strided(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that are not contiguous."""
    return torch.zeros(*sizes, 2, dtype=dtype)[..., 0]


@pytest.mark.compiler
@pytest.mark.parametrize(
    "changes",
    [{}, {"sinks": torch.zeros(HEADS), "softcap": 5.0, "window": 4}],
    ids=["plain", "sinks, soft cap and window"],
)
def test_the_declared_shapes_and_mutations_of_attention_are_true(changes: dict[str, Any]) -> None:
    arguments = attention_arguments() | changes
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.parley.attention.default, tuple(arguments.values()), test_utils=checks)


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("linear", linear_arguments), ("linear_of_experts", expert_arguments), ("unpack_rows", row_arguments)],
)
def test_the_declared_shapes_and_mutations_of_quantized_linears_are_true(
    name: str, arguments: Callable[[], dict[str, Any]]
) -> None:
    checks = ("test_schema", "test_faketensor")
    operator = getattr(torch.ops.parley, name).default
    torch.library.opcheck(operator, tuple(arguments().values()), test_utils=checks)


@pytest.mark.compiler
def test_no_rows_give_an_empty_result() -> None:
    linear = torch.ops.parley.linear(**linear_arguments() | {"x": torch.zeros(0, 64)})
    assert linear.shape == (0, 72)
    none = {"x": torch.zeros(0, 64), "experts": torch.zeros(0, 2, dtype=torch.int64)}
    assert torch.ops.parley.linear_of_experts(**expert_arguments() | none).shape == (0, 2, 32)
    none = {"experts": torch.zeros(7, 0, dtype=torch.int64)}
    assert torch.ops.parley.linear_of_experts(**expert_arguments() | none).shape == (7, 0, 32)
    none = {"rows": torch.zeros(0, dtype=torch.int64)}
    assert torch.ops.parley.unpack_rows(**row_arguments() | none).shape == (0, 64)


INPUTS = r"query, key and value must be float32 of \(1, heads, tokens, size\)"
FIT = "query, key and value do not fit each other"
KEYS = "cached keys must be contiguous"
VALUES = "cached values must be contiguous"
PLACES = r"slots and positions must be contiguous int64 of \(tokens\)"
SINKS = r"sinks must be contiguous float32 of \(heads\)"
CACHE = (SLOTS, KEY_HEADS, BLOCKS, SIZE, build.LANES)
VALUE_CACHE = (SLOTS, KEY_HEADS, BLOCKS * build.LANES, 2 * build.LANES)


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("query", torch.zeros(HEADS, TOKENS, SIZE), INPUTS, id="query of three dimensions"),
        pytest.param("key", torch.zeros(2, KEY_HEADS, TOKENS, SIZE), INPUTS, id="a batch of two keys"),
        pytest.param(
            "value", torch.zeros(1, KEY_HEADS, TOKENS, SIZE, dtype=torch.bfloat16), INPUTS, id="bfloat16 value"
        ),
        pytest.param("query", torch.zeros(1, 3, TOKENS, SIZE), "3 heads cannot share 2 key heads", id="three heads"),
        pytest.param("key", torch.zeros(1, 0, TOKENS, SIZE), "4 heads cannot share 0 key heads", id="no key heads"),
        pytest.param("key", torch.zeros(1, KEY_HEADS, TOKENS + 1, SIZE), FIT, id="more keys than queries"),
        pytest.param("key", torch.zeros(1, KEY_HEADS, TOKENS, SIZE + 1), FIT, id="keys larger than queries"),
        pytest.param("value", torch.zeros(1, 1, TOKENS, SIZE), FIT, id="fewer value heads than key heads"),
        pytest.param("value", torch.zeros(1, KEY_HEADS, TOKENS - 1, SIZE), FIT, id="fewer values than keys"),
        pytest.param("keys", torch.zeros(CACHE[1:]), KEYS, id="cached keys of four dimensions"),
        pytest.param("keys", strided(*CACHE), KEYS, id="strided cached keys"),
        pytest.param("keys", torch.zeros(SLOTS, 1, BLOCKS, SIZE, build.LANES), KEYS, id="cached keys of one head"),
        pytest.param("keys", torch.zeros(SLOTS, KEY_HEADS, BLOCKS, 8, build.LANES), KEYS, id="smaller cached keys"),
        pytest.param("keys", torch.zeros(SLOTS, KEY_HEADS, BLOCKS, SIZE, 8), KEYS, id="eight lanes"),
        pytest.param("values", torch.zeros(VALUE_CACHE[1:]), VALUES, id="cached values of three dimensions"),
        pytest.param("values", strided(*VALUE_CACHE), VALUES, id="strided cached values"),
        pytest.param("values", torch.zeros(VALUE_CACHE, dtype=torch.bfloat16), VALUES, id="cache of two dtypes"),
        pytest.param("values", torch.zeros(2, *VALUE_CACHE[1:]), VALUES, id="cached values of fewer slots"),
        pytest.param("values", torch.zeros(SLOTS, 1, *VALUE_CACHE[2:]), VALUES, id="cached values of one head"),
        pytest.param("values", torch.zeros(*VALUE_CACHE[:2], build.LANES, 32), VALUES, id="cached values of one block"),
        pytest.param("values", torch.zeros(*VALUE_CACHE[:3], build.LANES), VALUES, id="smaller cached values"),
        pytest.param("values", torch.zeros(*VALUE_CACHE[:3], 40), VALUES, id="cached values not of whole lanes"),
        pytest.param("slots", torch.zeros(TOKENS, 1, dtype=torch.int64), PLACES, id="slots of two dimensions"),
        pytest.param("slots", torch.zeros(TOKENS - 1, dtype=torch.int64), PLACES, id="fewer slots than tokens"),
        pytest.param("slots", strided(TOKENS, dtype=torch.int64), PLACES, id="strided slots"),
        pytest.param("slots", torch.zeros(TOKENS, dtype=torch.int32), PLACES, id="int32 slots"),
        pytest.param("positions", torch.zeros(TOKENS, 1, dtype=torch.int64), PLACES, id="positions of two dimensions"),
        pytest.param("positions", torch.zeros(TOKENS + 1, dtype=torch.int64), PLACES, id="more positions than tokens"),
        pytest.param("positions", strided(TOKENS, dtype=torch.int64), PLACES, id="strided positions"),
        pytest.param("positions", torch.zeros(TOKENS, dtype=torch.int32), PLACES, id="int32 positions"),
        pytest.param("slots", torch.tensor([0, 0, 1, 1, -1]), "slot -1, position 9 is not in", id="negative slot"),
        pytest.param("slots", torch.tensor([0, 0, 1, 1, SLOTS]), "slot 3, position 9 is not in", id="slot too high"),
        pytest.param(
            "positions", torch.tensor([0, 1, 7, 8, -1]), "slot 1, position -1 is not in", id="negative position"
        ),
        pytest.param(
            "positions", torch.tensor([0, 1, 7, 8, 32]), "slot 1, position 32 is not in", id="position too high"
        ),
        pytest.param("sinks", torch.zeros(HEADS - 1), SINKS, id="fewer sinks than heads"),
        pytest.param("sinks", torch.zeros(HEADS, dtype=torch.bfloat16), SINKS, id="bfloat16 sinks"),
        pytest.param("sinks", strided(HEADS), SINKS, id="strided sinks"),
    ],
)
def test_attention_refuses_tensors_that_do_not_fit_and_writes_nothing(name: str, value: Tensor, message: str) -> None:
    arguments = attention_arguments() | {name: value}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.parley.attention(**arguments)
    assert not arguments["keys"].any()
    assert not arguments["values"].any()


@pytest.mark.compiler
def test_attention_refuses_a_cache_of_another_dtype() -> None:
    caches = {"keys": torch.zeros(CACHE).double(), "values": torch.zeros(VALUE_CACHE).double()}
    with pytest.raises(RuntimeError, match="must be float32, bfloat16, float16 or float8_e4m3fn"):
        torch.ops.parley.attention(**attention_arguments() | caches)


X = r"the input must be contiguous float32 of \(rows, inputs\)"
WEIGHT = "the weight must be contiguous uint8, and as many bytes as its outputs and 64 inputs need"
EACH = "each weight needs a format and a number of outputs"
BIAS = "the bias must be contiguous float32 of 72"


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"x": torch.zeros(64)}, X, id="x of one dimension"),
        pytest.param({"x": torch.zeros(7, 64, dtype=torch.bfloat16)}, X, id="bfloat16 x"),
        pytest.param({"x": strided(7, 64)}, X, id="strided x"),
        pytest.param({"x": torch.zeros(7, 96)}, "96 inputs need", id="more inputs than weights"),
        pytest.param({"x": torch.zeros(7, 63)}, "inputs in groups of 32", id="inputs not in groups"),
        pytest.param({"x": torch.zeros(7, 0)}, "inputs in groups of 32", id="no inputs"),
        pytest.param({"weights": []}, EACH, id="no weights"),
        pytest.param({"formats": [4]}, EACH, id="fewer formats than weights"),
        pytest.param({"columns": [40, 32, 0]}, EACH, id="more sizes than weights"),
        pytest.param({"formats": [4, 9]}, "there is no format 9", id="unknown format"),
        pytest.param({"formats": [-1, 4]}, "there is no format -1", id="negative format"),
        pytest.param({"formats": [4, 0]}, WEIGHT, id="another format"),
        pytest.param({"columns": [40, 0]}, "a quantized weight needs outputs", id="no outputs"),
        pytest.param({"columns": [40, 33]}, WEIGHT, id="too many outputs"),
        pytest.param({"columns": [32, 32]}, WEIGHT, id="too few outputs"),
        pytest.param({"bias": torch.zeros(71)}, BIAS, id="fewer biases than outputs"),
        pytest.param({"bias": torch.zeros(72, dtype=torch.bfloat16)}, BIAS, id="bfloat16 bias"),
        pytest.param({"bias": strided(72)}, BIAS, id="strided bias"),
    ],
)
def test_linear_refuses_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.parley.linear(**linear_arguments() | changes)


@pytest.mark.compiler
@pytest.mark.parametrize(
    "change", [lambda weight: weight.char(), lambda weight: weight.repeat_interleave(2)[::2]], ids=["int8", "strided"]
)
def test_linear_refuses_a_weight_of_another_dtype_or_layout(change: Callable[[Tensor], Tensor]) -> None:
    arguments = linear_arguments()
    with pytest.raises(RuntimeError, match=WEIGHT):
        torch.ops.parley.linear(**arguments | {"weights": [change(weight) for weight in arguments["weights"]]})


CHOICES = r"the experts must be contiguous int64 of \(7, choices\)"
STACK = r"the weights must be contiguous, \(experts, bytes\)"


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param("x", lambda x: x[:6], r"of \(6, choices\)", id="more choices than rows"),
        pytest.param("experts", lambda chosen: chosen.int(), CHOICES, id="int32 choices"),
        pytest.param("experts", lambda chosen: chosen[:, 0], CHOICES, id="choices of one dimension"),
        pytest.param("experts", lambda chosen: chosen[:, :1], CHOICES, id="strided choices"),
        pytest.param("experts", lambda chosen: chosen + 1, "there is no expert 3", id="expert too high"),
        pytest.param("experts", lambda chosen: chosen - 1, "there is no expert -1", id="negative expert"),
        pytest.param("weight", lambda weight: weight[0], STACK, id="one expert"),
        pytest.param("weight", lambda weight: weight[:0], STACK, id="no experts"),
        pytest.param("weight", lambda weight: weight[:1].expand(3, -1), STACK, id="experts that share memory"),
        pytest.param("weight", lambda weight: weight[:, :-64], STACK, id="fewer bytes, strided"),
        pytest.param("weight", lambda weight: weight[:, :-64].clone(), WEIGHT, id="fewer bytes"),
        pytest.param("bias", lambda bias: bias[:2], "the bias must be contiguous float32 of 96", id="too few biases"),
        pytest.param("columns", lambda columns: 33, WEIGHT, id="too many outputs"),
    ],
)
def test_linear_of_experts_refuses_arguments_that_do_not_fit(
    name: str, change: Callable[[Any], object], message: str
) -> None:
    arguments = expert_arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.parley.linear_of_experts(**arguments | {name: change(arguments[name])})
