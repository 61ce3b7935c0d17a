from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, PreTrainedModel, PreTrainedTokenizerBase

from models.engine.joined_linears import LinearPart
from models.engine.quantization import is_faster, shares
from models.errors import CacheTooLargeError, ModelError
from models.language.gguf.gguf_file import GGUFFile
from models.language.loader import cache_on_accelerator, device_map, load
from models.language.weights import load_folder, load_gguf
from models.settings import Settings
from tests.support.endless_program import EndlessProgram
from tests.support.gguf_models import write_gguf
from tests.support.recurrent_models import tiny_recurrent
from tests.support.tiny import SHAPE, TEMPLATE, tiny_model
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


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0], ids=lambda kind: kind.name)
def test_a_gguf_file_is_loaded_and_nothing_is_written(tmp_path: Path, cache: Path, kind: Type) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", kind)
    tokenizer, model = load(settings(file), cache)
    assert (model.config.num_hidden_layers, model.dtype) == (2, torch.float32)
    assert tokenizer.chat_template == TEMPLATE
    os.utime(file, (1, 1))
    _, again = load(settings(file), cache)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not cache.exists()


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
    assert refusal(settings(folder), cache) == (
        f"PARLEY_MODEL={folder} cannot be loaded: 1 weights are missing, first model.layers.1.mlp.up_proj.weight: "
        "download it again"
    )


