"""With real errors: of transformers and safetensors, for models that are broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)

from models.language.load_errors import why_not_loaded


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel) -> Path:
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def load(folder: Path, trust_remote_code: bool) -> None:
    AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)


def reason(folder: Path, trust_remote_code: bool = False) -> str:
    """Why a folder cannot be loaded."""
    with pytest.raises(Exception) as raised:  # noqa: PT011  # it is the question which one
        load(folder, trust_remote_code)
    line = why_not_loaded(raised.value)
    assert len(line.splitlines()) == 1
    assert len(line) < 160
    assert "trust_remote_code=True" not in line
    return line


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def change(**config: Any) -> Callable[[Path], Any]:
    return lambda folder: configure(folder, **config)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        pytest.param(
            change(model_type="zorblax"), "does not know its model type zorblax: update Parley", id="unknown-type"
        ),
        pytest.param(change(model_type=None), "config.json has no model_type", id="no-type"),
        pytest.param(T5Config().save_pretrained, "T5 is not a causal language model", id="encoder-and-decoder"),
        pytest.param(CLIPConfig().save_pretrained, "CLIP is not a causal language model", id="no-language-model"),
        pytest.param(write("config.json", '{"a": '), "config.json is damaged", id="damaged-config"),
        pytest.param(
            change(num_attention_heads=5), "config.json is wrong: The hidden size (64) is not", id="impossible-shape"
        ),
        pytest.param(change(hidden_act="zz"), "has an unknown value, or lacks one: 'zz'", id="unknown-value"),
        pytest.param(remove("model.safetensors"), "it has no weights: model.safetensors is missing", id="no-weights"),
        pytest.param(write("model.safetensors", "x" * 99), "is cut or damaged (", id="damaged-weights"),
        pytest.param(change(hidden_size=128), "the shapes of its weights differ", id="other-shapes"),
        pytest.param(remove("tokenizer.json"), "it has no tokenizer that can be read", id="no-tokenizer"),
        pytest.param(
            change(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "its weights are quantized in a format that Parley does not read",
            id="quantized",
        ),
    ],
)
def test_a_reason_is_told_in_a_short_line(folder: Path, spoil: Callable[[Path], Any], expected: str) -> None:
    spoil(folder)
    assert expected in reason(folder)


@pytest.fixture
def with_code(folder: Path) -> Path:
    """A model that brings code."""
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    configure(folder, model_type="own", auto_map=classes)
    (folder / "configuration_own.py").write_text("import no_such_package\n")
    (folder / "modeling_own.py").touch()
    return folder


def test_code_that_a_model_brings_names_our_setting(with_code: Path) -> None:
    assert reason(with_code).endswith("set PARLEY_TRUST_REMOTE_CODE=true")


@pytest.mark.filterwarnings("ignore")
def test_packages_that_the_code_of_a_model_needs_are_named(with_code: Path) -> None:
    line = reason(with_code, trust_remote_code=True)
    assert line == "its own code needs packages that are not installed: pip install no_such_package"


def test_an_unknown_error_keeps_its_own_words() -> None:
    assert why_not_loaded(ValueError("the moon\nis full")) == "ValueError: the moon is full"


def test_too_little_memory_is_told() -> None:
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:120] . DefaultCPUAllocator: not enough memory: you tried to")
    assert why_not_loaded(error).startswith("there is not enough memory")
