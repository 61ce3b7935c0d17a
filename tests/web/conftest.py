"""Apps for the tests of a file, since an app with a database of its own takes longer than most tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from models.settings import Settings
from server import create_app
from tests.support.client import ANN, BOB
from tests.support.running_app import RunningApp, start
from tests.support.scripted import ScriptedChat
from tests.support.workers import start_workers

Start = Callable[[Starlette], AbstractContextManager[RunningApp]]
STARTS: dict[str, Start] = {"one process": start, "two workers": start_workers}


@pytest.fixture(scope="module", params=STARTS)
def start_shared(request: pytest.FixtureRequest) -> Start:
    """How the app for a whole file runs."""
    return STARTS[request.param]


@pytest.fixture(scope="module")
def shared_settings(start_shared: Start, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Like `settings`, with a data folder for a whole file."""
    data = tmp_path_factory.mktemp("shared") / "data"
    return Settings(context=256, slots=4, compile=False, data=data, users={"ann": ANN, "bob": BOB})


@pytest.fixture(scope="module")
def shared_app(start_shared: Start, shared_settings: Settings) -> Iterator[RunningApp]:
    """A scripted app for a whole file: its database has what other tests stored."""
    with start_shared(create_app(shared_settings, ScriptedChat().opened)) as running:
        yield running


@pytest.fixture
def client(shared_app: RunningApp) -> TestClient:
    """A new client of the shared app."""
    return shared_app.client()


@pytest.fixture(params=STARTS)
def own_app(request: pytest.FixtureRequest, settings: Settings, scripted: ScriptedChat) -> Iterator[RunningApp]:
    """A scripted app for one test, which may change it."""
    with STARTS[request.param](create_app(settings, scripted.opened)) as running:
        yield running


@pytest.fixture
def own_client(own_app: RunningApp) -> TestClient:
    """A client of `own_app`."""
    return own_app.client()
