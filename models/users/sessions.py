"""The sessions of browsers, and which of them have ended by a logout."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from dataclasses import astuple, dataclass

from itsdangerous import BadSignature, URLSafeTimedSerializer
from sqlalchemy import and_, delete, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import one_line
from models.store.database import Database, ended_sessions_table

logger = logging.getLogger("parley")

SESSION_SECONDS = 14 * 24 * 3600
ENDED_PER_USER = 1000  # how many ended sessions of a user are kept one by one
ALL = "all:"  # begins the id of a row that ends all sessions of a user up to the one that expires then

ENDED = ended_sessions_table.c


@dataclass(frozen=True)
class Session:
    """The login of a browser; `expires` is in Unix seconds."""

    id: str
    user_id: str
    expires: float


class Sessions:
    """Signs and reads session tokens, and ends sessions.

    A session that ends here is known at once. It is stored until it expires, so that other processes and later starts
    know it too; if that fails, the next `save` tries again.
    """

    def __init__(self, key: bytes, database: Database) -> None:
        self._database = database
        # The label keeps an old word, tickets: a new label would end all sessions.
        self._serializer = URLSafeTimedSerializer(hmac.digest(key, b"tickets", "sha256"))
        self._stored: dict[str, Session] = {}  # ended sessions, as of the last read of the database
        self._all_until: dict[str, float] = {}  # by user: all sessions that expire until then have ended
        self._unseen: dict[str, Session] = {}  # those that ended here, and that no read has shown yet
        self._unsaved: dict[str, Session] = {}
        self._saving = asyncio.Lock()
        self._failing = False

    def token(self, user_id: str, fingerprint: str) -> str:
        """A token of a new session. It is valid for two weeks, as long as the fingerprint is that of the secret."""
        return str(self._serializer.dumps([user_id, fingerprint, secrets.token_urlsafe(8)]))

    def read(self, token: str) -> tuple[Session, str] | None:
        """The session and the fingerprint of a token; None if the token is not valid or the session has ended."""
        try:
            (user_id, fingerprint, id), created = self._serializer.loads(
                token, max_age=SESSION_SECONDS, return_timestamp=True
            )
        except (BadSignature, ValueError):  # ValueError: the first release signed no id
            return None
        session = Session(id, user_id, created.timestamp() + SESSION_SECONDS)
        if id in self._unseen or id in self._stored or session.expires <= self._all_until.get(user_id, 0):
            return None
        return session, fingerprint

    @property
    def ended(self) -> list[Session]:
        """The sessions that have ended, as far as this process knows."""
        return [*(self._stored | self._unseen).values()]

    def end(self, session: Session) -> None:
        """End a session. The next `save` stores that."""
        self._unseen[session.id] = self._unsaved[session.id] = session

    async def save(self) -> None:
        """Store the sessions that have ended here and are not stored yet."""
        async with self._saving:
            try:
                for session in [*self._unsaved.values()]:
                    async with self._database.begin() as connection:
                        await self._store(connection, session)
                    del self._unsaved[session.id]
                    self._failing = False
            except Exception as error:
                if not self._failing:
                    logger.error("a logout cannot be stored, and is tried again: %s", one_line(error))
                self._failing = True

    async def fetch_ended(self, connection: AsyncConnection) -> list[Session]:
        """The sessions in the database that have ended, and would be valid otherwise."""
        rows = await connection.execute(select(ended_sessions_table).where(ENDED.expires > time.time()))
        return [Session(*row) for row in rows]

    def learn(self, ended: list[Session]) -> list[Session]:
        """Replace what the last read found; returns the sessions that other processes have ended since then."""
        new = [session for session in ended if session.id not in self._stored and session.id not in self._unseen]
        self._stored = {session.id: session for session in ended}
        self._all_until = {session.user_id: session.expires for session in ended if session.id.startswith(ALL)}
        unseen = (session for id, session in self._unseen.items() if id not in self._stored)
        self._unseen = {session.id: session for session in unseen if session.expires > time.time()}
        return new

    async def _store(self, connection: AsyncConnection, session: Session) -> None:
        """Store that a session has ended. Of too many ones of a user, the oldest become one row that ends them all."""
        all_id = f"{ALL}{session.user_id}"
        own = and_(ENDED.user_id == session.user_id, ENDED.id != all_id)
        kept = select(ENDED.id).where(own).order_by(ENDED.expires.desc(), ENDED.id).limit(ENDED_PER_USER)
        await connection.execute(delete(ended_sessions_table).where(ENDED.expires <= time.time()))
        await connection.execute(delete(ended_sessions_table).where(ENDED.id == session.id))  # if it was stored before
        await connection.execute(insert(ended_sessions_table).values(astuple(session)))
        replaced = or_(ENDED.id == all_id, and_(own, ENDED.id.not_in(kept)))  # with the row, so that it never goes back
        until = (await connection.execute(select(func.max(ENDED.expires)).where(replaced))).scalar()
        if until is not None:
            await connection.execute(delete(ended_sessions_table).where(replaced))
            all_until = Session(all_id, session.user_id, until)
            await connection.execute(insert(ended_sessions_table).values(astuple(all_until)))
