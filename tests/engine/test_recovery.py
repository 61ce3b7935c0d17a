from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.engine.recovery import StepRecovery
from models.engine.sampler import Sampler
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence
from models.engine.token_masks import TokenMasks
from tests.support.faulty import Broken, Fault, both_attentions, faulty_engine, make_engine
from tests.support.tiny import prompts

Replies = dict[Sequence, list[int | None]]

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, repetition_penalty=1.1)
UNLUCKY = SamplingParams(top_k=13)


def new_sequences(count: int = 8) -> list[Sequence]:
    """Sequences with prompts of one or several chunks; every other one samples its tokens."""
    some_prompts = prompts(20, 5, 33, 17, 40, 8, 29, 50)[:count]
    return [
        Sequence(prompt, SAMPLED if seed % 2 else GREEDY, 20, seed=seed) for seed, prompt in enumerate(some_prompts)
    ]


def generate(recovery: StepRecovery, sequences: Iterable[Sequence], together: bool = False) -> Replies:
    """All tokens, with None where a sequence fails. One sequence is added in each step, or all before the first."""
    waiting = list(sequences)
    replies: Replies = {sequence: [] for sequence in waiting}
    while waiting or not recovery.engine.idle:
        while waiting:
            recovery.engine.add(waiting.pop(0))
            if not together:
                break
        for sequence, token in recovery.step():
            replies[sequence].append(token.id if token else None)
    return replies


def replies_without_faults(
    model: PreTrainedModel, sequences: list[Sequence], native: bool = True
) -> list[list[int | None]]:
    """The replies of an engine that works. An engine that used the model before cannot be used any more."""
    copies = [Sequence(each.prompt, each.params, each.max_tokens, seed=each.seed) for each in sequences]
    engine = make_engine(model, slots=len(copies), context=128, prefill_chunk=16, native=native)
    return list(generate(StepRecovery(engine), copies).values())


class FaultInForwards:
    """A fault in some of the forwards, by their number. Only forwards of at least `fewest` sequences count."""

    def __init__(self, failing: Collection[int], fewest: int = 1, error: type[Exception] = RuntimeError) -> None:
        self.failing = failing
        self.fewest = fewest
        self.error = error
        self.number = 0

    def __call__(self, sequences: list[Sequence]) -> Exception | None:
        if len(sequences) < self.fewest:
            return None
        self.number += 1
        return self.error("temporary") if self.number in self.failing else None


def fault_above(most: int, error: Exception) -> Fault:
    """A fault in each forward of more than `most` sequences."""
    return lambda sequences: error if len(sequences) > most else None


def fault_with(poison: Sequence, error: Exception) -> Fault:
    """A fault in each forward of a sequence."""
    return lambda sequences: error if poison in sequences else None


class FaultySampler(Sampler):
    """Fails for each sequence with the parameters UNLUCKY."""

    def sample(
        self,
        logits: Tensor,
        slots: list[int],
        where: Tensor,
        uniforms: list[float],
        masks: TokenMasks | None = None,
    ) -> Tensor:
        if any(self.params[slot] == UNLUCKY for slot in slots):
            raise ValueError("unlucky")
        return super().sample(logits, slots, where, uniforms, masks)


@both_attentions
@pytest.mark.parametrize("cached", [0, 16, 45], ids=["first chunk", "second chunk", "decoding"])
def test_a_failing_sequence_ends_and_the_others_do_not_change(
    llama: PreTrainedModel, cached: int, native: bool
) -> None:
    sequences = new_sequences()
    poison = sequences[4]  # with a prompt of 40 tokens

    def fault(running: list[Sequence]) -> Exception | None:
        assert running, "no probe is needed while other sequences go on"
        return RuntimeError("poison") if poison in running and poison.cached >= cached else None

    replies = generate(StepRecovery(faulty_engine(llama, fault, native=native)), sequences)
    expected = replies_without_faults(llama, sequences, native)
    generated = max(0, cached - 39)  # before it fails
    assert replies.pop(poison) == [*expected.pop(4)[:generated], None]
    assert list(replies.values()) == expected


