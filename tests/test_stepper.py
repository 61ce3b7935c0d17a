from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.engine import Engine
from models.sampling import Sampler, Sampling
from models.sequence import Sequence
from models.stepper import Stepper, in_one_line
from tests.faulty import Broken, Fault, FaultyEngine
from tests.test_engine import both_attentions, prompts

Replies = dict[Sequence, list[int | None]]

SEEDED = Sampling(temperature=1.0, top_p=0.95, top_k=50, repetition_penalty=1.1)
UNLUCKY = Sampling(top_k=13)


def some(count: int = 8) -> list[Sequence]:
    """Sequences with prompts that a step may read in parts, every other one's reply drawn by chance."""
    asked = prompts(20, 5, 33, 17, 40, 8, 29, 50)[:count]
    return [Sequence(prompt, SEEDED if seed % 2 else Sampling(), 20, seed=seed) for seed, prompt in enumerate(asked)]


def replies(stepper: Stepper, sequences: Iterable[Sequence], together: bool = False) -> Replies:
    """All tokens of some sequences, which join one a step or together; None is where one fails."""
    waiting = list(sequences)
    told: Replies = {sequence: [] for sequence in waiting}
    while waiting or not stepper.engine.idle:
        while waiting:
            stepper.engine.add(waiting.pop(0))
            if not together:
                break
        for sequence, token in stepper.step():
            told[sequence].append(token.id if token else None)
    return told


def expected(model: PreTrainedModel, sequences: list[Sequence], native: bool = True) -> list[list[int | None]]:
    """What sequences such as these come to where nothing fails, in an engine that takes the model from any other."""
    again = [Sequence(each.prompt, each.sampling, each.max_tokens, seed=each.seed) for each in sequences]
    engine = Engine(model, slots=len(again), context=128, prefill_chunk=16, native=native)
    return list(replies(Stepper(engine), again).values())


class Passing:
    """A fault of some of the forwards, by their number."""

    def __init__(self, failing: Collection[int], fewest: int = 1, error: type[Exception] = RuntimeError) -> None:
        self.failing = failing
        self.fewest = fewest  # sequences in a forward that counts
        self.error = error
        self.number = 0

    def __call__(self, sequences: list[Sequence]) -> Exception | None:
        self.number += len(sequences) >= self.fewest
        fails = len(sequences) >= self.fewest and self.number in self.failing
        return self.error("it passes") if fails else None


def more_than(most: int, error: Exception) -> Fault:
    """A fault of all forwards of more sequences than some."""
    return lambda sequences: error if len(sequences) > most else None


class PickySampler(Sampler):
    """Fails where it is to sample for one of the unlucky."""

    def sample(self, logits: Tensor, slots: list[int], uniforms: list[float]) -> list[int]:
        if any(self.parameters[slot] == UNLUCKY for slot in slots):
            raise ValueError("unlucky")
        return super().sample(logits, slots, uniforms)


class PickyEngine(Engine):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, slots=8, context=128, prefill_chunk=16)
        self.sampler: Sampler = PickySampler(8, self.sampler.seen.shape[1], self.device)


@both_attentions
@pytest.mark.parametrize("cached", [0, 16, 45], ids=["first chunk", "second chunk", "decoding"])
def test_a_sequence_that_a_step_fails_for_ends_and_seven_others_never_know(
    llama: PreTrainedModel, cached: int, native: bool
) -> None:
    sequences = some()
    poison = sequences[4]  # of 40 tokens

    def fault(running: list[Sequence]) -> Exception | None:
        assert running, "a probe, while others get on"
        return RuntimeError("poison") if poison in running and poison.cached >= cached else None

    told = replies(Stepper(FaultyEngine(llama, fault, native=native)), sequences)
    before = expected(llama, sequences, native)
    until = max(0, cached - 39)  # tokens it has when it fails
    assert told.pop(poison) == [*before.pop(4)[:until], None]
    assert list(told.values()) == before


def test_a_sequence_that_cannot_be_sampled_for_ends_and_seven_others_never_know(llama: PreTrainedModel) -> None:
    sequences = some()
    unlucky = sequences[4] = Sequence(sequences[4].prompt, UNLUCKY, 20)
    told = replies(Stepper(PickyEngine(llama)), sequences)
    before = expected(llama, sequences)
    assert told.pop(unlucky) == [None]
    del before[4]
    assert list(told.values()) == before


def test_nobody_ends_for_faults_that_pass(llama: PreTrainedModel) -> None:
    fault = Passing([3, 4, 7, 8, 12, 15, 16], fewest=2)  # never three in a row
    sequences = some()
    assert list(replies(Stepper(FaultyEngine(llama, fault)), sequences).values()) == expected(llama, sequences)
    assert fault.number > 16


def test_nobody_ends_when_a_fault_hits_a_few_of_the_steps_alone_as_well(llama: PreTrainedModel) -> None:
    sequences = some(1)
    fault = Passing([2, 7, 11])
    assert list(replies(Stepper(FaultyEngine(llama, fault)), sequences).values()) == expected(llama, sequences)
    assert fault.number == 20 + 3


