"""How the positions of a GGUF file's model are scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.errors import ModelError
from models.language.gguf.gguf_file import GGUFFile
from tests.support.gguf_models import tiny_model, write_model

LLAMA3 = {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope_of(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the rotary embeddings that a file with these settings gives."""
    write_model(path / "model.gguf", tiny_model("llama"), "llama", **metadata)
    parameters: dict[str, Any] = GGUFFile(path / "model.gguf").config().rope_parameters
    return parameters


def test_the_factors_of_llama_3_1_divide_the_frequencies_as_transformers_does(tmp_path: Path) -> None:
    rope = LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 8192}
    original = tiny_model("llama", rope_parameters=rope, head_dim=128, max_position_embeddings=131072)
    file = GGUFFile(write_model(tmp_path / "model.gguf", original, "llama"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(file.config())  # type: ignore[no-untyped-call]
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](original.config)
    frequencies = file.sources(model)["model.rotary_emb.inv_freq"].values()
    torch.testing.assert_close(frequencies, expected)
    unscaled = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert (unscaled[-1] / frequencies[-1]).item() == pytest.approx(8)


def test_factors_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    rope = LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 64}
    original = tiny_model("llama", rope_parameters=rope)
    metadata: dict[str, Any] = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    file = GGUFFile(write_model(tmp_path / "model.gguf", original, "llama", **metadata))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(file.config())  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="its rotary positions are scaled in two ways"):
        file.sources(model)


def test_a_base_that_is_not_in_the_file_is_llama_cpps(tmp_path: Path) -> None:
    assert rope_of(tmp_path, {"rope.freq_base": None})["rope_theta"] == 10000.0


def test_a_linear_scaling_has_its_factor(tmp_path: Path) -> None:
    rope = rope_of(tmp_path, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def test_a_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    assert rope_of(tmp_path, {"rope.scale_linear": 2.0})["rope_type"] == "linear"


def test_no_scaling_and_a_factor_of_one_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    none = rope_of(tmp_path / "a", {"rope.scaling.type": "none"})
    one = rope_of(tmp_path / "b", {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0})
    assert none["rope_type"] == one["rope_type"] == "default"


def test_yarn_takes_all_its_numbers_from_the_file(tmp_path: Path) -> None:
    metadata = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0,
        "rope.scaling.yarn_attn_factor": 1.5,
    }
    rope = rope_of(tmp_path, metadata)
    expected = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0}
    assert rope | expected | {"rope_type": "yarn", "attention_factor": 1.5} == rope


def test_yarn_without_them_is_the_papers(tmp_path: Path) -> None:
    rope = rope_of(tmp_path, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})
    assert rope["attention_factor"] == pytest.approx(1.1386294)
    assert (rope["beta_fast"], rope["beta_slow"], rope["original_max_position_embeddings"]) == (32.0, 1.0, 128)


def test_a_scaling_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rope\.scaling\.type is spiral"):
        rope_of(tmp_path, {"rope.scaling.type": "spiral", "rope.scaling.factor": 2.0})


def test_phi_3_gets_both_lists_of_factors_and_the_context_where_the_short_ones_end(tmp_path: Path) -> None:
    short, long = [1.0 + index / 10 for index in range(8)], [2.0 + index for index in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    original = tiny_model(
        "phi3",
        rope_parameters=rope | {"original_max_position_embeddings": 32, "factor": 4.0},
        original_max_position_embeddings=32,
    )
    config = GGUFFile(write_model(tmp_path / "model.gguf", original, "phi3")).config()
    parameters = config.rope_parameters
    assert parameters["rope_type"] == "longrope"
    assert parameters["short_factor"] == pytest.approx(short)
    assert parameters["long_factor"] == pytest.approx(long)
    assert parameters["attention_factor"] == pytest.approx(1.1832160)  # sqrt(1 + ln 4 / ln 32)
    assert parameters["original_max_position_embeddings"] == 32
    assert config.max_position_embeddings == 128


@pytest.mark.parametrize(("head_dim", "rotated"), [(80, 32), (64, 16), (100, 58), (16, 16)])
def test_the_share_of_a_head_that_is_rotated_is_exact(tmp_path: Path, head_dim: int, rotated: int) -> None:
    metadata = {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": rotated}
    share = rope_of(tmp_path, metadata)["partial_rotary_factor"]
    assert int(head_dim * share) == rotated