def test_a_sequence_that_cannot_be_sampled_ends_alone(llama: PreTrainedModel) -> None:
    sequences = new_sequences()
    unlucky = sequences[4] = Sequence(sequences[4].prompt, UNLUCKY, 20)
    engine = make_engine(llama, slots=8, context=128, prefill_chunk=16)
    engine.sampler = FaultySampler(8, engine.runner.logits_size, engine.runner.device)
    replies = generate(StepRecovery(engine), sequences)
    expected = replies_without_faults(llama, sequences)
    assert replies.pop(unlucky) == [None]
    del expected[4]
    assert list(replies.values()) == expected


def test_temporary_faults_of_batches_end_no_sequence(llama: PreTrainedModel) -> None:
    fault = FaultInForwards([3, 4, 7, 8, 12, 15, 16], fewest=2)  # never three in a row
    sequences = new_sequences()
    replies = generate(StepRecovery(faulty_engine(llama, fault)), sequences)
    assert list(replies.values()) == replies_without_faults(llama, sequences)
    assert fault.number > 16


def test_temporary_faults_of_a_single_sequence_do_not_end_it(llama: PreTrainedModel) -> None:
    sequences = new_sequences(1)
    fault = FaultInForwards([2, 7, 11])
    replies = generate(StepRecovery(faulty_engine(llama, fault)), sequences)
    assert list(replies.values()) == replies_without_faults(llama, sequences)
    assert fault.number == 20 + 3


