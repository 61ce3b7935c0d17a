"""The servers to be measured, Parley and its peers. Each is started on this machine as its users start it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).parents[2]
SECRET = "bench"
BEFORE = "Parley before"  # the name of another checkout
START = 300.0  # seconds until a server must be ready


@dataclass(frozen=True)
class Server:
    """A running server: its protocol, its address and its process."""

    name: str
    kind: str  # the protocol, as load.py calls it
    url: str
    model: str
    process: subprocess.Popen[bytes]

    def load(self, what: str, **options: int) -> dict[str, float]:
        """Run `load.py` in a process of its own, and return its result. The server is stopped between two loads."""
        command = [sys.executable, str(ROOT / "tests/bench/load.py"), self.kind, self.url, "--what", what]
        command += ["--secret", SECRET, "--model", self.model]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self.process.send_signal(signal.SIGCONT)
        done = subprocess.run(command, capture_output=True, text=True)
        self.process.send_signal(signal.SIGSTOP)  # while another server is measured
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr.strip().splitlines()[-1]}")
        result: dict[str, float] = json.loads(done.stdout)
        return result

    @property
    def peak_memory(self) -> float:
        """The peak memory of the process, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * float(re.findall(r"VmHWM:\s+(\d+)", status)[0])


@contextmanager
def running(
    name: str,
    kind: str,
    command: list[str],
    health: str,
    port: int,
    model: str = "model",
    folder: Path = ROOT,
    **environment: str,
) -> Iterator[Server]:
    url = f"http://127.0.0.1:{port}"
    log = ROOT / ".bench" / f"{name.replace(' ', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment, cwd=folder)
    try:
        _wait(process, url + health, log)
        yield Server(name, kind, url, model, process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} is not ready; its log is {log}")


@contextmanager
def parley(root: Path = ROOT, port: int = 7801, compiled: bool = True, model: Path | None = None) -> Iterator[Server]:
    """A checkout of Parley with its default settings; if `compiled`, wait until the model is compiled."""
    command = [str(python_of(root)), "server.py", "--port", str(port)]
    data = ROOT / ".bench" / f"data-{port}"
    shutil.rmtree(data, ignore_errors=True)
    settings = {
        "PARLEY_USERS": f"bench:{SECRET}",
        "PARLEY_RESPONSES_PER_USER": "64",
        "PARLEY_MODEL_ALIASES": "*",
        "PARLEY_DATA": str(data),
    }
    if model:
        settings["PARLEY_MODEL"] = str(model.resolve())
    name = "Parley" if root == ROOT else BEFORE
    with running(name, "parley", command, "/ready", port, folder=root, **settings) as server:
        while compiled and not httpx2.get(server.url + "/args", trust_env=False).json()["args"]["compiled"]:
            time.sleep(0.1)
        yield server


@contextmanager
def llama_cpp(python: Path, gguf: Path, port: int = 7802) -> Iterator[Server]:
    """The server of llama.cpp from the `xllamacpp` wheel, with the slots, context and threads of Parley."""
    script = (
        "import sys, time, xllamacpp as x\n"
        "p = x.CommonParams(); p.model.path = sys.argv[1]; p.port = int(sys.argv[2]); p.n_parallel = 32\n"
        "p.n_ctx = 32 * 4096; p.fit_params = False; p.verbosity = 0\n"
        "p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[3])\n"
        "server = x.Server(p)\n"
        "while True: time.sleep(1)"
    )
    command = [str(python), "-c", script, str(gguf), str(port), str(os.cpu_count())]
    name = f"llama.cpp {gguf.stem.rpartition('.')[2]}"
    with running(name, "openai", command, "/health", port) as server:
        yield server


@contextmanager
def transformers_serve(python: Path, folder: Path, port: int = 7803) -> Iterator[Server]:
    """The server of transformers, with continuous batching, in bfloat16."""
    command = [str(python.parent / "transformers"), "serve", str(folder), "--continuous-batching"]
    command += ["--dtype", "bfloat16", "--device", "cpu", "--port", str(port)]
    with running("transformers", "openai", command, "/health", port, str(folder)) as server:
        yield server


@contextmanager
def vllm(python: Path, folder: Path, port: int = 7804) -> Iterator[Server]:
    """The server of vLLM. Where it runs on a CPU, the environment must have what it needs for that."""
    command = [str(python.parent / "vllm"), "serve", str(folder), "--served-model-name", "model", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "2048"]
    with running("vLLM", "openai", command, "/health", port) as server:
        yield server


def python_of(root: Path) -> Path:
    """The interpreter for a checkout: that of its own environment, or ours."""
    own = root / ".venv" / "bin" / "python"
    return own if root != ROOT and own.exists() else Path(sys.executable)


def has(python: Path, module: str) -> bool:
    """Whether an environment has a module."""
    if not python.exists():
        return False
    probe: subprocess.CompletedProcess[Any] = subprocess.run([python, "-c", f"import {module}"], capture_output=True)
    return probe.returncode == 0
