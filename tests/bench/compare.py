"""Compare Parley and the installed peers on one model and one machine. Prints the table of README.md.

    python tests/bench/compare.py --peers .bench/peers

Peers have an environment of their own (see README.md). A round takes six minutes; use the machine for nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.gguf_files import gguf_files, transformers_folder
from tests.bench.servers import BEFORE, ROOT, Server, has, llama_cpp, parley, python_of, transformers_serve

STREAMS = (1, 8, 32)
Measured = dict[str, dict[str, list[float]]]  # by server, then by measure: one number per round


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare Parley and its peers.")
    parser.add_argument("--peers", type=Path, default=ROOT / ".bench" / "peers", help="the environment of the peers")
    parser.add_argument("--before", type=Path, help="another checkout of Parley, with an environment of its own")
    parser.add_argument("--model", type=Path, help="a GGUF file, in place of the embedded model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    measured: Measured = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        servers = [
            stack.enter_context(start()) for start in _servers(arguments.peers, arguments.before, arguments.model)
        ]
        for round_ in range(arguments.rounds):
            print(f"round {round_ + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            for measure in _measures(arguments.tokens, 10_000 * round_):
                for server in servers:  # in turn, since the speed of a machine changes over time
                    for name, value in measure(server).items():
                        measured[server.name][name].append(value)
    checkouts = {"Parley": ROOT} | ({BEFORE: arguments.before.resolve()} if arguments.before else {})
    for _ in range(arguments.rounds):
        for name, root in checkouts.items():
            measured[name]["engine"].append(_engine_alone(root, arguments.tokens, arguments.model))
            measured[name]["memory"].append(_memory(root, arguments.model))
            measured[name]["start"].append(_start(root, arguments.model))
    medians = {name: _medians(values) for name, values in measured.items()}
    print("\n".join(_table(medians)))
    if arguments.before:
        print("\n".join(_before_and_after(medians)))
    (ROOT / ".bench" / "measured.json").write_text(json.dumps(measured, indent=1))


def _servers(
    peers: Path, before: Path | None, model: Path | None
) -> Iterator[Callable[[], AbstractContextManager[Server]]]:
    python = peers / "bin" / "python"
    yield partial(parley, model=model)
    if before:
        yield partial(parley, before.resolve(), 7800, model=model)
    if has(python, "xllamacpp"):
        for port, gguf in enumerate([model] if model else gguf_files(ROOT / ".bench" / "models"), 7810):
            yield partial(llama_cpp, python, gguf, port)
    if has(python, "transformers") and not model:
        yield partial(transformers_serve, python, transformers_folder(ROOT / ".bench" / "models"))


def _measures(tokens: int, number: int) -> Iterator[Callable[[Server], dict[str, float]]]:
    def speed(server: Server, streams: int) -> dict[str, float]:
        result = server.load("throughput", streams=streams, tokens=tokens, number=number)
        return {f"speed {streams}": result["speed"]}

    def first(server: Server) -> dict[str, float]:
        result = server.load("first_token", words=850, number=number)
        return {"first token": result["cold"], "second turn": result["second_turn"] / result["cold"]}

    def gap(server: Server) -> dict[str, float]:
        result = server.load("disturbed", streams=8, words=1700, number=number)
        return {"gap": result["p99_busy"] / result["p50"]}

    def depth(server: Server) -> dict[str, float]:
        near, far = (server.load("depth", words=words, tokens=64, number=number)["speed"] for words in (80, 2450))
        return {"depth": far / near}

    yield from (partial(speed, streams=streams) for streams in STREAMS)
    yield from (first, gap, depth)


def _engine_alone(root: Path, tokens: int, model: Path | None) -> float:
    """Tokens per second of 32 streams in a process without a server."""
    script = root / "tests" / "bench" / "engine.py"
    command = [str(python_of(root)), str(script), "--streams", "32", "--tokens", str(tokens)]
    command += ["--model", str(model)] if model else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["32"])


def _memory(root: Path, model: Path | None) -> float:
    """The peak memory of a server that answers 32 streams of 512 tokens, in bytes."""
    with parley(root, model=model) as server:
        server.load("throughput", streams=32, tokens=512)
        return server.peak_memory


def _start(root: Path, model: Path | None) -> float:
    """Seconds from the command to the first replies of a client that starts meanwhile; everything is cached."""
    began = time.perf_counter()
    with parley(root, compiled=False, model=model) as server:
        server.load("throughput", streams=1, tokens=1)
        return time.perf_counter() - began


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(numbers) for name, numbers in values.items() if numbers}


def _table(servers: dict[str, dict[str, float]]) -> Iterator[str]:
    own = servers["Parley"]
    llamas = [values for name, values in servers.items() if name.startswith("llama.cpp")]
    other = servers.get("transformers")
    yield "| | streams | Parley | llama.cpp | ratio | target | transformers serve | ratio | target |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for streams, target, target_transformers in zip(STREAMS, (1.0, 2.0, 2.5), (5.0, 4.0, 2.5), strict=True):
        key = f"speed {streams}"
        cells = [
            f"{own[key]:.0f}",
            *_against(own, llamas, key, target),
            *_against(own, [other], key, target_transformers),
        ]
        yield f"| tokens/s | {streams} | " + " | ".join(cells) + " |"
    cells = [f"{own['first token']:.2f} s", *_against(own, llamas, "first token", 1.0, min, " s")]
    cells += _against(own, [other], "first token", None, min, " s")
    yield "| first token of a 1,000-token prompt | 1 | " + " | ".join(cells) + " |"
    for key, label, streams, best, goal in (
        ("second turn", "first token of a second turn, against the first's", 1, min, "0.2 or less"),
        ("gap", "p99 gap while a 2,000-token prompt arrives, against p50", 8, min, "4 or less"),
        ("depth", "tokens/s at 3,000 tokens of context, against 100", 1, max, "0.6 or more"),
    ):
        llama = f"{best(each[key] for each in llamas):.2f}" if llamas else ""
        slow = f"{other[key]:.2f}" if other else ""
        yield f"| {label} | {streams} | {own[key]:.2f} | {llama} | | {goal} | {slow} | | |"
    socket = own["speed 32"] / own["engine"]
    yield f"| over `/ws`, against the engine alone | 32 | {socket:.2f} | | | 0.95 or more | | | |"
    yield f"| peak memory, 512 tokens each | 32 | {own['memory'] / 1e9:.2f} GB | | | 1.5 GB or less | | | |"
    yield f"| start to first token | | {own['start']:.1f} s | | | 15 s or less | | | |"


def _before_and_after(servers: dict[str, dict[str, float]]) -> Iterator[str]:
    """Every measure of another checkout and of this one."""
    before, after = servers[BEFORE], servers["Parley"]
    for values in (before, after):
        values["socket"] = values["speed 32"] / values["engine"]
    yield "| | before | after | ratio |"
    yield "|---|---|---|---|"
    for name, value in before.items():
        yield f"| {name} | {value:.4g} | {after[name]:.4g} | {after[name] / value:.2f} |"


def _against(
    own: dict[str, float],
    others: list[dict[str, float] | None] | list[dict[str, float]],
    key: str,
    target: float | None,
    best: Callable[..., float] = max,
    unit: str = "",
) -> list[str]:
    """The best value of the others, our ratio to it, and the target."""
    known = [other[key] for other in others if other and key in other]
    if not known:
        return ["", "", ""]
    value = best(known)
    wanted = "" if target is None else f"{target}" + (" or less" if best is min else "")
    return [f"{value:.2f}{unit}" if unit else f"{value:.0f}", f"{own[key] / value:.2f}", wanted]


if __name__ == "__main__":
    main()
