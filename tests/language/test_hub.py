from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.errors import ModelError
from models.language.hub import TRIES, fetch_model
from tests.support.fake_hub import COMMIT, FakeHub, running_hub

NAME = "ann/tiny"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with one model."""
    folder = tmp_path / "ann" / "tiny"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(f"the file {name}")
    with running_hub() as hub:
        hub.models[NAME] = folder
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def put(hub: FakeHub, *names: str) -> None:
    """Replace the files of the model."""
    folder = hub.models[NAME]
    for file in folder.iterdir():
        file.unlink()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the file {name}")


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def refusal(hub: FakeHub, cache: Path, name: str = NAME, revision: str | None = None, seconds: float = 10) -> str:
    with pytest.raises(ModelError) as raised:
        fetch_model(name, revision, api=hub.api, cache=cache, seconds=seconds)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 300
    return message


# Downloads


def test_a_model_is_downloaded_into_the_cache_once(hub: FakeHub, cache: Path) -> None:
    folder = fetch_model(NAME, api=hub.api, cache=cache)
    assert names(folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "config.json").read_text() == "the file config.json"
    assert cache in folder.parents
    hub.asked.clear()
    assert fetch_model(NAME, api=hub.api, cache=cache) == folder
    assert not any("/resolve/" in asked for asked in hub.asked)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        pytest.param(
            [
                *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                *("model.safetensors.index.json", "consolidated.safetensors", "pytorch_model.bin"),
            ],
            {
                *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                "model.safetensors.index.json",
            },
            id="shards",
        ),
        pytest.param(
            ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5", "README.md"],
            {"model.safetensors"},
            id="one-format-only",
        ),
        pytest.param(
            ["pytorch_model.bin", "onnx/model.onnx", "onnx/config.json"], {"pytorch_model.bin"}, id="no-safetensors"
        ),
        pytest.param(
            ["model.safetensors", "vocab.txt", "tokenizer.model", "code/model.py", "chat_template.jinja", "x.gguf"],
            {"model.safetensors", "vocab.txt", "tokenizer.model", "code/model.py", "chat_template.jinja"},
            id="tokenizer-template-and-code",
        ),
        pytest.param(["adapter_model.safetensors"], {"adapter_model.safetensors"}, id="adapter"),
        pytest.param(
            ["adapter_model.safetensors", "model.safetensors"],
            {"adapter_model.safetensors", "model.safetensors"},
            id="adapter-and-base",
        ),
    ],
)
def test_only_what_is_needed_is_downloaded(hub: FakeHub, cache: Path, files: list[str], wanted: set[str]) -> None:
    put(hub, "config.json", *files)
    assert names(fetch_model(NAME, api=hub.api, cache=cache)) == {"config.json", *wanted}


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_downloaded(hub: FakeHub, cache: Path, revision: str) -> None:
    fetch_model(NAME, revision, api=hub.api, cache=cache)
    assert f"GET /api/models/{NAME}/revision/{revision}" in hub.asked


# Refusals


@pytest.mark.parametrize("name", ["ann/other", "not a name", "a/b/c"])
def test_a_model_that_is_not_there_is_told(hub: FakeHub, cache: Path, name: str) -> None:
    message = refusal(hub, cache, name)
    assert message.startswith("there is no such file or folder here, and no such model on the Hub")
    assert "HF_TOKEN" in message


def test_a_gated_model_is_told(hub: FakeHub, cache: Path) -> None:
    hub.gated.add(NAME)
    assert f"accept the terms on {hub.url}/{NAME}, then set HF_TOKEN" in refusal(hub, cache)


def test_a_wrong_revision_is_told(hub: FakeHub, cache: Path) -> None:
    assert "no branch, tag or commit v9 (PARLEY_REVISION)" in refusal(hub, cache, revision="v9")


@pytest.mark.parametrize(
    ("file", "reason"), [("tiny.gguf", "it holds GGUF files only"), ("README.md", "it holds no weights")]
)
def test_a_model_without_weights_is_told(hub: FakeHub, cache: Path, file: str, reason: str) -> None:
    put(hub, "config.json", file)
    assert reason in refusal(hub, cache)


def test_a_failed_download_is_told(hub: FakeHub, cache: Path) -> None:
    cache.write_text("a file in its place")
    assert refusal(hub, cache).startswith("the download failed: ")


# Without the Hub


@pytest.fixture
def silent() -> Iterator[FakeHub]:
    """A hub that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield FakeHub(f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.fixture
def absent() -> FakeHub:
    """A hub that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return FakeHub(f"http://127.0.0.1:{port}")


def test_a_hub_that_is_not_there_is_told(absent: FakeHub, cache: Path) -> None:
    message = refusal(absent, cache)
    assert message.startswith(f"the Hub ({absent.url}) cannot be reached (ConnectError: ")
    assert "set PARLEY_MODEL to a folder" in message


def test_a_hub_that_never_answers_is_told(silent: FakeHub, cache: Path) -> None:
    assert f"the Hub ({silent.url}) cannot be reached (ReadTimeout: " in refusal(silent, cache, seconds=0.05)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_broken_is_asked_only_some_times(hub: FakeHub, cache: Path, status: int) -> None:
    hub.failures = [status] * 10
    assert "cannot be reached" in refusal(hub, cache)
    assert len(hub.asked) == TRIES


def test_one_failed_answer_is_not_the_end(hub: FakeHub, cache: Path) -> None:
    hub.failures = [503]
    assert names(fetch_model(NAME, api=hub.api, cache=cache))


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_without_the_hub_a_model_that_was_downloaded_is_used(
    hub: FakeHub, absent: FakeHub, cache: Path, revision: str | None
) -> None:
    folder = fetch_model(NAME, revision, api=hub.api, cache=cache)
    assert fetch_model(NAME, revision, api=absent.api, cache=cache) == folder


def test_without_the_hub_an_adapter_that_was_downloaded_is_used(hub: FakeHub, absent: FakeHub, cache: Path) -> None:
    put(hub, "adapter_config.json", "adapter_model.safetensors")
    folder = fetch_model(NAME, api=hub.api, cache=cache)
    assert fetch_model(NAME, api=absent.api, cache=cache) == folder


def test_without_the_hub_another_revision_is_refused(hub: FakeHub, absent: FakeHub, cache: Path) -> None:
    fetch_model(NAME, api=hub.api, cache=cache)
    assert "cannot be reached" in refusal(absent, cache, revision="v1")
