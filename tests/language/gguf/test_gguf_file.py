"""Whole GGUF files: split ones, incomplete ones, and ones that Parley cannot run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.errors import ModelError
from models.language.gguf.gguf_file import GGUFFile
from models.language.gguf.header import read_header
from tests.language.gguf.test_architectures import TOKENS, read_back
from tests.support.gguf_models import tiny_model, write_gguf, write_model


def split(path: Path, parts: int) -> list[Path]:
    """Split a file as llama.cpp does: the settings are in the first part, and the tensors spread over all."""
    header = read_header(path)
    names = list(header.tensors)
    paths = [path.with_name(f"{path.stem}-{number:05}-of-{parts:05}.gguf") for number in range(1, parts + 1)]
    for number, part in enumerate(paths):
        writer = GGUFWriter(part, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(names))
        for key, value in header.metadata.items():
            if number == 0 and key != "general.architecture":
                kind = writer.add_array if isinstance(value, list) else writer.add_float32
                (writer.add_uint32 if isinstance(value, int) else kind)(key, value)
        for name in names[number::parts]:
            writer.add_tensor(name, header.tensors[name].values().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return paths


def rewrite(
    path: Path, remove: str = "", add: Mapping[str, torch.Tensor] = {}, metadata: Mapping[str, Any] = {}
) -> Path:
    """Write a file again, without some tensors, with others, with other settings."""
    header = read_header(path)
    tensors = {name: tensor.values() for name, tensor in header.tensors.items() if not remove or remove not in name}
    arrays = {name: tensor.numpy() for name, tensor in (tensors | dict(add)).items()}
    return write_gguf(path, header.metadata | dict(metadata), arrays)


def empty_model(file: GGUFFile) -> PreTrainedModel:
    """A model of the file's configuration, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(file.config())  # type: ignore[no-any-return,no-untyped-call]


@pytest.fixture
def original() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def path(original: PreTrainedModel, tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", original, "llama")


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_of_a_split_file_stands_for_all(original: PreTrainedModel, path: Path, given: int) -> None:
    parts = split(path, 3)
    with torch.inference_mode():
        expected, logits = original(input_ids=TOKENS).logits, read_back(parts[given])(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, expected)


def test_a_part_that_is_missing_is_named(path: Path) -> None:
    parts = split(path, 3)
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"is one of 3 parts, and beside it is no model-00002-of-00003\.gguf"):
        GGUFFile(parts[0])


def test_a_part_with_another_name_is_refused(path: Path) -> None:
    renamed = split(path, 3)[0].rename(path.with_name("renamed.gguf"))
    with pytest.raises(ModelError, match=r"is part 1 of 3, and its name does not end in -00001-of-00003\.gguf"):
        GGUFFile(renamed)


def test_a_part_with_the_name_of_another_one_is_refused(path: Path) -> None:
    parts = split(path, 3)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.gguf is not part 2 of 3, as its name says"):
        GGUFFile(parts[0])


def test_parts_of_two_models_are_refused(original: PreTrainedModel, path: Path, tmp_path: Path) -> None:
    parts = split(path, 2)
    (tmp_path / "other").mkdir()
    smaller = write_model(tmp_path / "other" / "model.gguf", tiny_model("llama", num_hidden_layers=1), "llama")
    parts[1].write_bytes(split(smaller, 2)[1].read_bytes())
    with pytest.raises(ModelError, match="do not belong together"):
        GGUFFile(parts[0])


def test_missing_tensors_are_refused_with_their_number_and_the_first(path: Path) -> None:
    file = GGUFFile(rewrite(path, remove="ffn_up"))
    with pytest.raises(ModelError, match=r"is incomplete: 2 tensors are missing, first blk\.0\.ffn_up\.weight"):
        file.sources(empty_model(file))


def test_a_tensor_without_a_place_is_refused(path: Path) -> None:
    file = GGUFFile(rewrite(path, add={"blk.0.attn_sub_norm.weight": torch.ones(64)}))
    with pytest.raises(ModelError, match=r"1 of its tensors have no place in the model, first blk\.0\.attn_sub_norm"):
        file.sources(empty_model(file))


def test_a_tensor_of_another_shape_is_refused(path: Path) -> None:
    file = GGUFFile(rewrite(path, add={"blk.1.ffn_up.weight": torch.ones(97, 64)}))
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight is \[97, 64\], not \[96, 64\]"):
        file.sources(empty_model(file))


def test_layers_that_predict_further_tokens_are_left_out(path: Path) -> None:
    extra = {"blk.2.nextn.eh_proj.weight": torch.ones(64, 128), "blk.2.attn_q.weight": torch.ones(64, 64)}
    file = GGUFFile(rewrite(path, add=extra, metadata={"llama.block_count": 3, "llama.nextn_predict_layers": 1}))
    assert file.config().num_hidden_layers == 2
    assert not [name for name in file.sources(empty_model(file)) if ".2." in name]


def test_a_setting_that_is_missing_is_named(path: Path) -> None:
    with pytest.raises(ModelError, match=r"is incomplete: llama\.embedding_length is missing"):
        GGUFFile(rewrite(path, metadata={"llama.embedding_length": None})).config()


