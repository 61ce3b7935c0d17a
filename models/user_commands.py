"""`users add`, `users list` and `users remove` on the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import click

from models import database
from models.settings import Settings, StartError
from models.users import Users

ReadSettings = Callable[[], Settings]


@click.group()
def users() -> None:
    """Who may chat."""


@users.command()
@click.argument("id")
@click.option("--secret", help="The secret; one is made up and printed where it is left out.")
@click.pass_obj
def add(read_settings: ReadSettings, id: str, secret: str | None) -> None:
    """Add a user."""
    made = _with_users(read_settings, lambda users: users.add(id, secret))
    click.echo(f"added {id}" if secret else f"added {id}; the secret, shown this once: {made}")


@users.command("list")
@click.pass_obj
def list_users(read_settings: ReadSettings) -> None:
    """List the users."""
    for user in _with_users(read_settings, lambda users: users.all()):
        click.echo(user.id)


@users.command()
@click.argument("id")
@click.pass_obj
def remove(read_settings: ReadSettings, id: str) -> None:
    """Remove a user."""
    _with_users(read_settings, lambda users: users.remove(id))
    click.echo(f"removed {id}")


def _with_users(read_settings: ReadSettings, act: Callable[[Users], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        settings = read_settings()
        async with database.opened(settings) as opened:
            return await act(Users.of(settings, opened))

    try:
        return asyncio.run(run())
    except StartError as error:
        raise click.ClickException(str(error)) from error
