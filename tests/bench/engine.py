"""Measure the engine alone, without a server and without text: tokens per second, in this process.

python tests/bench/engine.py --streams 1 8 32 --tokens 128
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from platformdirs import user_cache_path

from models.engine.async_engine import keep_memory
from models.engine.engine import Engine
from models.engine.model_runner import ModelRunner
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence
from models.language.loader import load
from models.settings import Settings
from tests.bench.load import story


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine alone.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--model", help="a model, in place of the embedded one")
    arguments = parser.parse_args()
    tokenizer, model = load(Settings(model=arguments.model, quantize=arguments.quantize))
    engine = Engine(ModelRunner(model, 32, 4096))
    keep_memory()
    if arguments.compile:
        engine.runner.compile(user_cache_path("parley") / "compiled")

    def run(streams: int, tokens: int, first: int) -> float:
        """Tokens per second of some sequences that begin together."""
        for number in range(first, first + streams):
            text = tokenizer.apply_chat_template(story(number), add_generation_prompt=True, tokenize=False)
            prompt = tokenizer.encode(str(text), add_special_tokens=False)
            engine.add(Sequence(prompt, SamplingParams(), tokens, frozenset([tokenizer.eos_token_id])))
        started, tokens_made = time.perf_counter(), 0
        while not engine.idle:
            tokens_made += len(engine.step())
        return tokens_made / (time.perf_counter() - started)

    run(2, 16, 10**6)
    print(json.dumps({streams: run(streams, arguments.tokens, 1000 * streams) for streams in arguments.streams}))


if __name__ == "__main__":
    main()
