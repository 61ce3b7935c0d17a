"""What `gpu.py` measures, part by part; each runs in a process of its own, which `gpu.py` starts."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from models.engine.fused_attention import FusedAttention
from models.engine.graphs import Graphs
from models.engine.sampling_params import SamplingParams
from tests.bench.gpu import SMOKE, Load
from tests.bench.gpu_engine import (
    EngineLoad,
    Replies,
    compared,
    configuration,
    copy_rate,
    join,
    random_model,
    release,
    same_prompts,
    weights_read,
)
from tests.bench.gpu_report import Report
from tests.bench.gpu_transformers import transformers as peer

USUAL = SamplingParams(temperature=0.45, top_p=0.9, repetition_penalty=1.1)  # the defaults of the server
KERNELS = 8  # that are printed
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def device(report: Report, device: torch.device, load: Load, smoke: bool) -> None:
    """Versions, the copy rate, and which fast ways work here, on one layer of the 8B shape."""
    report.say(f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        report.say(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    report.attempt("copy", lambda: report.keep("copy", copy_rate(device) / 1e12, "TB/s", 2))
    config = configuration("8b", smoke, num_hidden_layers=1, vocab_size=1024)

    def graph() -> None:
        graphs, numbers = Graphs(device), torch.zeros(3, device=device)
        step = graphs.capture(lambda: numbers + 1)
        numbers.fill_(4)
        report.keep("graphs", bool(step and graphs.works and step().eq(5).all()))

    def layer() -> None:
        model = random_model(config, device)
        join(model)
        expected = EngineLoad(model, load, eager=True).replies(4, 12)
        release(device)
        engine = EngineLoad(model, load)
        report.keep("fused attention", not engine.runner.cache.needs_groups)
        report.keep("graphs and eager", compared(engine.replies(4, 12), expected))

    def waits() -> None:
        engine = EngineLoad(random_model(config, device), load)
        engine.fill(4)
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.steps(8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        report.keep("waits", "for the tokens only")

    report.attempt("graphs", graph)
    report.attempt("one layer", layer)
    release(device)
    if device.type == "cuda":
        report.attempt("waits", waits)


def kinds(report: Report, device: torch.device) -> None:
    """Attention of several kinds, by our kernels in graphs, and by torch without graphs."""
    from tests.support.tiny import tiny_gemma2, tiny_gemma3, tiny_gpt_oss  # needs all of requirements.txt

    float8 = {"cache_dtype": torch.float8_e4m3fn}
    makes: list[tuple[str, Callable[[], Any], dict[str, Any]]] = [
        *(("windows", tiny_gemma3, {}), ("soft-capping", tiny_gemma2, {})),
        *(("sinks", tiny_gpt_oss, {}), ("float8", tiny_gemma3, float8)),
    ]
    for name, make, options in makes:
        model = make().to(device=device, dtype=torch.bfloat16)
        plain = FusedAttention(allowed=False)
        expected = EngineLoad(model, SMOKE, eager=True, fused=plain, **options).replies(4, 12)
        engine = EngineLoad(model, SMOKE, **options)
        fused = "fused" if not engine.runner.cache.needs_groups else "NOT FUSED"
        report.keep(name, f"{fused}, {compared(engine.replies(4, 12), expected)}")


def parley(report: Report, device: torch.device, load: Load, smoke: bool, shape: str) -> None:
    """The engine alone; of a small model, one stream only."""
    model = random_model(configuration(shape, smoke), device)
    size = weights_read(model)
    report.keep("floor", copy_rate(device) / size, "tokens/s at one stream", 1)
    join(model)
    report.say(f"{size / 1e9:.2f} GB of weights a step; the model is ready")
    expected: Replies = []

    def eager() -> None:
        with torch.inference_mode():
            ids = torch.tensor(same_prompts(load, load.few, model.config.vocab_size), device=device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, 0]
        expected.extend(EngineLoad(model, load, eager=True).replies(load.few, load.reply // 2))
        own = [([int(row.argmax())], [row]) for row in logits]
        first = [(tokens[:1], rows[:1]) for tokens, rows in expected]
        report.keep("equal eager and transformers", compared(first, own))

    if shape == "8b":
        report.attempt("eager", eager)
    release(device)
    engine = EngineLoad(model, load)
    report.say(f"the cache has room for {engine.runner.capacity:,} tokens")
    measures = Measures(report, engine, load.streams if shape == "8b" else load.streams[:1])
    if expected:
        report.attempt("graphs equal", lambda: measures.equal("graphs and eager", expected))
    report.attempt("plain decode", lambda: measures.decode("plain "))
    compiled = report.attempt("compile", measures.compile, needs=10)
    report.attempt("decode", measures.decode)
    if compiled and expected:
        report.attempt("compiled equal", lambda: measures.equal("compiled and eager", expected))
    report.attempt("profiles", measures.profiles)
    if shape == "8b":
        report.attempt("first token", measures.first_token)
        report.attempt("gaps", measures.gaps)
        report.attempt("sampling", measures.sampling)
        report.attempt("churn", measures.churn)
    report.attempt("whole", measures.whole)


def profile(load: EngineLoad, streams: int, report: Report, steps: int = 4) -> None:
    """What steps consist of in which so many sequences decode: the device's time, launches, waits, kernels."""
    load.fill(streams)
    on_gpu = load.device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_gpu)]) as profiler:
        load.steps(steps)
    kernels: dict[str, tuple[int, float]] = {}  # number and milliseconds by name
    launches = waits = 0
    for event in profiler.events() or ():
        if event.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")):
            launches += 1
        elif event.name in WAITS:
            waits += 1
        elif event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU) and not event.is_user_annotation:
            took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            number, total = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = number + 1, total + took / 1000
    report.keep(f"busy {streams}", sum(total for _, total in kernels.values()) / steps, "ms", 2)
    report.keep(f"launches {streams}", launches / steps, "", 1)
    report.keep(f"waits {streams}", waits / steps, "", 1)
    for name, (number, total) in sorted(kernels.items(), key=lambda item: -item[1][1])[:KERNELS]:
        short = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
        report.say(f"    {total / steps:8.3f} ms  x{number / steps:5.1f}  {short[:80]}")


