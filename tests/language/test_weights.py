from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, MixtralConfig, PreTrainedModel

from models.engine.quantization import QuantizedLinear, quantizable, shares
from models.engine.quantized_weight import BLOCK_TYPES, Format, QuantizedWeight
from models.errors import ModelError
from models.language.adapter import Adapter
from models.language.gguf.gguf_file import GGUFFile
from models.language.memory import size_of_model, size_of_weights
from models.language.weights import load_folder, load_gguf
from tests.support.gguf_models import write_gguf
from tests.support.peak_memory import measure
from tests.support.tiny import SHAPE, tiny_gemma3, tiny_gpt_oss, tiny_llama, tiny_model, tiny_tokenizer
from tests.support.tiny_gguf import write_tiny_gguf

compiler = pytest.mark.compiler  # quantized weights need the kernels

PROMPT = torch.tensor([[3, 100, 7, 42, 200, 5, 77, 8]])
EXACT = {Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL, Type.MXFP4}
DOWN = "model.layers.1.mlp.down_proj.weight"

all_kept = pytest.mark.parametrize("kind", [Type(type) for type in BLOCK_TYPES], ids=lambda kind: kind.name)


def from_gguf(path: Path, format: Format | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_gguf(GGUFFile(path), format, dtype, "cpu")


def from_folder(folder: Path, format: Format | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_folder(folder, Adapter.of(folder), False, format, dtype, "cpu")


def saved(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return nn.Module.to(model, dtype)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=PROMPT).logits
    return result[0]


def error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).detach().norm() / expected.detach().norm())


def formats(model: PreTrainedModel) -> set[str]:
    """How the weights of all linears and embeddings are stored."""
    return {kind for kind in shares(model) if kind != "float32"}


def numbers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The values of all weights that are one matrix, by the names of the modules."""
    found = {}
    for name, module in model.named_modules():
        weights = [*module.weights] if isinstance(module, QuantizedLinear) else [getattr(module, "weight", None)]
        if weights and isinstance(weights[0], QuantizedWeight):
            found[name] = weights[0].rows(torch.arange(weights[0].outputs))
        elif weights and isinstance(weights[0], nn.Parameter):
            found[name] = weights[0].detach()
    return found


def dequantized(path: Path) -> Path:
    """The same file with gguf-py's values of all tensors, in float32."""
    reader, target = GGUFReader(path), path.with_name(f"{path.stem}-float32.gguf")
    values = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        for tensor in reader.tensors
    }
    metadata = dict(GGUFFile(path).metadata)
    return write_gguf(target, metadata, values)


# GGUF files


@pytest.mark.parametrize("kind", [*map(Type, BLOCK_TYPES), Type.F16, Type.BF16, Type.F32], ids=lambda kind: kind.name)
def test_without_quantization_a_file_gives_the_values_of_gguf_py(tmp_path: Path, kind: Type) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", kind, hidden=256, inner=256)
    model = from_gguf(path)
    assert shares(model) == {"float32": 1.0}
    assert torch.equal(logits(model), logits(from_gguf(dequantized(path))))
    (down,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down.weight")
    expected = torch.tensor(dequantize(down.data, down.tensor_type)).view(256, 256)
    assert torch.equal(model.get_parameter(DOWN), expected)


@compiler
@all_kept
def test_blocks_of_a_kept_type_stay_as_they_are(tmp_path: Path, kind: Type) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", kind, hidden=256, inner=256)
    kept, plain = from_gguf(path, Format.Q8_0), from_gguf(path)
    assert formats(kept) == {BLOCK_TYPES[kind].name}
    expected, result = numbers(plain), numbers(kept)
    assert result.keys() == expected.keys()
    for name, values in result.items():
        if kind in EXACT:
            assert torch.equal(values, expected[name])
        else:
            assert error(values, expected[name]) < 1e-3
    assert error(logits(kept), logits(plain)) < 0.1


@compiler
@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.F32], ids=lambda kind: kind.name)
def test_plain_numbers_are_rounded(tmp_path: Path, kind: Type) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", kind)
    plain = from_gguf(path)
    rounded = from_gguf(path, Format.Q8_0)
    assert formats(rounded) == {"Q8_0"}
    assert error(logits(rounded), logits(plain)) < 0.1
    fewer = from_gguf(path, Format.Q4_1)
    assert formats(fewer) == {"Q8_0", "Q4_1"}
    assert {weight.format for weight in (fewer.lm_head.weights[0], fewer.model.embed_tokens.weight)} == {Format.Q8_0}
    assert error(logits(fewer), logits(plain)) < 0.5


