from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import aclosing
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from models.engine.async_engine import AsyncEngine
from models.engine.engine import Engine
from models.engine.model_runner import ModelRunner
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence
from models.engine.subprocesses import Subprocesses
from models.errors import CompilationError, EngineError
from tests.support.faulty import Broken, FaultyRunner, faulty_engine, make_engine

pytestmark = pytest.mark.anyio


def new_sequence(length: int = 5, tokens: int = 10) -> Sequence:
    return Sequence(list(range(3, 3 + length)), SamplingParams(), tokens)


async def generate(engine: AsyncEngine, sequence: Sequence) -> list[int]:
    """The whole reply."""
    return [token.id async for tokens in engine.generate(sequence) for token in tokens]


async def test_concurrent_replies_equal_that_of_the_engine_alone(llama: PreTrainedModel) -> None:
    sequence, engine = new_sequence(), make_engine(llama, 2, 64)
    engine.add(sequence)
    reply = [token.id for _ in range(10) for token in engine.step()]
    async_engine = AsyncEngine(make_engine(llama, 2, 64))
    first, second = await asyncio.gather(*(generate(async_engine, new_sequence()) for _ in range(2)))
    assert first == second == reply
    await async_engine.stop()


async def test_tokens_that_come_while_the_event_loop_is_busy_are_yielded_together(llama: PreTrainedModel) -> None:
    sequence, steps = new_sequence(), threading.Semaphore(0)
    async_engine = AsyncEngine(make_engine(llama, 1, 64), on_step=lambda seconds: steps.release())
    async with aclosing(async_engine.generate(sequence)) as stream:
        first = await anext(stream)
        assert [steps.acquire(timeout=60) for _ in range(10)] == 10 * [True]  # the event loop waits here
        assert await generate(async_engine, new_sequence(tokens=2))  # its calls come after those of all ten steps
        rest = [tokens async for tokens in stream]
    assert len(first) == 1
    assert [len(tokens) for tokens in rest] == [9]
    assert [token.id for token in first + rest[0]] == sequence.tokens[len(sequence.prompt) :]
    await async_engine.stop()


async def test_a_closed_stream_frees_its_slot_for_the_next_sequence(llama: PreTrainedModel) -> None:
    async_engine = AsyncEngine(make_engine(llama, 1, 64))
    async with aclosing(async_engine.generate(new_sequence(tokens=50))) as tokens:
        await anext(tokens)
    assert len(await generate(async_engine, new_sequence(tokens=4))) == 4  # the engine asserts that a slot is free
    await async_engine.stop()
    assert async_engine.engine.idle


async def test_a_sequence_that_fails_its_steps_ends_and_the_others_go_on(llama: PreTrainedModel) -> None:
    poison = new_sequence(length=13)
    engine = faulty_engine(llama, lambda sequences: RuntimeError() if poison in sequences else None)
    async_engine = AsyncEngine(engine)
    expected = await generate(async_engine, new_sequence())
    others = [generate(async_engine, new_sequence()) for _ in range(7)]
    failure, *replies = await asyncio.gather(generate(async_engine, poison), *others, return_exceptions=True)
    assert isinstance(failure, EngineError)
    assert replies == 7 * [expected]
    assert async_engine.trouble is None
    await async_engine.stop()


async def test_the_event_loop_learns_the_new_slots_before_the_next_token(llama: PreTrainedModel) -> None:
    calls: list[tuple[int, threading.Thread]] = []
    errors = [MemoryError()]  # for one forward
    engine = faulty_engine(llama, lambda sequences: errors.pop() if errors else None)
    async_engine = AsyncEngine(engine, on_shrink=lambda slots: calls.append((slots, threading.current_thread())))
    async with aclosing(async_engine.generate(new_sequence())) as tokens:
        await anext(tokens)
        assert calls == [(4, threading.current_thread())]
    await async_engine.stop()


async def test_a_broken_engine_ends_all_replies_and_says_why(llama: PreTrainedModel) -> None:
    poison = new_sequence(length=13)
    async_engine = AsyncEngine(faulty_engine(llama, Broken(poison)))
    replies = (generate(async_engine, sequence) for sequence in (poison, new_sequence(tokens=50)))
    ends = await asyncio.gather(*replies, return_exceptions=True)
    assert [type(end) for end in ends] == [EngineError, EngineError]
    await async_engine.died.wait()
    reason = "the engine stopped: RuntimeError: CUDA error: device-side assert triggered Compile with..."
    assert async_engine.trouble == reason
    with pytest.raises(EngineError, match="device-side assert"):
        await generate(async_engine, new_sequence())
    await async_engine.stop()
    assert async_engine.trouble == reason


