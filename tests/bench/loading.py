"""Measure what starting with a model takes: the peak of memory, the memory afterwards, the time until it is ready.

python tests/bench/loading.py --before FOLDER

Files of the shapes that people have are made in .bench/models. Each start is a process of its own under /usr/bin/time,
in a cache that is empty for the first start and full for the second. `--before` is another checkout of Parley, to
measure beside this one; `--model` is a file of your own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.gguf_files import gguf_files
from tests.bench.servers import python_of
from tests.bench.synthetic_gguf import SHAPES, write_model

ROOT = Path(__file__).parents[2]
PORT = 7790
PATIENCE = 900  # seconds for a start


@dataclass(frozen=True)
class Start:
    """What one start took: seconds until the server is ready, and megabytes."""

    seconds: float
    peak: int
    afterwards: int


def main() -> None:
    parser = argparse.ArgumentParser(description="What starting with a model takes.")
    parser.add_argument("--before", type=Path, help="another checkout of Parley, to measure too")
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="files of your own")
    parser.add_argument("--shapes", nargs="*", default=["0.5B-Q4_K_M", "1.46B-Q4_0"], choices=list(SHAPES))
    arguments = parser.parse_args()
    folder = ROOT / ".bench" / "models"
    embedded, _ = gguf_files(folder)
    files = [write_model(folder / f"{name}.gguf", SHAPES[name], embedded) for name in arguments.shapes]
    print("| | model | file, MB | copy, MB | peak, MB: 1st, 2nd | afterwards, MB | ready, s: 1st, 2nd |")
    print("|---|---|---|---|---|---|---|")
    for checkout in filter(None, (arguments.before, ROOT)):
        for model in (None, *files, *arguments.model):
            print(row(checkout, model), flush=True)


def row(checkout: Path, model: Path | None) -> str:
    """Two starts of a checkout with a model; without one, with the embedded model."""
    cache = ROOT / ".bench" / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    first, second = (start(checkout, model, cache) for _ in range(2))
    copy = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 2**25)
    size = f"{model.stat().st_size / 1e6:.0f}" if model else "-"
    name = model.stem if model else "embedded"
    label = "now" if checkout == ROOT else "before"
    return (
        f"| {label} | {name} | {size} | {copy / 1e6:.0f} | {first.peak}, {second.peak} | {second.afterwards} | "
        f"{first.seconds:.1f}, {second.seconds:.1f} |"
    )


def start(checkout: Path, model: Path | None, cache: Path) -> Start:
    """Start the server of a checkout, wait until it is ready, and stop it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PARLEY_")}
    environment |= {"XDG_CACHE_HOME": str(cache), "PARLEY_DATA": str(cache / "data"), "PARLEY_COMPILE": "false"}
    if model:
        environment["PARLEY_MODEL"] = str(model)
    command = ["/usr/bin/time", "-v", str(python_of(checkout)), "server.py", "--port", str(PORT)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True)
    server = None
    try:
        seconds = wait(process, started)
        server = int(subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True))
        status = Path(f"/proc/{server}/status").read_text()
        afterwards = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1000  # type: ignore[index]
    finally:
        if server:
            os.kill(server, signal.SIGTERM)
        else:
            process.terminate()
        _, stderr = process.communicate(timeout=60)
    peak = int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", stderr)[1]) // 1000  # type: ignore[index]
    return Start(seconds, peak, afterwards)


def wait(process: subprocess.Popen[str], started: float) -> float:
    """Seconds from the start until /ready answers 200."""
    while process.poll() is None and time.monotonic() - started < PATIENCE:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=1):
                return time.monotonic() - started
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {process.stderr.read() if process.stderr else ''}")


if __name__ == "__main__":
    main()
