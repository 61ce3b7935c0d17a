from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from models.errors import ModelError
from models.language.loader import load
from models.settings import Settings
from tests.support.packed import fp4_values, integers, pack_awq, pack_compressed, pack_fp4, pack_fp8, pack_gptq
from tests.support.tiny import tiny_gpt_oss, tiny_llama, tiny_tokenizer

Pack = Callable[[str, int, int], tuple[dict[str, Tensor], Tensor]]

FORMATS: dict[str, tuple[dict[str, Any], Pack]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        lambda name, outputs, inputs: pack_gptq(name, 4, outputs, inputs, 32),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        lambda name, outputs, inputs: pack_awq(name, outputs, inputs, 32),
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [48, 48]},
        lambda name, outputs, inputs: pack_fp8(name, outputs, inputs, 48),
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda name, outputs, inputs: pack_compressed(name, 4, outputs, inputs, 32, False),
    ),
}


@pytest.fixture(autouse=True)
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))


def save(folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Save a model, but these tensors as its weights and this as its quantization_config."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(settings))


def loaded(folder: Path) -> PreTrainedModel:
    return load(Settings(model=str(folder), device="cpu", quantize="none"), folder / "cache")[1]


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_with_packed_linears_is_loaded(tmp_path: Path, name: str) -> None:
    config, pack = FORMATS[name]
    torch.manual_seed(0)
    model = tiny_llama()
    tensors, expected = dict[str, Tensor](), dict[str, Tensor]()
    for weight, tensor in model.state_dict().items():
        if weight.endswith("_proj.weight"):
            packed, expected[weight] = pack(weight, *tensor.shape)
            tensors |= packed
        else:
            tensors[weight] = expected[weight] = tensor
    save(tmp_path, model, tensors, config)
    found = loaded(tmp_path)
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[weight], tensor) for weight, tensor in expected.items())
    assert found.generation_config.eos_token_id == 2
    assert found.dtype == torch.float32


def test_the_experts_of_gpt_oss_are_unpacked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_gpt_oss()
    tensors, expected = dict(model.state_dict()), dict[str, Tensor]()
    for weight in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(weight).shape
        numbers = integers(4, experts, outputs, inputs // 32, 32)
        tensors[f"{weight}_blocks"] = pack_fp4(numbers)
        tensors[f"{weight}_scales"] = torch.full(numbers.shape[:3], 126, dtype=torch.uint8)
        expected[weight] = fp4_values(numbers).flatten(2).transpose(1, 2) / 2
    save(tmp_path, model, tensors, {"quant_method": "mxfp4"})
    state = loaded(tmp_path).state_dict()
    assert expected
    assert all(torch.equal(state[weight], tensor) for weight, tensor in expected.items())


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    model = tiny_llama()
    save(tmp_path, model, dict(model.state_dict()), FORMATS["fp8"][0])
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in {*places.values()}:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(loaded(tmp_path).get_parameter("lm_head.weight"), tensors["lm_head.weight"])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 files are missing in .*, first model-00002-of-00002\.safetensors"):
        loaded(tmp_path)


def test_a_format_that_is_not_read_stops_the_start(tmp_path: Path) -> None:
    model = tiny_llama()
    save(tmp_path, model, dict(model.state_dict()), {"quant_method": "exl3", "bits": 4})
    with pytest.raises(
        ModelError, match=f"PARLEY_MODEL={tmp_path} cannot be loaded: its weights are quantized with exl3"
    ):
        loaded(tmp_path)


def test_a_missing_weight_stops_the_start(tmp_path: Path) -> None:
    model = tiny_llama()
    tensors = dict(model.state_dict())
    del tensors["model.norm.weight"]
    save(tmp_path, model, tensors, FORMATS["fp8"][0])
    with pytest.raises(ModelError, match=r"1 weights are missing, first model\.norm\.weight"):
        loaded(tmp_path)
