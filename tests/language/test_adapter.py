from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PhiConfig, PreTrainedModel

from models.errors import ModelError
from models.language.adapter import Adapter
from models.language.loader import load
from models.settings import Settings
from tests.support.chat_templates import CHATML
from tests.support.tiny import SHAPE, TEMPLATE, tiny_llama, tiny_model, tiny_tokenizer

RANK = 4
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
IDS = torch.tensor([[5, 6, 7, 100, 30]])
GPT2 = GPT2Config(vocab_size=SHAPE["vocab_size"], n_embd=64, n_layer=1, n_head=2, n_positions=64)
PLAIN = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "bias": "none", "fan_in_fan_out": False}


def lora(model: nn.Module, *modules: str, rank: int = RANK) -> dict[str, Tensor]:
    """Random matrices for linears, with the names that PEFT gives them."""
    torch.manual_seed(1)
    tensors = dict[str, Tensor]()
    for module in modules:
        outputs, inputs = model.get_parameter(f"{module}.weight").shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs) / 4
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, rank) / 4
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Write an adapter as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def opened(folder: Path) -> Adapter:
    adapter = Adapter.of(folder)
    assert adapter is not None
    return adapter


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=IDS).logits
    return result


def hooked_logits(model: PreTrainedModel, tensors: dict[str, Tensor], scales: dict[str, float]) -> Tensor:
    """The logits of a model whose linears add what an adapter computes from the same input."""

    def add(module: str, scale: float) -> Any:
        down, up = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + scale * (inputs[0] @ down.T @ up.T)

        return hook

    handles = [
        model.get_submodule(module).register_forward_hook(add(module, scale)) for module, scale in scales.items()
    ]
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


# Merging


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        pytest.param({}, {Q: 4, DOWN: 4}, id="alpha-and-rank"),
        pytest.param({"use_rslora": True}, {Q: 8, DOWN: 8}, id="rank-stabilized"),
        pytest.param({"alpha_pattern": {"down_proj": 2}}, {Q: 4, DOWN: 0.5}, id="alpha-pattern"),
        pytest.param(
            {"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 1, "proj": 8}}, {Q: 0.25, DOWN: 4}, id="whole-names"
        ),
    ],
)
def test_merged_weights_give_the_logits_of_base_and_adapter(
    tmp_path: Path, config: dict[str, Any], scales: dict[str, float]
) -> None:
    model = tiny_llama()
    tensors = lora(model, Q, DOWN)
    expected, before = hooked_logits(model, tensors, scales), logits(model)
    opened(write(tmp_path, tensors, **config)).merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.1


def test_modules_may_have_different_ranks(tmp_path: Path) -> None:
    model = tiny_llama()
    tensors = lora(model, Q) | lora(model, DOWN, rank=2)
    expected = hooked_logits(model, tensors, {Q: 4, DOWN: 8})
    opened(write(tmp_path, tensors, rank_pattern={"down_proj": 2})).merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def pair(module: str, inputs: int, outputs: int) -> dict[str, Tensor]:
    """Random matrices for one module."""
    sizes = {"A": (RANK, inputs), "B": (outputs, RANK)}
    return {f"base_model.model.{module}.lora_{side}.weight": torch.randn(size) for side, size in sizes.items()}


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.parametrize("quantize", ["none", pytest.param("int8", marks=pytest.mark.compiler)])
@pytest.mark.parametrize(
    ("make", "module", "inputs", "outputs", "transposed"),
    [
        pytest.param(tiny_llama, Q, 64, 64, False, id="Linear"),
        pytest.param(lambda: tiny_model(GPT2), "transformer.h.0.attn.c_proj", 64, 64, True, id="Conv1D"),
        pytest.param(
            lambda: tiny_model(GPT2), "transformer.h.0.mlp.c_fc", 64, 256, True, id="Conv1D-that-is-not-square"
        ),
    ],
)
def test_the_kind_of_a_module_decides_which_way_round_its_change_is(
    tmp_path: Path,
    make: Callable[[], PreTrainedModel],
    module: str,
    inputs: int,
    outputs: int,
    transposed: bool,
    quantize: str,
    fan_in_fan_out: bool,
) -> None:
    tensors = pair(module, inputs, outputs)
    make().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    write(tmp_path, tensors, fan_in_fan_out=fan_in_fan_out)
    _, model = loaded(tmp_path, tmp_path, quantize)
    down, up = tensors.values()
    before = make().get_parameter(f"{module}.weight").detach()
    expected = (before.T if transposed else before) + 4 * (up @ down)  # (outputs, inputs)
    linear = model.get_submodule(module)
    eye = torch.eye(inputs)[None]
    with torch.no_grad():
        result = (linear(eye) - linear(torch.zeros_like(eye)))[0].T  # (outputs, inputs), without the bias
    assert (result - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("quantize", ["none", pytest.param("int8", marks=pytest.mark.compiler)])
def test_biases_of_whole_modules_are_replaced(tmp_path: Path, quantize: str) -> None:
    base = tiny_model(PhiConfig(**SHAPE))
    base.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    bias = torch.randn(SHAPE["vocab_size"])
    head = {"weight": base.get_parameter("lm_head.weight").detach().clone(), "bias": bias}
    write(tmp_path, {f"base_model.model.lm_head.{kind}": tensor for kind, tensor in head.items()})
    _, model = loaded(tmp_path, tmp_path, quantize)
    assert torch.equal(model.lm_head.bias, bias)


def test_embeddings_and_whole_modules_are_changed(tmp_path: Path) -> None:
    model = tiny_llama()
    vocabulary, size = model.get_parameter("model.embed_tokens.weight").shape
    down, up, norm, head = (
        torch.randn(*shape) for shape in ((RANK, vocabulary), (size, RANK), (size,), (vocabulary, size))
    )
    embedding = model.get_parameter("model.embed_tokens.weight").detach().clone()
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": down,
        "base_model.model.model.embed_tokens.lora_embedding_B": up,
        "base_model.model.model.embed_tokens.base_layer.weight": embedding + 1,
        "base_model.model.model.norm.weight": norm,
        "base_model.model.lm_head.weight": head,
    }
    opened(write(tmp_path, tensors, modules_to_save=["norm", "lm_head"])).merge(model)
    torch.testing.assert_close(model.get_parameter("model.embed_tokens.weight"), embedding + 1 + 4 * (up @ down).T)
    assert torch.equal(model.get_parameter("model.norm.weight"), norm)
    assert torch.equal(model.get_parameter("lm_head.weight"), head)


