"""Measure Parley on a GPU beside transformers' continuous batching, and print a table. It takes four minutes.

    python tests/bench/gpu.py
    python tests/bench/gpu.py --device cpu --smoke

The models have random weights, in the shapes of Llama-3-8B and Qwen2.5-0.5B, in bfloat16, made on the device. Each part
is a process of its own, with a limit: one that fails or hangs leaves the others. README.md says how to read the table.

The engine's parts need torch and transformers only; the part with sockets needs what the server needs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LEAST = 12.0  # seconds: a part is not started with less

# Whose tokens and logits are compared with whose.
EQUAL = ("eager and transformers", "graphs and eager", "compiled and eager")

Values = dict[str, Any]  # what a part has measured, by name
Measured = dict[str, Values]  # by part


@dataclass(frozen=True)
class Load:
    """The sizes of what is measured; lengths in tokens."""

    streams: tuple[int, int, int, int] = (1, 8, 32, 128)
    prompt: int = 128
    reply: int = 64
    socket_reply: int = 192  # over a socket
    long_prompt: int = 1000  # whose first token is waited for
    arriving: int = 2000  # a prompt that arrives while others decode
    churn: int = 150  # departures and arrivals
    steps: int = 48  # that are timed
    context: int = 8192
    block: int | None = None  # None is the size that the runner chooses

    @property
    def few(self) -> int:
        return self.streams[1]

    @property
    def many(self) -> int:
        return self.streams[2]


SMOKE = Load((1, 2, 4, 8), 12, 16, 32, 40, 60, 12, 6, 128, 16)


@dataclass(frozen=True)
class Part:
    """What one process measures, and how many seconds it gets."""

    name: str
    seconds: float


PARTS = [  # the most important first; the last two run if time is left
    Part("parley 8b", 75),
    Part("socket 8b", 70),
    Part("transformers 8b", 50),
    Part("parley 0.5b", 30),
    Part("device", 15),
    Part("transformers 0.5b", 0),
    Part("kinds", 0),
]


def main() -> int:
    """The exit status: 0 if no part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny models and loads, to try the parts without a GPU")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="may be given again")
    parser.add_argument("--budget", type=float, default=240, help="seconds for all parts together")
    arguments = parser.parse_args()
    planned = time.monotonic()
    deadline = planned + arguments.budget
    options = ["--device", arguments.device, *(["--smoke"] if arguments.smoke else [])]
    measured: Measured = {}
    whole = True
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if arguments.only and part.name not in arguments.only:
                continue
            planned += part.seconds  # what a part leaves over, the next ones may take
            until = deadline if arguments.smoke or arguments.only else min(planned, deadline)
            if (seconds := until - time.monotonic()) < LEAST:
                print(f"\n== {part.name}: left out, {seconds:.0f} s are left", flush=True)
                continue
            results = Path(folder, part.name.replace(" ", "-"))
            whole &= _run(part.name, until, [*options, "--results", str(results)])
            measured[part.name] = _read(results)
            whole &= not measured[part.name].get("failed")
    print("\n" + "\n".join(table(measured, SMOKE if arguments.smoke else Load())))
    return 0 if whole else 1


