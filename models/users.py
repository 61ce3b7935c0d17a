"""Who may chat."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from itsdangerous import BadSignature, URLSafeTimedSerializer
from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from models.database import DatabaseUnavailable, DataFolderError, explained, users_table
from models.refused import Refused
from models.settings import USER_ID, Settings, StartError
from models.throttle import Throttle, TooManyFailures

logger = logging.getLogger("parley")

TICKET_SECONDS = 14 * 24 * 3600
LOOK_SECONDS = 0.5  # from one look into the database to the next


class UsersError(StartError):
    """A user that cannot be added or removed, or a key that cannot be used; the message says what to do."""


class WrongCredentials(Refused):
    """Credentials that are missing or belong to nobody."""

    type = "authentication_error"
    code = "invalid_credentials"
    message = "authentication failed"


class OriginNotAllowed(Refused):
    """A browser that shows somebody else's page, with the cookie of ours."""

    type = "authentication_error"
    code = "origin_not_allowed"
    message = "this page's origin is not in PARLEY_ORIGINS"


@dataclass(frozen=True)
class User:
    """Someone who may chat. `digest` is the keyed hash of the secret, which itself is kept nowhere."""

    id: str
    digest: bytes


class Users:
    """The users of a database and those of `PARLEY_USERS`.

    Secrets are stored as HMAC-SHA256 under a key that lies beside the database, so neither alone is worth
    stealing; and since a digest cannot be chosen without the key, looking one up tells an attacker nothing.
    Who was there at the last look into the database is known without it; `trouble` says why that failed.
    """

    def __init__(self, database: AsyncEngine, key: bytes, configured: Mapping[str, str]) -> None:
        self._database = database
        self._throttle = Throttle()
        self._key = key
        self._tickets = URLSafeTimedSerializer(hmac.digest(key, b"tickets", "sha256"))
        self._configured = [User(user, self._digest(secret)) for user, secret in configured.items()]
        self._known = tuple(self._configured)  # as of the last look into the database
        self._looks = self._latest = 0  # into the database, and the one that `_known` comes from
        self._revoked: Callable[[User], None] | None = None
        self.trouble: str | None = None

    @classmethod
    def of(cls, settings: Settings, database: AsyncEngine) -> Users:
        """The users of the settings and of a database, with the key under the data folder. Raises StartError."""
        try:
            settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
            key = _key(settings.data / "key")
        except OSError as error:
            raise DataFolderError(settings.data, error) from error
        return cls(database, key, settings.users)

    @asynccontextmanager
    async def watched(self, revoked: Callable[[User], None], seconds: float = LOOK_SECONDS) -> AsyncIterator[None]:
        """While the context lasts, see at once who was added, and tell whose secret is no longer good."""
        self._revoked = revoked
        watching = asyncio.create_task(self._watch(seconds))
        try:
            yield
        finally:
            self._revoked = None
            watching.cancel()
            await asyncio.wait([watching])

    async def find(self, secret: str, user_id: str | None = None) -> User | None:
        """The user with this secret, and with this id where one is given. Raises DatabaseUnavailable."""
        digest = self._digest(secret)
        found = self._among(digest, user_id)
        if not found:
            try:
                await self._look()
            except Exception as error:
                raise DatabaseUnavailable from error
            found = self._among(digest, user_id)
        return found

    async def log_in(self, secret: str, user_id: str | None, address: str) -> User:
        """As `find`, where a wrong secret counts against an address. Raises Refused."""
        try:
            user = await self.find(secret, user_id)
            refusal: Refused = WrongCredentials()
        except DatabaseUnavailable as error:  # a guess all the same: whoever was known would have been found
            user, refusal = None, error
        if self._throttle.blocked(address):  # after the look-up: nobody else's guess comes between this and the count
            raise TooManyFailures
        if user is None:
            self._throttle.failed(address)
            raise refusal
        return user

    def ticket(self, user: User) -> str:
        """A signed note of who it is, for a session cookie, always another; good for two weeks, while the secret is."""
        return self._tickets.dumps([user.id, self._stamp(user), secrets.token_urlsafe(8)])

    def of_ticket(self, ticket: str) -> User | None:
        """Whose ticket it is, if it is one of ours and still good."""
        try:
            user_id, stamp, *_ = self._tickets.loads(ticket, max_age=TICKET_SECONDS)
        except BadSignature:
            return None
        users = [user for user in self._known if user.id == user_id]
        return next((user for user in users if hmac.compare_digest(self._stamp(user), stamp)), None)

    async def add(self, user_id: str, secret: str | None = None) -> str:
        """Add a user; returns the secret, made up where none is given. Raises UsersError."""
        if not re.fullmatch(USER_ID, user_id):
            raise UsersError(f"{user_id!r} cannot be a user's id: use up to 64 letters, digits and . _ @ -")
        if secret is None:
            secret = secrets.token_urlsafe(24)
        if not secret or secret != secret.strip():
            raise UsersError("the secret is empty or has blanks around it: leave --secret out to have one made")
        if any(user_id == user.id for user in await self.all()):
            raise UsersError(f"there is a user {user_id} already: remove it first to give it a new secret")
        if await self.find(secret):
            raise UsersError("another user has this secret: choose a different one")
        try:
            async with self._database.begin() as connection:
                await connection.execute(insert(users_table).values(id=user_id, digest=self._digest(secret)))
        except IntegrityError:
            raise UsersError(f"another process added {user_id}, or a user with this secret, just now") from None
        await self._look()
        return secret

    async def remove(self, user_id: str) -> None:
        """Remove a user. Raises UsersError."""
        if any(user_id == user.id for user in self._configured):
            raise UsersError(f"{user_id} comes from PARLEY_USERS: take it out there")
        async with self._database.begin() as connection:
            if not (await connection.execute(delete(users_table).where(users_table.c.id == user_id))).rowcount:
                raise UsersError(f"there is no user {user_id}")
        await self._look()

    async def all(self) -> list[User]:
        """All users, by id."""
        await self._look()
        return sorted(self._known, key=lambda user: user.id)

    async def add_first(self) -> str | None:
        """Where there is no user at all, add `admin` and return its secret."""
        if await self.all():
            return None
        try:
            return await self.add("admin")
        except UsersError:  # another worker was faster
            return None

    def _stamp(self, user: User) -> str:
        """Shows which secret a ticket was made with, and tells nothing of it."""
        return hmac.digest(self._key, b"stamp" + user.digest, "sha256").hex()[:32]

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._key, secret.encode(errors="surrogatepass"), "sha256")

    def _among(self, digest: bytes, user_id: str | None) -> User | None:
        matches = [user for user in self._known if hmac.compare_digest(user.digest, digest)]
        return next((user for user in matches if user_id in (None, user.id)), None)

    async def _look(self) -> None:
        self._looks += 1
        look = self._looks
        async with self._database.connect() as connection:
            rows = await connection.execute(select(users_table.c.id, users_table.c.digest))
            known = (*self._configured, *(User(*row) for row in rows))
        if look < self._latest:  # who was late would bring back who is gone, and revoke who is new
            return
        self._latest = look
        gone, self._known = {*self._known} - {*known}, known
        if revoked := self._revoked:
            for user in gone:
                revoked(user)

    async def _watch(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await self._look()
                self.trouble = None
            except Exception as error:
                if not self.trouble:
                    logger.error("the database cannot be read: %s", explained(error))
                self.trouble = "the database cannot be read at present"


def _key(path: Path) -> bytes:
    """The key in a file, made once, whole and readable for its owner only."""
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # made 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
            os.link(temporary, path)  # unlike a rename, it never replaces another process's key
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    if len(key := path.read_bytes()) != 32:
        raise UsersError(f"{path} is not a key of 32 bytes: restore it, or delete it and add the users anew")
    return key
