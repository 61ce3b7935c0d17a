"""What `gpu.py` measures of transformers' continuous batching, with CUDA graphs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.bench.gpu import Load
from tests.bench.gpu_engine import configuration, random_model, random_prompt
from tests.bench.gpu_report import Report

PAGE = 256  # tokens, the default of transformers
OTHERS = 10**7  # its prompts have higher numbers than those of our engine
WAIT = 30.0  # seconds that requests may take


@dataclass(frozen=True)
class Run:
    """What requests that come together took."""

    whole: float  # tokens per second from the requests to the last tokens
    decode: float  # tokens per second while all decode
    first: float  # seconds to the first token, in the median


def options(load: Load) -> dict[str, Any]:
    """Room for all requests, and graphs of sizes so close that little is padded."""
    streams = max(load.streams)
    pages = streams * -(-(load.prompt + load.reply) // PAGE) + -(-load.long_prompt // PAGE)
    chosen = {"use_cuda_graph": True, "q_padding_interval_size": 32, "kv_padding_interval_size": 512}
    chosen |= {"num_blocks": pages + streams // 4, "max_batch_tokens": 2048, "max_requests_per_batch": streams}
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    return chosen | ({"auto_switch_to_flash": False} if "auto_switch_to_flash" in known else {})


class Batching:
    """Puts a load on a running manager of continuous batching."""

    def __init__(self, manager: Any, load: Load, vocabulary: int) -> None:
        self.manager = manager
        self.load = load
        self.vocabulary = vocabulary
        self._prompts = OTHERS

    def run(self, streams: int, length: int, reply: int) -> Run:
        """So many requests, all at once, until all are answered."""
        inputs = []
        for _ in range(streams):
            self._prompts += 1
            inputs.append(random_prompt(length, self._prompts, self.vocabulary))
        began = time.perf_counter()
        done: list[Any] = []
        self.manager.add_requests(inputs=inputs, max_new_tokens=reply, record_timestamps=True)
        while len(done) < streams:
            if time.perf_counter() - began > WAIT or not self.manager.is_running():
                raise RuntimeError(f"{len(done)} of {streams} requests are answered, and no more come")
            result = self.manager.get_result(timeout=1)
            if result and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                done.append(result)
        took = time.perf_counter() - began
        times = [result.timestamps for result in done]
        start, end = max(each[0] for each in times), min(each[-1] for each in times)
        inside = sum(start < moment <= end for each in times for moment in each)
        made = sum(len(result.generated_tokens) for result in done)
        first = statistics.median(each[0] for each in times) - began
        return Run(made / took, inside / (end - start) if end > start else 0.0, first)


def transformers(report: Report, device: torch.device, load: Load, smoke: bool, shape: str) -> None:
    """The same loads as our engine gets; of a small model, one stream only."""
    model: Any = random_model(configuration(shape, smoke), device)
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=load.reply, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    config = ContinuousBatchingConfig(**options(load))
    began = time.perf_counter()
    opened = model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=config, block=True, timeout=3
    )
    with opened as manager:
        batching = Batching(manager, load, model.config.vocab_size)
        batching.run(2, load.prompt, 4)
        report.say(f"ready in {time.perf_counter() - began:.1f} s; {_in_effect(manager, model)}")
        for streams in load.streams if shape == "8b" else load.streams[:1]:
            report.attempt(f"{streams} streams", partial(_streams, report, batching, streams))
        if shape == "8b":
            report.attempt("first token", lambda: _first_token(report, batching))


def _in_effect(manager: Any, model: Any) -> str:
    config = manager.continuous_batching_config
    names = ("use_cuda_graph", "use_async_batching", "num_blocks", "max_batch_tokens")
    return ", ".join([model.config._attn_implementation, *(f"{name} {getattr(config, name)}" for name in names)])


def _streams(report: Report, batching: Batching, streams: int) -> None:
    load = batching.load
    batching.run(streams, load.prompt, load.reply)  # captures graphs
    run = batching.run(streams, load.prompt, load.reply)
    report.keep(f"decode {streams}", run.decode, "tokens/s")
    report.keep(f"whole {streams}", run.whole, "tokens/s")
    report.say(f"first tokens of {streams}: {1000 * run.first:.0f} ms in the median")


def _first_token(report: Report, batching: Batching) -> None:
    times = [1000 * batching.run(1, batching.load.long_prompt, 1).first for _ in range(6)]
    report.say(f"first tokens: {', '.join(f'{time:.0f}' for time in times)} ms")
    report.keep("first token", statistics.median(times[3:]), "ms", 1)
