from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, PreTrainedModel

from models.engine.batch import Batch
from models.engine.engine import Engine
from models.engine.kv_cache import DTYPES
from models.engine.model_runner import ModelRunner
from models.engine.sampling_params import SamplingParams
from models.engine.scheduler import Placement
from models.engine.sequence import Sequence
from models.errors import UnsupportedModelError
from tests.support.any_batch import assert_equal_logits_in_any_batch
from tests.support.faulty import both_attentions, faulty_engine, make_engine, slots_of
from tests.support.tiny import (
    SHAPE,
    prompts,
    tiny_gemma2,
    tiny_gemma3,
    tiny_gpt_oss,
    tiny_llama,
    tiny_model,
    tiny_qwen3,
    to_int8,
)

GREEDY = SamplingParams()

Make = Callable[[], PreTrainedModel]


def reference(model: PreTrainedModel, prompt: list[int], tokens: int, **options: float) -> list[int]:
    """The greedy reply of transformers' own `generate`."""
    model.set_attn_implementation("eager")
    ids = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return [int(token) for token in ids[0, len(prompt) :]]


def generate(engine: Engine, sequences: Iterable[Sequence], every: int = 1) -> list[list[int]]:
    """All replies. One sequence is added every so many steps, as soon as a slot is free."""
    sequences = list(sequences)
    waiting, replies, steps = list(sequences), {sequence: list[int]() for sequence in sequences}, 0
    while waiting or not engine.idle:
        if waiting and engine.scheduler.free_slots and steps % every == 0:
            engine.add(waiting.pop(0))
        for token in engine.step():
            replies[token.sequence].append(token.id)
        steps += 1
    return list(replies.values())


def generate_one(engine: Engine, sequence: Sequence) -> list[int]:
    (reply,) = generate(engine, [sequence])
    return reply


def fill_with_nan(engine: Engine, slot: int, length: int) -> None:
    """Set the first positions of a slot to NaN."""
    with torch.inference_mode():
        for keys, values in slots_of(engine).cache.tensors:
            keys[slot, :, : -(-length // keys.shape[-1])] = values[slot, :, :length] = torch.nan


@both_attentions
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gemma3, tiny_gemma2, tiny_gpt_oss])
def test_greedy_replies_equal_those_of_transformers(make: Make, native: bool) -> None:
    model = make()
    asked = prompts(5, 40, 17, 33, 50, 8, 29, 21)
    expected = [reference(model, prompt, 24) for prompt in asked]
    engine = make_engine(model, slots=6, context=96, prefill_chunk=16, native=native)
    assert generate(engine, [Sequence(prompt, GREEDY, 24) for prompt in asked], every=3) == expected
    assert len({token for reply in expected for token in reply}) > 10


def test_a_repetition_penalty_works_as_in_transformers() -> None:
    model, (prompt,) = tiny_llama(), prompts(20)
    expected = reference(model, prompt, 30, repetition_penalty=1.4)
    sequence = Sequence(prompt, SamplingParams(repetition_penalty=1.4), 30)
    assert generate_one(make_engine(model, 2, 96), sequence) == expected
    assert expected != reference(model, prompt, 30)


def test_a_seeded_reply_is_the_same_alone_and_among_others(llama: PreTrainedModel) -> None:
    first, *others = prompts(30, 5, 40, 17, 33, 50, 8, 29)
    params = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, repetition_penalty=1.1)
    engine = make_engine(llama, slots=8, context=128, prefill_chunk=16)
    alone = generate_one(engine, Sequence(first, params, 32, seed=11))
    neighbours = [
        Sequence(prompt, SamplingParams(temperature=1.5), 40, seed=seed) for seed, prompt in enumerate(others)
    ]
    among = generate(engine, [*neighbours[:4], Sequence(first, params, 32, seed=11), *neighbours[4:]], every=2)
    assert among[4] == alone
    assert generate_one(engine, Sequence(first, params, 32, seed=12)) != alone


