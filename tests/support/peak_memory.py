"""Loads a model in a process of its own, and prints what that takes: python -m tests.support.peak_memory MODEL QUANTIZE

The bytes are above those of the process before, which has imported all and loaded a tiny model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

from models.engine.native import build
from models.language.loader import load
from models.language.memory import size_of_model
from models.settings import Settings
from tests.support.tiny_gguf import write_tiny_gguf

ROOT = Path(__file__).parents[2]


def measure(model: Path, quantize: str) -> tuple[int, int]:
    """The peak of the memory while a model is loaded, and the bytes of its weights."""
    command = [sys.executable, "-m", "tests.support.peak_memory", str(model), quantize]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    peak, weights = json.loads(done.stdout)
    return peak, weights


def _status(name: str) -> int:
    """A number of bytes in /proc/self/status."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def _main(model: str, quantize: str) -> None:
    build.load_kernels(build.build_library(user_cache_path("parley")))
    with tempfile.TemporaryDirectory() as folder:
        load(Settings(model=str(write_tiny_gguf(Path(folder) / "tiny.gguf")), device="cpu", quantize=quantize))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    _, loaded = load(Settings(model=model, device="cpu", quantize=quantize))
    print(json.dumps([_status("VmHWM") - before, size_of_model(loaded)]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
