from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.errors import ModelError
from models.language.packed.checkpoint import PackedCheckpoint, quantization_of
from tests.support.packed import pack_fp8, pack_gptq

WEIGHT = "model.layers.0.q_proj.weight"
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MIXED: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}


def checkpoint(config: dict[str, Any], tensors: dict[str, Tensor]) -> PackedCheckpoint:
    return PackedCheckpoint(config, tensors, tensors.__getitem__)


def test_packed_weights_have_the_names_of_plain_ones() -> None:
    tensors, expected = pack_gptq(WEIGHT, 4, 64, 96, 32)
    norm, bias = torch.rand(64), torch.rand(64)
    found = checkpoint(GPTQ, tensors | {"model.norm.weight": norm, "model.layers.0.q_proj.bias": bias})
    assert found.names == {WEIGHT, "model.norm.weight", "model.layers.0.q_proj.bias"}
    assert torch.equal(found.tensor(WEIGHT), expected)
    assert found.tensor("model.norm.weight") is norm


def test_weights_that_are_not_packed_stay_as_they_are() -> None:
    head, scale = torch.rand(8, 4).bfloat16(), torch.rand(4)
    found = checkpoint(FP8, pack_fp8(WEIGHT, 128, 128, 128)[0] | {"lm_head.weight": head, "layer_scale": scale})
    assert found.names == {WEIGHT, "lm_head.weight", "layer_scale"}
    assert found.tensor("lm_head.weight") is head
    assert found.tensor("layer_scale") is scale


def test_scales_of_activations_and_of_the_cache_are_left_out() -> None:
    tensors, _ = pack_fp8(WEIGHT, 128, 128, 128)
    extra = dict.fromkeys(
        ["a.q_proj.input_scale", "a.q_proj.input_global_scale", "a.k_scale", "a.k_proj.output_scale"], torch.rand(1)
    )
    assert checkpoint(FP8, tensors | extra).names == {WEIGHT}


def test_nothing_is_read_before_it_is_needed() -> None:
    read = list[str]()

    def note(name: str) -> Tensor:
        read.append(name)
        return torch.rand(4)

    found = PackedCheckpoint(GPTQ, ["a.qweight", "a.qzeros", "a.scales", "b.weight"], note)
    assert read == []
    found.tensor("b.weight")
    assert read == ["b.weight"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        pytest.param({"quant_method": "exl3"}, "exl3", id="method"),
        pytest.param({}, "None", id="none"),
        pytest.param(GPTQ | {"bits": 5}, "gptq (, 5 bits)", id="bits"),
        pytest.param(GPTQ | {"checkpoint_format": "marlin"}, "gptq (marlin, 4 bits)", id="format"),
        pytest.param({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "modelopt (NVFP4_AWQ)", id="algorithm"),
        pytest.param(
            MIXED | {"quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4_AWQ"}}},
            "modelopt (NVFP4_AWQ)",
            id="layer",
        ),
        pytest.param(GPTQ | {"pack_dtype": "int64"}, "gptq in int64", id="words"),
        pytest.param({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq (gemv, 4 bits)", id="version"),
        pytest.param(
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors with sparse weights",
            id="sparse",
        ),
        pytest.param(
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "compressed-tensors with transformed weights",
            id="transformed",
        ),
    ],
)
def test_formats_that_are_not_read_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as raised:
        checkpoint(config, {})
    assert str(raised.value).startswith(f"its weights are quantized with {named}, which Parley does not read: ")
    assert len(str(raised.value).splitlines()) == 1


def test_a_packed_weight_without_its_scale_is_refused() -> None:
    tensors, _ = pack_fp8(WEIGHT, 128, 128, 128)
    del tensors[f"{WEIGHT}_scale_inv"]
    with pytest.raises(ModelError, match=r"q_proj\.weight is packed as torch\.float8_e4m3fn without what is needed"):
        checkpoint(FP8, tensors).tensor(WEIGHT)


def test_a_packed_weight_of_wrong_shapes_is_refused() -> None:
    tensors, _ = pack_gptq(WEIGHT, 4, 64, 96, 32)
    tensors["model.layers.0.q_proj.qweight"] = tensors["model.layers.0.q_proj.qweight"][:, :5]
    with pytest.raises(ModelError, match=r"q_proj\.weight cannot be unpacked from gptq: "):
        checkpoint(GPTQ, tensors).tensor(WEIGHT)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"model_type": "llama"}, None, id="plain"),
        pytest.param({"quantization_config": GPTQ}, GPTQ, id="packed"),
        pytest.param({"quantization_config": None}, None, id="null"),
        pytest.param({"text_config": {"quantization_config": GPTQ}}, GPTQ, id="in-the-text-model"),
    ],
)
def test_the_configuration_says_whether_weights_are_packed(
    config: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert quantization_of(config) == expected


@pytest.mark.parametrize("algorithm", ["FP8", "MXFP8", "NVFP4", None])
def test_algorithms_of_modelopt_are_read_for_all_layers_and_for_each(algorithm: str | None) -> None:
    layers = {"quantized_layers": {"a": {"quant_algo": algorithm}, "b": {"quant_algo": "FP8"}}}
    for config in ({"quant_method": "modelopt", "quant_algo": algorithm}, MIXED | layers):
        tensors = {WEIGHT: torch.full((2, 32), 3.0).to(torch.float8_e4m3fn), f"{WEIGHT}_scale": torch.tensor(0.5)}
        assert checkpoint(config, tensors).tensor(WEIGHT).eq(1.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_that_somebody_has_unpacked_is_not_scaled_again(dtype: torch.dtype) -> None:
    weight = torch.rand(4, 32).to(dtype)
    tensors = {WEIGHT: weight, f"{WEIGHT}_scale": torch.full((4, 1), 0.01)}
    assert (
        checkpoint({"quant_method": "compressed-tensors", "format": "dense"}, tensors)
        .tensor(WEIGHT)
        .equal(weight.float())
    )
