from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest
from transformers import PreTrainedModel

from models.engine import Engine
from models.engine_thread import EngineFailed, EngineThread
from models.sampling import Sampling
from models.sequence import Sequence
from tests.faulty import Broken, FaultyEngine

pytestmark = pytest.mark.anyio


class UnopenedEngine(FaultyEngine):
    """Works until a sequence is to join it."""

    def add(self, sequence: Sequence) -> None:
        self.fault = lambda sequences: RuntimeError("broken")
        raise RuntimeError("as it turns out")


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


async def test_a_poisonous_sequence_fails_alone_and_the_engine_goes_on(llama: PreTrainedModel) -> None:
    poison = sequence(length=13)
    thread = EngineThread(FaultyEngine(llama, lambda running: RuntimeError() if poison in running else None))
    expected = await collect(thread, sequence())
    others = [collect(thread, sequence()) for _ in range(7)]
    failure, *replies = await asyncio.gather(collect(thread, poison), *others, return_exceptions=True)
    assert isinstance(failure, EngineFailed)
    assert replies == 7 * [expected]
    assert thread.trouble is None
    await thread.stop()


async def test_the_event_loop_is_told_of_fewer_slots_before_a_reply_ends(llama: PreTrainedModel) -> None:
    told: list[tuple[int, threading.Thread]] = []
    errors = [MemoryError()]  # one, which passes
    engine = FaultyEngine(llama, lambda running: errors.pop() if errors else None)
    thread = EngineThread(engine, on_shrink=lambda slots: told.append((slots, threading.current_thread())))
    async with aclosing(thread.tokens(sequence())) as tokens:
        await anext(tokens)
        assert told == [(4, threading.current_thread())]
    await thread.stop()


async def test_a_broken_engine_ends_all_replies_and_says_why(llama: PreTrainedModel) -> None:
    poison = sequence(length=13)
    thread = EngineThread(FaultyEngine(llama, Broken(poison)))
    ends = await asyncio.gather(collect(thread, poison), collect(thread, sequence(tokens=50)), return_exceptions=True)
    assert [type(end) for end in ends] == [EngineFailed, EngineFailed]
    await thread.died.wait()
    assert thread.trouble
    assert thread.trouble.startswith("the engine stopped: RuntimeError: CUDA error: device-side assert triggered Comp")
    with pytest.raises(EngineFailed, match="device-side assert"):
        await collect(thread, sequence())
    await thread.stop()
    assert thread.trouble.startswith("the engine stopped: ")


async def test_an_engine_that_proves_to_be_broken_when_a_sequence_joins_has_died(llama: PreTrainedModel) -> None:
    thread = EngineThread(UnopenedEngine(llama, lambda running: None))
    with pytest.raises(EngineFailed):
        await collect(thread, sequence())
    await thread.died.wait()
    assert thread.trouble == "the engine stopped: RuntimeError: broken"
    await thread.stop()


async def test_whatever_ends_the_thread_ends_all_replies(llama: PreTrainedModel) -> None:
    def observe_step(seconds: float) -> None:
        raise SystemExit("x" * 1000 + "\n")

    thread = EngineThread(Engine(llama, 2, 64), observe_step=observe_step)
    with pytest.raises(EngineFailed):
        await collect(thread, sequence())
    await thread.died.wait()
    assert thread.trouble
    assert thread.trouble.startswith("the engine stopped: SystemExit: xxx")
    assert len(thread.trouble) <= 300
    await thread.stop()


async def test_the_seconds_of_steps_are_told(llama: PreTrainedModel) -> None:
    seconds: list[float] = []
    thread = EngineThread(Engine(llama, 2, 64), observe_step=seconds.append)
    await collect(thread, sequence())
    await thread.stop()
    assert len(seconds) == 10


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
    assert thread.trouble == "the engine was stopped"
    assert not thread.died.is_set()
    assert "engine" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(EngineFailed):
        await collect(thread, sequence())