def test_a_cut_weights_file_is_refused(folder: Path, cache: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    message = refusal(settings(folder), cache)
    assert message.startswith(f"PARLEY_MODEL={folder} cannot be loaded: a file of its weights is cut or damaged (")


@pytest.mark.parametrize("quantize", ["none", pytest.param("int8", marks=pytest.mark.compiler)])
def test_experts_of_different_shapes_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, quantize: str
) -> None:
    tiny_model(MixtralConfig(**SHAPE | {"num_local_experts": 4})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layers.1.block_sparse_moe.experts.2.w2.weight"))
    save_file(tensors | {name: torch.zeros(3, 3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert refusal(settings(tmp_path, quantize=quantize), cache) == (
        f"PARLEY_MODEL={tmp_path} cannot be loaded: the shapes of its weights differ from those in config.json: "
        "download it again"
    )


@pytest.mark.parametrize("content", ['{"eos_token_id": [2, 7', "[]", "", "\xff"], ids=["cut", "list", "empty", "latin"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_generation_config_is_refused(folder: Path, cache: Path, file: str, content: str) -> None:
    if file == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    load(settings(folder), cache)
    (folder / "generation_config.json").write_text(content, encoding="latin-1")
    reason = "generation_config.json is damaged: download it again"
    assert refusal(settings(folder), cache) == f"PARLEY_MODEL={folder} cannot be loaded: {reason}"


@pytest.mark.parametrize("end", ["<|end|>", 2.5, [[2]], [2, "7"]])
def test_an_end_that_is_no_token_id_is_refused(folder: Path, cache: Path, end: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert "eos_token_id in generation_config.json is no token id" in refusal(settings(folder), cache)


def test_generation_settings_that_parley_does_not_read_may_be_anything(folder: Path, cache: Path) -> None:
    stored = {"max_new_tokens": -1, "cache_implementation": "new", "compile_config": {}, "temperature": 0.3}
    (folder / "generation_config.json").write_text(json.dumps(stored))
    _, model = load(settings(folder), cache)
    assert model.generation_config.temperature == 0.3


def test_a_folder_without_a_generation_config_is_loaded(folder: Path, cache: Path) -> None:
    (folder / "generation_config.json").unlink()
    _, model = load(settings(folder), cache)
    assert model.generation_config.eos_token_id == SHAPE["eos_token_id"]


def test_a_folder_without_weights_is_refused(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(settings(folder), cache) == (
        f"PARLEY_MODEL={folder} cannot be loaded: it has no weights: model.safetensors is missing"
    )


def test_a_cut_gguf_file_is_refused(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:-1000])
    assert refusal(settings(file), cache) == (f"PARLEY_MODEL={file} cannot be loaded: it is cut off: download it again")


def test_a_gguf_file_with_impossible_settings_is_refused_once(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", changes={"llama.attention.head_count": 5})
    message = refusal(settings(file), cache)
    assert message.startswith(f"PARLEY_MODEL={file} cannot be loaded: ")
    assert message.count("cannot be loaded") == 1


def test_a_gguf_file_of_an_unknown_architecture_is_refused(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "odd.gguf", {"general.architecture": "odd"}, {})
    assert refusal(settings(file), cache) == (
        f"PARLEY_MODEL={file} cannot be loaded: Parley cannot run the architecture odd from a GGUF file: use a folder "
        "of the model with safetensors"
    )


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


def test_without_an_accelerator_all_weights_are_for_the_cpu() -> None:
    assert device_map(Settings()) == ("auto" if torch.accelerator.is_available() else "cpu")
    assert device_map(Settings(device="cpu")) == "cpu"
    assert device_map(Settings(device="cuda:1")) == "cuda:1"


def test_the_cache_of_an_accelerator_has_the_context_and_the_dtype_of_the_settings(llama: PreTrainedModel) -> None:
    numbers = 4 * 3 * 2 * (16 + 16)  # slots, layers, key heads, sizes of keys and values
    assert cache_on_accelerator(Settings(slots=4, device="mps", dtype="float16"), llama) == numbers * 512 * 2
    assert cache_on_accelerator(Settings(slots=4, device="xpu", context=64, kv_cache="float8"), llama) == numbers * 64


def test_a_cache_in_blocks_needs_room_for_one_sequence(llama: PreTrainedModel) -> None:
    numbers = 3 * 2 * (16 + 16)
    assert cache_on_accelerator(Settings(slots=4, device="cuda"), llama) == numbers * 512 * 2
    hybrid, settings = tiny_recurrent("lfm2"), Settings(slots=4, device="cuda", context=64)
    assert cache_on_accelerator(settings, hybrid) == 4 * cache_on_accelerator(replace(settings, slots=1), hybrid)


def test_a_cache_that_has_no_room_beside_the_weights_is_refused_before_these_are_read(
    folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "format": None,
        "dtype": torch.float32,
        "device": "cpu",
        "size_of_cache": lambda _: 10**18,
    }
    with pytest.raises(CacheTooLargeError, match="lower PARLEY_SLOTS"):
        load_folder(folder, None, False, **options)
    with pytest.raises(CacheTooLargeError, match="lower PARLEY_SLOTS"):
        load_gguf(GGUFFile(write_tiny_gguf(tmp_path / "tiny.gguf")), **options)


# Quantization


def is_quantized(model: PreTrainedModel) -> bool:
    return set(shares(model)) == {"Q8_0", "float32"}


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
def test_the_setting_decides_about_quantization(
    folder: Path, cache: Path, changes: dict[str, str], expected: bool | None
) -> None:
    _, model = load(settings(folder, **changes), cache)
    assert is_quantized(model) == (is_faster() if expected is None else expected)


@pytest.mark.compiler
def test_the_setting_can_ask_for_four_bits(folder: Path, cache: Path) -> None:
    _, model = load(settings(folder, quantize="int4"), cache)
    assert set(shares(model)) == {"Q4_1", "Q8_0", "float32"}


@pytest.mark.compiler
def test_quantized_linears_of_the_same_input_are_joined(folder: Path, cache: Path) -> None:
    _, model = load(settings(folder, quantize="int8"), cache)
    attention = model.model.layers[0].self_attn
    assert {type(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)} == {LinearPart}


@pytest.mark.compiler
def test_the_blocks_of_a_gguf_file_are_kept(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", Type.Q5_0)
    for quantize in ("int8", "int4"):
        _, model = load(settings(file, quantize=quantize), cache)
        assert set(shares(model)) == {"Q5_0", "float32"}


def test_without_a_compiler_the_weights_stay_and_the_log_says_why(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    _, model = load(settings(folder), cache)
    assert shares(model) == {"float32": 1.0}
    assert "Compiling" not in capsys.readouterr().err
    assert "replies will be several times slower" in caplog.text
    assert "there is no C++ compiler no-such-compiler (on Debian: apt-get install g++)" in caplog.text


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_without_a_compiler_quantization_is_refused(folder: Path, cache: Path, quantize: str) -> None:
    message = refusal(settings(folder, quantize=quantize), cache)
    assert message.startswith(f"PARLEY_QUANTIZE={quantize} is not possible: there is no C++ compiler no-such-compiler")


# Compilers


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EndlessProgram]:
    """A compiler that does not end by itself."""
    with EndlessProgram.written(tmp_path) as program:
        monkeypatch.setenv("CXX", str(program.path))
        yield program


def kept_files(tmp_path: Path) -> set[str]:
    """What is left where the kernels are kept, but for the lock."""
    kept = tmp_path / "empty" / "parley"
    return {path.name for path in kept.iterdir()} - {"kernels.lock"} if kept.exists() else set()


def test_an_interrupt_ends_the_compilers_and_leaves_no_file(
    folder: Path, tmp_path: Path, cache: Path, compiler: EndlessProgram, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        compiler.wait_until_it_runs()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        load(settings(folder), cache)
    thread.join()
    assert not compiler.came_to_its_end()
    assert not kept_files(tmp_path)
    assert "Compiling" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_refused_without_waiting_for_compilers(
    tmp_path: Path, cache: Path, compiler: EndlessProgram
) -> None:
    assert "there is no such file or folder" in refusal(settings(tmp_path / "nowhere"), cache)
    assert not compiler.came_to_its_end()
    assert not kept_files(tmp_path)


# Threads


def test_a_model_can_be_loaded_in_another_thread(folder: Path, cache: Path) -> None:
    loaded = list[object]()
    thread = threading.Thread(target=lambda: loaded.append(load(settings(folder), cache)))
    thread.start()
    thread.join()
    assert len(loaded) == 1
