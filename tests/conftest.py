"""What most tests stand on: a tiny tokenizer, tiny models, an app over them and a real server."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # lets Triton's kernels run as Python, without a GPU; read when it is imported

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from platformdirs import user_cache_path
from starlette.applications import Starlette
from starlette.testclient import TestClient
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.engine.native import build
from models.generation.manager import ResponseManager
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.database import open_database
from server import create_app
from tests.support.client import ANN, BOB
from tests.support.scripted import ScriptedChat, running
from tests.support.serving import Served, serve
from tests.support.tiny import opens_tiny, tiny_llama, tiny_tokenizer
from tests.support.upstreams import serve_in_front
from tests.support.workers import serve_by_workers

pytest_plugins = ["tests.support.databases", "tests.support.redis_server"]


@pytest.fixture(autouse=True, scope="session")
def one_compute_thread() -> None:
    """Tiny models gain nothing from more threads, and the machine has few."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what only several threads could get wrong, or what is too slow with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def compiled_kernels(request: pytest.FixtureRequest) -> None:
    """Load the engine's kernels where a selected test needs a compiler; without such tests, torch computes all."""
    if any(item.get_closest_marker("compiler") for item in request.session.items):
        build.load_kernels(build.build_library(user_cache_path("parley")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a browser, a PostgreSQL or a Redis server, so that it can be left out."""
    for item in items:
        if "browser" in item.path.parts:
            item.add_marker("browser")
        if "postgresql" in getattr(item, "fixturenames", ()):
            item.add_marker("postgresql")
        if "stopped_redis" in getattr(item, "fixturenames", ()):
            item.add_marker("redis")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two users, ann and bob, and little of everything."""
    return Settings(context=256, slots=4, compile=False, data=tmp_path / "data", users={"ann": ANN, "bob": BOB})


@pytest.fixture
def app(settings: Settings) -> Starlette:
    """The app over a tiny model with random weights."""
    return create_app(settings, opens_tiny)


@pytest.fixture
def client(app: Starlette) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture
def scripted() -> ScriptedChat:
    return ScriptedChat()


@pytest.fixture
async def conversations(settings: Settings) -> AsyncIterator[Conversations]:
    """The store of an empty database."""
    async with open_database(settings) as opened:
        yield Conversations(opened)


@pytest.fixture
async def responses(
    scripted: ScriptedChat, conversations: Conversations, settings: Settings
) -> AsyncIterator[ResponseManager]:
    """Replies made by the scripted chat, and kept in `conversations`."""
    async with running(scripted, conversations, settings) as responses:
        yield responses


SERVES = {"one process": serve, "two workers": serve_by_workers, "an upstream": serve_in_front}
PROTOCOL_SUITE = ("test_openai", "test_openai_responses", "test_langchain", "test_pydantic_ai")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the protocol suite with an upstream too, but for what a server of its own replies only does."""
    if "scripted_server" in metafunc.fixturenames:
        suite = metafunc.module.__name__.rpartition(".")[2] in PROTOCOL_SUITE
        with_upstream = suite and not metafunc.definition.get_closest_marker("own_replies")
        metafunc.parametrize("scripted_server", [*SERVES][: None if with_upstream else 2], indirect=True)


@pytest.fixture
def scripted_server(request: pytest.FixtureRequest, settings: Settings, scripted: ScriptedChat) -> Iterator[Served]:
    """A real server whose model says what the test wants."""
    with SERVES[request.param](create_app(settings, scripted.opened)) as served:
        yield served
