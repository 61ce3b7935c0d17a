from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedModel,
)

from models.engine import Engine
from models.forward import Batch
from models.kv_cache import UnsupportedModel
from models.quantization import quantize
from models.sampling import Sampling
from models.sequence import Sequence
from tests.faulty import FaultyEngine
from tests.tiny import SHAPE, tiny_gemma3, tiny_llama, tiny_model, tiny_qwen3


def tiny_gemma2() -> PreTrainedModel:
    """Soft-capped scores, every other layer with a window."""
    return tiny_model(Gemma2Config(**SHAPE, sliding_window=12, query_pre_attn_scalar=16, attn_logit_softcapping=5.0))


def tiny_gpt_oss() -> PreTrainedModel:
    """Attention sinks, and a mixture of experts."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return tiny_model(GptOssConfig(**SHAPE, sliding_window=12, layer_types=layers, rope_parameters=rope, **experts))


def prompts(*lengths: int) -> list[list[int]]:
    source = random.Random(5)
    return [[source.randrange(3, SHAPE["vocab_size"]) for _ in range(length)] for length in lengths]


def generated(model: PreTrainedModel, prompt: list[int], tokens: int, **options: float) -> list[int]:
    """What transformers itself makes of a prompt, greedily."""
    model.set_attn_implementation("eager")
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return [int(token) for token in ids[0, len(prompt) :]]


def run(engine: Engine, sequences: Iterable[Sequence], every: int = 1) -> dict[Sequence, list[int]]:
    """Step until all are done; one sequence joins every so many steps, as soon as a slot is free."""
    waiting, replies, steps = list(sequences), {}, 0
    while waiting or not engine.idle:
        if waiting and engine.free_slots and steps % every == 0:
            engine.add(waiting[0])
            replies[waiting.pop(0)] = []
        for token in engine.step():
            replies[token.sequence].append(token.id)
        steps += 1
    return replies


both_attentions = pytest.mark.parametrize("native", [True, False], ids=["kernel", "torch"])


def int8(model: PreTrainedModel) -> PreTrainedModel:
    quantize(model, lambda: model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False))
    return model


@both_attentions
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gemma3, tiny_gemma2, tiny_gpt_oss])
def test_greedy_replies_of_sequences_that_join_at_different_steps_equal_generate(
    make: Callable[[], PreTrainedModel], native: bool
) -> None:
    model = make()
    asked = prompts(5, 40, 17, 33, 50, 8, 29, 21)
    expected = [generated(model, prompt, 24) for prompt in asked]
    sequences = [Sequence(prompt, Sampling(), 24) for prompt in asked]
    replies = run(Engine(model, slots=6, context=96, prefill_chunk=16, native=native), sequences, every=3)
    assert [replies[sequence] for sequence in sequences] == expected
    assert len({token for reply in expected for token in reply}) > 10


def test_a_repetition_penalty_counts_prompt_and_reply_as_generate_does() -> None:
    model, (prompt,) = tiny_llama(), prompts(20)
    expected = generated(model, prompt, 30, repetition_penalty=1.4)
    sequence = Sequence(prompt, Sampling(repetition_penalty=1.4), 30)
    assert run(Engine(model, 2, 96), [sequence])[sequence] == expected
    assert expected != generated(model, prompt, 30)


def test_a_seeded_reply_is_the_same_alone_and_among_seven_others(llama: PreTrainedModel) -> None:
    first, *others = prompts(30, 5, 40, 17, 33, 50, 8, 29)
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=50, repetition_penalty=1.1)

    def seeded() -> Sequence:
        return Sequence(first, sampling, 32, seed=11)

    engine = Engine(llama, slots=8, context=128, prefill_chunk=16)
    alone, among = seeded(), seeded()
    reply = run(engine, [alone])[alone]
    company = [Sequence(prompt, Sampling(temperature=1.5), 40, seed=index) for index, prompt in enumerate(others)]
    assert run(engine, [*company[:4], among, *company[4:]], every=2)[among] == reply
    other_seed = Sequence(first, sampling, 32, seed=12)
    assert run(engine, [other_seed])[other_seed] != reply


def expect_the_same_logits_to_the_bit_in_any_batch_and_chunks(engine: Engine) -> None:
    asked = prompts(50, 7, 33, 50, 21)

    def logits(size: int, company: int) -> torch.Tensor:
        """After each of the first prompt's tokens, read so many at a time, beside so many other sequences."""
        sequences = [Sequence(prompt, Sampling(), 1) for prompt in asked[: company + 1]]
        for slot, sequence in enumerate(sequences):
            sequence.slot = slot
        rows = []
        while sequences[0].cached < 50:
            batch, first = Batch(), sequences[0]
            for sequence in reversed(sequences):
                count = min(size, len(sequence.prompt) - sequence.cached)
                if count:
                    batch.add(sequence, count)
            start = len(batch.ids) - min(size, 50 - first.cached)
            batch.last = list(range(start, len(batch.ids)))
            rows.append(engine._forward(batch))
            for sequence, count in batch.read:
                sequence.cached += count
        return torch.cat(rows)

    with torch.inference_mode():
        expected = logits(50, company=0)
        assert expected.shape[0] == 50
        for size, company in [(50, 4), (1, 0), (1, 4), (7, 2), (16, 1)]:
            assert torch.equal(logits(size, company), expected)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gemma3, tiny_gemma2])