class BreaksWhenASequenceIsAdded(Engine):
    """Works until the first sequence is added; then nothing works any more."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.faulty = FaultyRunner(model, lambda sequences: None, slots=8, context=128, native=True)
        super().__init__(self.faulty)

    def add(self, sequence: Sequence) -> None:
        self.faulty.fault = lambda sequences: RuntimeError("broken")
        raise RuntimeError("cannot add")


async def test_an_engine_that_breaks_when_a_sequence_is_added_stops(llama: PreTrainedModel) -> None:
    async_engine = AsyncEngine(BreaksWhenASequenceIsAdded(llama))
    with pytest.raises(EngineError):
        await generate(async_engine, new_sequence())
    await async_engine.died.wait()
    assert async_engine.trouble == "the engine stopped: RuntimeError: broken"
    await async_engine.stop()


async def test_any_exception_in_the_thread_ends_all_replies(llama: PreTrainedModel) -> None:
    def on_step(seconds: float) -> None:
        raise SystemExit("x" * 1000 + "\n")

    async_engine = AsyncEngine(make_engine(llama, 2, 64), on_step=on_step)
    with pytest.raises(EngineError):
        await generate(async_engine, new_sequence())
    await async_engine.died.wait()
    assert async_engine.trouble
    assert async_engine.trouble.startswith("the engine stopped: SystemExit: xxx")
    assert len(async_engine.trouble) <= 300
    await async_engine.stop()


async def test_on_step_gets_the_seconds_of_each_step(llama: PreTrainedModel) -> None:
    seconds: list[float] = []
    async_engine = AsyncEngine(make_engine(llama, 2, 64), on_step=seconds.append)
    await generate(async_engine, new_sequence())
    await async_engine.stop()
    assert len(seconds) == 10


@pytest.mark.parametrize(
    "prompt", [[], [10**6], list(range(3, 103))], ids=["empty", "unknown token", "longer than the context"]
)
async def test_an_invalid_prompt_fails_alone(llama: PreTrainedModel, prompt: list[int]) -> None:
    async_engine = AsyncEngine(make_engine(llama, 2, 64))
    with pytest.raises(EngineError):
        await generate(async_engine, Sequence(prompt, SamplingParams(), 5))
    assert len(await generate(async_engine, new_sequence())) == 10
    await async_engine.stop()


async def test_stop_fails_running_replies_and_ends_the_thread(llama: PreTrainedModel) -> None:
    async_engine = AsyncEngine(make_engine(llama, 2, 64))
    tokens = async_engine.generate(new_sequence(tokens=50))
    await anext(tokens)
    await async_engine.stop()
    with pytest.raises(EngineError):
        async for _ in tokens:
            pass
    assert async_engine.trouble == "the engine was stopped"
    assert not async_engine.died.is_set()
    assert "engine" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(EngineError):
        await generate(async_engine, new_sequence())


class LogLines(logging.Handler):
    """Hands the lines of a log to the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: asyncio.Queue[str] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        self.loop.call_soon_threadsafe(self.lines.put_nowait, f"{record.levelname} {record.getMessage()}")


class UncompilableRunner(ModelRunner):
    def compile(self, cache: Path, subprocesses: Subprocesses | None = None) -> None:
        raise CompilationError("two\nlines")


async def test_a_failed_compilation_is_logged_and_changes_no_reply(llama: PreTrainedModel, tmp_path: Path) -> None:
    async_engine = AsyncEngine(Engine(UncompilableRunner(llama, slots=2, context=64)))
    expected = await generate(async_engine, new_sequence())
    log, logger = LogLines(), logging.getLogger("parley")
    logger.addHandler(log)
    try:
        async_engine.compile(tmp_path)
        line = await log.lines.get()
    finally:
        logger.removeHandler(log)
    assert line == "WARNING the model is not compiled and stays a little slower: two lines"
    assert await generate(async_engine, new_sequence()) == expected
    await async_engine.stop()


class SlowlyCompiledRunner(ModelRunner):
    """Loads a program, once `compiling` is set, until `loaded` is set."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, slots=2, context=64)
        self.compiling, self.loaded, self.ended = threading.Event(), threading.Event(), threading.Event()

    def compile(self, cache: Path, subprocesses: Subprocesses | None = None) -> None:
        self.compiling.set()
        self.loaded.wait()
        self.ended.set()
        raise CompilationError("the server stops")


async def test_a_stop_waits_for_a_program_that_is_being_loaded(
    llama: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = SlowlyCompiledRunner(llama)
    async_engine = AsyncEngine(Engine(runner))
    async_engine.compile(tmp_path)
    await asyncio.to_thread(runner.compiling.wait)
    stopping = asyncio.create_task(async_engine.stop())
    await asyncio.to_thread(async_engine._thread.join)  # from here on, only the compilation is waited for
    assert not stopping.done()
    runner.loaded.set()
    await stopping
    assert runner.ended.is_set()
    assert "not compiled" not in caplog.text
