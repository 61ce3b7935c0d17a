from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from models.engine.architecture import check_architecture
from models.engine.engine import Engine
from models.engine.recovery import StepRecovery
from models.engine.recurrent_layer import SCAN, RecurrentLayer
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence
from models.errors import CompilationError, UnsupportedModelError
from tests.support.faulty import faulty_engine, make_engine, slots_of
from tests.support.greedy import greedy_misses
from tests.support.recurrent_models import FAMILIES, OTHERS, tiny_recurrent
from tests.support.tiny import prompts

GREEDY = SamplingParams()


def run(engine: Engine, sequences: Iterable[Sequence], every: int = 1) -> list[Sequence]:
    """Let sequences join, one every so many steps as soon as a slot is free, until all have ended."""
    sequences = list(sequences)
    waiting, steps, recovery = list(sequences), 0, StepRecovery(engine)
    while waiting or not engine.idle:
        if waiting and engine.scheduler.free_slots and steps % every == 0:
            engine.add(waiting.pop(0))
        for sequence, token in recovery.step():
            assert token, f"{sequence} has failed"
        steps += 1
    return sequences


def recurrent_layers(model: nn.Module) -> list[RecurrentLayer]:
    return [module for module in model.modules() if isinstance(module, RecurrentLayer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_those_of_the_models_own_forward(family: str) -> None:
    """Prompts in several chunks, single tokens as prompts, sequences that start in the middle of others, used slots."""
    engine = make_engine(tiny_recurrent(family), slots=4, context=96, prefill_chunk=7)
    sequences = run(engine, [Sequence(prompt, GREEDY, 14) for prompt in prompts(5, 40, 17, 1, 50, 8, 1, 21)], every=3)
    assert greedy_misses(tiny_recurrent(family), sequences) == [0] * 8
    assert len({token for sequence in sequences for token in sequence.tokens[-14:]}) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_failed_steps_cancelled_sequences_and_next_turns_change_no_reply(family: str) -> None:
    forwards = 0

    def fault(sequences: list[Sequence]) -> Exception | None:
        nonlocal forwards
        forwards += 1
        return RuntimeError("temporary") if len(sequences) > 1 and forwards % 4 == 0 else None

    engine = faulty_engine(tiny_recurrent(family), fault, slots=3, native=False)
    first, cancelled, second = (Sequence(prompt, GREEDY, 12) for prompt in prompts(21, 30, 40))
    for sequence in (first, cancelled):
        engine.add(sequence)
        StepRecovery(engine).step()
    engine.cancel(cancelled)
    run(engine, [second], every=2)
    (extra,) = prompts(9)
    turns = [Sequence(sequence.tokens + extra, GREEDY, 12) for sequence in (second, first)]
    assert greedy_misses(tiny_recurrent(family), [first, second, *run(engine, turns)]) == [0] * 4
    assert [turn.reused for turn in turns] == [len(turn.prompt) - 10 for turn in turns]  # all but the last token
    assert forwards > 12


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "mamba", "qwen3_5_text", "zaya"])
def test_a_prompt_continues_from_a_copy_of_a_state_while_its_source_goes_on(family: str) -> None:
    engine = make_engine(tiny_recurrent(family), slots=3, context=96, prefill_chunk=16)
    (prompt, extra), source = prompts(30, 9), Sequence(prompts(30)[0], GREEDY, 20)
    engine.add(source)
    for _ in range(4):
        engine.step()
    whole, part = Sequence([*source.tokens, *extra], GREEDY, 12), Sequence([*prompt, *extra], GREEDY, 12)
    run(engine, [whole, part])
    assert (whole.reused, part.reused) == (33, 0)  # a state cannot go back to an earlier token
    assert greedy_misses(tiny_recurrent(family), [source, whole, part]) == [0] * 3


def test_the_oldest_sequences_go_on_after_the_slots_were_halved() -> None:
    engine = faulty_engine(
        tiny_recurrent("qwen3_5_text"), lambda some: MemoryError() if len(some) > 2 else None, slots=4
    )
    sequences = [Sequence(prompt, GREEDY, 12) for prompt in prompts(20, 40, 9)]
    for sequence in sequences:
        engine.add(sequence)
    outcomes = [outcome for _ in range(20) for outcome in StepRecovery(engine).step()]
    assert [sequence for sequence, token in outcomes if not token] == sequences[2:]
    assert greedy_misses(tiny_recurrent("qwen3_5_text"), sequences[:2]) == [0, 0]
    assert [sequence.generated for sequence in sequences[:2]] == [12, 12]


