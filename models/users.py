"""Who may chat."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Column, LargeBinary, MetaData, String, Table, delete, insert, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from models.settings import USER_ID, Settings

metadata = MetaData()

users_table = Table(
    "users",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("digest", LargeBinary(32), unique=True, nullable=False),
)


class UsersError(Exception):
    """A user that cannot be added or removed, or a database that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class User:
    """Someone who may chat. `digest` is the keyed hash of the secret, which itself is kept nowhere."""

    id: str
    digest: bytes


class Users:
    """The users of a database and those of `PARLEY_USERS`.

    Secrets are stored as HMAC-SHA256 under a key that lies beside the database, so neither alone is worth
    stealing; and since a digest cannot be chosen without the key, looking one up tells an attacker nothing.
    """

    def __init__(self, database: AsyncEngine, key: bytes, configured: Mapping[str, str]) -> None:
        self._database = database
        self._key = key
        self._configured = [User(user, self._digest(secret)) for user, secret in configured.items()]

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings) -> AsyncIterator[Users]:
        """The users under the settings' data folder, made where there is none. Raises UsersError."""
        try:
            settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
            key = _key(settings.data / "key")
        except OSError as error:
            raise UsersError(f"PARLEY_DATA={settings.data} cannot be used: {error}") from error
        database = create_async_engine(f"sqlite+aiosqlite:///{settings.data / 'parley.db'}")
        try:
            async with database.begin() as connection:
                await connection.run_sync(metadata.create_all)
            yield cls(database, key, settings.users)
        except SQLAlchemyError as error:
            raise UsersError(f"the database in {settings.data} cannot be used: {error.args[0]}") from error
        finally:
            await database.dispose()

    async def find(self, secret: str, user_id: str | None = None) -> User | None:
        """The user with this secret, and with this id where one is given."""
        digest = self._digest(secret)
        known = await self._stored(users_table.c.digest == digest)
        matches = [user for user in [*self._configured, *known] if hmac.compare_digest(user.digest, digest)]
        return next((user for user in matches if user_id in (None, user.id)), None)

    async def signed_in(self, user_id: str, stamp: str) -> User | None:
        """The user of a session cookie, while the secret it was made with is still good."""
        known = await self._stored(users_table.c.id == user_id)
        users = [user for user in [*self._configured, *known] if user.id == user_id]
        return next((user for user in users if hmac.compare_digest(self.stamp(user), stamp)), None)

    def stamp(self, user: User) -> str:
        """What a session cookie carries to show which secret it was made with."""
        return self.derive(f"stamp {user.digest.hex()}").hex()[:32]

    def derive(self, purpose: str) -> bytes:
        """A key for a purpose of its own."""
        return hmac.digest(self._key, purpose.encode(), "sha256")

    async def add(self, user_id: str, secret: str | None = None) -> str:
        """Add a user; returns the secret, made up where none is given. Raises UsersError."""
        if not re.fullmatch(USER_ID, user_id):
            raise UsersError(f"{user_id!r} cannot be a user's id: use up to 64 letters, digits and . _ @ -")
        if secret == "":
            raise UsersError("the secret is empty: leave --secret out to have one made")
        secret = secret or secrets.token_urlsafe(24)
        if any(user_id == user.id for user in await self.all()):
            raise UsersError(f"there is a user {user_id} already: remove it first to give it a new secret")
        if await self.find(secret):
            raise UsersError("another user has this secret: choose a different one")
        async with self._database.begin() as connection:
            await connection.execute(insert(users_table).values(id=user_id, digest=self._digest(secret)))
        return secret

    async def remove(self, user_id: str) -> None:
        """Remove a user. Raises UsersError."""
        if any(user_id == user.id for user in self._configured):
            raise UsersError(f"{user_id} comes from PARLEY_USERS: take it out there")
        async with self._database.begin() as connection:
            if not (await connection.execute(delete(users_table).where(users_table.c.id == user_id))).rowcount:
                raise UsersError(f"there is no user {user_id}")

    async def all(self) -> list[User]:
        """All users, by id."""
        return sorted([*self._configured, *await self._stored()], key=lambda user: user.id)

    async def add_first(self) -> str | None:
        """Where there is no user at all, add `admin` and return its secret."""
        if await self.all():
            return None
        try:
            return await self.add("admin")
        except IntegrityError:  # another worker was faster
            return None

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._key, secret.encode(errors="surrogatepass"), hashlib.sha256)

    async def _stored(self, *where: object) -> list[User]:
        query = select(users_table.c.id, users_table.c.digest).where(*where)  # type: ignore[arg-type]
        async with self._database.connect() as connection:
            return [User(*row) for row in await connection.execute(query)]


def _key(path: Path) -> bytes:
    """The key in a file, made once, whole and readable for its owner only."""
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # made 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
        try:
            os.link(temporary, path)  # unlike a rename, it never replaces another process's key
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    return path.read_bytes()