@pytest.mark.parametrize("count", [3, 4_000_000_000])
def test_more_layers_than_a_file_has_are_refused(path: Path, count: int) -> None:
    with pytest.raises(ModelError, match=f"is incomplete: it has no tensor of the last of its {count} layers"):
        GGUFFile(rewrite(path, metadata={"llama.block_count": count})).config()


@pytest.mark.parametrize(("count", "further"), [(2, 2), (2, 5), (0, 0)])
def test_a_file_without_layers_for_text_is_refused(path: Path, count: int, further: int) -> None:
    metadata = {"llama.block_count": count, "llama.nextn_predict_layers": further}
    with pytest.raises(ModelError, match="is broken: none of its layers is for text"):
        GGUFFile(rewrite(path, metadata=metadata)).config()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count_kv", 0),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", -1e-5),
        ("attention.layer_norm_rms_epsilon", math.nan),
        ("attention.layer_norm_rms_epsilon", "x"),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", -5.0),
        ("rope.freq_base", math.inf),
    ],
)
def test_a_setting_that_cannot_be_right_is_refused_by_name(path: Path, name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"model\.gguf is broken: llama\.{name} is {value}; download it again"):
        GGUFFile(rewrite(path, metadata={f"llama.{name}": value})).config()


def test_an_architecture_that_is_unknown_is_named(path: Path) -> None:
    with pytest.raises(
        ModelError, match="cannot run the architecture clip from a GGUF file: use a folder of the model"
    ):
        GGUFFile(rewrite(path, metadata={"general.architecture": "clip"}))


def test_heads_with_values_of_another_width_are_refused(path: Path) -> None:
    with pytest.raises(ModelError, match="its heads have keys of 16 and values of 8"):
        GGUFFile(rewrite(path, metadata={"llama.attention.key_length": 16, "llama.attention.value_length": 8})).config()


def test_a_setting_that_differs_between_layers_is_refused(path: Path) -> None:
    with pytest.raises(ModelError, match=r"attention\.head_count_kv differs between layers"):
        GGUFFile(rewrite(path, metadata={"llama.attention.head_count_kv": [2, 1]})).config()


def test_one_value_for_each_layer_counts_as_one_if_all_are_the_same(path: Path) -> None:
    config = GGUFFile(rewrite(path, metadata={"llama.attention.head_count_kv": [2, 2]})).config()
    assert config.num_key_value_heads == 2


def test_a_setting_that_is_unknown_is_told_in_the_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    GGUFFile(path).config()
    assert not caplog.records
    GGUFFile(rewrite(path, metadata={"llama.attention.temperature": 2.0})).config()
    assert "has settings that Parley does not know" in caplog.text
    assert caplog.text.rstrip().endswith("attention.temperature")


def test_a_model_that_reads_both_ways_is_refused(path: Path) -> None:
    with pytest.raises(ModelError, match="because it does not write text"):
        GGUFFile(rewrite(path, metadata={"llama.attention.causal": False})).config()


def test_experts_that_are_weighed_in_another_way_are_refused(tmp_path: Path) -> None:
    original = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    path = write_model(tmp_path / "model.gguf", original, "qwen3moe", expert_gating_func=2)
    with pytest.raises(ModelError, match="its experts are weighed in another way"):
        GGUFFile(path).config()


def test_queries_keys_and_values_in_one_tensor_are_taken_apart(original: PreTrainedModel, path: Path) -> None:
    stored = read_header(path).tensors
    fused = {
        f"blk.{layer}.attn_qkv.weight": torch.cat(
            [stored[f"blk.{layer}.attn_{each}.weight"].values() for each in "qkv"]
        )
        for layer in range(2)
    }
    for letter in "qkv":
        rewrite(path, remove=f"attn_{letter}.")
    rewrite(path, add=fused)
    with torch.inference_mode():
        expected, logits = original(input_ids=TOKENS).logits, read_back(path)(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, expected)


def test_queries_keys_and_values_apart_are_joined_for_a_model_that_has_them_in_one(tmp_path: Path) -> None:
    original = tiny_model("phi3", original_max_position_embeddings=128)
    path = write_model(tmp_path / "model.gguf", original, "phi3")
    apart = {
        f"blk.{layer}.attn_{letter}.weight": part
        for layer in range(2)
        for letter, part in zip(
            "qkv",
            torch.split(read_header(path).tensors[f"blk.{layer}.attn_qkv.weight"].values(), [64, 32, 32]),
            strict=True,
        )
    }
    rewrite(path, remove="attn_qkv", add=apart)
    with torch.inference_mode():
        expected, logits = original(input_ids=TOKENS).logits, read_back(path)(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, expected)


def test_tied_weights_have_one_source(tmp_path: Path) -> None:
    file = GGUFFile(write_model(tmp_path / "model.gguf", tiny_model("llama", tie_word_embeddings=True), "llama"))
    assert file.config().tie_word_embeddings
    sources = file.sources(empty_model(file))
    assert "model.embed_tokens.weight" in sources
    assert "lm_head.weight" not in sources


def test_the_vocabulary_is_as_large_as_the_embedding(original: PreTrainedModel, path: Path) -> None:
    assert GGUFFile(rewrite(path, metadata={"llama.vocab_size": 7})).config().vocab_size == original.config.vocab_size