def test_a_change_is_added_in_float32(tmp_path: Path) -> None:
    model = tiny_llama()
    tensors = {name: tensor.bfloat16() for name, tensor in lora(model, Q).items()}
    adapter = opened(write(tmp_path, tensors))
    down, up = (tensors[f"base_model.model.{Q}.lora_{side}.weight"].float() for side in "AB")
    weight = model.get_parameter(f"{Q}.weight").detach().bfloat16()
    assert torch.equal(adapter.changed(f"{Q}.weight", weight), weight.float() + up @ down * 4)


def test_other_parameters_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = opened(write(tmp_path, lora(model, Q)))
    weight = model.get_parameter(f"{DOWN}.weight")
    assert adapter.changed(f"{DOWN}.weight", weight) is weight
    assert [name for name, _ in model.named_parameters() if adapter.touches(name)] == [f"{Q}.weight"]


# What cannot be merged

WRONG: dict[str, list[Any]] = {
    "lora_alpha": [float("nan"), float("inf"), "16", None],
    "alpha_pattern": ["q_proj", [8], {"q_proj": "8"}, {"(": 8}],
    "use_rslora": ["yes"],
    "base_model_name_or_path": [5],
    "revision": [5],
}


def refusal(folder: Path, model: PreTrainedModel | None = None) -> str:
    """The message of the error that opening or merging an adapter raises."""
    with pytest.raises(ModelError) as raised:
        opened(folder).merge(model or tiny_llama())
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert f"the adapter in {folder}" in message
    return message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param({"peft_type": "IA3"}, "its type is IA3", id="type"),
        pytest.param({"use_dora": True}, "it uses use_dora", id="dora"),
        pytest.param({"bias": "all"}, "it has biases (bias=all)", id="bias"),
        pytest.param({"lora_bias": True}, "it uses lora_bias", id="lora-bias"),
        pytest.param({"target_parameters": ["experts"]}, "it uses target_parameters", id="parameters"),
        pytest.param({"init_lora_weights": "pissa"}, "it changes its base model too", id="pissa"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    message = refusal(write(tmp_path, lora(tiny_llama(), Q), **config))
    assert f"cannot be merged: {reason}" in message


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_field_of_the_config_is_named(tmp_path: Path, field: str, value: Any) -> None:
    message = refusal(write(tmp_path, lora(tiny_llama(), Q), **{field: value}))
    assert f"cannot be merged: in adapter_config.json, {field} " in message


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (write(tmp_path, {}) / "adapter_config.json").write_text("[]")
    assert "cannot be read (adapter_config.json is no object)" in refusal(tmp_path)


def test_a_module_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    tensors = lora(tiny_llama(), Q)
    tensors |= {name.replace("q_proj", "qkv_proj"): tensor.clone() for name, tensor in tensors.items()}
    message = refusal(write(tmp_path, tensors))
    assert (
        "does not fit its base model: 2 of its tensors find no place there, first model.layers.0.self_attn.qkv"
        in message
    )


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor[:, :3].contiguous() for name, tensor in lora(tiny_llama(), Q, rank=3).items()}
    message = refusal(write(tmp_path, tensors))
    assert f"{Q}.weight has the shape (64, 64) there, and (64, 3) in the adapter" in message


