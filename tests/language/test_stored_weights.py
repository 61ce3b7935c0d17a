from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.errors import ModelError
from models.language.stored_weights import StoredWeight, stored_weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(1)}


def write(folder: Path, files: dict[str, list[str]], **config: Any) -> Path:
    """Write some tensors to each file, an index if there are several, and a configuration."""
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def values(folder: Path) -> dict[str, Tensor]:
    return {name: weight[...] for name, weight in stored_weights(folder).items()}


def test_one_file_has_all_weights(tmp_path: Path) -> None:
    found = values(write(tmp_path, {"model.safetensors": ["a", "b", "c"]}))
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_an_index_says_in_which_file_each_weight_is(tmp_path: Path) -> None:
    found = values(write(tmp_path, {"one.safetensors": ["c"], "two.safetensors": ["a", "b"]}))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_whole_file_counts_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": ["a"], "two.safetensors": ["b"]})
    write(tmp_path, {"model.safetensors": ["c"]})
    assert values(tmp_path).keys() == {"c"}


def test_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": ["a"], "two.safetensors": ["b"], "three.safetensors": ["c"]})
    (tmp_path / "one.safetensors").unlink()
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"2 files are missing in .*, first one\.safetensors: download them"):
        stored_weights(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'], ids=["cut", "empty", "number"])
def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"one.safetensors": ["a"], "two.safetensors": ["b"]})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is damaged: download it again"):
        stored_weights(tmp_path)


def test_a_folder_without_safetensors_has_none(tmp_path: Path) -> None:
    assert stored_weights(write(tmp_path, {})) == {}


def test_packed_weights_without_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {}, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"it has no weights: model\.safetensors is missing"):
        stored_weights(tmp_path)


def test_packed_weights_are_unpacked_when_they_are_read(tmp_path: Path) -> None:
    fp8 = {"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.full((1, 1), 0.5)}
    write(tmp_path, {}, quantization_config={"quant_method": "fp8", "weight_block_size": [4, 4]})
    save_file(fp8, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = values(tmp_path)
    assert found.keys() == {"x.weight"}
    assert torch.equal(found["x.weight"], torch.full((4, 4), 0.5))


def write_modelopt(folder: Path, quantization: Any) -> None:
    """A weight in FP8 that only ModelOpt's own file tells of."""
    write(folder, {})
    fp8 = {"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x.weight_scale": torch.tensor(0.5)}
    save_file(fp8, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))


def test_weights_of_modelopt_without_an_entry_in_the_configuration_are_unpacked(tmp_path: Path) -> None:
    write_modelopt(tmp_path, {"quant_algo": "FP8", "kv_cache_quant_algo": None})
    found = values(tmp_path)
    assert found.keys() == {"x.weight"}
    assert torch.equal(found["x.weight"], torch.full((4, 4), 0.5))


def test_an_algorithm_of_modelopt_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    write_modelopt(tmp_path, {"quant_algo": "W4A16_AWQ"})
    with pytest.raises(ModelError, match=r"are quantized with modelopt \(W4A16_AWQ\), which Parley does not read"):
        stored_weights(tmp_path)


@pytest.mark.parametrize("quantization", [None, [], 3], ids=str)
def test_a_damaged_file_of_modelopt_is_refused(tmp_path: Path, quantization: Any) -> None:
    write_modelopt(tmp_path, quantization)
    with pytest.raises(ModelError, match=r"hf_quant_config\.json is damaged: download it again"):
        stored_weights(tmp_path)


def test_numbers_that_need_scales_are_refused_when_they_are_read(tmp_path: Path) -> None:
    write_modelopt(tmp_path, {})
    (tmp_path / "hf_quant_config.json").unlink()
    weights = stored_weights(tmp_path)
    with pytest.raises(ModelError, match=r"^x\.weight is packed as torch\.float8_e4m3fn without what is needed"):
        weights["x.weight"][...]


def test_tables_of_integers_stay_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, {})
    table = {"positions": torch.arange(5), "mask": torch.tensor([True, False])}
    save_file(table, tmp_path / "model.safetensors")
    found = values(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in table.items())


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "fp8"}}], ids=["plain", "packed"])
def test_a_file_that_is_replaced_between_two_weights_is_told(tmp_path: Path, config: dict[str, Any]) -> None:
    weights = stored_weights(write(tmp_path, {"model.safetensors": ["a", "b"]}, **config))
    assert torch.equal(weights["a"][...], TENSORS["a"])
    save_file({"a": TENSORS["a"] * 0}, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors has changed while it was read: start again"):
        weights["b"][...]


def test_a_weight_is_read_only_when_it_is_indexed() -> None:
    read = list[int]()

    def once() -> Tensor:
        read.append(1)
        return torch.zeros(2)

    weight = StoredWeight(once)
    assert not read
    assert torch.equal(weight[...], torch.zeros(2))
    assert read == [1]


def test_no_file_stays_mapped(tmp_path: Path) -> None:
    """Pages of a mapped file would count as memory of the process."""
    file = write(tmp_path, {"model.safetensors": ["a"]}) / "model.safetensors"
    weight = stored_weights(tmp_path)["a"][...]
    assert torch.equal(weight, TENSORS["a"])
    assert str(file) not in Path("/proc/self/maps").read_text()