def test_a_fault_that_stays_and_hits_nobody_alone_ends_all_in_its_third_step(llama: PreTrainedModel) -> None:
    stepper = Stepper(FaultyEngine(llama, more_than(1, RuntimeError("together"))))
    for _ in range(2):  # the next ones have three steps too
        told = replies(stepper, some(2), together=True)
        assert [len(reply) for reply in told.values()] == [4, 4]
        assert [reply.index(None) for reply in told.values()] == [3, 3]
    alone = some(1)
    assert list(replies(stepper, alone).values()) == expected(llama, alone)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["accelerator", "python", "cpu", "kernels", "driver", "cublas"],
)
def test_out_of_memory_halves_the_slots_and_the_oldest_go_on(
    llama: PreTrainedModel, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    before, shrunk = expected(llama, some()), list[int]()
    stepper = Stepper(FaultyEngine(llama, more_than(4, error)), shrunk.append)
    replies(stepper, some(3))  # the next ones get slots in another order than that of their age
    told = list(replies(stepper, some(), together=True).values())
    assert told[:4] == before[:4]
    assert told[4:] == [[first, None] for first, *_ in before[4:]]
    assert shrunk == [4]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "from 8 slots to 4" in warning
    assert "PARLEY_SLOTS" in warning
    assert list(replies(stepper, some(), together=True).values()) == before  # four wait, as those already let in
    assert shrunk == [4]


def test_the_memory_of_a_real_allocator_runs_out_as_the_engine_expects(llama: PreTrainedModel) -> None:
    def fault(sequences: list[Sequence]) -> None:
        if len(sequences) > 1:
            torch.empty(1 << 50)

    shrunk: list[int] = []
    sequences = some(2)
    told = list(replies(Stepper(FaultyEngine(llama, fault, slots=2), shrunk.append), sequences, together=True).values())
    assert shrunk == [1]
    assert told[0] == expected(llama, sequences)[0]
    assert told[1][-1] is None


def test_slots_shrink_until_what_is_left_has_memory(llama: PreTrainedModel) -> None:
    shrunk: list[int] = []
    stepper = Stepper(FaultyEngine(llama, more_than(1, MemoryError())), shrunk.append)
    sequences = some()
    told = replies(stepper, sequences, together=True)
    assert shrunk == [4, 2, 1]
    assert [None in reply for reply in told.values()] == [False] + 7 * [True]
    assert told[sequences[0]] == expected(llama, sequences)[0]


def test_a_sequence_that_has_no_memory_alone_ends_and_takes_no_slot_with_it(llama: PreTrainedModel) -> None:
    shrunk: list[int] = []
    sequences = some()
    poison = sequences[4]
    engine = FaultyEngine(llama, lambda running: MemoryError() if poison in running else None)
    told = replies(Stepper(engine, shrunk.append), sequences)
    assert [None in reply for reply in told.values()] == 4 * [False] + [True] + 3 * [False]
    assert not shrunk


def test_the_last_slot_ends_its_sequence_where_memory_lacks_again_and_again(llama: PreTrainedModel) -> None:
    shrunk: list[int] = []
    fault = Passing(range(1, 100, 2), error=MemoryError)  # every first try
    (sequence,) = some(1)
    told = replies(Stepper(FaultyEngine(llama, fault, slots=1), shrunk.append), [sequence])
    assert told[sequence] == [*expected(llama, [sequence])[0][:3], None]
    assert not shrunk


def test_what_a_failed_step_held_is_let_go_of_before_its_sequences_step_alone(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1, "parley")  # pytest keeps what is logged
    held: list[weakref.ref[Tensor]] = []

    def fault(sequences: list[Sequence]) -> Exception | None:
        if len(sequences) > 1:
            activations = torch.zeros(9)
            held.append(weakref.ref(activations))
            raise MemoryError
        assert held[-1]() is None
        return None

    told = replies(Stepper(FaultyEngine(llama, fault)), some(2), together=True)
    assert [len(reply) for reply in told.values()] == [20, 4]
    assert len(held) == 3


def test_a_poisonous_sequence_alone_ends_and_the_next_is_answered(llama: PreTrainedModel) -> None:
    poison, healthy = some(2)
    stepper = Stepper(FaultyEngine(llama, lambda running: RuntimeError() if poison in running else None))
    assert replies(stepper, [poison])[poison] == [None]
    assert list(replies(stepper, [healthy]).values()) == expected(llama, [healthy])


def test_an_engine_that_is_broken_raises_once_nobody_gets_on_alone(llama: PreTrainedModel) -> None:
    sequences = some()
    with pytest.raises(RuntimeError, match="device-side assert"):
        replies(Stepper(FaultyEngine(llama, Broken(sequences[4]))), sequences)


def test_a_failure_is_logged_once_with_its_traceback_and_once_for_who_fails_alone(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    sequences = some(3)
    poison = sequences[1]
    fault: Fault = lambda running: RuntimeError("two\nlines") if poison in running else None  # noqa: E731
    replies(Stepper(FaultyEngine(llama, fault)), sequences, together=True)
    step, alone = caplog.records
    assert (step.name, alone.name) == ("parley", "parley")
    assert step.exc_info
    assert not alone.exc_info
    assert alone.getMessage().endswith("RuntimeError: two lines")


def test_the_seconds_of_each_step_that_went_well_are_told(llama: PreTrainedModel) -> None:
    seconds: list[float] = []
    stepper = Stepper(FaultyEngine(llama, Passing([5])), observe_step=seconds.append)
    replies(stepper, some(1))
    assert len(seconds) == 19
    assert min(seconds) > 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("CUDA error:\n  an assert\n"), "RuntimeError: CUDA error: an assert"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 238),
    ],
)
def test_an_error_comes_in_one_line(error: Exception, line: str) -> None:
    assert in_one_line(error) == line