def test_nan_in_a_state_does_not_reach_the_next_sequence() -> None:
    engine = make_engine(tiny_recurrent("mamba2"), slots=1, context=96)
    broken, *others = (Sequence(prompt, GREEDY, 12) for prompt in prompts(30, 20, 1))
    engine.add(broken)
    engine.step()
    with torch.inference_mode():
        for states in slots_of(engine).states.layers:
            for state in states.values():
                state.fill_(torch.nan)
    engine.cancel(broken)
    assert greedy_misses(tiny_recurrent("mamba2"), run(engine, others)) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_reply_starts_as_in_transformers(dtype: torch.dtype) -> None:
    engine = make_engine(tiny_recurrent("qwen3_5_text").to(dtype), slots=2, context=96)  # type: ignore[arg-type]
    (sequence,) = run(engine, [Sequence(prompts(20)[0], GREEDY, 1)])
    assert greedy_misses(tiny_recurrent("qwen3_5_text").to(dtype), [sequence]) == [0]  # type: ignore[arg-type]


def test_streams_that_decode_are_one_call_of_a_layer() -> None:
    engine = make_engine(tiny_recurrent("mamba2"), slots=4, context=96)
    sequences = [Sequence(prompt, GREEDY, 20) for prompt in prompts(9, 8, 7, 6)]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    engine.cancel(sequences[1])  # slots need not be neighbours
    sizes: list[tuple[int, ...]] = []
    layer = recurrent_layers(engine.runner.model)[0].layer
    layer.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[:2])))
    engine.step()
    assert sizes == [(3, 1)]


@pytest.mark.parametrize(("family", "at_once"), [("mamba", False), ("mamba2", True), ("qwen3_5_text", True)])
def test_a_layer_that_ignores_a_state_before_several_tokens_gets_them_one_by_one(family: str, at_once: bool) -> None:
    engine = make_engine(tiny_recurrent(family), slots=1, context=96)
    assert {layer.continues for layer in recurrent_layers(engine.runner.model)} == {at_once}


def test_a_layer_does_not_pad_a_short_chunk_of_a_prompt_to_the_length_of_its_scan() -> None:
    engine = make_engine(tiny_recurrent("mamba2", chunk_size=256), slots=1, context=96, prefill_chunk=7)
    assert {layer.layer.chunk_size for layer in recurrent_layers(engine.runner.model)} == {SCAN}
    assert greedy_misses(tiny_recurrent("mamba2"), run(engine, [Sequence(prompts(70)[0], GREEDY, 9)])) == [0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_check_accepts_a_family_that_is_right(family: str) -> None:
    check_architecture(tiny_recurrent(family))


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_that_keeps_states_in_a_way_of_its_own_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot run on this engine") as refusal:
        check_architecture(tiny_recurrent(family))
    assert "\n" not in str(refusal.value)


class FadingMixer(Mamba2Mixer):
    """Loses a part of its state before several tokens."""

    fades_before_several = True

    def forward(self, hidden_states: Tensor, cache_params: Any = None, **kwargs: Any) -> Any:
        state = None if cache_params is None else cache_params.get_recurrent_state(self.layer_idx)
        if state is not None and (hidden_states.shape[1] > 1) == self.fades_before_several:
            state.mul_(0.9)
        return super().forward(hidden_states, cache_params=cache_params, **kwargs)


class FadingMixerOfSingleTokens(FadingMixer):
    """Loses a part of its state before a single token."""

    fades_before_several = False


class FadingMamba2(Mamba2ForCausalLM):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any, mixer: type[Mamba2Mixer] = FadingMixer) -> None:
        super().__init__(config)
        for index, block in enumerate(self.backbone.layers):
            block.mixer = mixer(config, index)


class FadingMamba2OfSingleTokens(FadingMamba2):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any) -> None:
        super().__init__(config, FadingMixerOfSingleTokens)


@pytest.mark.parametrize("kind", [FadingMamba2, FadingMamba2OfSingleTokens])
def test_the_start_check_refuses_a_layer_that_does_not_continue_from_its_state(kind: type[FadingMamba2]) -> None:
    with pytest.raises(UnsupportedModelError, match="their own sequence"):
        check_architecture(kind(tiny_recurrent("mamba2").config))


def test_a_model_with_recurrent_layers_is_not_compiled(tmp_path: Path) -> None:
    engine = make_engine(tiny_recurrent("lfm2"), slots=2, context=64)
    with pytest.raises(CompilationError, match="recurrent"):
        engine.runner.compile(tmp_path)
    assert slots_of(engine).program is None


def test_a_second_engine_on_a_model_has_states_of_its_own() -> None:
    model = tiny_recurrent("mamba2")
    run(make_engine(model, slots=2, context=64), [Sequence(prompts(9)[0], GREEDY, 5)])
    engine = make_engine(model, slots=3, context=64)
    assert len(slots_of(engine).states.layers) == 3
    assert not any(
        isinstance(module.layer, RecurrentLayer) for module in model.modules() if isinstance(module, RecurrentLayer)
    )
    assert greedy_misses(tiny_recurrent("mamba2"), run(engine, [Sequence(prompts(9)[0], GREEDY, 5)])) == [0]
