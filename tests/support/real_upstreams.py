"""Real servers of other makers, and our own, as upstreams; and a server in front of each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from openai import OpenAI
from platformdirs import user_cache_path

from models.language.model_files import find_model
from models.settings import Settings
from server import create_app
from tests.support.client import ANN
from tests.support.serving import Served, serve

ROOT = Path(__file__).parents[2]
LLAMA_PYTHON = ROOT / ".bench" / "llama" / "bin" / "python"  # see models/upstream/README.md
VLLM_URL = os.environ.get("PARLEY_TEST_VLLM")  # of a vLLM that runs already
STARTS = 120.0  # seconds that a server may take to start
CONTEXT = 2048


@dataclass
class Front:
    """A server in front of an upstream of a kind, and ann's clients of it."""

    kind: str
    served: Served
    client: OpenAI
    http: httpx2.Client

    @property
    def model(self) -> str:
        """The model of the upstream."""
        return str(self.served.app.state.models.default.name)

    @property
    def running(self) -> int:
        """How many replies the upstream makes for the server."""
        return sum(one.running for one in self.served.app.state.chat._pool.endpoints)


def kinds() -> list[str]:
    """The kinds of upstreams that are here."""
    return ["parley", *(["llama.cpp"] if LLAMA_PYTHON.exists() else []), *(["vllm"] if VLLM_URL else [])]


@contextmanager
def running_upstream(kind: str, data: Path, port: int) -> Iterator[str]:
    """The URL of a running upstream with the embedded model."""
    if kind == "vllm":
        assert VLLM_URL
        yield VLLM_URL
    elif kind == "llama.cpp":
        gguf = str(find_model(Settings(), user_cache_path("parley")))
        command = [str(LLAMA_PYTHON), "tests/bench/llama_server.py", gguf, str(port)]
        with process(command, {}, f"http://127.0.0.1:{port}/health"):
            yield f"http://127.0.0.1:{port}/v1"
    else:
        settings = {
            "USERS": f"front:{ANN}",
            "DATA": data,
            "COMPILE": "false",
            "CONTEXT": CONTEXT,
            "RESPONSES_PER_USER": 8,
        }
        environment = {f"PARLEY_{name}": str(value) for name, value in settings.items()}
        command = [sys.executable, "server.py", "--port", str(port)]
        with process(command, environment, f"http://127.0.0.1:{port}/ready"):
            yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def process(command: list[str], environment: Mapping[str, str], ready: str) -> Iterator[None]:
    """A process, from when its server answers."""
    running = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + STARTS
        while not _answers(ready):
            assert running.poll() is None, f"{command} has ended with {running.returncode}"
            assert time.monotonic() < deadline, f"{command} does not start"
            time.sleep(0.05)
        yield
    finally:
        running.kill()
        running.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@contextmanager
def in_front_of(kind: str, settings: Settings) -> Iterator[Front]:
    """A server in front of an upstream."""
    with serve(create_app(settings)) as served:
        headers = {"Authorization": f"Bearer {ANN}"}
        with (
            OpenAI(base_url=f"{served.url}/v1", api_key=ANN, max_retries=0) as client,
            httpx2.Client(base_url=served.url, headers=headers, trust_env=False, timeout=60) as http,
        ):
            yield Front(kind, served, client, http)