@pytest.mark.compiler
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gemma3, tiny_gemma2])
def test_int8_logits_are_equal_to_the_bit_in_any_batch(make: Make) -> None:
    assert_equal_logits_in_any_batch(make_engine(to_int8(make()), slots=8, context=128))


@both_attentions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_reply_starts_as_in_transformers(dtype: torch.dtype, native: bool) -> None:
    model = tiny_llama().to(dtype)  # type: ignore[arg-type]
    (prompt,) = prompts(20)
    expected = reference(model, prompt, 1)
    reply = generate_one(make_engine(model, 2, 96, native=native), Sequence(prompt, GREEDY, 12))
    assert reply[:1] == expected  # later ones are near ties in so few bits
    assert len(reply) == 12


@both_attentions
def test_a_cached_prefix_is_reused_and_changes_no_reply(native: bool) -> None:
    model = to_int8(tiny_llama()) if native else tiny_llama()
    (history,) = prompts(60)
    asked = [history + more for more in prompts(9, 12, 20)]

    def new_engine(prefill_chunk: int = 32) -> Engine:
        return make_engine(model, 4, 128, prefill_chunk, native)

    alone = [generate_one(new_engine(), Sequence(prompt, GREEDY, 20)) for prompt in asked]
    sequences = [Sequence(prompt, GREEDY, 20) for prompt in asked]
    assert generate(new_engine(prefill_chunk=16), sequences, every=4) == alone
    assert [sequence.reused for sequence in sequences] == [0, 60, 60]
    prompt = asked[0] + alone[0] + [5, 6]
    expected = generate_one(new_engine(), Sequence(prompt, GREEDY, 10))
    engine, next_turn = new_engine(), Sequence(prompt, GREEDY, 10)
    generate_one(engine, Sequence(asked[0], GREEDY, 20))
    assert generate_one(engine, next_turn) == expected
    assert next_turn.reused == len(asked[0]) + 19  # the last token of the reply was never computed


@both_attentions
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_in_a_cache_of_any_dtype_a_reply_does_not_depend_on_prefixes_chunks_or_slots(
    llama: PreTrainedModel, dtype: torch.dtype, native: bool
) -> None:
    (history,) = prompts(60)
    asked = [history + more for more in prompts(9, 12, 20)]

    def new_engine(prefill_chunk: int = 32) -> Engine:
        return make_engine(llama, 2, 128, prefill_chunk, native, dtype)

    alone = [generate_one(new_engine(), Sequence(prompt, GREEDY, 12)) for prompt in asked]
    sequences = [Sequence(prompt, GREEDY, 12) for prompt in asked]
    engine = new_engine(prefill_chunk=16)
    assert generate(engine, sequences, every=4) == alone
    assert [sequence.reused for sequence in sequences] == [0, 60, 60]
    assert {tensor.dtype for pair in slots_of(engine).cache.tensors for tensor in pair} == {dtype}


def test_a_prefix_stays_cached_while_other_slots_are_free(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=4, context=128)
    first, *others = prompts(40, 30, 30, 30)
    for prompt in (first, *others):
        generate_one(engine, Sequence(prompt, GREEDY, 4))
    again = Sequence([*first, 9], GREEDY, 4)
    generate_one(engine, again)
    assert again.reused == 40