def test_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    tensors = lora(tiny_llama(), Q)
    del tensors[f"base_model.model.{Q}.lora_B.weight"]
    assert "is damaged" in refusal(write(tmp_path, tensors))


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_one_of_two_uses_of_a_shared_weight_cannot_be_changed(tmp_path: Path, module: str) -> None:
    model = tiny_model(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    weight = torch.zeros_like(model.get_parameter("model.embed_tokens.weight"))
    message = refusal(write(tmp_path, {f"base_model.model.{module}.weight": weight}), model)
    assert module in message


def test_an_adapter_without_its_weights_is_refused(tmp_path: Path) -> None:
    (write(tmp_path, {}) / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_refused(tmp_path: Path, file: str) -> None:
    (write(tmp_path, {}) / file).write_text("{")
    assert "cannot be read" in refusal(tmp_path)


def test_a_folder_without_an_adapter_has_none(tmp_path: Path) -> None:
    assert Adapter.of(tmp_path) is None


# Finding the base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a base model."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder: Path, tmp_path: Path, quantize: str = "none") -> tuple[Any, PreTrainedModel]:
    return load(Settings(model=str(folder), device="cpu", quantize=quantize), tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_compiler(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("compiler") is None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))


def test_an_adapter_beside_its_base_is_merged(base: Path, tmp_path: Path) -> None:
    tensors = lora(tiny_llama(), Q)
    write(base, tensors, base_model_name_or_path="ann/elsewhere")
    _, model = loaded(base, tmp_path)
    expected = hooked_logits(AutoModelForCausalLM.from_pretrained(base), tensors, {Q: 4})
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative-to-the-adapter"])
@pytest.mark.parametrize("config", [False, True], ids=["adapter-only", "with-the-config-of-the-base"])
def test_the_base_of_an_adapter_is_loaded(base: Path, tmp_path: Path, relative: bool, config: bool) -> None:
    tensors = lora(tiny_llama(), Q)
    adapter = write(tmp_path / "adapter", tensors, base_model_name_or_path="../base" if relative else str(base))
    if config:
        (adapter / "config.json").write_text((base / "config.json").read_text())
    tokenizer, model = loaded(adapter, tmp_path)
    expected = hooked_logits(AutoModelForCausalLM.from_pretrained(base), tensors, {Q: 4})
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (None, "names no base model"),
        ("not an id/of the Hub", "no such file or folder here, and no such model on the Hub"),
    ],
)
def test_a_base_that_is_not_found_is_refused(tmp_path: Path, name: str | None, reason: str) -> None:
    folder = write(tmp_path / "adapter", {}, base_model_name_or_path=name)
    with pytest.raises(ModelError, match=reason) as raised:
        loaded(folder, tmp_path)
    assert "put " in str(raised.value)


def test_an_adapter_that_does_not_fit_its_base_stops_the_start(base: Path, tmp_path: Path) -> None:
    tensors = lora(tiny_llama(), Q)
    write(base, {name.replace("layers.0", "layers.9"): tensor for name, tensor in tensors.items()})
    with pytest.raises(ModelError, match="does not fit its base model"):
        loaded(base, tmp_path)


# The tokenizer


def test_the_tokenizer_beside_the_adapter_is_used(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", {}, base_model_name_or_path=str(base))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<own>"])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(adapter)
    found, _ = loaded(adapter, tmp_path)
    assert ("<own>" in found.get_vocab(), found.chat_template) == (True, CHATML)


def test_a_tokenizer_without_a_template_gets_that_of_the_base(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", {}, base_model_name_or_path=str(base))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<own>"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(adapter)
    found, _ = loaded(adapter, tmp_path)
    assert ("<own>" in found.get_vocab(), found.chat_template) == (True, TEMPLATE)


def test_a_template_beside_the_adapter_is_used_with_the_tokenizer_of_the_base(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", {}, base_model_name_or_path=str(base))
    (adapter / "chat_template.jinja").write_text(CHATML)
    found, _ = loaded(adapter, tmp_path)
    assert found.chat_template == CHATML


def test_the_weights_on_the_disk_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    write(base, lora(tiny_llama(), Q))
    before = load_file(base / "model.safetensors")
    loaded(base, tmp_path)
    after = load_file(base / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