@compiler
def test_blocks_that_no_layout_holds_are_rounded(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", Type.Q2_K, hidden=256, inner=256)
    assert Type.Q2_K not in BLOCK_TYPES
    rounded = from_gguf(path, Format.Q8_0)
    assert formats(rounded) == {"Q8_0"}
    assert error(logits(rounded), logits(from_gguf(path))) < 0.1


@compiler
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.F16], ids=lambda kind: kind.name)
def test_experts_are_quantized_and_routers_stay_precise(tmp_path: Path, kind: Type) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", kind, experts=4)
    model, plain = from_gguf(path, Format.Q8_0), from_gguf(path)
    assert formats(model) == {"Q4_0" if kind == Type.Q4_0 else "Q8_0"}
    assert {name.split(".")[-2] for name, _ in model.named_parameters()} == {
        *("gate", "input_layernorm", "post_attention_layernorm", "norm")
    }
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(model.get_parameter(router), plain.get_parameter(router))
    assert error(logits(model), logits(plain)) < 0.1


@compiler
@pytest.mark.parametrize(
    "names", [("ffn_down_exps",), ("ffn_gate_exps",), ("ffn_gate_exps", "ffn_up_exps")], ids=" ".join
)
def test_experts_of_which_a_file_has_some_in_float32_are_all_quantized(tmp_path: Path, names: tuple[str, ...]) -> None:
    float32 = tuple(f"blk.0.{name}.weight" for name in names)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", Type.Q8_0, experts=4, float32=float32)
    model = load_gguf(GGUFFile(path), Format.Q8_0, torch.float32, "cpu")
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, QuantizedWeight)
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits.isfinite().all()


@compiler
def test_a_router_that_is_a_plain_linear_stays_precise_beside_half_floats(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", Type.F16, float32=("blk.0.ffn_up.weight",))
    model = from_gguf(path, Format.Q8_0)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantizedLinear)


@compiler
def test_a_tied_head_shares_the_blocks_of_the_embedding(tmp_path: Path) -> None:
    model = from_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", Type.Q5_1, tied=True), Format.Q8_0)
    assert model.lm_head.weights[0] is model.model.embed_tokens.weight
    assert formats(model) == {"Q5_1"}


def test_the_tokens_of_the_file_end_a_reply(tmp_path: Path) -> None:
    model = from_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"))
    assert model.generation_config.eos_token_id == [2]
    assert not model.training


@pytest.mark.parametrize("format", [None, pytest.param(Format.Q8_0, marks=compiler)], ids=["plain", "quantized"])
def test_a_file_that_is_gone_while_it_is_loaded_is_told_in_a_line(tmp_path: Path, format: Format | None) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", Type.Q8_0)
    file = GGUFFile(path)
    path.unlink()
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be read: .*No such file"):
        load_gguf(file, format, torch.float32, "cpu")


