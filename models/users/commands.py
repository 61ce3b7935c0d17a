"""The commands `users add`, `users list` and `users remove`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import click

from models.errors import StartError
from models.settings import Settings
from models.store.database import open_database
from models.store.ownership import Ownership
from models.users.users import Users


@click.group()
def users() -> None:
    """Add, list and remove users."""


@users.command()
@click.argument("id")
@click.option("--secret", help="The secret; without it a random one is made and printed.")
@click.pass_obj
def add(settings: Settings, id: str, secret: str | None) -> None:
    """Add a user."""
    created = _with_users(settings, lambda users: users.create(id, secret), needs_key=True)
    click.echo(f"added {id}" if secret else f"added {id}; the secret, shown only this once: {created}")


@users.command("list")
@click.pass_obj
def list_users(settings: Settings) -> None:
    """List the users."""
    for user in _with_users(settings, lambda users: users.all()):
        click.echo(user.id)


@users.command()
@click.argument("id")
@click.pass_obj
def remove(settings: Settings, id: str) -> None:
    """Remove a user."""
    _with_users(settings, lambda users: users.remove(id))
    click.echo(f"removed {id}")


def _with_users(settings: Settings, act: Callable[[Users], Awaitable[Any]], needs_key: bool = False) -> Any:
    async def run() -> Any:
        async with open_database(settings) as database:
            users = Users.open(settings, database)
            if needs_key:  # else users whose key is lost could not be removed
                await users.check_key(Ownership(database))
            return await act(users)

    try:
        return asyncio.run(run())
    except StartError as error:
        raise click.ClickException(str(error)) from error