def _run(name: str, until: float, options: list[str]) -> bool:
    """Run a part in a process of its own, which is killed with all that it started when its time is over.

    Returns whether it came to its end.
    """
    began = time.monotonic()
    print(f"\n== {name}, at most {until - began:.0f} s", flush=True)
    command = [sys.executable, str(HERE / "gpu_parts.py"), name, "--until", str(until), *options]
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"})
    code = 1
    try:
        code = process.wait(until - began)
        ended = "ended" if code == 0 else f"ENDED WITH {code}"
    except subprocess.TimeoutExpired:
        ended = "KILLED AT ITS LIMIT"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(f"== {name} {ended} after {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


def _read(results: Path) -> Values:
    lines = results.read_text().splitlines() if results.exists() else []
    return dict(json.loads(line) for line in lines)


def table(measured: Measured, load: Load) -> list[str]:
    """The lines of the table, and what else is compared."""
    parley, peer, socket = (measured.get(part, {}) for part in ("parley 8b", "transformers 8b", "socket 8b"))
    small, small_peer = (measured.get(part, {}) for part in ("parley 0.5b", "transformers 0.5b"))

    def row(title: str, values: Values, what: str, first: str = "") -> str:
        rates = [_number(values.get(f"{what} {streams}")) for streams in load.streams]
        return _row(title, *rates, _number(values.get(first), " ms"))

    def ratios(title: str, ours: str, theirs: str) -> str:
        rates = [_ratio(parley.get(f"{ours} {n}"), peer.get(f"{theirs} {n}")) for n in load.streams]
        return _row(title, *rates, _ratio(parley.get("first token"), peer.get("first token")))

    lines = [
        _row("8B, tokens/s", *(f"{n} streams" for n in load.streams), f"first token of {load.long_prompt:,}"),
        "|---" * 6 + "|",
        _row("floor: weights read once", _number(parley.get("floor")), "", "", "", ""),
        row("Parley over /ws", socket, "decode"),
        row("Parley, all decode", parley, "decode", "first token"),
        row("the same before layers are compiled", parley, "plain decode"),
        row("Parley, from requests to last tokens", parley, "whole"),
        row("transformers with graphs, all decode", peer, "decode", "first token"),
        row("the same, from requests to last tokens", peer, "whole"),
        ratios("Parley / transformers, all decode", "decode", "decode"),
        ratios("the same, from requests to last tokens", "whole", "whole"),
    ]
    one, many = load.streams[0], load.many
    rate, small_rate, small_peer_rate = (
        parley.get(f"decode {many}"),
        small.get(f"decode {one}"),
        small_peer.get(f"decode {one}"),
    )
    pace = [_number(parley.get(name), " ms", 1) for name in ("quiet gap", "busy gap p50", "busy gap p99")]
    return [
        *lines,
        "",
        f"1 stream: {_ratio(parley.get(f'decode {one}'), parley.get('floor'))} of the floor",
        f"gap of {many} streams: {pace[0]}; while {load.arriving:,} tokens arrive p50 {pace[1]}, p99 {pace[2]}"
        f" = {_ratio(parley.get('busy gap p99'), parley.get('quiet gap'))} x the quiet one",
        f"{many} streams with the default sampling: {_ratio(parley.get('sampled'), rate)} of greedy",
        f"{many} streams after {load.churn} departures and arrivals: {_ratio(parley.get('churned'), rate)} of fresh",
        *(_step(parley, streams) for streams in load.streams),
        *(_over_socket(socket, streams) for streams in (one, *load.streams[2:])),
        *(f"{name}: {parley.get(f'equal {name}', '-')}" for name in EQUAL),
        f"0.5B, 1 stream: Parley {_number(small_rate)} tokens/s, transformers {_number(small_peer_rate)},"
        f" {_ratio(small_rate, small_peer_rate)} times",
        *(f"FAILED: {part}, {name}" for part, values in measured.items() for name in values.get("failed", ())),
    ]


def _step(parley: Values, streams: int) -> str:
    """What a decode step consists of."""
    step, busy, launches, waits = (parley.get(f"{name} {streams}") for name in ("step", "busy", "launches", "waits"))
    return (
        f"a step of {streams}: {_number(step, ' ms', 2)}, device busy {_number(busy, ' ms', 2)},"
        f" {_number(launches)} launches, {_number(waits, '', 1)} synchronisations"
    )


def _over_socket(socket: Values, streams: int) -> str:
    """What else is known of replies over sockets."""
    shares = ", ".join(f"{name} {share:.2f}" for name, share in socket.get(f"shares {streams}", {}).items())
    whole, first, last = (socket.get(f"{name} {streams}") for name in ("whole", "first token", "last first token"))
    return (
        f"/ws, {streams}: {_number(whole)} tokens/s from requests to last tokens, first tokens"
        f" {_number(first, ' ms')} in the median, {_number(last, ' ms')} at most; cores used: {shares or '-'}"
    )


def _row(title: str, *cells: str) -> str:
    return f"| {title:40} | " + " | ".join(f"{cell:>10}" for cell in cells) + " |"


def _number(value: float | None, unit: str = "", digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else "-"


if __name__ == "__main__":
    sys.exit(main())
