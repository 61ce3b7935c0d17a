"""How `create_app` builds the app; what the app does is tested in the other files of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp

from models.errors import SettingsError
from models.settings import Settings
from server import create_app
from tests.support.running_app import start
from tests.support.scripted import ScriptedChat


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without settings, in an empty folder."""
    for name in os.environ:
        if name.startswith("PARLEY_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


# Settings


def test_settings_are_read_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("PARLEY_CONTEXT", "64")
    environment.setenv("PARLEY_HOSTS", "chat.example.com, *.example.org")
    environment.setenv("PARLEY_TEMPERATURE", "0.3")
    settings = create_app().state.settings
    assert settings == Settings(context=64, hosts=("chat.example.com", "*.example.org"), options={"temperature": 0.3})


def test_settings_are_read_from_the_env_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PARLEY_CONTEXT=64\nPARLEY_SLOTS=2\n")
    environment.setenv("PARLEY_SLOTS", "3")  # the environment counts first
    assert create_app().state.settings == Settings(context=64, slots=3)


def test_without_any_setting_all_are_default(environment: pytest.MonkeyPatch) -> None:
    assert create_app().state.settings == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [("CONTEXT", "8"), ("SLOTS", "many"), ("HOSTS", "http://x"), ("TEMPERATURE", "hot"), ("LOG", "xml")],
)
def test_a_bad_setting_raises_an_error_that_names_it(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(f"PARLEY_{name}", value)
    with pytest.raises(SettingsError, match=f"^PARLEY_{name}='{value}' is not allowed: it must be "):
        create_app()


def test_given_settings_replace_the_environment(environment: pytest.MonkeyPatch, settings: Settings) -> None:
    environment.setenv("PARLEY_CONTEXT", "not a number")
    assert create_app(settings).state.settings is settings


def test_an_unknown_setting_is_logged(environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    environment.setenv("PARLEY_COLOUR", "red")
    create_app()
    assert "PARLEY_COLOUR is not a setting of Parley and has no effect" in caplog.messages


# Middleware


def layers(app: ASGIApp | None) -> Iterator[ASGIApp]:
    """The middleware of an app, from the outside, and what is inside of it."""
    while app:
        yield app
        app = getattr(app, "app", None)


def trusted_hosts(app: ASGIApp | None) -> list[ASGIApp]:
    return [layer for layer in layers(app) if isinstance(layer, TrustedHostMiddleware)]


def test_the_allowed_hosts_of_the_settings_are_checked_by_one_middleware(
    settings: Settings, scripted: ScriptedChat
) -> None:
    app = create_app(replace(settings, hosts=("chat.example.com",)), scripted.opened)
    with start(app) as running:
        client = running.client()
        assert client.get("/health", headers={"Host": "chat.example.com"}).status_code == 200
        (first,) = trusted_hosts(app.middleware_stack)
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
        assert client.get("/health").status_code == 400
        (second,) = trusted_hosts(app.middleware_stack)
    assert first is second


def test_the_allowed_hosts_of_the_environment_are_checked(
    environment: pytest.MonkeyPatch, tmp_path: Path, scripted: ScriptedChat
) -> None:
    environment.setenv("PARLEY_HOSTS", "*.example.org")
    environment.setenv("PARLEY_DATA", str(tmp_path / "data"))
    with start(create_app(open_chat=scripted.opened)) as running:
        client = running.client()
        assert client.get("/health", headers={"Host": "a.example.org"}).status_code == 200
        assert client.get("/health", headers={"Host": "example.org"}).status_code == 400


def test_two_apps_have_their_own_settings_and_state(settings: Settings, tmp_path: Path, scripted: ScriptedChat) -> None:
    other = replace(settings, hosts=("other.example",), data=tmp_path / "other")
    with start(create_app(settings, scripted.opened)) as one, start(create_app(other, ScriptedChat().opened)) as two:
        assert one.app.state.users is not two.app.state.users
        assert one.client().get("/health").status_code == 200
        assert two.client().get("/health").status_code == 400
