"""Measure what formats cost: masks, sampling with them, and steps in which some of the streams have one.

python tests/bench/constraints.py
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from platformdirs import user_cache_path
from transformers import PreTrainedTokenizerBase

from models.engine.async_engine import keep_memory
from models.engine.engine import Engine
from models.engine.model_runner import ModelRunner
from models.engine.sampler import Sampler
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence
from models.engine.token_masks import TokenMasks
from models.language.grammar.constraint import GrammarConstraint
from models.language.grammar.grammars import Grammars
from models.language.loader import load
from models.options import SAMPLING, Options
from models.output_format import OutputFormat
from models.settings import Settings
from tests.bench.load import story

STREAMS = 32
STRING = {"type": "string", "minLength": 5}
FORMAT = OutputFormat(  # never ends
    "json_schema",
    {
        "type": "array",
        "minItems": 10_000,
        "items": {
            "type": "object",
            "properties": {"name": STRING, "age": {"type": "integer", "minimum": 0}, "kind": {"enum": ["a", "b"]}},
            "required": ["name", "age", "kind"],
            "additionalProperties": False,
        },
    },
)


def usual_params() -> SamplingParams:
    options = Options()
    return SamplingParams(**{name: getattr(options, name) for name in SAMPLING})


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


async def constraints(grammars: Grammars, count: int) -> list[GrammarConstraint]:
    made = [await grammars.compile(FORMAT, "bench") for _ in range(count)]
    return [constraint for constraint in made if constraint]


def measure_masks(grammars: Grammars, vocabulary: int, rows: int) -> tuple[float, float, float]:
    """Seconds of a step: for masks and tokens, for sampling without masks, and for sampling with them."""
    device = torch.device("cpu")
    made = asyncio.run(constraints(grammars, rows))
    sampler, slots = Sampler(STREAMS, vocabulary, device), list(range(STREAMS))
    for slot in slots:
        sampler.assign(slot, usual_params(), [1])
    logits, where, uniforms = torch.randn(STREAMS, vocabulary) * 6, torch.arange(STREAMS), [0.5] * STREAMS
    filling, free, bound = [], [], []
    for _ in range(100):
        masks = TokenMasks(list(range(rows)), vocabulary, device)
        began = time.perf_counter()
        for constraint, mask in zip(made, masks.bits, strict=True):
            constraint.fill(mask)
        filling.append(time.perf_counter() - began)
        free.append(timed(lambda: sampler.sample(logits, slots, where, uniforms)))
        bound.append(timed(lambda masks=masks: sampler.sample(logits, slots, where, uniforms, masks)))  # type: ignore[misc]
        for constraint, token in zip(
            made, sampler.sample(logits, slots, where, uniforms, masks).tolist(), strict=False
        ):
            filling[-1] += timed(lambda constraint=constraint, token=token: constraint.accept(token))  # type: ignore[misc]
    return median(filling), median(free), median(bound)


class Streams:
    """Steps of many streams, of which some have a format."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, grammars: Grammars) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.round = 0

    def step_seconds(self, constrained: int, steps: int) -> list[tuple[float, float]]:
        """The seconds of single steps in which all streams decode, and those of the processor in this process."""
        self.round += 1
        for number in range(STREAMS):
            messages = story(1000 * self.round + number)
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            self.engine.add(Sequence(self.tokenizer.encode(str(text)), usual_params(), 1000, seed=number))
        sequences = list(self.engine.scheduler.running)
        for sequence, each in zip(sequences, asyncio.run(constraints(self.grammars, constrained)), strict=False):
            sequence.constraint = each
        while not all(sequence.decodes for sequence in sequences):
            self.engine.step()
        seconds = []
        for _ in range(steps):
            began = time.process_time()
            seconds.append((timed(self.engine.step), time.process_time() - began))
        for sequence in sequences:
            self.engine.cancel(sequence)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="What formats cost.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    tokenizer, model = load(Settings())
    engine = Engine(ModelRunner(model, STREAMS, 1024))
    keep_memory()
    engine.runner.compile(user_cache_path("parley") / "compiled")
    vocabulary = engine.runner.logits_size
    grammars = Grammars(tokenizer, vocabulary, [tokenizer.eos_token_id])
    try:
        print(f"the tokenizer of formats: {timed(lambda: asyncio.run(constraints(grammars, 1))) * 1e3:.0f} ms")
        for rows in (1, STREAMS):
            filling, free, bound = measure_masks(grammars, vocabulary, rows)
            print(
                f"{rows} of {STREAMS} rows: masks {filling * 1e3:.3f} ms, sampling {free * 1e3:.2f} ms free, ", end=""
            )
            print(f"{bound * 1e3:.2f} ms with masks", flush=True)
        streams, seconds = (
            Streams(engine, tokenizer, grammars),
            {count: list[tuple[float, float]]() for count in (0, 1, STREAMS)},
        )
        streams.step_seconds(1, 5)
        for _ in range(arguments.rounds):  # in turn, since the machine may have other work
            for count, measured in seconds.items():
                measured += streams.step_seconds(count, arguments.steps)
        for count, measured in seconds.items():
            wall, busy = map(median, zip(*measured, strict=True))
            print(
                f"{count} of {STREAMS} streams with a format: {1 / wall:.1f} steps/s, {busy * 1e3:.1f} ms busy a step"
            )
    finally:
        grammars.close()


if __name__ == "__main__":
    main()