class Measures:
    """What is measured of one engine."""

    def __init__(self, report: Report, engine: EngineLoad, streams: tuple[int, ...]) -> None:
        self.report = report
        self.engine = engine
        self.load = engine.load
        self.streams = streams

    def equal(self, name: str, expected: Replies) -> None:
        replies = self.engine.replies(len(expected), len(expected[0][0]))
        self.report.keep(f"equal {name}", compared(replies, expected))

    def decode(self, kind: str = "") -> None:
        for number in self.streams:
            rate = self.engine.decode(number)
            self.report.keep(f"{kind}decode {number}", rate, "tokens/s")
            self.report.keep(f"{kind}step {number}", 1000 * number / rate, "ms", 2)

    def compile(self) -> None:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            self.engine.runner.compile(Path(folder))
        self.report.keep("compiled in", time.perf_counter() - began, "s", 1)

    def profiles(self) -> None:
        for number in self.streams:
            profile(self.engine, number, self.report)

    def first_token(self) -> None:
        times = [1000 * self.engine.first_token() for _ in range(6)]
        self.report.say(f"first tokens, the first ones without a graph: {_list(times)} ms")
        self.report.keep("first token", statistics.median(times[3:]), "ms", 1)

    def gaps(self) -> None:
        running = self.engine.fill(self.load.many)
        self.report.keep("quiet gap", statistics.median(self.engine.gaps(running)), "ms", 2)
        arrivals = []
        for _ in range(6):
            arrivals.append(sorted(self.engine.gaps(running, self.load.arriving)))
            self.engine.steps(3)
        self.report.say(f"longest gap of each arrival: {_list([each[-1] for each in arrivals])} ms")
        warm = sorted(gap for each in arrivals[3:] for gap in each)  # steps of these sizes have come before
        self.report.keep("busy gap p50", statistics.median(warm), "ms", 1)
        self.report.keep("busy gap p99", warm[int(0.99 * len(warm))], "ms", 1)

    def sampling(self) -> None:
        self.report.keep("sampled", self.engine.decode(self.load.many, USUAL), "tokens/s")

    def churn(self) -> None:
        self.engine.fill(self.load.many)
        self.engine.churn(self.load.churn)
        self.report.keep("churned", self.load.many / self.engine.steps(self.load.steps), "tokens/s")

    def whole(self) -> None:
        for number in self.streams:
            self.engine.whole(number)  # its steps of many sizes come for the first time
            self.report.keep(f"whole {number}", self.engine.whole(number), "tokens/s")


def socket(report: Report, device: torch.device, load: Load, smoke: bool) -> None:
    """The whole server, which needs more packages than the engine."""
    from tests.bench.gpu_socket import socket

    socket(report, device, load, smoke)


def _list(numbers: list[float]) -> str:
    return ", ".join(f"{number:.0f}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--until", type=float, required=True, help="when it is killed, by the system's monotonic clock")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(max(arguments.until - time.monotonic() - 2, 1))  # where it hangs
    logging.basicConfig(level=logging.WARNING, format="  %(message).200s", stream=sys.stdout)
    logging.getLogger("parley").setLevel(logging.INFO)  # tells why a fast way is not taken
    report = Report(arguments.results, arguments.until - 3)
    load = SMOKE if arguments.smoke else Load()
    common = report, torch.device(arguments.device), load, arguments.smoke
    name, _, shape = arguments.part.partition(" ")
    parts: dict[str, Callable[[], None]] = {
        "device": lambda: device(*common),
        "kinds": lambda: kinds(report, torch.device(arguments.device)),
        "parley": lambda: parley(*common, shape),
        "transformers": lambda: peer(*common, shape),
        "socket": lambda: socket(*common),
    }
    if not report.attempt(arguments.part, parts[name]):
        sys.exit(1)


if __name__ == "__main__":
    main()
