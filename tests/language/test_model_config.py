from __future__ import annotations

from typing import Any

import pytest
from transformers import BloomConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from models.errors import SettingsError
from models.language.chat_template import ChatTemplate
from models.language.model_config import DEFAULT_CONTEXT, context_length, default_options, stop_token_ids
from models.options import Options
from models.settings import Settings
from tests.support.chat_templates import CHATML, GEMMA, HARMONY, MISTRAL, tokenizer_with
from tests.support.tiny import SHAPE, SPECIAL, tiny_llama, tiny_model

TINY_END = SPECIAL[2]  # a special token of every tiny tokenizer, whose name means the end of a turn


def llama_with(**config: Any) -> PreTrainedModel:
    return tiny_model(LlamaConfig(**SHAPE | config))


# The context


@pytest.mark.parametrize(
    ("limit", "setting", "expected"),
    [
        pytest.param(512, None, 512, id="all-of-a-short-one"),
        pytest.param(8192, None, DEFAULT_CONTEXT, id="a-part-of-a-long-one"),
        pytest.param(512, 256, 256, id="less-by-the-setting"),
        pytest.param(8192, 8192, 8192, id="more-by-the-setting"),
    ],
)
def test_the_context_follows_the_model_and_the_setting(limit: int, setting: int | None, expected: int) -> None:
    model = llama_with(max_position_embeddings=limit)
    assert context_length(model, Settings(context=setting)) == expected


def test_a_model_that_names_no_limit_gets_the_default_context() -> None:
    model = tiny_model(BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=2))
    assert context_length(model, Settings()) == DEFAULT_CONTEXT


@pytest.mark.parametrize("context", [513, 1024])
def test_a_context_larger_than_the_models_is_refused(llama: PreTrainedModel, context: int) -> None:
    with pytest.raises(
        SettingsError, match=f"^PARLEY_CONTEXT={context} is not allowed: the model can hold at most 512$"
    ):
        context_length(llama, Settings(context=context))


def test_a_longrope_model_has_its_short_context_unless_a_longer_one_is_set() -> None:
    factors = [1.0] * (SHAPE["head_dim"] // 2)
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": factors, "long_factor": factors}
    model = llama_with(rope_parameters=rope | {"original_max_position_embeddings": 128})
    assert context_length(model, Settings()) == 128
    assert context_length(model, Settings(context=256)) == 256
    scaled = {"original_max_position_embeddings": 128, "short_mscale": 1.0, "long_mscale": 1.2}
    with pytest.raises(SettingsError, match="128"):
        context_length(llama_with(rope_parameters=rope | scaled), Settings(context=256))


# Default options


def test_the_operators_options_come_before_the_models_and_ours() -> None:
    model = tiny_llama()
    model.generation_config.temperature, model.generation_config.top_k = 0.7, 20
    assert default_options(model, Settings(options={"temperature": 0.1})) == Options(temperature=0.1, top_k=20)


def test_options_of_the_model_that_are_out_of_bounds_are_ignored() -> None:
    model = tiny_llama()
    model.generation_config.repetition_penalty, model.generation_config.top_p = 5.0, 0.5
    assert default_options(model, Settings()) == Options(top_p=0.5)


def test_the_operator_can_set_options_that_no_model_has() -> None:
    options = {"instructions": "Be brief.", "max_output_tokens": 100}
    assert default_options(tiny_llama(), Settings(options=options)) == Options().updated(options)


# Tokens that end a reply


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        pytest.param(7, {2, 7}, id="one"),
        pytest.param([7, 8], {2, 7, 8}, id="several"),
        pytest.param(None, {2}, id="none"),
        pytest.param(2, {2}, id="same-as-the-tokenizer"),
    ],
)
def test_stop_tokens_come_from_the_model_and_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, named: int | list[int] | None, expected: set[int]
) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = named
    assert stop_token_ids(ChatTemplate.of(tokenizer), model) == expected


def stop_tokens(tokenizer: PreTrainedTokenizerBase, *named: str) -> set[str]:
    """The tokens that end a reply of a model whose generation config names some."""
    model = tiny_llama()
    ids = tokenizer.get_vocab()
    model.generation_config.eos_token_id = [ids[name] for name in named]
    names = {token_id: name for name, token_id in ids.items()}
    return {names[token_id] for token_id in stop_token_ids(ChatTemplate.of(tokenizer), model)}


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>")], ids=["chatml", "gemma"]
)
def test_a_model_whose_config_names_only_the_end_of_the_text_stops_at_the_end_of_a_turn(
    template: str, end: str
) -> None:
    assert stop_tokens(tokenizer_with(template, added=[end]), "</s>") == {"</s>", end, TINY_END}


def test_special_tokens_that_end_a_turn_by_their_name_end_a_reply() -> None:
    ends = ["<|eot_id|>", "<|eom_id|>", TINY_END, "<|end_of_turn|>", "<|endoftext|>", "<turn|>"]
    others = ["<|start_header_id|>", "<|python_tag|>", "<think>", "</think>", "<|tool_call|>", "<|fim_middle|>"]
    assert stop_tokens(tokenizer_with(MISTRAL, [*ends, *others]), "</s>") == {"</s>", *ends}


def test_a_name_that_is_no_special_token_does_not_end_a_reply() -> None:
    assert stop_tokens(tokenizer_with(MISTRAL, added=["<|eot_id|>"]), "</s>") == {"</s>", TINY_END}


def test_the_end_of_the_reasoning_of_gpt_oss_does_not_end_a_reply() -> None:
    special = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"]
    tokenizer = tokenizer_with(HARMONY, special, eos="<|return|>")
    assert stop_tokens(tokenizer, "<|return|>", "<|call|>") == {"<|return|>", "<|call|>", "<|endoftext|>"}