def test_a_fault_of_all_batches_ends_all_sequences_in_the_third_step(llama: PreTrainedModel) -> None:
    recovery = StepRecovery(faulty_engine(llama, fault_above(1, RuntimeError("together"))))
    for _ in range(2):  # the second time, three steps fail again before the sequences end
        replies = generate(recovery, new_sequences(2), together=True)
        assert [len(reply) for reply in replies.values()] == [4, 4]
        assert [reply.index(None) for reply in replies.values()] == [3, 3]
    alone = new_sequences(1)
    assert list(generate(recovery, alone).values()) == replies_without_faults(llama, alone)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), id="accelerator"),
        pytest.param(MemoryError(), id="python"),
        pytest.param(
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
            ),
            id="cpu",
        ),
        pytest.param(RuntimeError("std::bad_alloc"), id="kernels"),
        pytest.param(RuntimeError("CUDA error: out of memory"), id="driver"),
        pytest.param(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), id="cublas"
        ),
    ],
)
def test_out_of_memory_halves_the_slots_and_the_oldest_sequences_go_on(
    llama: PreTrainedModel, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    expected, shrunk = replies_without_faults(llama, new_sequences()), list[int]()
    recovery = StepRecovery(faulty_engine(llama, fault_above(4, error)), shrunk.append)
    generate(recovery, new_sequences(3))  # so that the next sequences get slots in another order than that of their age
    replies = list(generate(recovery, new_sequences(), together=True).values())
    assert replies[:4] == expected[:4]
    assert replies[4:] == [[first, None] for first, *_ in expected[4:]]
    assert shrunk == [4]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "from 8 slots to 4" in warning
    assert "PARLEY_SLOTS" in warning
    # Sequences that were admitted before the slots were halved wait for their turn.
    assert list(generate(recovery, new_sequences(), together=True).values()) == expected
    assert shrunk == [4]


def test_the_error_of_a_real_allocator_is_known_as_out_of_memory(llama: PreTrainedModel) -> None:
    def fault(sequences: list[Sequence]) -> None:
        if len(sequences) > 1:
            torch.empty(1 << 50)

    shrunk: list[int] = []
    sequences = new_sequences(2)
    recovery = StepRecovery(faulty_engine(llama, fault, slots=2), shrunk.append)
    first, second = generate(recovery, sequences, together=True).values()
    assert shrunk == [1]
    assert first == replies_without_faults(llama, sequences)[0]
    assert second[-1] is None


def test_the_slots_shrink_until_the_memory_is_enough(llama: PreTrainedModel) -> None:
    shrunk: list[int] = []
    sequences = new_sequences()
    recovery = StepRecovery(faulty_engine(llama, fault_above(1, MemoryError())), shrunk.append)
    replies = generate(recovery, sequences, together=True)
    assert shrunk == [4, 2, 1]
    assert [None in reply for reply in replies.values()] == [False] + 7 * [True]
    assert replies[sequences[0]] == replies_without_faults(llama, sequences)[0]


def test_a_sequence_without_memory_even_alone_ends_and_no_slot_goes(llama: PreTrainedModel) -> None:
    shrunk: list[int] = []
    sequences = new_sequences()
    recovery = StepRecovery(faulty_engine(llama, fault_with(sequences[4], MemoryError())), shrunk.append)
    replies = generate(recovery, sequences)
    assert [None in reply for reply in replies.values()] == 4 * [False] + [True] + 3 * [False]
    assert not shrunk


def test_the_last_slot_stays_and_its_sequence_ends_after_three_steps(llama: PreTrainedModel) -> None:
    shrunk: list[int] = []
    fault = FaultInForwards(range(1, 100, 2), error=MemoryError)  # each first try fails, each second one works
    (sequence,) = new_sequences(1)
    recovery = StepRecovery(faulty_engine(llama, fault, slots=1), shrunk.append)
    replies = generate(recovery, [sequence])
    assert replies[sequence] == [*replies_without_faults(llama, [sequence])[0][:3], None]
    assert not shrunk


def test_a_failed_step_frees_its_memory_before_sequences_run_alone(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1, "parley")  # else pytest keeps the traceback, and the memory with it
    held: list[weakref.ref[Tensor]] = []

    def fault(sequences: list[Sequence]) -> Exception | None:
        if len(sequences) > 1:
            activations = torch.zeros(9)
            held.append(weakref.ref(activations))
            raise MemoryError
        assert held[-1]() is None
        return None

    replies = generate(StepRecovery(faulty_engine(llama, fault)), new_sequences(2), together=True)
    assert [len(reply) for reply in replies.values()] == [20, 4]
    assert len(held) == 3


def test_after_a_failing_sequence_the_engine_answers_the_next_one(llama: PreTrainedModel) -> None:
    poison, healthy = new_sequences(2)
    recovery = StepRecovery(faulty_engine(llama, fault_with(poison, RuntimeError())))
    assert generate(recovery, [poison])[poison] == [None]
    assert list(generate(recovery, [healthy]).values()) == replies_without_faults(llama, [healthy])


def test_a_broken_engine_raises_once_every_sequence_fails_alone(llama: PreTrainedModel) -> None:
    sequences = new_sequences()
    with pytest.raises(RuntimeError, match="device-side assert"):
        generate(StepRecovery(faulty_engine(llama, Broken(sequences[4]))), sequences)


def test_a_failed_step_is_logged_with_its_traceback_and_the_sequence_in_a_line(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    sequences = new_sequences(3)
    recovery = StepRecovery(faulty_engine(llama, fault_with(sequences[1], RuntimeError("two\nlines"))))
    generate(recovery, sequences, together=True)
    step, alone = caplog.records
    assert (step.name, alone.name) == ("parley", "parley")
    assert step.exc_info
    assert not alone.exc_info
    assert alone.getMessage().endswith("RuntimeError: two lines")


def test_on_step_gets_the_seconds_of_steps_that_did_not_fail(llama: PreTrainedModel) -> None:
    seconds: list[float] = []
    generate(StepRecovery(faulty_engine(llama, FaultInForwards([5])), on_step=seconds.append), new_sequences(1))
    assert len(seconds) == 19
    assert min(seconds) > 0