def test_in_int8_a_sequence_has_the_same_logits_to_the_bit_in_any_batch_and_chunks(
    make: Callable[[], PreTrainedModel],
) -> None:
    expect_the_same_logits_to_the_bit_in_any_batch_and_chunks(Engine(int8(make()), slots=8, context=128))


@both_attentions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_begins_its_reply_as_generate_does(dtype: torch.dtype, native: bool) -> None:
    model = tiny_llama().to(dtype)
    (prompt,) = prompts(20)
    expected = generated(model, prompt, 1)
    sequence = Sequence(prompt, Sampling(), 12)
    reply = run(Engine(model, 2, 96, native=native), [sequence])[sequence]
    assert reply[:1] == expected  # later ones are near ties in so few bits
    assert len(reply) == 12


@both_attentions
def test_a_prompt_that_begins_like_one_before_is_read_from_there_and_the_reply_is_the_same(native: bool) -> None:
    model = int8(tiny_llama()) if native else tiny_llama()
    (history,) = prompts(60)
    asked = [history + more for more in prompts(9, 12, 20)]
    alone = [
        run(Engine(model, 4, 128, native=native), [sequence])[sequence]
        for sequence in [Sequence(prompt, Sampling(), 20) for prompt in asked]
    ]
    engine = Engine(model, 4, 128, prefill_chunk=16, native=native)
    sequences = [Sequence(prompt, Sampling(), 20) for prompt in asked]
    replies = run(engine, sequences, every=4)
    assert [replies[sequence] for sequence in sequences] == alone
    assert [sequence.reused for sequence in sequences] == [0, 60, 60]
    turn = Sequence(asked[0] + replies[sequences[0]] + [5, 6], Sampling(), 10)
    again = Sequence(turn.prompt, Sampling(), 10)
    fresh = run(Engine(model, 4, 128, native=native), [again])[again]
    engine = Engine(model, 4, 128, native=native)
    first = Sequence(asked[0], Sampling(), 20)
    run(engine, [first])
    assert run(engine, [turn])[turn] == fresh
    assert turn.reused == len(asked[0]) + 19  # the last token was chosen, never read


def test_a_conversation_is_still_there_after_as_many_others_as_there_are_other_slots(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=4, context=128)
    first, *others = prompts(40, 30, 30, 30)
    for prompt in (first, *others):
        run(engine, [Sequence(prompt, Sampling(), 4)])
    again = Sequence([*first, 9], Sampling(), 4)
    run(engine, [again])
    assert again.reused == 40


