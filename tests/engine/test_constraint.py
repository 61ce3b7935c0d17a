from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from models.engine.engine import Engine
from models.engine.recovery import StepRecovery
from models.engine.sampler import Sampler
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence, Token
from models.engine.token_masks import TokenMasks
from tests.engine.test_engine import generate, reference
from tests.support.blocks import CountingGraphs, block_engine
from tests.support.constraints import Cycle
from tests.support.faulty import faulty_engine, make_engine
from tests.support.no_waiting import NoWaiting
from tests.support.tiny import SHAPE, prompts

GREEDY = SamplingParams()
SAMPLED = SamplingParams(1.0, 0.9, 40, 1.2, 0.3, 0.2)
THIRDS = [{token for token in range(3, SHAPE["vocab_size"]) if token % 3 == rest} for rest in range(3)]

Make = Callable[..., Engine]


def in_slots(model: PreTrainedModel, slots: int, context: int) -> Engine:
    return make_engine(model, slots, context, native=False)


both_runners = pytest.mark.parametrize("make", [in_slots, block_engine], ids=["slots", "blocks"])


def tokens_of(engine: Engine, sequences: list[Sequence]) -> dict[Sequence, list[Token]]:
    """All tokens of some sequences that begin together."""
    tokens: dict[Sequence, list[Token]] = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        for token in engine.step():
            tokens[token.sequence].append(token)
    return tokens


@both_runners
def test_constrained_sequences_have_allowed_tokens_and_free_ones_do_not_change(
    llama: PreTrainedModel, make: Make
) -> None:
    def asked() -> list[Sequence]:
        each = (GREEDY, SAMPLED, GREEDY, SAMPLED)
        pairs = zip(prompts(20, 30, 9, 41), each, strict=True)
        return [Sequence(prompt, params, 24, seed=5) for prompt, params in pairs]

    free = generate(make(llama, 4, 128), asked(), every=3)
    sequences, constraints = asked(), [Cycle(THIRDS), Cycle([{7}, {8, 9}])]
    for sequence, constraint in zip(sequences[1:3], constraints, strict=True):
        sequence.constraint = constraint
    replies = generate(make(llama, 4, 128), sequences, every=3)
    assert [replies[0], replies[3]] == [free[0], free[3]]
    assert [replies[1], replies[2]] == [constraint.accepted for constraint in constraints]
    assert [token % 3 for token in replies[1]] == [0, 1, 2] * 8
    assert replies[1] != free[1]
    assert set(replies[2][::2]) == {7}
    assert set(replies[2][1::2]) <= {8, 9}


@both_runners
def test_a_greedy_reply_whose_own_tokens_are_allowed_does_not_change(llama: PreTrainedModel, make: Make) -> None:
    (prompt,) = prompts(30)
    expected = reference(llama, prompt, 20)
    constraint = Cycle([{token, 4, 5} for token in expected])
    assert generate(make(llama, 2, 64), [Sequence(prompt, GREEDY, 20, constraint=constraint)]) == [expected]


@both_runners
def test_each_mask_is_made_after_the_token_before_it_was_accepted(llama: PreTrainedModel, make: Make) -> None:
    constraint = Cycle(THIRDS)
    sequences = [Sequence(prompts(20)[0], GREEDY, 30), Sequence(prompts(9)[0], GREEDY, 12, constraint=constraint)]
    generate(make(llama, 2, 64), sequences)
    assert constraint.filled == list(range(12))


@both_runners
@pytest.mark.parametrize(("most", "reason"), [(50, "stop"), (8, "stop"), (7, "max_output_tokens")])
def test_a_sequence_ends_with_its_constraint_and_by_its_limit_before(
    llama: PreTrainedModel, make: Make, most: int, reason: str
) -> None:
    engine = make(llama, 2, 64)
    sequence = Sequence(prompts(20)[0], GREEDY, most, frozenset([2]), constraint=Cycle(THIRDS, length=8))
    (tokens,) = tokens_of(engine, [sequence]).values()
    assert len(tokens) == min(most, 8)
    assert tokens[-1].finish_reason == reason
    assert not any(token.stops for token in tokens)
    assert engine.scheduler.free_slots == 2


