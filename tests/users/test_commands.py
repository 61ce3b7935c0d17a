"""The `users` commands over a database; tests/system/test_command_line.py runs them as an operator does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from models.settings import Settings
from models.store.database import open_database
from models.users.commands import users
from models.users.users import Users


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """One user, ann, and no database yet."""
    return Settings(data=tmp_path / "data", users={"ann": "ann's secret"})


def run(settings: Settings, *arguments: str) -> Result:
    return CliRunner().invoke(users, arguments, obj=settings)


def find_id(settings: Settings, secret: str) -> str | None:
    """The id of the user with a secret, as the server finds it."""

    async def find() -> str | None:
        async with open_database(settings) as database:
            user = await Users.open(settings, database).find(secret)
            return user.id if user else None

    return asyncio.run(find())


def test_add_prints_a_random_secret_that_logs_in(settings: Settings) -> None:
    added = run(settings, "add", "zoe")
    assert added.exit_code == 0
    text, _, secret = added.output.strip().rpartition(" ")
    assert text == "added zoe; the secret, shown only this once:"
    assert find_id(settings, secret) == "zoe"


def test_add_does_not_print_a_secret_that_was_given(settings: Settings) -> None:
    assert run(settings, "add", "zoe", "--secret", "zoe's secret").output == "added zoe\n"
    assert find_id(settings, "zoe's secret") == "zoe"


def test_list_prints_configured_and_stored_users(settings: Settings) -> None:
    assert run(settings, "list").output == "ann\n"
    run(settings, "add", "zoe")
    assert run(settings, "list").output == "ann\nzoe\n"


def test_remove_removes_a_stored_user(settings: Settings) -> None:
    run(settings, "add", "zoe", "--secret", "zoe's secret")
    assert run(settings, "remove", "zoe").output == "removed zoe\n"
    assert find_id(settings, "zoe's secret") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["add", "a b"], "'a b' cannot be the id of a user", id="bad id"),
        pytest.param(["add", "zoe", "--secret", ""], "the secret is empty", id="empty secret"),
        pytest.param(["add", "ann"], "there is a user ann already", id="id in use"),
        pytest.param(["remove", "zoe"], "there is no user zoe", id="unknown user"),
        pytest.param(["remove", "ann"], "ann comes from PARLEY_USERS", id="configured user"),
    ],
)
def test_a_command_that_fails_says_why_in_one_line(settings: Settings, arguments: list[str], message: str) -> None:
    result = run(settings, *arguments)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {message}")
    assert len(result.output.splitlines()) == 1


def test_a_command_without_a_usable_database_says_why(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(replace(settings, data=tmp_path / "file"), "list")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: PARLEY_DATA={tmp_path / 'file'} cannot be used")
