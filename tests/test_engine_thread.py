from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest
from transformers import PreTrainedModel

from models.engine import Engine
from models.engine_thread import EngineFailed, EngineThread
from models.sampling import Sampling
from models.sequence import Sequence, Token

pytestmark = pytest.mark.anyio


class BreakableEngine(Engine):
    """Fails at the end of a step in which a sequence with a prompt of 13 tokens takes part."""

    def step(self) -> list[Token]:
        unlucky = any(sequence and len(sequence.prompt) == 13 for sequence in self.slots)
        tokens = super().step()
        if unlucky:
            raise RuntimeError("unlucky")
        return tokens


def sequence(length: int = 5, tokens: int = 10) -> Sequence:
    return Sequence(list(range(3, 3 + length)), Sampling(), tokens)


async def collect(thread: EngineThread, sequence: Sequence) -> list[int]:
    return [token.id async for token in thread.tokens(sequence)]


async def test_tokens_come_as_the_engine_makes_them(llama: PreTrainedModel) -> None:
    expected, engine = sequence(), Engine(llama, 2, 64)
    engine.add(expected)
    reply = [token.id for _ in range(10) for token in engine.step()]
    thread = EngineThread(Engine(llama, 2, 64))
    assert await asyncio.gather(collect(thread, sequence()), collect(thread, sequence())) == [reply, reply]
    await thread.stop()


async def test_leaving_early_frees_the_slot_before_the_next_sequence_is_added(llama: PreTrainedModel) -> None:
    thread = EngineThread(Engine(llama, 1, 64))
    async with aclosing(thread.tokens(sequence(tokens=50))) as tokens:
        await anext(tokens)
    assert len(await collect(thread, sequence(tokens=4))) == 4  # asserts a free slot in the engine
    await thread.stop()
    assert thread.engine.idle


async def test_a_failed_step_fails_the_sequences_of_that_step_and_no_later_ones(llama: PreTrainedModel) -> None:
    thread = EngineThread(BreakableEngine(llama, 2, 64))
    with pytest.raises(EngineFailed):
        await collect(thread, sequence(length=13))
    assert thread.alive
    assert len(await collect(thread, sequence())) == 10
    await thread.stop()


async def test_a_sequence_that_would_have_ended_in_a_failed_step_fails_too(llama: PreTrainedModel) -> None:
    thread = EngineThread(BreakableEngine(llama, 2, 64))
    with pytest.raises(EngineFailed):
        await collect(thread, sequence(length=13, tokens=1))
    await thread.stop()


@pytest.mark.parametrize("prompt", [[], [10**6], list(range(3, 103))])
async def test_a_sequence_that_the_engine_cannot_take_fails_alone(llama: PreTrainedModel, prompt: list[int]) -> None:
    thread = EngineThread(Engine(llama, 2, 64))
    with pytest.raises(EngineFailed):
        await collect(thread, Sequence(prompt, Sampling(), 5))
    assert len(await collect(thread, sequence())) == 10
    await thread.stop()


async def test_stopping_fails_what_still_runs_and_leaves_no_thread(llama: PreTrainedModel) -> None:
    thread = EngineThread(Engine(llama, 2, 64))
    tokens = thread.tokens(sequence(tokens=50))
    await anext(tokens)
    await thread.stop()
    with pytest.raises(EngineFailed):
        async for _ in tokens:
            pass
    assert not thread.alive
    assert "engine" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(EngineFailed):
        await collect(thread, sequence())
