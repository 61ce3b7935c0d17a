from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.engine.quantization import Int8Linear, int8_is_faster
from models.errors import ModelError
from models.language.loader import load
from models.settings import Settings
from tests.support.tiny import TEMPLATE
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel) -> Path:
    """A model as `save_pretrained` writes it."""
    folder = tmp_path / "tiny"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_compiler(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the marker `compiler`, a machine without a compiler and without compiled kernels."""
    if request.node.get_closest_marker("compiler") is None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))


def settings(model: Path, **changes: Any) -> Settings:
    return Settings(model=str(model), device="cpu", **changes)


def refusal(settings: Settings, cache: Path) -> str:
    """The message of the error that loading raises."""
    with pytest.raises(ModelError) as raised:
        load(settings, cache)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


# Weights


def test_a_folder_is_loaded(folder: Path, llama: PreTrainedModel, cache: Path) -> None:
    tokenizer, model = load(settings(folder), cache)
    assert torch.equal(model.model.embed_tokens.weight, llama.model.embed_tokens.weight)
    assert tokenizer.chat_template == TEMPLATE
    assert not model.training
    assert not cache.exists()


def test_a_gguf_file_is_loaded(tmp_path: Path, cache: Path) -> None:
    tokenizer, model = load(settings(write_tiny_gguf(tmp_path / "tiny.gguf")), cache)
    assert (model.config.num_hidden_layers, model.dtype) == (2, torch.float32)
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
    ids=["auto", "float32", "bfloat16", "float16"],
)
def test_the_setting_decides_the_dtype(folder: Path, cache: Path, dtype: str, expected: torch.dtype) -> None:
    assert load(settings(folder, dtype=dtype), cache)[1].dtype == expected


def test_a_folder_that_cannot_be_loaded_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert f"PARLEY_MODEL={tmp_path} cannot be loaded: " in refusal(settings(tmp_path), cache)


def test_missing_weights_are_refused_by_name(folder: Path, cache: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = refusal(settings(folder), cache)
    assert "1 weights are missing, first model.layers.1.mlp.up_proj.weight" in message


def test_a_cut_weights_file_is_refused(folder: Path, cache: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be loaded" in refusal(settings(folder), cache)


def test_a_broken_converted_model_is_refused_with_the_folder_to_delete(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    load(settings(file), cache)
    (converted,) = cache.glob("tiny-*")
    (converted / "model.safetensors").write_bytes(b"cut")
    assert refusal(settings(file), cache).endswith(f"; delete {converted} to convert the model again")


# Chat templates


def test_a_model_without_a_chat_template_is_refused(folder: Path, cache: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    message = refusal(settings(folder), cache)
    assert "has no chat template" in message
    assert "PARLEY_CHAT_TEMPLATE" in message


def test_the_setting_replaces_the_chat_template(folder: Path, tmp_path: Path, cache: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    tokenizer, _ = load(settings(folder, chat_template=template), cache)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{% for message in %}", id="syntax"),
        pytest.param("{{ raise_exception('no') }}", id="exception"),
        pytest.param("{{ 1 / 0 }}", id="expression"),
    ],
)
def test_a_chat_template_that_fails_is_refused(folder: Path, tmp_path: Path, cache: Path, template: str) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    assert f"PARLEY_MODEL={folder}: the chat template fails: " in refusal(settings(folder, chat_template=file), cache)


def test_a_chat_template_that_cannot_be_read_is_refused(folder: Path, tmp_path: Path, cache: Path) -> None:
    message = refusal(settings(folder, chat_template=tmp_path / "none"), cache)
    assert message.startswith("PARLEY_CHAT_TEMPLATE cannot be read: ")
    (tmp_path / "none").write_bytes(b"\xff")
    message = refusal(settings(folder, chat_template=tmp_path / "none"), cache)
    assert message.startswith("PARLEY_CHAT_TEMPLATE cannot be read: ")


# Devices


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda:99"])
def test_a_missing_device_is_refused_before_any_download(device: str, cache: Path) -> None:
    assert f"PARLEY_DEVICE={device}: this machine or this build of torch has no such device" in refusal(
        Settings(device=device), cache
    )
    assert not cache.exists()


# int8


def int8_linears(model: PreTrainedModel) -> int:
    return sum(isinstance(module, Int8Linear) for module in model.modules())


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"quantize": "int8"}, True, id="int8"),
        pytest.param({"quantize": "none"}, False, id="none"),
        pytest.param({"dtype": "float32"}, False, id="auto-with-a-dtype"),
        pytest.param({}, None, id="auto"),
    ],
)
def test_the_setting_decides_about_int8_linears(
    folder: Path, cache: Path, changes: dict[str, str], expected: bool | None
) -> None:
    _, model = load(settings(folder, **changes), cache)
    assert bool(int8_linears(model)) == (int8_is_faster() if expected is None else expected)


def test_without_a_compiler_the_linears_stay_and_the_log_says_why(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, model = load(settings(folder), cache)
    assert (model.dtype, int8_linears(model)) == (torch.float32, 0)
    assert "replies will be several times slower" in caplog.text
    assert "there is no C++ compiler no-such-compiler (on Debian: apt-get install g++)" in caplog.text


def test_without_a_compiler_int8_is_refused(folder: Path, cache: Path) -> None:
    message = refusal(settings(folder, quantize="int8"), cache)
    assert message.startswith("PARLEY_QUANTIZE=int8 is not possible: ")
    assert "there is no C++ compiler no-such-compiler" in message


# Threads


def test_a_model_can_be_loaded_in_another_thread(folder: Path, cache: Path) -> None:
    loaded = list[object]()
    thread = threading.Thread(target=lambda: loaded.append(load(settings(folder), cache)))
    thread.start()
    thread.join()
    assert len(loaded) == 1