@pytest.mark.parametrize("format", [None, pytest.param(Format.Q8_0, marks=compiler)], ids=["plain", "quantized"])
def test_a_file_that_becomes_shorter_while_it_is_loaded_is_told_in_a_line(
    tmp_path: Path, format: Format | None
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", Type.Q8_0)
    file = GGUFFile(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"tiny\.gguf has changed while it was read: start again"):
        load_gguf(file, format, torch.float32, "cpu")


# Folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_folder_gives_the_weights_of_its_files(tmp_path: Path, dtype: torch.dtype) -> None:
    model = in_dtype(tiny_llama(), dtype)
    found = from_folder(saved(tmp_path, model))
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in found.state_dict().items())
    assert from_folder(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@compiler
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_gpt_oss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_of_a_folder_are_rounded(
    tmp_path: Path, make: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> None:
    folder = saved(tmp_path, in_dtype(make(), dtype))
    plain = from_folder(folder)
    rounded = from_folder(folder, Format.Q8_0)
    assert formats(rounded) == {"Q8_0"}
    assert shares(rounded)["Q8_0"] > 0.95
    assert error(logits(rounded), logits(plain)) < 0.06


@compiler
def test_four_bits_leave_eight_for_the_head_and_the_embedding(tmp_path: Path) -> None:
    model = from_folder(saved(tmp_path, tiny_llama()), Format.Q4_1)
    eight = {name for name, module in model.named_modules() if getattr(module, "format", None) == Format.Q8_0}
    assert eight == {"lm_head.weights.0", "model.embed_tokens.weight"}
    assert formats(model) == {"Q8_0", "Q4_1"}


@compiler
def test_experts_that_lie_apart_in_the_files_become_one_weight(tmp_path: Path) -> None:
    shape = {"num_local_experts": 4, "num_experts_per_tok": 2}
    folder = saved(tmp_path, tiny_model(MixtralConfig(**SHAPE | shape)))
    assert any(name.endswith("experts.3.w2.weight") for name in load_file(folder / "model.safetensors"))
    model = from_folder(folder, Format.Q8_0)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, QuantizedWeight)
    assert error(logits(model), logits(from_folder(folder))) < 0.05


@compiler
def test_linears_whose_inputs_come_first_are_turned(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_model(GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=128)))
    model = from_folder(folder, Format.Q8_0)
    assert isinstance(model.get_submodule("transformer.h.0.mlp.c_fc"), QuantizedLinear)
    assert error(logits(model), logits(from_folder(folder))) < 0.03


@compiler
def test_a_head_that_the_files_have_beside_the_embedding_it_is_tied_to_is_stored_once(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_gemma3())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = from_folder(folder, Format.Q8_0)
    assert model.lm_head.weights[0] is model.model.embed_tokens.weight


@pytest.mark.parametrize("format", [None, pytest.param(Format.Q8_0, marks=compiler)], ids=["plain", "quantized"])
def test_missing_weights_are_refused_by_name(tmp_path: Path, format: Format | None) -> None:
    folder = saved(tmp_path, tiny_llama())
    tensors = load_file(folder / "model.safetensors")
    del tensors[DOWN], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"2 weights are missing, first {DOWN}"):
        from_folder(folder, format)