def test_a_step_reads_more_of_a_prompt_while_nobody_waits_for_a_token(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=2, context=256, prefill_chunk=8)
    alone, late = (Sequence(prompt, Sampling(), 50) for prompt in prompts(120, 40))
    engine.add(alone)
    assert [token.sequence for token in engine.step()] == [alone]
    engine.add(late)
    engine.step()
    assert late.cached == 8


@pytest.mark.parametrize("make", [lambda: int8(tiny_gemma3()), tiny_qwen3], ids=["int8", "float32"])
def test_compiling_in_another_thread_changes_no_reply(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    engine = Engine(make(), slots=8, context=128, prefill_chunk=16)
    asked = prompts(40, 30, 5)

    def replies() -> list[list[int]]:
        sequences = [Sequence(prompt, Sampling(), 20) for prompt in asked]
        made = run(engine, sequences, every=2)
        return [made[sequence] for sequence in sequences]

    expected = replies()
    compiling = threading.Thread(target=engine.compile, args=[tmp_path])
    compiling.start()
    assert replies() == expected
    compiling.join()
    assert engine.program is not None
    assert replies() == expected
    if engine.quantized:
        expect_the_same_logits_to_the_bit_in_any_batch_and_chunks(engine)


def joined_by_a_long_prompt(model: PreTrainedModel, length: int) -> tuple[Engine, Sequence, Sequence]:
    """An engine that reads 16 tokens a step at most, a sequence that decodes in it and one whose prompt waits."""
    engine = Engine(model, slots=2, context=256, prefill_chunk=16)
    running, long = (Sequence(prompt, Sampling(), 100) for prompt in prompts(4, length))
    engine.add(running)
    engine.step()
    engine.add(long)
    return engine, running, long


def test_running_sequences_get_a_token_in_every_step_while_a_long_prompt_is_read(llama: PreTrainedModel) -> None:
    engine, short, long = joined_by_a_long_prompt(llama, 160)
    reading = []
    while not long.prefilled:
        reading.append([token.sequence for token in engine.step()])
    assert len(reading) >= 10  # chunks of 16 at most
    assert reading[:-1] == [[short]] * (len(reading) - 1)
    assert set(reading[-1]) == {short, long}


def test_chunks_grow_smaller_far_into_a_prompt_where_each_token_takes_longer(llama: PreTrainedModel) -> None:
    engine, _, long = joined_by_a_long_prompt(llama, 200)
    chunks = []
    while not long.prefilled:
        before = long.cached
        engine.step()
        chunks.append(long.cached - before)
    assert chunks[0] == 16
    assert chunks[:-1] == sorted(chunks[:-1], reverse=True)
    assert chunks[-2] < 16


def test_one_step_reads_several_short_prompts(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=4, context=64, prefill_chunk=32)
    sequences = [Sequence(prompt, Sampling(), 5) for prompt in prompts(8, 8, 8)]
    for sequence in sequences:
        engine.add(sequence)
    assert {token.sequence for token in engine.step()} == set(sequences)


def test_cancel_frees_the_slot_at_once_while_prefilling_and_while_decoding(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=2, context=128, prefill_chunk=16)
    decoding, prefilling = (Sequence(prompt, Sampling(), 50) for prompt in prompts(4, 100))
    engine.add(decoding)
    engine.add(prefilling)
    engine.step()
    engine.cancel(prefilling)
    assert engine.free_slots == 1
    engine.cancel(decoding)
    assert engine.idle
    assert engine.step() == []
    engine.cancel(decoding)
    assert engine.free_slots == 2


def test_each_token_of_a_seeded_sequence_has_a_random_number_that_stays_until_it_is_there() -> None:
    sequence, source = Sequence([5], Sampling(temperature=1.0), 9, seed=3), random.Random(3)
    for token_id in range(9):
        assert [sequence.uniform, sequence.uniform] == 2 * [source.random()]
        sequence.append(token_id)


def test_neighbours_that_decode_make_one_part_however_old_they_are(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=3, context=64)
    run(engine, [Sequence(prompt, Sampling(), 2) for prompt in prompts(8, 8)])
    for prompt in prompts(9, 9, 9):
        engine.add(Sequence(prompt, Sampling(), 5))
    engine.step()
    assert [sequence.slot for sequence in engine.active] != [0, 1, 2]
    assert [(part.slot, part.rows) for part in engine._schedule(engine.active).parts] == [(0, 3)]


def test_a_step_among_some_leaves_the_others_where_they_are(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=3, context=64)
    decoding, other, reading = sequences = [Sequence(prompt, Sampling(), 5) for prompt in prompts(8, 8, 8)]
    for sequence in sequences[:2]:
        engine.add(sequence)
    engine.step()
    engine.add(reading)
    assert [token.sequence for token in engine.step([reading])] == [reading]
    assert [token.sequence for token in engine.step([decoding])] == [decoding]
    assert [sequence.generated for sequence in sequences] == [2, 1, 1]
    assert [sequence.cached for sequence in sequences] == [9, 8, 8]
    assert {token.sequence for token in engine.step()} == {decoding, other, reading}


def test_sequences_beyond_the_limit_wait_for_older_ones_to_end(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=3, context=64)
    sequences = [Sequence(prompt, Sampling(), 4) for prompt in prompts(8, 8, 8)]
    for sequence in sequences:
        engine.add(sequence)
    engine.limit = 2
    assert engine.free_slots == 0
    steps = [[token.sequence for token in engine.step()] for _ in range(8)]
    assert steps == 4 * [sequences[:2]] + 4 * [sequences[2:]]
    assert engine.idle
    assert engine.free_slots == 2


@both_attentions
def test_a_step_that_raises_has_done_nothing_and_comes_to_the_same_tokens_again(
    llama: PreTrainedModel, native: bool
) -> None:
    def replies(faults: list[Exception | None]) -> tuple[list[list[int]], list[int]]:
        """What some sequences come to, and how often a step raised."""
        engine = FaultyEngine(llama, lambda running: faults.pop() if faults else None, native=native)
        sampling = Sampling(temperature=1.0, repetition_penalty=1.3)
        sequences = [Sequence(prompt, sampling, 12, seed=7) for prompt in prompts(40, 9, 21)]
        raised = []
        for sequence in sequences:
            engine.add(sequence)
        while not engine.idle:
            before = [(sequence.cached, list(sequence.tokens)) for sequence in sequences]
            try:
                engine.step()
            except RuntimeError:
                raised.append(1)
                assert [(sequence.cached, sequence.tokens) for sequence in sequences] == before
        return [sequence.tokens for sequence in sequences], raised

    error = RuntimeError("passing")
    undisturbed, never = replies([])
    assert replies([error, None, error, error, None, None, error]) == (undisturbed, 4 * [1])
    assert not never


def test_what_a_failed_forward_left_in_a_slot_does_not_reach_the_next_sequence(llama: PreTrainedModel) -> None:
    long, short, neighbour = prompts(50, 8, 60)
    alone = Sequence(short, Sampling(), 20)
    reply = run(Engine(llama, 2, 128, native=False), [alone])[alone]

    def fault(running: list[Sequence]) -> Exception | None:
        if poison not in running:
            return None
        for keys, values in engine.cache.modules.values():
            keys[poison.slot, :, : -(-50 // keys.shape[-1])] = values[poison.slot, :, :50] = torch.nan
        return RuntimeError("half done")

    engine = FaultyEngine(llama, fault, slots=2, native=False)
    poison, again = Sequence(long, Sampling(), 20), Sequence(short, Sampling(), 20)
    engine.add(poison)
    with pytest.raises(RuntimeError, match="half done"):
        engine.step()
    engine.cancel(poison)
    beside = Sequence(neighbour, Sampling(), 30)
    replies = run(engine, [again, beside])  # the one that is attended to as far as the other
    assert replies[again] == reply


def test_a_slot_that_was_used_before_gives_the_same_reply(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=1, context=128)
    long, short, again = (Sequence(prompt, Sampling(), 20) for prompt in [*prompts(90, 6), prompts(90, 6)[1]])
    run(engine, [long])
    fresh = Engine(llama, slots=1, context=128)
    assert run(engine, [short])[short] == run(fresh, [again])[again]


def test_a_sequence_ends_at_a_stop_token_its_limit_or_the_context(llama: PreTrainedModel) -> None:
    engine = Engine(llama, slots=3, context=64)
    (prompt,) = prompts(40)
    free = Sequence(prompt, Sampling(), 100)
    reply = run(engine, [free])[free]
    assert len(prompt) + len(reply) == 64
    endings = {}
    stopped = Sequence(prompt, Sampling(), 100, stop_ids=frozenset([reply[5]]))
    limited = Sequence(prompt, Sampling(), 3)
    full = Sequence(prompt, Sampling(), 100)
    for sequence in (stopped, limited, full):
        engine.add(sequence)
    while not engine.idle:
        endings.update({token.sequence: token.finish for token in engine.step() if token.finish})
    assert endings == {stopped: "stop", limited: "max_output_tokens", full: "context_length"}
    assert stopped.generated == reply.index(reply[5]) + 1


def test_a_model_whose_attention_cannot_be_replaced_is_refused() -> None:
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(UnsupportedModel):
        Engine(bloom.eval(), slots=2, context=64)


def test_a_model_with_layers_of_an_unknown_kind_is_refused_by_name(llama: PreTrainedModel) -> None:
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        Engine(model, slots=2, context=64)


def test_a_model_with_learned_positions_runs_beside_an_idle_slot_in_its_whole_context() -> None:
    model = tiny_model(GPT2Config(vocab_size=SHAPE["vocab_size"], n_positions=64, n_embd=32, n_layer=2, n_head=2))
    short, long = prompts(4, 40)
    expected = generated(model, long, 20)
    engine = Engine(model, slots=2, context=64)
    first, second = Sequence(short, Sampling(), 2), Sequence(long, Sampling(), 20)
    replies = run(engine, [first, second])  # the first one ends long before the second
    assert replies[second] == expected


def test_an_idle_slot_does_not_change_the_rope_of_others() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [9.0] * 8,
    }
    model = tiny_model(LlamaConfig(**SHAPE | {"max_position_embeddings": 128, "rope_parameters": rope}))
    short, long = prompts(4, 30)
    expected = generated(model, long, 20)
    engine = Engine(model, slots=2, context=64)
    second = Sequence(long, Sampling(), 20)
    assert run(engine, [Sequence(short, Sampling(), 2), second])[second] == expected


@both_attentions
def test_what_went_wrong_in_a_slot_does_not_reach_the_next_sequence(llama: PreTrainedModel, native: bool) -> None:
    long, short = prompts(50, 8)
    fresh = Engine(llama, slots=1, context=128, native=native)
    expected = Sequence(short, Sampling(), 20)
    reply = run(fresh, [expected])[expected]
    engine = Engine(llama, slots=1, context=128, native=native)
    overflown, again = Sequence(long, Sampling(), 20), Sequence(short, Sampling(), 20)
    engine.add(overflown)
    engine.step()
    with torch.inference_mode():
        for keys, values in engine.cache.modules.values():
            keys[0, :, : -(-50 // keys.shape[-1])] = values[0, :, :50] = torch.nan
    engine.cancel(overflown)
    assert run(engine, [again])[again] == reply