class HalfCopyingRunner(ModelRunner):
    """Copies half of a prefix, and fails."""

    def prepare_slot(self, placement: Placement) -> None:
        super().prepare_slot(placement._replace(length=placement.length // 2))
        if placement.length:
            raise RuntimeError("no memory")


def test_a_slot_is_not_reused_after_a_copy_into_it_failed(llama: PreTrainedModel) -> None:
    first, second = prompts(60, 40)
    expected = generate_one(make_engine(llama, 2, 128), Sequence([*second, 9], GREEDY, 5))
    engine = Engine(HalfCopyingRunner(llama, slots=2, context=128))
    running, ended = Sequence(first, GREEDY, 20), Sequence(second, GREEDY, 1)
    for sequence in (running, ended):
        engine.add(sequence)
        engine.step([sequence])
    with pytest.raises(RuntimeError, match="no memory"):
        engine.add(Sequence([*first, 5], GREEDY, 5))  # into the slot that `ended` had
    assert engine.scheduler.running == [running]
    engine.cancel(running)
    again = Sequence([*second, 9], GREEDY, 5)
    assert generate_one(engine, again) == expected
    assert again.reused == 0


def test_a_prefill_chunk_is_larger_while_nothing_decodes(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=2, context=256, prefill_chunk=8)
    alone, late = (Sequence(prompt, GREEDY, 50) for prompt in prompts(120, 40))
    engine.add(alone)
    assert [token.sequence for token in engine.step()] == [alone]
    engine.add(late)
    engine.step()
    assert late.cached == 8


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: to_int8(tiny_gemma3(layers=2)), lambda: tiny_qwen3(layers=1)], ids=["int8", "float32"]
)
def test_compiling_in_the_background_changes_no_reply(make: Make, program_library: Path, tmp_path: Path) -> None:
    shutil.copy(program_library, tmp_path)
    engine = make_engine(make(), slots=8, context=128, prefill_chunk=16)
    asked = prompts(40, 30, 5)

    def replies() -> list[list[int]]:
        return generate(engine, [Sequence(prompt, GREEDY, 20) for prompt in asked], every=2)

    expected = replies()
    compiling = threading.Thread(target=engine.runner.compile, args=[tmp_path])
    compiling.start()
    assert replies() == expected
    compiling.join()
    assert slots_of(engine).program is not None
    assert replies() == expected
    if slots_of(engine).quantized:
        assert_equal_logits_in_any_batch(engine)


def engine_with_a_long_prompt(model: PreTrainedModel, length: int) -> tuple[Engine, Sequence, Sequence]:
    """An engine with a prefill chunk of 16, a sequence that decodes in it, and one with a long prompt."""
    engine = make_engine(model, slots=2, context=256, prefill_chunk=16)
    decoding, long = (Sequence(prompt, GREEDY, 100) for prompt in prompts(4, length))
    engine.add(decoding)
    engine.step()
    engine.add(long)
    return engine, decoding, long


def test_a_long_prefill_lets_other_sequences_decode_in_each_step(llama: PreTrainedModel) -> None:
    engine, decoding, long = engine_with_a_long_prompt(llama, 160)
    steps = []
    while not long.decodes:
        steps.append([token.sequence for token in engine.step()])
    assert len(steps) >= 10  # chunks of 16 at most
    assert steps[:-1] == [[decoding]] * (len(steps) - 1)
    assert set(steps[-1]) == {decoding, long}


def test_prefill_chunks_shrink_far_into_a_long_prompt(llama: PreTrainedModel) -> None:
    engine, _, long = engine_with_a_long_prompt(llama, 200)
    chunks = []
    while not long.decodes:
        before = long.cached
        engine.step()
        chunks.append(long.cached - before)
    assert chunks[0] == 16
    assert chunks[:-1] == sorted(chunks[:-1], reverse=True)
    assert chunks[-2] < 16


def test_one_step_prefills_several_short_prompts(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=4, context=64, prefill_chunk=32)
    sequences = [Sequence(prompt, GREEDY, 5) for prompt in prompts(8, 8, 8)]
    for sequence in sequences:
        engine.add(sequence)
    assert {token.sequence for token in engine.step()} == set(sequences)


def test_cancel_frees_a_slot_during_prefill_and_decode(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=2, context=128, prefill_chunk=16)
    decoding, prefilling = (Sequence(prompt, GREEDY, 50) for prompt in prompts(4, 100))
    engine.add(decoding)
    engine.add(prefilling)
    engine.step()
    engine.cancel(prefilling)
    assert engine.scheduler.free_slots == 1
    engine.cancel(decoding)
    assert engine.idle
    assert engine.step() == []
    engine.cancel(decoding)
    assert engine.scheduler.free_slots == 2


def test_the_cache_usage_counts_the_tokens_of_running_sequences(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=2, context=64)
    first, second = (Sequence(prompt, GREEDY, 5) for prompt in prompts(40, 24))
    assert engine.cache_usage == 0
    engine.add(first)
    engine.step()
    assert engine.cache_usage == 40 / 128
    engine.add(second)
    engine.step()
    assert engine.cache_usage == (41 + 24) / 128
    engine.cancel(first)
    assert engine.cache_usage == 24 / 128


