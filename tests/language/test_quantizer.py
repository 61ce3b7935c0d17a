from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, HrmTextConfig, PreTrainedModel

from models.engine.quantization import Place, QuantizedLinear, quantizable, shares
from models.engine.quantized_weight import QuantizedWeight
from models.errors import ModelError
from models.language.quantizer import ParleyConfig
from tests.support.tiny import SHAPE, tiny_llama, tiny_model

pytestmark = pytest.mark.compiler  # quantized weights need the kernels

UP = "model.layers.0.mlp.up_proj.weight"


def rounded(name: str, place: Place, tensor: Tensor) -> QuantizedWeight:
    return QuantizedWeight.of_numbers(place.oriented(tensor).contiguous())


def load(folder: Path, config: ParleyConfig) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model and what transformers says about its weights."""
    options = {"dtype": torch.float32, "device_map": "cpu", "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    return loaded[0], loaded[1]


def test_each_parameter_is_quantized_once_with_its_name_and_place(tmp_path: Path) -> None:
    original = tiny_llama()
    original.save_pretrained(tmp_path)
    seen = list[tuple[str, tuple[int, ...]]]()

    def quantize(name: str, place: Place, tensor: Tensor) -> QuantizedWeight:
        seen.append((name, place.shape))
        assert torch.equal(tensor, original.get_parameter(name))
        return rounded(name, place, tensor)

    places = quantizable(original)
    model, found = load(tmp_path, ParleyConfig(quantize, places))
    assert sorted(seen) == sorted((name, place.shape) for name, place in places.items())
    assert set(shares(model)) == {"Q8_0", "float32"}
    assert not found["missing_keys"]


def test_only_the_named_parameters_are_quantized(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model, _ = load(tmp_path, ParleyConfig(rounded, [UP]))
    assert [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)] == [
        UP.removesuffix(".weight")
    ]


def test_a_stored_tensor_that_becomes_several_weights_is_quantized_in_parts(tmp_path: Path) -> None:
    original = tiny_model(HrmTextConfig(**SHAPE | {"H_cycles": 1, "L_cycles": 1}))
    original.save_pretrained(tmp_path)
    places = quantizable(original)
    model, found = load(tmp_path, ParleyConfig(rounded, places))
    assert not found["missing_keys"]
    assert set(shares(model)) == {"Q8_0", "float32"}
    for name in places:
        module = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(module, QuantizedLinear):
            expected = rounded(name, places[name], original.get_parameter(name).detach())
            weight = module.weights[0]
            assert isinstance(weight, QuantizedWeight)
            assert torch.equal(weight.panels, expected.panels)


def test_the_first_error_stops_the_load_as_it_is_and_logs_no_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    calls = list[str]()

    def fail(name: str, place: Place, tensor: Tensor) -> QuantizedWeight:
        calls.append(name)
        raise ModelError(f"{name} is wrong")

    with pytest.raises(ModelError) as raised:
        load(tmp_path, ParleyConfig(fail, quantizable(tiny_llama())))
    assert calls == [str(raised.value).removesuffix(" is wrong")]
    assert "LOAD REPORT" not in capsys.readouterr().err
    assert not caplog.records


def test_a_loaded_model_forgets_who_quantized_it(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model, _ = load(tmp_path, ParleyConfig(rounded, [UP]))
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
