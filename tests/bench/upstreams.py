"""What Parley costs in front of another engine: the same load on the engine alone, and through Parley.

    python tests/bench/upstreams.py --llama .bench/llama/bin/python

Each pair of numbers is the median of some rounds, in which the two take turns. `--paced` measures in front of a server
that sends tokens at a fixed pace, as an engine on another machine does: then nobody fights for the processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from models.language.model_files import find_model
from models.settings import Settings
from tests.bench.servers import ROOT, SECRET, Server, llama_cpp, parley, running, vllm

STREAMS = (1, 8, 32)
TOKENS = 128


def measure(server: Server, streams: int, number: int) -> dict[str, float]:
    """Tokens per second and the seconds to the first token, of some streams at once."""
    load = [sys.executable, "tests/bench/load.py", "openai", server.url, "--secret", SECRET, "--model", server.model]
    load += ["--streams", str(streams), "--tokens", str(TOKENS), "--number", str(number)]
    done = subprocess.run(load, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{server.name}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


@contextmanager
def front(behind: Server, port: int = 7841, workers: int = 1) -> Iterator[Server]:
    """Parley in front of a server."""
    command = [sys.executable, "server.py", "--port", str(port), "--workers", str(workers)]
    settings = {
        "PARLEY_UPSTREAM": f"{behind.url}/v1",
        "PARLEY_UPSTREAM_KEY": SECRET,
        "PARLEY_MODEL_ALIASES": "*",
        "PARLEY_USERS": f"bench:{SECRET}",
        "PARLEY_RESPONSES_PER_USER": "64",
        "PARLEY_DATA": str(ROOT / ".bench" / f"data-{port}"),
    }
    with running(
        f"Parley before {behind.name}", "openai", command, "/ready", port, "model", ROOT, **settings
    ) as server:
        yield server


@contextmanager
def paced(port: int = 7842) -> Iterator[Server]:
    """A server that sends tokens at a fixed pace."""
    command = [sys.executable, "tests/bench/paced_upstream.py", str(port)]
    with running("a paced server", "openai", command, "/health", port) as server:
        yield server


def compare(behind: Server, rounds: int) -> None:
    """Measure a server alone and through Parley, and print both."""
    print(f"{behind.name}: alone, through Parley")
    with front(behind) as through:
        for streams in STREAMS:
            found: dict[str, list[dict[str, float]]] = {"alone": [], "through": []}
            for number in range(rounds):
                pair = [("alone", behind), ("through", through)]
                for name, server in pair if number % 2 else reversed(pair):
                    found[name].append(measure(server, streams, 1000 * number + 17 * (name == "alone")))
            speeds, firsts = (
                [statistics.median(one[what] for one in found[name]) for name in ("alone", "through")]
                for what in ("speed", "first")
            )
            print(
                f"  {streams:2} streams: {speeds[0]:7.1f} {speeds[1]:7.1f} tokens/s ({speeds[1] / speeds[0]:.3f}),"
                f" first token {1000 * firsts[0]:6.1f} {1000 * firsts[1]:6.1f} ms",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--llama", type=Path, help="the Python of an environment with xllamacpp")
    parser.add_argument("--parley", action="store_true", help="in front of another Parley")
    parser.add_argument("--paced", action="store_true", help="in front of a server with a fixed pace")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the Python of an environment with vLLM")
    parser.add_argument("--folder", type=Path, help="the folder of the model for vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        if arguments.paced:
            compare(stack.enter_context(paced()), arguments.rounds)
        if arguments.llama:
            gguf = find_model(Settings(), user_cache_path("parley"))
            compare(stack.enter_context(llama_cpp(arguments.llama, gguf)), arguments.rounds)
        if arguments.vllm:
            compare(stack.enter_context(vllm(arguments.vllm, arguments.folder)), arguments.rounds)
        if arguments.parley:
            compare(stack.enter_context(parley()), arguments.rounds)


if __name__ == "__main__":
    main()
