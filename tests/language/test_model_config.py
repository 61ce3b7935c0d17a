from __future__ import annotations

from typing import Any

import pytest
from transformers import BloomConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from models.errors import SettingsError
from models.language.model_config import DEFAULT_CONTEXT, context_length, default_options, stop_token_ids
from models.options import Options
from models.settings import Settings
from tests.support.tiny import SHAPE, tiny_llama, tiny_model


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


def test_a_longrope_model_is_used_up_to_its_original_context() -> None:
    factors = [1.0] * (SHAPE["head_dim"] // 2)
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": factors, "long_factor": factors}
    model = llama_with(rope_parameters=rope | {"original_max_position_embeddings": 128})
    assert context_length(model, Settings()) == 128
    with pytest.raises(SettingsError, match="128"):
        context_length(model, Settings(context=256))


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
    assert stop_token_ids(tokenizer, model) == expected
