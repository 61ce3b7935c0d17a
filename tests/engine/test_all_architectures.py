from __future__ import annotations

from contextlib import suppress

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.engine.architectures import EQUAL, NOT_BUILT, WINDOW, WINDOWED, architectures, config_of, verdict, written


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", architectures())
def test_replies_are_equal_to_those_of_transformers_or_the_model_is_refused_as_the_table_says(name: str) -> None:
    assert verdict(name) == written()[name]


def test_the_table_has_every_causal_language_model_of_transformers() -> None:
    verdicts = written()
    assert sorted(verdicts) == sorted(architectures())
    assert sum(verdicts.get(kind) == EQUAL for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= 100
    assert len(NOT_BUILT) < 12


@pytest.mark.filterwarnings("ignore")
def test_all_architectures_whose_window_is_off_by_default_are_tried_with_it() -> None:
    off = []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with suppress(StrictDataclassClassValidationError):  # a class that allows no window
            default, changed = (config_of(name).get_text_config(decoder=True) for name in (kind, kind + WINDOW))
            if kind not in NOT_BUILT and getattr(default, "sliding_window", 0) is None and changed.sliding_window:
                off.append(kind)
    assert off
    assert set(off) <= set(WINDOWED)