def test_decoding_neighbours_make_one_span_whatever_their_age(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=3, context=64)
    generate(engine, [Sequence(prompt, GREEDY, 2) for prompt in prompts(8, 8)])
    for prompt in prompts(9, 9, 9):
        engine.add(Sequence(prompt, GREEDY, 5))
    engine.step()
    active = engine.scheduler.active
    assert [sequence.slot for sequence in active] != [0, 1, 2]
    spans = Batch(engine.scheduler.schedule(active)).spans
    assert [(span.slot, span.rows) for span in spans] == [(0, 3)]


def test_a_step_of_some_sequences_leaves_the_others_alone(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=3, context=64)
    decoding, other, prefilling = sequences = [Sequence(prompt, GREEDY, 5) for prompt in prompts(8, 8, 8)]
    for sequence in sequences[:2]:
        engine.add(sequence)
    engine.step()
    engine.add(prefilling)
    assert [token.sequence for token in engine.step([prefilling])] == [prefilling]
    assert [token.sequence for token in engine.step([decoding])] == [decoding]
    assert [sequence.generated for sequence in sequences] == [2, 1, 1]
    assert [sequence.cached for sequence in sequences] == [9, 8, 8]
    assert {token.sequence for token in engine.step()} == {decoding, other, prefilling}


def test_sequences_above_the_limit_wait_for_older_ones(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=3, context=64)
    sequences = [Sequence(prompt, GREEDY, 4) for prompt in prompts(8, 8, 8)]
    for sequence in sequences:
        engine.add(sequence)
    engine.scheduler.limit = 2
    assert engine.scheduler.free_slots == 0
    steps = [[token.sequence for token in engine.step()] for _ in range(8)]
    assert steps == 4 * [sequences[:2]] + 4 * [sequences[2:]]
    assert engine.idle
    assert engine.scheduler.free_slots == 2


@both_attentions
def test_a_failed_step_changes_nothing_and_can_be_tried_again(llama: PreTrainedModel, native: bool) -> None:
    def replies(faults: list[Exception | None]) -> tuple[list[list[int]], int]:
        """The tokens of some sequences, and the number of failed steps."""
        engine = faulty_engine(llama, lambda sequences: faults.pop() if faults else None, native=native)
        params = SamplingParams(temperature=1.0, repetition_penalty=1.3)
        sequences = [Sequence(prompt, params, 12, seed=7) for prompt in prompts(40, 9, 21)]
        failed = 0
        for sequence in sequences:
            engine.add(sequence)
        while not engine.idle:
            before = [(sequence.cached, list(sequence.tokens)) for sequence in sequences]
            try:
                engine.step()
            except RuntimeError:
                failed += 1
                assert [(sequence.cached, sequence.tokens) for sequence in sequences] == before
        return [sequence.tokens for sequence in sequences], failed

    error = RuntimeError("temporary")
    expected, never = replies([])
    assert never == 0
    assert replies([error, None, error, error, None, None, error]) == (expected, 4)


def test_a_failed_forward_leaves_no_nan_for_the_next_sequence(llama: PreTrainedModel) -> None:
    long, short, neighbour = prompts(50, 8, 60)
    expected = generate_one(make_engine(llama, 2, 128, native=False), Sequence(short, GREEDY, 20))

    def fault(sequences: list[Sequence]) -> Exception | None:
        if poison not in sequences:
            return None
        fill_with_nan(engine, poison.slot, 50)
        return RuntimeError("half done")

    engine = faulty_engine(llama, fault, slots=2, native=False)
    poison = Sequence(long, GREEDY, 20)
    engine.add(poison)
    with pytest.raises(RuntimeError, match="half done"):
        engine.step()
    engine.cancel(poison)
    # Beside a longer sequence, torch's attention reads the first slot beyond its own tokens.
    reply, _ = generate(engine, [Sequence(short, GREEDY, 20), Sequence(neighbour, GREEDY, 30)])
    assert reply == expected


