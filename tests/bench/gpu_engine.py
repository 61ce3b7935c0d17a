"""An engine without a server around it, over a model with random weights, and what `gpu.py` measures of it."""

from __future__ import annotations

import gc
import random
import statistics
import time
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from models.engine.block_runner import BLOCK, BlockRunner
from models.engine.engine import Engine
from models.engine.graphs import Graphs
from models.engine.joined_linears import join_linears
from models.engine.sampler import Sampler
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence
from models.engine.token_masks import TokenMasks
from tests.bench.gpu import Load

GREEDY = SamplingParams()
ENDLESS = 10**6  # tokens: more than the context
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy on the device, read and written ones together."""
    size = 2**32 if device.type == "cuda" else 2**24
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size / statistics.median(times)


def configuration(shape: str, smoke: bool, **changes: Any) -> PreTrainedConfig:
    sizes = SHAPES[shape] | (TINY | {"num_key_value_heads": 2} if smoke else {}) | changes
    sizes |= {"max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**sizes) if shape == "8b" else Qwen2Config(**sizes)


def random_model(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A model with random weights in bfloat16, which are made on the device."""
    torch.manual_seed(1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def weights_read(model: PreTrainedModel) -> int:
    """The bytes of weights that a step reads at least: all but the embedding, of which it reads some rows."""
    embedding = model.get_input_embeddings().weight
    tied = model.config.tie_word_embeddings  # then the head reads it whole
    return sum(weight.nbytes for weight in model.parameters() if tied or weight is not embedding)


def join(model: PreTrainedModel) -> None:
    """Join the linears of a model as the loader does."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    join_linears(model, lambda: model(input_ids=ids, use_cache=False), nn.Linear)


def random_prompt(length: int, number: int, vocabulary: int) -> list[int]:
    source = random.Random(number)
    return [source.randrange(3, vocabulary) for _ in range(length)]


def same_prompts(load: Load, count: int, vocabulary: int) -> list[list[int]]:
    return [random_prompt(load.prompt, ENDLESS + number, vocabulary) for number in range(count)]


def release(device: torch.device) -> None:
    """Give the memory of what is gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class NotingSampler(Sampler):
    """Keeps the logits of each slot, (vocabulary,) each, in order."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        super().__init__(slots, vocabulary, device)
        self.noted: dict[int, list[Tensor]] = {}

    def sample(
        self,
        logits: Tensor,
        slots: list[int],
        where: Tensor,
        uniforms: list[float],
        masks: TokenMasks | None = None,
    ) -> Tensor:
        for slot, row in zip(slots, logits.clone(), strict=True):
            self.noted.setdefault(slot, []).append(row)
        return super().sample(logits, slots, where, uniforms, masks)


Replies = list[tuple[list[int], list[Tensor]]]  # the tokens of each, and the logits that they were chosen from


class EngineLoad:
    """Puts a load on an engine that has no server around it."""

    def __init__(self, model: PreTrainedModel, load: Load, eager: bool = False, **options: Any) -> None:
        self.device = model.device
        graphs = Graphs(self.device)
        graphs.works = graphs.works and not eager
        slots, block = max(load.streams), load.block or BLOCK
        # What the eager one leaves must be room enough for the next one.
        blocks = 2 * -(-load.context // block) if eager else None
        options |= {"block_size": block, "blocks": blocks, "graphs": graphs}
        self.runner = BlockRunner(model, slots, load.context, **options)
        self.engine = Engine(self.runner)
        self.load = load
        self._prompts = 0

    def add(self, length: int, reply: int = ENDLESS, params: SamplingParams = GREEDY) -> Sequence:
        """Add a sequence with a prompt of its own."""
        self._prompts += 1
        sequence = Sequence(random_prompt(length, self._prompts, self.runner.vocabulary), params, reply)
        self.engine.add(sequence)
        return sequence

    def clear(self) -> None:
        """End all sequences, and forget their tokens."""
        for sequence in [*self.engine.scheduler.running]:
            self.engine.cancel(sequence)
        self.drain()
        for slot in range(self.runner.slots):
            self.engine.scheduler.prefixes.forget(slot)

    def drain(self) -> None:
        while not self.engine.idle:
            self.engine.step()

    def fill(self, streams: int, params: SamplingParams = GREEDY) -> list[Sequence]:
        """So many sequences, and no others, that decode; steps of their sizes have come before."""
        self.clear()
        sequences = [self.add(self.load.prompt, params=params) for _ in range(streams)]
        self.settle()
        return sequences

    def settle(self) -> None:
        while not all(sequence.decodes for sequence in self.engine.scheduler.running):
            self.engine.step()
        for _ in range(4):
            self.engine.step()
        synchronize(self.device)

    def steps(self, count: int) -> float:
        """Seconds of a step, on average over some."""
        began = time.perf_counter()
        for _ in range(count):
            self.engine.step()
        synchronize(self.device)
        return (time.perf_counter() - began) / count

    def decode(self, streams: int, params: SamplingParams = GREEDY) -> float:
        """Tokens per second while so many sequences decode."""
        self.fill(streams, params)
        return streams / self.steps(self.load.steps)

    def whole(self, streams: int) -> float:
        """Tokens per second of so many requests that come together, from the requests to the last tokens."""
        self.clear()
        began = time.perf_counter()
        for _ in range(streams):
            self.add(self.load.prompt, self.load.reply)
        self.drain()
        return streams * self.load.reply / (time.perf_counter() - began)

    def first_token(self) -> float:
        """Seconds to the first token of a long prompt, with nothing else to do."""
        self.clear()
        began = time.perf_counter()
        self.add(self.load.long_prompt, 1)
        self.drain()
        return time.perf_counter() - began

    def gaps(self, running: list[Sequence], arriving: int = 0) -> list[float]:
        """Milliseconds between the tokens of running sequences: of some steps, or while a prompt arrives."""
        known = dict.fromkeys(running, time.perf_counter())
        sequence = self.add(arriving, 1) if arriving else None
        gaps: list[float] = []
        left = self.load.steps
        while sequence.slot >= 0 if sequence else left:
            tokens, now = self.engine.step(), time.perf_counter()
            left -= 1
            for token in tokens:
                if token.sequence in known:
                    gaps.append(1000 * (now - known[token.sequence]))
                    known[token.sequence] = now
        return gaps

    def churn(self, times: int) -> None:
        """So many departures at random, each with an arrival after it."""
        source = random.Random(3)
        for number in range(times):
            self.engine.cancel(source.choice(self.engine.scheduler.running))
            self.add(self.load.prompt)
            if number % 5 == 0:
                self.engine.step()
        self.settle()

    def replies(self, streams: int, length: int) -> Replies:
        """Greedy replies to the same prompts at each call, and their logits."""
        self.clear()
        usual, sampler = self.engine.sampler, NotingSampler(self.runner.slots, self.runner.logits_size, self.device)
        self.engine.sampler = sampler
        sequences = [Sequence(ids, GREEDY, length) for ids in same_prompts(self.load, streams, self.runner.vocabulary)]
        for sequence in sequences:
            self.engine.add(sequence)
        slots = [sequence.slot for sequence in sequences]
        self.drain()
        self.engine.sampler = usual
        return [
            (sequence.tokens[len(sequence.prompt) :], sampler.noted[slot][:length])
            for sequence, slot in zip(sequences, slots, strict=True)
        ]


def compared(replies: Replies, expected: Replies) -> str:
    """How many replies have the expected tokens, and how much logits differ, until the first token that does."""
    equal, difference = 0, 0.0
    for (ids, logits), (other_ids, other_logits) in zip(replies, expected, strict=True):
        same = next((i for i, pair in enumerate(zip(ids, other_ids, strict=True)) if pair[0] != pair[1]), len(ids))
        equal += same == len(ids)
        for row, other in zip(logits[: same + 1], other_logits[: same + 1], strict=True):
            difference = max(difference, float((row - other).abs().max() / other.abs().max()))
    return f"{equal} of {len(replies)} replies, logits within {100 * difference:.2f}% of the largest"
