from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.engine.architecture import check_architecture
from models.engine.block_cache import BlockCache
from models.engine.engine import Engine
from models.engine.fused_attention import FusedAttention
from models.engine.graphs import Graphs, Step
from models.engine.recovery import StepRecovery
from models.engine.sampler import Sampler
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence, Token
from models.engine.token_masks import TokenMasks
from models.errors import CacheTooLargeError
from tests.engine.test_engine import generate, generate_one, reference
from tests.support.blocks import BLOCK, CountingGraphs, PlainFused, block_engine, blocks_of
from tests.support.faulty import make_engine
from tests.support.no_waiting import NoWaiting
from tests.support.tiny import prompts, tiny_gemma2, tiny_gemma3, tiny_gpt_oss, tiny_llama, tiny_qwen3

GREEDY = SamplingParams()

Make = Callable[[], PreTrainedModel]

both_kinds = pytest.mark.parametrize("fused", [PlainFused(), FusedAttention(allowed=False)], ids=["fused", "gathered"])


@both_kinds
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gemma3, tiny_gemma2, tiny_gpt_oss])
def test_greedy_replies_equal_those_of_transformers(make: Make, fused: FusedAttention) -> None:
    model = make()
    asked = prompts(5, 40, 17, 33, 50, 8, 29, 21)
    expected = [reference(model, prompt, 24) for prompt in asked]
    engine = block_engine(model, slots=6, context=96, prefill_chunk=16, fused=fused)
    assert generate(engine, [Sequence(prompt, GREEDY, 24) for prompt in asked], every=3) == expected
    assert engine.idle


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_gemma2, tiny_gpt_oss])
def test_the_check_at_the_start_accepts_right_models(make: Make) -> None:
    check_architecture(make(), blocks=True)


def test_a_seeded_reply_is_the_same_as_in_slots(llama: PreTrainedModel) -> None:
    params = SamplingParams(0.9, 0.9, 40, 1.2, 0.3, 0.2)

    def replies(engine: Engine) -> list[list[int]]:
        return generate(engine, [Sequence(prompt, params, 20, seed=5) for prompt in prompts(30, 12, 45)], every=2)

    assert replies(block_engine(llama, 4, 128)) == replies(make_engine(llama, 4, 128, native=False))


def step_until(engine: Engine, sequence: Sequence, tokens: int) -> None:
    """Step until so many tokens of a sequence are known."""
    while sequence.generated < tokens:
        engine.step()


def test_the_next_step_is_launched_before_the_tokens_of_this_one_are_read(llama: PreTrainedModel) -> None:
    (prompt,) = prompts(20)
    engine, sequence = block_engine(llama, 2, 64), Sequence(prompt, GREEDY, 3)
    engine.add(sequence)
    known = [(sequence.length, [token.id for token in engine.step()]) for _ in range(4)]
    reply = reference(llama, prompt, 3)
    assert [ids for _, ids in known] == [[], reply[:1], reply[1:2], reply[2:]]
    assert engine.idle


def test_a_token_after_the_last_one_is_dropped(llama: PreTrainedModel) -> None:
    prompt, other = prompts(20, 30)
    reply = reference(llama, prompt, 8)
    stop = next(token for token in reply[2:] if token not in reply[:2])
    expected = reply[: reply.index(stop) + 1]
    engine = block_engine(llama, 2, 64)
    sequences = [Sequence(prompt, GREEDY, 20, frozenset([stop])), Sequence(other, GREEDY, 20)]
    assert generate(engine, sequences) == [expected, reference(llama, other, 20)]
    assert sequences[0].tokens == prompt + expected


def test_a_sequence_that_is_cancelled_while_a_token_is_in_flight_gets_none(llama: PreTrainedModel) -> None:
    first, second = (Sequence(prompt, GREEDY, 20) for prompt in prompts(20, 30))
    engine = block_engine(llama, 2, 64)
    engine.add(first)
    engine.add(second)
    step_until(engine, first, 3)
    engine.cancel(first)
    assert [token.sequence for token in engine.step()] == [second]
    assert first.generated == 3
    late = Sequence(prompts(25)[0], GREEDY, 10)
    engine.add(late)  # into the slot that the step in flight still writes
    replies: dict[Sequence, list[int]] = {second: [], late: []}
    while not engine.idle:
        for token in engine.step():
            replies[token.sequence].append(token.id)
    assert replies[late] == reference(llama, late.prompt, 10)
    assert second.tokens == second.prompt + reference(llama, second.prompt, 20)