def test_a_reused_slot_gives_the_same_reply_as_a_new_one(llama: PreTrainedModel) -> None:
    long, short = prompts(90, 6)
    used = make_engine(llama, slots=1, context=128)
    generate_one(used, Sequence(long, GREEDY, 20))
    reply = generate_one(used, Sequence(short, GREEDY, 20))
    assert reply == generate_one(make_engine(llama, slots=1, context=128), Sequence(short, GREEDY, 20))


def test_a_reply_ends_at_a_stop_token_its_limit_or_the_context(llama: PreTrainedModel) -> None:
    engine = make_engine(llama, slots=3, context=64)
    (prompt,) = prompts(40)
    reply = generate_one(engine, Sequence(prompt, GREEDY, 100))
    assert len(prompt) + len(reply) == 64
    stopped = Sequence(prompt, GREEDY, 100, stop_ids=frozenset([reply[5]]))
    limited = Sequence(prompt, GREEDY, 3)
    full = Sequence(prompt, GREEDY, 100)
    for sequence in (stopped, limited, full):
        engine.add(sequence)
    reasons = {}
    while not engine.idle:
        reasons.update({token.sequence: token.finish_reason for token in engine.step() if token.finish_reason})
    assert reasons == {stopped: "stop", limited: "max_output_tokens", full: "context_length"}
    assert stopped.generated == reply.index(reply[5]) + 1


def test_a_model_with_unknown_attention_is_refused() -> None:
    config = BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2)
    bloom = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModelError):
        make_engine(bloom.eval(), slots=2, context=64)


def test_learned_positions_reach_the_whole_context_beside_an_idle_slot() -> None:
    model = tiny_model(GPT2Config(vocab_size=SHAPE["vocab_size"], n_positions=64, n_embd=32, n_layer=2, n_head=2))
    short, long = prompts(4, 40)
    expected = reference(model, long, 20)
    engine = make_engine(model, slots=2, context=64)
    _, reply = generate(engine, [Sequence(short, GREEDY, 2), Sequence(long, GREEDY, 20)])
    assert reply == expected


def longrope_llama(short: float, long: float) -> PreTrainedModel:
    """A Llama whose frequencies are divided by one factor up to 64 tokens, and by another one beyond."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": [short] * 8,
        "long_factor": [long] * 8,
    }
    return tiny_model(LlamaConfig(**SHAPE | {"max_position_embeddings": 128, "rope_parameters": rope}))


@pytest.mark.parametrize(("context", "factor"), [(64, 1.0), (128, 9.0)], ids=["short", "long"])
def test_the_context_alone_chooses_the_frequencies_of_longrope(context: int, factor: float) -> None:
    asked = prompts(4, 30, context - 20)
    expected = [reference(longrope_llama(factor, factor), prompt, 20) for prompt in asked]
    engine = make_engine(longrope_llama(1.0, 9.0), slots=3, context=context)
    # Some are alone, some beside a longer one, and some behind the end of one.
    assert generate(engine, [Sequence(prompt, GREEDY, 20) for prompt in asked], every=6) == expected


@both_attentions
def test_nan_of_a_sequence_does_not_reach_the_next_one(llama: PreTrainedModel, native: bool) -> None:
    long, short, neighbour = prompts(50, 8, 60)
    expected = generate_one(make_engine(llama, 2, 128, native=native), Sequence(short, GREEDY, 20))
    engine = make_engine(llama, 2, 128, native=native)
    broken, beside, again = Sequence(long, GREEDY, 20), Sequence(neighbour, GREEDY, 60), Sequence(short, GREEDY, 20)
    for sequence in (broken, beside):
        engine.add(sequence)
        engine.step([sequence])
    fill_with_nan(engine, broken.slot, 50)
    engine.cancel(broken)
    # Beside a longer sequence, torch's attention reads the first slot beyond its own tokens.
    engine.add(again)
    while again.slot >= 0:
        engine.step()
    assert again.tokens == short + expected
    assert beside.slot == 1