@both_runners
def test_a_stop_token_that_is_allowed_ends_the_sequence_and_is_not_accepted(llama: PreTrainedModel, make: Make) -> None:
    constraint = Cycle([{7}, {8}, {2}])
    sequence = Sequence(prompts(20)[0], GREEDY, 50, frozenset([2]), constraint=constraint)
    (tokens,) = tokens_of(make(llama, 2, 64), [sequence]).values()
    assert [(token.id, token.stops) for token in tokens] == [(7, False), (8, False), (2, True)]
    assert tokens[-1].finish_reason == "stop"
    assert constraint.accepted == [7, 8]


@both_runners
@pytest.mark.parametrize("where", ["fills_fail", "accepts_fail"])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_a_constraint_that_fails_ends_its_own_sequence_only_and_says_why(
    llama: PreTrainedModel, make: Make, where: str, count: int
) -> None:
    if where == "accepts_fail" and not count:
        count = 2
    asked = prompts(20, 30, 9)
    expected = [reference(llama, prompt, 20) for prompt in asked]
    sequences = [Sequence(prompt, GREEDY, 20) for prompt in asked]
    sequences[1].constraint = Cycle(THIRDS, **{where: lambda tokens: tokens == count})  # type: ignore[arg-type]
    engine, replies = make(llama, 3, 64), {sequence: list[int | None]() for sequence in sequences}
    recovery = StepRecovery(engine)
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        for sequence, token in recovery.step():
            replies[sequence].append(token.id if token else None)
    first, failed, third = replies.values()
    assert (first, third) == (expected[0], expected[2])
    assert len(failed) == count + (where == "fills_fail")
    assert failed[-1] is None
    assert None not in failed[:-1]
    assert str(sequences[1].error) == "too complex"
    assert engine.scheduler.free_slots == 3


def test_a_slot_whose_constraint_failed_serves_the_next_sequence(llama: PreTrainedModel) -> None:
    prompt, other = prompts(20, 30)
    engine = block_engine(llama, 1, 64)
    engine.add(Sequence(prompt, GREEDY, 20, constraint=Cycle(THIRDS, fills_fail=lambda tokens: tokens == 3)))
    while not engine.idle:
        engine.step()
        engine.take_failed()
    assert generate(engine, [Sequence(other, GREEDY, 10)]) == [reference(llama, other, 10)]


class FailsAfterMasks(Sampler):
    """Fails each third time, after the masks were made and, in blocks, the tokens of the step before were read."""

    calls = 0

    def sample(
        self,
        logits: Tensor,
        slots: list[int],
        where: Tensor,
        uniforms: list[float],
        masks: TokenMasks | None = None,
    ) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 0:
            raise MemoryError
        return super().sample(logits, slots, where, uniforms, masks)


@both_runners
def test_a_step_that_fails_after_its_masks_loses_no_token_and_gives_the_same_ones_again(
    llama: PreTrainedModel, make: Make
) -> None:
    def replies(fails: bool) -> tuple[list[list[int]], list[int]]:
        engine, constraint = make(llama, 3, 96), Cycle(THIRDS)
        if fails:
            engine.sampler = FailsAfterMasks(3, engine.runner.logits_size, engine.runner.device)
        sequences = [Sequence(prompt, SAMPLED, 20, seed=5) for prompt in prompts(20, 30, 9)]
        sequences[1].constraint = constraint
        read: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        for sequence in sequences:
            engine.add(sequence)
        failures = 0
        while not engine.idle:
            try:
                for token in engine.step():
                    read[token.sequence].append(token.id)
            except MemoryError:
                failures += 1
        assert (failures > 5) == fails
        return list(read.values()), constraint.accepted

    expected, accepted = replies(fails=False)
    assert replies(fails=True) == (expected, accepted)
    assert accepted == expected[1]


def test_a_step_of_all_alone_after_a_fault_gives_the_same_constrained_tokens(llama: PreTrainedModel) -> None:
    def replies(faults: list[Exception | None]) -> list[list[int]]:
        engine = faulty_engine(llama, lambda sequences: faults.pop() if faults else None, native=False)
        sequences = [Sequence(prompt, SAMPLED, 12, seed=7) for prompt in prompts(40, 9, 21)]
        for sequence in sequences[1:]:
            sequence.constraint = Cycle(THIRDS)
        recovery, read = StepRecovery(engine), {sequence: list[int]() for sequence in sequences}
        for sequence in sequences:
            engine.add(sequence)
        while not engine.idle:
            for sequence, token in recovery.step():
                assert token
                read[sequence].append(token.id)
        return list(read.values())

    error: Exception | None = RuntimeError("temporary")
    faults = 3 * [None, None, None, None, error]  # the last one first: a step, each alone, and a step
    assert replies(faults) == replies([])
    assert not faults