@pytest.mark.parametrize("format", [None, pytest.param(Format.Q8_0, marks=compiler)], ids=["plain", "quantized"])
def test_weights_of_another_shape_are_refused_by_name(
    tmp_path: Path, format: Format | None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, tiny_llama())
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN] = torch.zeros(64, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as raised:
        from_folder(folder, format)
    assert str(raised.value) == f"{DOWN} has the shape (64, 64), and (64, 96) by config.json: download both again"
    assert not caplog.records


def test_weights_that_have_no_place_are_logged_in_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, tiny_llama())
    tensors = load_file(folder / "model.safetensors") | {"model.extra.weight": torch.zeros(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        from_folder(folder)
    assert caplog.messages == ["1 weights of the model are not used, first model.extra.weight"]


@pytest.mark.parametrize("format", [None, pytest.param(Format.Q8_0, marks=compiler)], ids=["plain", "quantized"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight"])
def test_numbers_that_need_scales_are_refused_if_nothing_says_that_weights_are_packed(
    tmp_path: Path, format: Format | None, dtype: torch.dtype, name: str
) -> None:
    folder = saved(tmp_path, tiny_llama())
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as raised:
        from_folder(folder, format)
    assert str(raised.value) == (
        f"{name} is packed as {dtype} without what is needed to unpack it: download all files of the model again, or "
        "choose another version of it"
    )


def test_scales_beside_weights_that_are_not_packed_change_nothing(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, tiny_llama()), tiny_llama()
    names = ["model.layers.0.self_attn.k_scale", f"{DOWN}_scale", "vision.weight", "vision.weight_scale"]
    tensors = load_file(folder / "model.safetensors") | {name: torch.full((1,), 3.0) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert error(logits(from_folder(folder)), logits(model)) < 1e-6


def test_the_generation_settings_of_a_folder_are_kept(tmp_path: Path) -> None:
    model = tiny_llama()
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = [2, 7]
    found = from_folder(saved(tmp_path, model)).generation_config
    assert (found.temperature, found.eos_token_id) == (0.6, [2, 7])


def test_without_generation_settings_those_of_the_model_count(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_llama())
    (folder / "generation_config.json").unlink()
    assert from_folder(folder).generation_config.eos_token_id == 2


@pytest.mark.parametrize("format", [None, pytest.param(Format.Q8_0, marks=compiler)], ids=["plain", "quantized"])
def test_a_folder_of_an_older_format_is_loaded(tmp_path: Path, format: Format | None) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = from_folder(tmp_path, format)
    assert formats(found) == ({"Q8_0"} if format else set())
    assert error(logits(found), logits(model)) < (0.03 if format else 1e-6)


# Adapters


def add_adapter(folder: Path, module: str) -> None:
    """Put an adapter beside a model that changes one linear a lot."""
    outputs, inputs = tiny_llama().get_parameter(f"{module}.weight").shape
    torch.manual_seed(1)
    tensors = {"A": torch.randn(4, inputs), "B": torch.randn(outputs, 4)}
    names = {side: f"base_model.model.{module}.lora_{side}.weight" for side in tensors}
    save_file({names[side]: tensor for side, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@compiler
def test_an_adapter_changes_a_weight_before_it_is_rounded(tmp_path: Path) -> None:
    before = from_folder(saved(tmp_path, tiny_llama()))
    add_adapter(tmp_path, DOWN.removesuffix(".weight"))
    plain, rounded = from_folder(tmp_path), from_folder(tmp_path, Format.Q8_0)
    assert isinstance(rounded.model.layers[1].mlp.down_proj, QuantizedLinear)
    assert error(logits(before), logits(plain)) > 0.3
    assert error(logits(rounded), logits(plain)) < 0.1


@compiler
def test_an_adapter_of_another_shape_is_told_in_a_line(tmp_path: Path) -> None:
    model = tiny_model(LlamaConfig(**SHAPE | {"intermediate_size": 64}))
    saved(tmp_path, model)
    add_adapter(tmp_path, DOWN.removesuffix(".weight"))
    with pytest.raises(ModelError, match=f"does not fit its base model: {DOWN} has the shape"):
        from_folder(tmp_path, Format.Q8_0)


# Memory


@compiler
@pytest.mark.parametrize("format", [None, Format.Q8_0, Format.Q4_1], ids=str)
def test_the_size_that_weights_will_have_is_known_before(tmp_path: Path, format: Format | None) -> None:
    config = LlamaConfig(**SHAPE | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    folder = saved(tmp_path, tiny_model(config))
    with torch.device("meta"):
        empty = tiny_model(config)
    expected = {} if format is None else dict.fromkeys(quantizable(empty), format)
    if format is Format.Q4_1:
        expected |= dict.fromkeys(["lm_head.weight", "model.embed_tokens.weight"], Format.Q8_0)
    size = size_of_model(from_folder(folder, format))
    assert size_of_weights(empty, expected, torch.float32) == pytest.approx(size, rel=0.02)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models whose files have about 200 MB, by their kind."""
    folder = tmp_path_factory.mktemp("large")

    def make(kind: str) -> Path:
        if kind == "folder":
            shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "head_dim": 256}
            tiny_tokenizer().save_pretrained(folder / kind)
            return saved(folder / kind, tiny_model(LlamaConfig(**SHAPE | shape)).bfloat16())
        layers = {"Q8_0": 14, "Q4_0": 26}[kind]
        return write_tiny_gguf(folder / f"{kind}.gguf", Type[kind], hidden=1024, inner=3072, layers=layers)

    return make


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "folder"])
def test_a_model_is_loaded_in_little_more_memory_than_its_file(large: Callable[[str], Path], kind: str) -> None:
    path = large(kind)
    file = path if path.is_file() else path / "model.safetensors"
    assert 150e6 < file.stat().st_size < 250e6
    peak, _ = measure(path, "int8")
    assert peak < 1.3 * file.stat().st_size + 100e6


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4", "none"])
def test_beside_its_weights_a_folder_takes_the_memory_of_few_tensors(
    large: Callable[[str], Path], quantize: str
) -> None:
    peak, weights = measure(large("folder"), quantize)
    assert peak < weights + 60e6  # four of 12.6 MB in float32