def test_an_engine_whose_sequences_are_all_cancelled_reads_the_last_step_and_is_idle(llama: PreTrainedModel) -> None:
    engine, sequence = block_engine(llama, 2, 64), Sequence(prompts(20)[0], GREEDY, 20)
    engine.add(sequence)
    step_until(engine, sequence, 2)
    engine.cancel(sequence)
    assert not engine.idle
    assert engine.step() == []
    assert engine.idle


def test_a_reply_ends_at_its_limit_and_at_the_context(llama: PreTrainedModel) -> None:
    (prompt,) = prompts(40)
    expected = reference(llama, prompt, 24)
    for most, reason in ((7, "max_output_tokens"), (100, "context_length")):
        engine, sequence, tokens = block_engine(llama, 2, 64), Sequence(prompt, GREEDY, most), list[Token]()
        engine.add(sequence)
        while not engine.idle:
            tokens += engine.step()
        assert [token.id for token in tokens] == expected[: min(most, 24)]
        assert tokens[-1].finish_reason == reason


@both_kinds
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_cached_prefix_is_reused_and_changes_no_reply(
    llama: PreTrainedModel, dtype: torch.dtype | None, fused: FusedAttention
) -> None:
    (history,) = prompts(60)
    asked = [history + more for more in prompts(9, 12, 20)]

    def new_engine(prefill_chunk: int = 32) -> Engine:
        return block_engine(llama, 4, 128, prefill_chunk, fused=fused, cache_dtype=dtype)

    alone = [generate_one(new_engine(), Sequence(prompt, GREEDY, 20)) for prompt in asked]
    next_turn = Sequence(asked[0] + alone[0] + [5, 6], GREEDY, 10)
    expected = generate_one(new_engine(), Sequence(next_turn.prompt, GREEDY, 10))
    sequences = [Sequence(prompt, GREEDY, 20) for prompt in asked]
    engine = new_engine(prefill_chunk=16)
    assert generate(engine, sequences, every=8) == alone
    assert [sequence.reused for sequence in sequences] == [0, 60, 60]
    assert generate_one(engine, next_turn) == expected
    assert next_turn.reused == len(asked[0]) + 19  # the last token of the reply was never computed


def test_sequences_that_share_a_prefix_use_no_more_than_the_whole_cache(llama: PreTrainedModel) -> None:
    (history,) = prompts(3 * BLOCK)
    engine = block_engine(llama, slots=4, context=96, blocks=7)
    sequences = [Sequence([*history, last], GREEDY, 5) for last in range(4)]
    engine.add(sequences[0])
    step_until(engine, sequences[0], 1)
    for sequence in sequences[1:]:
        engine.add(sequence)
    step_until(engine, sequences[-1], 1)
    assert engine.cache_usage == 1  # 3 blocks that all share, and one of each
    while not engine.idle:
        engine.step()
    assert engine.cache_usage == 0


def test_a_shared_prefix_takes_no_second_block(llama: PreTrainedModel) -> None:
    (history,) = prompts(4 * BLOCK)
    engine = block_engine(llama, 4, 128)
    first, second = (Sequence([*history, number], GREEDY, 5) for number in (5, 6))
    engine.add(first)
    step_until(engine, first, 1)
    blocks = blocks_of(engine)
    before = blocks.free
    engine.add(second)
    step_until(engine, second, 1)
    assert blocks.tables[second.slot][:4] == blocks.tables[first.slot][:4]
    assert before - blocks.free == 1


def test_another_owner_finds_only_the_public_beginning(llama: PreTrainedModel) -> None:
    (history,) = prompts(70)
    engine = block_engine(llama, 4, 128)
    ann = Sequence([*history, 5], GREEDY, 5, owner="ann", public=30)
    bob = Sequence([*history, 5], GREEDY, 5, owner="bob", public=30)
    expected = generate_one(engine, ann)
    assert generate_one(engine, bob) == expected
    assert bob.reused == 30


@both_kinds
def test_sequences_that_do_not_all_fit_the_blocks_come_to_the_same_replies(
    llama: PreTrainedModel, fused: FusedAttention
) -> None:
    asked = prompts(40, 30, 20, 50, 10)
    expected = [reference(llama, prompt, 40) for prompt in asked]
    engine = block_engine(llama, slots=5, context=96, prefill_chunk=16, blocks=9, fused=fused)
    sequences = [Sequence(prompt, GREEDY, 40) for prompt in asked]  # they need 4 to 6 blocks each
    lost: set[Sequence] = set()
    replies: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        for token in engine.step():
            replies[token.sequence].append(token.id)
        lost |= {each for each in sequences if each.generated and not each.cached}
    assert list(replies.values()) == expected
    assert lost, "some sequence had to give its blocks to an older one"
    assert sequences[0] not in lost


