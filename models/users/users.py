"""Who may chat: users and their secrets."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from weakref import WeakValueDictionary

from limits.aio.storage import Storage
from sqlalchemy import delete, exists, insert, select
from sqlalchemy.exc import IntegrityError

from models.errors import (
    APIError,
    DatabaseInUseError,
    DatabaseUnavailableError,
    DataFolderError,
    TooManyLoginsError,
    UsersError,
    WrongCredentialsError,
    one_line,
)
from models.private_files import make_private_file
from models.settings import USER_ID, Settings
from models.store.database import Database, begin_alone, key_fingerprint_table, make_data_folder, users_table
from models.store.ownership import Ownership
from models.users.addresses import counted
from models.users.devices import Devices
from models.users.login_limiter import Guesser, LoginLimiter
from models.users.sessions import Session, Sessions

logger = logging.getLogger("parley")

REFRESH_SECONDS = 0.5  # between two reads of the users in the database


@dataclass(frozen=True)
class User:
    """Someone who may chat. `digest` is the keyed hash of the secret; the secret itself is not stored."""

    id: str
    digest: bytes


@dataclass(frozen=True)
class Logins:
    """Who may log in: the users, and the sessions that have ended before they expire."""

    users: tuple[User, ...]
    ended: tuple[Session, ...]


class Users:
    """The users in the database and those of `PARLEY_USERS`.

    Secrets are stored as HMAC-SHA256. The key is in the settings or in a file: the database is useless without it.
    An attacker cannot predict digests, so the time of a lookup reveals nothing. The users of the last read stay known
    while the database is down; `trouble` says why a later read failed.
    """

    def __init__(
        self, database: Database, key: bytes, configured: Mapping[str, str], limits: Storage | None = None
    ) -> None:
        self._database = database
        self._login_limiter = LoginLimiter(storage=limits)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of logins, by address
        self._key = key
        self._sessions = Sessions(key, database)
        self._devices = Devices(key)
        self._configured = [User(user, self._digest(secret)) for user, secret in configured.items()]
        self._known = tuple(self._configured)  # as of the last read of the database
        self._reads = self._latest_read = 0  # how many reads began, and the number of the read that gave `_known`
        self._on_revoked: Callable[[User], None] | None = None
        self._on_session_ended: Callable[[Session], None] | None = None
        self.on_changed: Callable[[Logins], None] | None = None
        self.trouble: str | None = None

    @classmethod
    def open(cls, settings: Settings, database: Database, limits: Storage | None = None) -> Self:
        """The users of the settings and a database, with the key of the settings, else of the data folder.

        `limits` counts failed logins, else the memory does. Raises StartError.
        """
        if settings.key is not None:
            key = hashlib.sha256(settings.key.encode(errors="surrogatepass")).digest()
            return cls(database, key, settings.users, limits)
        make_data_folder(settings)
        try:
            key = _read_key(settings.data / "key")
        except OSError as error:
            raise DataFolderError(settings.data, error) from error
        return cls(database, key, settings.users, limits)

    def key_for(self, purpose: bytes) -> bytes:
        """A key for something else, which all hosts with the same users have."""
        return hmac.digest(self._key, purpose, "sha256")

    @property
    def logins(self) -> Logins:
        """Who may log in, as of the last read of the database."""
        return Logins(self._known, tuple(self._sessions.ended))

    def replace(self, logins: Logins) -> None:
        """Replace who may log in, as another process has read it."""
        self._known = logins.users
        self._sessions.learn([*logins.ended])

    async def check_key(self, ownership: Ownership) -> None:
        """Check that the database belongs to the key; it takes the first one that it sees.

        It takes another one only while it has no users, and no other process runs. `ownership` is that of this process,
        which need not have taken it. Raises UsersError.
        """
        if await self._take_key():
            return
        with suppress(DatabaseInUseError):
            if not await self._has_stored_users():
                await ownership.wait_alone()
                if await self._take_key(replace=True):
                    return
        raise UsersError(
            "the secrets in the database belong to another key: set PARLEY_KEY to the same value on all hosts, or copy "
            "the file data/key of the first one; if the key is lost, stop all hosts, remove all users, and start again"
        )

    async def _take_key(self, replace: bool = False) -> bool:
        """Give the database this key, if it has none or it is to be replaced. Returns whether it has this one now."""
        fingerprint = hmac.digest(self._key, b"fingerprint", "sha256")
        async with begin_alone(self._database) as connection:
            stored = (await connection.execute(select(key_fingerprint_table.c.fingerprint))).scalar()
            if stored is None or replace:
                await connection.execute(delete(key_fingerprint_table))
                await connection.execute(insert(key_fingerprint_table).values(place=1, fingerprint=fingerprint))
                return True
        return hmac.compare_digest(stored, fingerprint)

    async def _has_stored_users(self) -> bool:
        async with self._database.connect() as connection:
            return bool((await connection.execute(select(exists(select(users_table.c.id))))).scalar())

    @asynccontextmanager
    async def watched(
        self,
        on_revoked: Callable[[User], None],
        on_session_ended: Callable[[Session], None] | None = None,
        seconds: float = REFRESH_SECONDS,
    ) -> AsyncIterator[None]:
        """While the context lasts, read the users regularly, and tell who is gone and which sessions have ended."""
        self._on_revoked, self._on_session_ended = on_revoked, on_session_ended
        watching = asyncio.create_task(self._watch(seconds))
        try:
            yield
        finally:
            self._on_revoked = self._on_session_ended = None
            watching.cancel()
            await asyncio.wait([watching])
            await self._sessions.save()

    async def find(self, secret: str, user_id: str | None = None) -> User | None:
        """The user with this secret, and with this id if one is given. Raises DatabaseUnavailableError."""
        digest = self._digest(secret)
        found = self._find_known(digest, user_id)
        if not found:
            try:
                await self._refresh()
            except Exception as error:
                raise DatabaseUnavailableError from error
            found = self._find_known(digest, user_id)
        return found

    async def log_in(self, secret: str, user_id: str | None, address: str, device: str = "") -> User:
        """Like `find`, but a wrong secret is an error and counts against the address. Raises APIError.

        `device` is the device token of the browser, if it has one: its user can log in although the address is blocked.
        """
        known = self._user_of_device(device)
        guesser = Guesser(address, user_id, known.id if known else None)
        async with self._turns.setdefault(counted(address), asyncio.Lock()):  # else a burst is over before it counts
            return await self._log_in(secret, guesser)

    async def _log_in(self, secret: str, guesser: Guesser) -> User:
        wanted = await self._wanted(guesser)
        try:
            user = await self.find(secret, wanted)
            refusal: APIError = WrongCredentialsError()
        except DatabaseUnavailableError as error:  # counts as a failed login: the secret matched no known user
            user, refusal = None, error
        if user is None:
            if not await self._login_limiter.count_failure(guesser):
                refusal = TooManyLoginsError()
            raise refusal
        return user

    def device_token(self, user: User) -> str:
        """A signed token for the browser of a user who has logged in. It is no session."""
        return self._devices.token(user.id, self._secret_fingerprint(user))

    def session_token(self, user: User) -> str:
        """A new signed token for a session cookie. It is valid for two weeks, as long as the secret is valid."""
        return self._sessions.token(user.id, self._secret_fingerprint(user))

    def session(self, token: str) -> tuple[User, Session] | None:
        """The user and the session of a session token; None if the token is not valid or the session has ended."""
        if not (found := self._sessions.read(token)):
            return None
        session, fingerprint = found
        user = self._find_by_fingerprint(session.user_id, fingerprint)
        return (user, session) if user else None

    async def end_session(self, session: Session) -> None:
        """End a session: its token is no longer valid, in any process."""
        if self._on_session_ended:
            self._on_session_ended(session)
        self._sessions.end(session)
        self._tell_changed()
        await self._sessions.save()

    async def create(self, user_id: str, secret: str | None = None) -> str:
        """Add a user and return the secret; it is random if none is given. Raises UsersError."""
        if not re.fullmatch(USER_ID, user_id):
            raise UsersError(f"{user_id!r} cannot be the id of a user: use up to 64 letters, digits and . _ @ -")
        if secret is None:
            secret = secrets.token_urlsafe(24)
        if not secret or secret != secret.strip():
            raise UsersError("the secret is empty or has spaces around it: leave --secret out to get a random one")
        if any(user_id == user.id for user in await self.all()):
            raise UsersError(f"there is a user {user_id} already: remove it first to give it a new secret")
        if await self.find(secret):
            raise UsersError("another user has this secret: choose a different one")
        try:
            async with self._database.begin() as connection:
                await connection.execute(insert(users_table).values(id=user_id, digest=self._digest(secret)))
        except IntegrityError:
            raise UsersError(f"another process has just added {user_id}, or a user with this secret") from None
        await self._refresh()
        return secret

    async def remove(self, user_id: str) -> None:
        """Remove a user. Raises UsersError."""
        if any(user_id == user.id for user in self._configured):
            raise UsersError(f"{user_id} comes from PARLEY_USERS: remove it there")
        async with self._database.begin() as connection:
            if not (await connection.execute(delete(users_table).where(users_table.c.id == user_id))).rowcount:
                raise UsersError(f"there is no user {user_id}")
        await self._refresh()

    async def all(self) -> list[User]:
        """All users, by id."""
        await self._refresh()
        return sorted(self._known, key=lambda user: user.id)

    async def create_first(self) -> str | None:
        """If there are no users, add `admin` and return its secret."""
        if await self.all():
            return None
        try:
            return await self.create("admin")
        except UsersError:  # another process was faster
            return None

    def _secret_fingerprint(self, user: User) -> str:
        """Identifies the secret that a session token was made with, without revealing it."""
        return hmac.digest(self._key, b"stamp" + user.digest, "sha256").hex()[:32]

    def _find_by_fingerprint(self, user_id: str, fingerprint: str) -> User | None:
        users = [user for user in self._known if user.id == user_id]
        return next((user for user in users if hmac.compare_digest(self._secret_fingerprint(user), fingerprint)), None)

    def _user_of_device(self, token: str) -> User | None:
        found = self._devices.read(token)
        return self._find_by_fingerprint(*found) if found else None

    async def _wanted(self, guesser: Guesser) -> str | None:
        """The id of the only user that a secret may belong to; None for any. Raises TooManyLoginsError.

        From a blocked address, it is the user whose device this is: a secret of anybody else is like a wrong one.
        """
        try:
            await self._login_limiter.check(guesser)
            return guesser.user_id
        except TooManyLoginsError:
            if guesser.user_id not in (None, guesser.device_of):
                raise
            await self._login_limiter.check_device(guesser)
            return guesser.device_of

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._key, secret.encode(errors="surrogatepass"), "sha256")

    def _find_known(self, digest: bytes, user_id: str | None) -> User | None:
        matches = [user for user in self._known if hmac.compare_digest(user.digest, digest)]
        return next((user for user in matches if user_id in (None, user.id)), None)

    async def _refresh(self) -> None:
        """Read the users from the database."""
        self._reads += 1
        read = self._reads
        async with self._database.connect() as connection:
            rows = await connection.execute(select(users_table.c.id, users_table.c.digest))
            known = (*self._configured, *(User(*row) for row in rows))
            ended = await self._sessions.fetch_ended(connection)
        if read < self._latest_read:  # a late read would bring back removed users, and revoke new ones
            return
        self._latest_read = read
        before, self._known = self._known, known
        gone, sessions = {*before} - {*known}, self._sessions.learn(ended)
        if on_revoked := self._on_revoked:
            for user in gone:
                on_revoked(user)
        for session in sessions:
            if self._on_session_ended:
                self._on_session_ended(session)
        if sessions or {*before} != {*known}:
            self._tell_changed()

    def _tell_changed(self) -> None:
        if self.on_changed:
            self.on_changed(self.logins)

    async def _watch(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._sessions.save()
            try:
                await self._refresh()
                self.trouble = None
            except Exception as error:
                if not self.trouble:
                    logger.error("the database cannot be read: %s", one_line(error))
                self.trouble = "the database cannot be read at the moment"


def _read_key(path: Path) -> bytes:
    """The key in a file, a new one if there is none. A new file is never incomplete, and only its owner can read it."""
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # with mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
            os.link(temporary, path)  # unlike a rename, it never replaces the key of another process
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    make_private_file(path)
    if len(key := path.read_bytes()) != 32:
        raise UsersError(
            f"{path} is not a key of 32 bytes: restore it; or delete it, remove the users and add them again"
        )
    return key