def test_a_constrained_sequence_that_loses_its_blocks_goes_on_where_it_was(llama: PreTrainedModel) -> None:
    asked = prompts(40, 30, 20, 50, 10)

    def replies(blocks: int | None) -> list[list[int]]:
        engine = block_engine(llama, slots=5, context=96, prefill_chunk=16, blocks=blocks)
        sequences = [Sequence(prompt, GREEDY, 40, constraint=Cycle(THIRDS)) for prompt in asked]
        read = tokens_of(engine, sequences)
        return [[token.id for token in tokens] for tokens in read.values()]

    assert replies(blocks=9) == replies(blocks=None)


def test_in_blocks_only_the_tokens_before_are_waited_for_and_steps_without_constraints_run_ahead(
    llama: PreTrainedModel,
) -> None:
    free, bound = prompts(20, 30)
    engine = block_engine(llama, slots=2, context=128)
    first = Sequence(free, GREEDY, 40)
    second = Sequence(bound, GREEDY, 6, constraint=Cycle(THIRDS))
    engine.add(first)
    engine.add(second)
    ahead = []
    while not engine.idle:
        engine.step()
        ahead.append((second.slot >= 0, first.in_flight))
    assert {flight for _, flight in ahead[:-1]} == {1}, "a step is in flight after each call, with constraints too"
    assert ahead[-1] == (False, 0)


def test_the_host_never_waits_in_a_step_with_constraints_but_for_the_tokens_before(llama: PreTrainedModel) -> None:
    graphs = CountingGraphs()
    graphs.capture = lambda step: (lambda logits: lambda: logits)(step())  # type: ignore[method-assign]
    engine = block_engine(llama, slots=3, context=128, graphs=graphs)
    usual = replace(SAMPLED, top_p=1.0, top_k=0, min_p=0.05, logit_bias={9: 1.0}, logprobs=5)
    each = (GREEDY, usual, usual)
    pairs = zip(prompts(20, 30, 25), each, strict=True)
    sequences = [Sequence(prompt, params, 60) for prompt, params in pairs]
    sequences[2].constraint = constraint = Cycle(THIRDS)
    for sequence in sequences:
        engine.add(sequence)
    while sequences[2].generated < 5:
        engine.step()
    with NoWaiting():
        while sequences[2].generated < 30:
            engine.step()
    assert len(constraint.accepted) == 30


@both_runners
def test_each_token_comes_with_its_probabilities_if_its_sequence_asks(llama: PreTrainedModel, make: Make) -> None:
    prompt, other = prompts(20, 30)
    alone = [
        each.logprobs
        for each in tokens_of(make(llama, 2, 64), [Sequence(prompt, replace(GREEDY, logprobs=3), 9)]).popitem()[1]
    ]
    sequences = [Sequence(other, SAMPLED, 20, seed=1), Sequence(prompt, replace(GREEDY, logprobs=3), 9)]
    free, asked = tokens_of(make(llama, 2, 64), sequences).values()
    assert [token.logprobs for token in free] == [None] * 20
    for token, expected in zip(asked, alone, strict=True):
        assert token.logprobs
        assert expected
        assert token.logprobs.top[0] == (token.id, token.logprobs.chosen)
        assert token.logprobs.chosen == pytest.approx(expected.chosen, abs=1e-4)
        assert all(a[1] >= b[1] for a, b in pairwise(token.logprobs.top))
        assert len(token.logprobs.top) == 3


def test_the_probabilities_of_a_constrained_token_are_those_without_the_constraint(llama: PreTrainedModel) -> None:
    (prompt,) = prompts(20)
    params = SamplingParams(logprobs=1)
    (free,) = tokens_of(block_engine(llama, 1, 64), [Sequence(prompt, params, 1)]).popitem()[1]
    constraint = Cycle([{free.id ^ 1}])
    (bound,) = tokens_of(block_engine(llama, 1, 64), [Sequence(prompt, params, 1, constraint=constraint)]).popitem()[1]
    assert bound.logprobs
    assert free.logprobs
    assert bound.logprobs.top == free.logprobs.top
    assert bound.logprobs.chosen < free.logprobs.chosen