def test_a_prefix_whose_copy_failed_is_not_reused(llama: PreTrainedModel) -> None:
    (history,) = prompts(5 * BLOCK)
    first, second, third, fourth = (Sequence([*history[:length], 5], GREEDY, 3) for length in (80, 80, 45, 44))
    expected = reference(llama, fourth.prompt, 3)
    engine = block_engine(llama, slots=2, context=96)
    generate(engine, [first, second], every=2)  # the second shares the blocks of the first

    class FailingCopy(BlockCache):
        def copy_block(self, source: int, target: int) -> None:
            raise MemoryError

    cache = engine.runner.cache
    cache.__class__ = FailingCopy
    with pytest.raises(MemoryError):
        engine.add(third)
    cache.__class__ = BlockCache
    assert generate_one(engine, fourth) == expected


def test_sequences_that_share_their_blocks_never_use_more_than_the_cache(llama: PreTrainedModel) -> None:
    (history,) = prompts(4 * BLOCK)
    engine = block_engine(llama, slots=4, context=96, blocks=8)
    for number in range(4):
        sequence = Sequence([*history, number], GREEDY, 9)
        engine.add(sequence)
        step_until(engine, sequence, 1)
    assert engine.cache_usage == 1


def test_idle_slots_lose_their_blocks_first_and_are_not_reused_then(llama: PreTrainedModel) -> None:
    old, new, large = prompts(40, 40, 70)
    again = [Sequence([*prompt, 9], GREEDY, 5) for prompt in (new, old)]
    expected = [reference(llama, sequence.prompt, 5) for sequence in again]
    engine = block_engine(llama, slots=3, context=96, blocks=8)
    for prompt in (old, new, large):
        generate_one(engine, Sequence(prompt, GREEDY, 5))
    assert [generate_one(engine, sequence) for sequence in again] == expected
    assert [sequence.reused for sequence in again] == [40, 0]


def test_a_prefix_is_cut_to_whole_blocks_where_none_is_free_for_a_copy(llama: PreTrainedModel) -> None:
    (history,) = prompts(3 * BLOCK + 5)
    engine = block_engine(llama, slots=2, context=96, blocks=6)
    first = Sequence([*history, 5], GREEDY, 40)
    engine.add(first)
    step_until(engine, first, 30)  # it has all blocks now
    second = Sequence([*history, 6], GREEDY, 5)
    engine.add(second)
    assert second.reused == 3 * BLOCK
    while not engine.idle:
        engine.step()
    assert second.tokens == second.prompt + reference(llama, second.prompt, 5)
    assert first.tokens == first.prompt + reference(llama, first.prompt, 40)


def test_steps_of_the_same_sizes_are_captured_at_their_second_time(llama: PreTrainedModel) -> None:
    graphs, asked = CountingGraphs(), prompts(20, 21, 22)
    expected = [reference(llama, prompt, 30) for prompt in asked]
    engine = block_engine(llama, slots=8, context=128, graphs=graphs)
    assert generate(engine, [Sequence(prompt, GREEDY, 30) for prompt in asked], every=2) == expected
    assert graphs.captured <= 5, "one, two and four sequences that decode, and prompts beside them"
    assert graphs.replayed >= 25


class FixedGraphs(Graphs):
    """Graphs whose replays compute nothing: what is left of a step is what the host does."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def capture(self, step: Step) -> Step:
        logits = step()
        return lambda: logits


def test_the_host_never_waits_for_the_device_in_a_step_that_is_a_graph(llama: PreTrainedModel) -> None:
    engine = block_engine(llama, slots=4, context=128, graphs=FixedGraphs())
    usual = SamplingParams(0.5, 1.0, 0, 1.1, 0.1, 0.1)  # top-p looks at the candidates again, on a CPU
    sequences = [Sequence(prompt, params, 60) for prompt, params in zip(prompts(20, 30), (GREEDY, usual), strict=True)]
    for sequence in sequences:
        engine.add(sequence)
    step_until(engine, sequences[1], 5)
    with NoWaiting():
        step_until(engine, sequences[1], 5 + 2 * BLOCK)  # they get new blocks too


class CrampedGraphs(CountingGraphs):
    """Has no memory for the third graph."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten = 0

    def capture(self, step: Step) -> Step:
        if self.captured == 2 and not self.forgotten:
            raise torch.OutOfMemoryError("none is left")
        return super().capture(step)

    def forget(self) -> None:
        self.forgotten += 1


def test_graphs_are_forgotten_if_there_is_no_memory_for_one_more(llama: PreTrainedModel) -> None:
    graphs, asked = CrampedGraphs(), prompts(20, 21, 22)
    expected = [reference(llama, prompt, 30) for prompt in asked]
    engine = block_engine(llama, slots=8, context=128, graphs=graphs)
    assert generate(engine, [Sequence(prompt, GREEDY, 30) for prompt in asked], every=2) == expected
    assert graphs.forgotten == 1
    assert graphs.captured > 2


def test_a_sequence_that_fails_alone_ends_and_the_others_do_not_change(llama: PreTrainedModel) -> None:
    asked = prompts(20, 30, 40)
    expected = [reference(llama, prompt, 20) for prompt in asked]
    sequences = [Sequence(prompt, GREEDY, 20) for prompt in asked]

    class FailingSampler:
        """Fails once the second sequence has some tokens."""

        def __init__(self, engine: Engine) -> None:
            self.sampler = engine.sampler

        def __getattr__(self, name: str) -> object:
            return getattr(self.sampler, name)

        def sample(
            self,
            logits: Tensor,
            slots: list[int],
            where: Tensor,
            uniforms: list[float],
            masks: TokenMasks | None = None,
        ) -> Tensor:
            if sequences[1].slot in slots and sequences[1].generated >= 4:
                raise ValueError("unlucky")
            return self.sampler.sample(logits, slots, where, uniforms, masks)

    engine = block_engine(llama, 4, 96)
    engine.sampler = FailingSampler(engine)  # type: ignore[assignment]
    recovery, replies = StepRecovery(engine), {sequence: list[int | None]() for sequence in sequences}
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        for sequence, token in recovery.step():
            replies[sequence].append(token.id if token else None)
    first, second, third = replies.values()
    assert (first, third) == (expected[0], expected[2])
    assert second[-1] is None
    assert second[:-1] == expected[1][: len(second) - 1]
    assert len(second) >= 5


def test_a_step_that_fails_once_its_tokens_are_chosen_gives_the_same_ones_again(llama: PreTrainedModel) -> None:
    params = SamplingParams(0.9, 1, 0, repetition_penalty=1.5, frequency_penalty=0.7)

    class FailingSampler(Sampler):
        """Chooses tokens, and fails then, at each third time."""

        calls = 0

        def sample(
            self,
            logits: Tensor,
            slots: list[int],
            where: Tensor,
            uniforms: list[float],
            masks: TokenMasks | None = None,
        ) -> Tensor:
            tokens = super().sample(logits, slots, where, uniforms, masks)
            self.calls += 1
            if self.calls % 3 == 0:
                raise MemoryError
            return tokens

    def asked() -> list[Sequence]:
        return [Sequence(prompt, params, 20, seed=5) for prompt in prompts(20, 30)]

    expected = generate(block_engine(llama, 2, 96), asked())
    engine, sequences = block_engine(llama, 2, 96), asked()
    engine.sampler = FailingSampler(2, engine.runner.logits_size, engine.runner.device)
    for sequence in sequences:
        engine.add(sequence)
    failures = 0
    while not engine.idle:
        try:
            engine.step()
        except MemoryError:
            failures += 1
    assert [sequence.tokens[len(sequence.prompt) :] for sequence in sequences] == expected
    assert failures > 5


def test_an_infinity_in_a_block_does_not_reach_the_next_sequence(llama: PreTrainedModel) -> None:
    long, short = prompts(60, 10)
    expected = reference(llama, short, 20)
    engine = block_engine(llama, slots=1, context=96)
    with torch.inference_mode():
        weight = cast(nn.Embedding, llama.get_input_embeddings()).weight
        before = weight.clone()
        weight.fill_(torch.inf)
        generate_one(engine, Sequence(long, GREEDY, 5))
        weight.copy_(before)
    assert generate_one(engine, Sequence(short, GREEDY, 20)) == expected


def test_a_cache_without_room_for_one_sequence_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(CacheTooLargeError, match="no room for a sequence of 96 tokens: lower PARLEY_CONTEXT"):
        block_engine(llama, slots=2, context=96, blocks=5)
