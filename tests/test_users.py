from __future__ import annotations

import asyncio
import base64
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models import database
from models.database import DatabaseUnavailable, DataFolderError, users_table
from models.settings import Settings
from models.throttle import TooManyFailures
from models.users import User, Users, UsersError, WrongCredentials

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.databases"]

ANN, BOB = "ann's secret", "bob's secret"  # configured
SECRET = "carla's secret 广州"


@pytest.fixture
def settings(empty_database: Settings) -> Settings:
    """Two users, ann and bob, and an empty database of either kind."""
    return replace(empty_database, users={"ann": ANN, "bob": BOB})


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Users]:
    async with database.opened(settings) as engine:
        yield Users.of(settings, engine)


@pytest.fixture
async def users(settings: Settings) -> AsyncIterator[Users]:
    async with opened(settings) as users:
        yield users


@pytest.fixture
async def nobody(empty_database: Settings) -> AsyncIterator[Users]:
    async with opened(empty_database) as users:
        yield users


async def ids(users: Users) -> list[str]:
    return [user.id for user in await users.all()]


async def found(users: Users, secret: str, user_id: str | None = None) -> str | None:
    user = await users.find(secret, user_id)
    return user.id if user else None


async def test_an_added_user_is_found_by_the_secret(users: Users) -> None:
    assert await users.add("carla", SECRET) == SECRET
    assert await found(users, SECRET) == "carla"
    assert await found(users, SECRET, "carla") == "carla"


async def test_a_made_up_secret_is_long_new_and_good(users: Users) -> None:
    first, second = await users.add("carla"), await users.add("dora")
    assert len(first) >= 32
    assert first != second
    assert await found(users, first) == "carla"


@pytest.mark.parametrize("secret", ["", "ann", "ann's secre", "ann's secret ", "ANN'S SECRET", "\ud800", "\x00"])
async def test_any_other_secret_finds_nobody(users: Users, secret: str) -> None:
    assert await users.find(secret) is None


@pytest.mark.parametrize("user_id", ["bob", "", "ANN", "nobody"])
async def test_a_secret_is_good_for_its_own_user_only(users: Users, user_id: str) -> None:
    assert await found(users, ANN, "ann") == "ann"
    assert await users.find(ANN, user_id) is None


async def test_configured_users_stand_beside_stored_ones_in_order(users: Users) -> None:
    await users.add("aaron")
    await users.add("carla")
    assert await ids(users) == ["aaron", "ann", "bob", "carla"]
    assert await found(users, ANN) == "ann"


async def test_users_are_there_when_the_database_is_opened_again(settings: Settings) -> None:
    async with opened(settings) as users:
        await users.add("carla", SECRET)
        ticket = users.ticket(User("carla", (await users.all())[-1].digest))
    async with opened(replace(settings, users={})) as users:
        assert await ids(users) == ["carla"]
        assert await found(users, SECRET) == "carla"
        assert users.of_ticket(ticket)


async def test_a_removed_user_is_gone_and_can_be_added_anew(users: Users) -> None:
    await users.add("carla", SECRET)
    await users.remove("carla")
    assert await users.find(SECRET) is None
    assert "carla" not in await ids(users)
    await users.add("carla", SECRET)


@pytest.mark.parametrize(
    ("user_id", "message"), [("nobody", "there is no user nobody"), ("ann", "ann comes from PARLEY_USERS")]
)
async def test_a_user_who_is_not_stored_cannot_be_removed(users: Users, user_id: str, message: str) -> None:
    with pytest.raises(UsersError, match=message):
        await users.remove(user_id)


@pytest.mark.parametrize(
    ("user_id", "secret", "message"),
    [
        ("", "new", "cannot be a user's id"),
        ("a b", "new", "cannot be a user's id"),
        ("a\n", "new", "cannot be a user's id"),
        ("a" * 65, "new", "cannot be a user's id"),
        ("ann", "new", "there is a user ann already"),
        ("carla", "new", "there is a user carla already"),
        ("dora", SECRET, "another user has this secret"),
        ("dora", ANN, "another user has this secret"),
        ("dora", "", "the secret is empty"),
    ],
)
async def test_a_user_who_cannot_be_added_leaves_all_as_it_was(
    users: Users, user_id: str, secret: str, message: str
) -> None:
    await users.add("carla", SECRET)
    with pytest.raises(UsersError, match=message):
        await users.add(user_id, secret)
    assert await ids(users) == ["ann", "bob", "carla"]
    assert await found(users, SECRET) == "carla"


@pytest.mark.parametrize("other", [("carla", "another secret"), ("dora", SECRET)])
async def test_of_two_added_at_once_that_clash_one_is_refused(users: Users, other: tuple[str, str]) -> None:
    results = await asyncio.gather(users.add("carla", SECRET), users.add(*other), return_exceptions=True)
    assert [type(result) for result in results if not isinstance(result, str)] == [UsersError]
    assert len(await ids(users)) == 3


@pytest.mark.parametrize("user_id", ["a", "a" * 64, "ann.b@example-1.org", "姓名"])
async def test_ids_of_letters_digits_and_a_few_signs_are_good(users: Users, user_id: str) -> None:
    assert await found(users, await users.add(user_id)) == user_id


async def test_the_first_user_is_added_only_where_there_is_nobody(nobody: Users) -> None:
    secret = await nobody.add_first()
    assert secret
    assert await found(nobody, secret) == "admin"
    assert await nobody.add_first() is None
    assert await ids(nobody) == ["admin"]


async def test_no_first_user_is_added_beside_configured_ones(users: Users) -> None:
    assert await users.add_first() is None
    assert await ids(users) == ["ann", "bob"]


async def test_a_ticket_is_good_for_its_user_until_the_secret_changes(users: Users) -> None:
    await users.add("carla", SECRET)
    carla = await users.find(SECRET)
    assert carla
    ticket = users.ticket(carla)
    assert users.of_ticket(ticket) == carla
    assert users.of_ticket(ticket[:-1]) is None
    assert users.of_ticket(ticket.replace(".", "x.", 1)) is None
    await users.remove("carla")
    assert users.of_ticket(ticket) is None
    await users.add("carla")
    assert users.of_ticket(ticket) is None


async def test_a_ticket_dies_with_a_configured_secret_and_with_the_key(settings: Settings) -> None:
    async with opened(settings) as users:
        ann = await users.find(ANN)
        assert ann
        ticket = users.ticket(ann)
    async with opened(replace(settings, users={"ann": "a new secret"})) as users:
        assert users.of_ticket(ticket) is None
    (settings.data / "key").unlink()
    async with opened(settings) as users:
        assert users.of_ticket(ticket) is None


async def test_a_key_that_was_cut_is_refused(settings: Settings) -> None:
    settings.data.mkdir()
    (settings.data / "key").write_bytes(b"")
    with pytest.raises(UsersError, match="32 bytes"):
        async with opened(settings):
            pass


async def test_no_secret_lies_in_the_data_folder_or_the_database(users: Users, settings: Settings) -> None:
    kept = [ANN, await users.add("carla", SECRET), await users.add("dora")]
    async with database.opened(settings) as engine, engine.connect() as connection:
        stored = repr((await connection.execute(users_table.select())).all()).encode()
    assert b"carla" in stored
    stored += b"".join(path.read_bytes() for path in settings.data.iterdir())
    assert not any(secret.encode() in stored for secret in kept)


@pytest.mark.usefixtures("users")
async def test_only_the_owner_can_read_the_key_and_the_folder(settings: Settings) -> None:
    assert stat.S_IMODE(settings.data.stat().st_mode) == 0o700
    assert stat.S_IMODE((settings.data / "key").stat().st_mode) == 0o600
    assert len((settings.data / "key").read_bytes()) == 32
    assert {path.name for path in settings.data.iterdir()} - {"parley.db", "parley.db-wal", "parley.db-shm"} == {"key"}


def all_at_once(settings: Settings, act: Callable[[Users], Awaitable[object]], workers: int = 6) -> list[object]:
    """What `act` returns in each of some workers that open the users at the same time."""
    barrier, results = threading.Barrier(workers), list[object]()

    async def work() -> object:
        barrier.wait()
        async with opened(settings) as users:
            return await act(users)

    threads = [threading.Thread(target=lambda: results.append(asyncio.run(work()))) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


async def digest(users: Users) -> bytes:
    """What the key makes of ann's secret."""
    return (await users.all())[0].digest


async def test_workers_that_make_the_key_at_once_get_the_same_one(settings: Settings) -> None:
    before = await asyncio.to_thread(all_at_once, settings, digest, workers=1)
    (settings.data / "key").unlink()
    digests = await asyncio.to_thread(all_at_once, settings, digest)
    assert len(digests) == 6
    assert len(set(digests)) == 1
    assert digests[0] not in before


async def test_workers_that_start_at_once_on_an_empty_folder_add_one_first_user(empty_database: Settings) -> None:
    results = await asyncio.to_thread(all_at_once, empty_database, Users.add_first)
    assert len(results) == 6
    assert sum(secret is not None for secret in results) == 1


class OutrunUsers(Users):
    """Users of a worker that another one outruns: it adds `admin` right after this one saw nobody."""

    rival: Users

    async def all(self) -> list[User]:
        users = await super().all()
        if not users:
            await self.rival.add("admin")
        return users


async def test_a_worker_that_is_outrun_adds_no_first_user(nobody: Users, empty_database: Settings) -> None:
    async with database.opened(empty_database) as engine:
        outrun = OutrunUsers.of(empty_database, engine)
        assert isinstance(outrun, OutrunUsers)
        outrun.rival = nobody
        assert await outrun.add_first() is None
        assert await ids(nobody) == ["admin"]


@pytest.mark.parametrize("obstacle", ["data", "data/key"])
async def test_a_folder_that_cannot_be_used_is_told_by_name(tmp_path: Path, obstacle: str) -> None:
    if obstacle == "data":
        (tmp_path / "other-data").write_text("a file, no folder")
    else:
        (tmp_path / "other-data" / "key").mkdir(parents=True)
    async with database.opened(Settings(data=tmp_path / "data")) as engine:
        with pytest.raises(
            DataFolderError, match=f"PARLEY_DATA={tmp_path / 'other-data'} cannot be used: .* be written"
        ):
            Users.of(Settings(data=tmp_path / "other-data"), engine)


# Logging in


@pytest.mark.parametrize("user_id", [None, "ann"])
async def test_whoever_knows_the_secret_logs_in(users: Users, user_id: str | None) -> None:
    assert await users.log_in(ANN, user_id, "10.0.0.1") == await users.find(ANN)
    assert await users.log_in(await users.add("carla", SECRET), None, "10.0.0.1") == await users.find(SECRET)


@pytest.mark.parametrize(("secret", "user_id"), [("wrong", None), ("", None), (ANN, "bob"), (ANN, ""), (BOB, "ann")])
async def test_a_wrong_secret_or_somebody_elses_is_refused(users: Users, secret: str, user_id: str | None) -> None:
    with pytest.raises(WrongCredentials, match="authentication failed") as raised:
        await users.log_in(secret, user_id, "10.0.0.1")
    assert (raised.value.type, raised.value.code) == ("authentication_error", "invalid_credentials")


async def fail(users: Users, address: str, times: int) -> list[type[BaseException]]:
    """How each of some wrong logins that come at once is refused."""
    guesses = (users.log_in(f"guess {number}", None, address) for number in range(times))
    return sorted((type(refused) for refused in await asyncio.gather(*guesses, return_exceptions=True)), key=str)


async def test_an_address_that_failed_ten_times_has_to_wait_even_with_the_right_secret(users: Users) -> None:
    assert await fail(users, "10.0.0.1", 9) == [WrongCredentials] * 9
    assert await users.log_in(ANN, None, "10.0.0.1")
    assert await fail(users, "10.0.0.1", 1) == [WrongCredentials]
    with pytest.raises(TooManyFailures, match="wait a minute") as raised:
        await users.log_in(ANN, None, "10.0.0.1")
    assert (raised.value.type, raised.value.code) == ("rate_limit_error", "too_many_failures")
    assert await users.log_in(ANN, None, "10.0.0.2")


async def test_guesses_that_come_at_once_are_no_more_than_those_in_turn(users: Users) -> None:
    assert await fail(users, "10.0.0.1", 30) == [TooManyFailures] * 20 + [WrongCredentials] * 10


async def test_right_secrets_do_not_count_however_many(users: Users) -> None:
    for _ in range(11):
        await users.log_in(ANN, None, "10.0.0.1")
    assert await fail(users, "10.0.0.1", 1) == [WrongCredentials]


# Watching the database


class BreakableDatabase:
    """A database that is out of reach while a test wants it to be, and knows how often it was looked into."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.broken = False
        self.looks = 0
        self.look = asyncio.Event()

    def connect(self) -> Any:
        self.looks += 1
        self.look.set()
        if self.broken:
            raise OSError("no route to host")
        return self._engine.connect()

    def begin(self) -> Any:
        return self._engine.begin()


@pytest.fixture
async def broken(users: Users, settings: Settings) -> AsyncIterator[tuple[Users, BreakableDatabase]]:
    """The users as another process sees them, and its way to the database."""
    async with database.opened(settings) as engine:
        breakable = BreakableDatabase(engine)
        yield Users.of(settings, breakable), breakable  # type: ignore[arg-type]


class Revoked(asyncio.Queue[User]):
    """Hears whose secrets are no longer good."""

    async def next(self) -> str:
        async with asyncio.timeout(10):  # else a test would wait for ever
            return (await self.get()).id


async def looked(database: BreakableDatabase) -> None:
    """Wait until a look into the database that begins from now on has ended, where one comes after the other."""
    before = database.looks
    while database.looks < before + 2:
        database.look.clear()
        await database.look.wait()


async def test_whose_secret_another_process_takes_away_is_told_and_nobody_else(
    users: Users, settings: Settings
) -> None:
    await users.add("carla")
    await users.add("dora")
    revoked = Revoked()
    async with opened(settings) as watching:
        await watching.all()
        async with watching.watched(revoked.put_nowait, seconds=0.01):
            await users.remove("carla")
            assert await revoked.next() == "carla"
            await users.remove("dora")
            await users.add("dora")
            assert await revoked.next() == "dora"
    assert revoked.empty()


async def test_who_comes_and_goes_between_two_looks_is_told_too(users: Users, settings: Settings) -> None:
    revoked = Revoked()
    async with opened(settings) as watching:
        await watching.all()
        async with watching.watched(revoked.put_nowait, seconds=0.5):
            await asyncio.sleep(0)  # it has begun
            secret = await users.add("carla")
            assert await found(watching, secret) == "carla"
            await users.remove("carla")
            await watching.find("somebody else's secret")
            assert await revoked.next() == "carla"


async def test_nobody_is_told_of_twice_or_for_being_added(
    users: Users, broken: tuple[Users, BreakableDatabase]
) -> None:
    watching, way = broken
    revoked = Revoked()
    await users.add("carla")
    await watching.all()
    async with watching.watched(revoked.put_nowait, seconds=0.01):
        await users.remove("carla")
        await users.add("dora", SECRET)
        assert await revoked.next() == "carla"
        await looked(way)
        assert revoked.empty()
    assert await found(watching, SECRET) == "dora"


async def test_without_the_database_whoever_was_known_logs_in_and_others_are_told_to_wait(
    users: Users, broken: tuple[Users, BreakableDatabase]
) -> None:
    watching, away = broken
    await users.add("carla", SECRET)
    ticket = users.ticket(await users.log_in(SECRET, None, "10.0.0.1"))
    await watching.all()
    away.broken = True
    for secret, user in ((SECRET, "carla"), (ANN, "ann")):
        assert (await watching.log_in(secret, None, "10.0.0.1")).id == user
    assert watching.of_ticket(ticket)
    with pytest.raises(DatabaseUnavailable):
        await watching.log_in("unknown", None, "10.0.0.1")
    away.broken = False
    with pytest.raises(WrongCredentials):
        await watching.log_in("unknown", None, "10.0.0.1")


async def test_trouble_is_told_while_it_lasts_and_logged_once_and_nobody_is_revoked(
    users: Users, broken: tuple[Users, BreakableDatabase], caplog: pytest.LogCaptureFixture
) -> None:
    watching, away = broken
    revoked = Revoked()
    await users.add("carla", SECRET)
    await watching.all()
    async with watching.watched(revoked.put_nowait, seconds=0.01):
        assert watching.trouble is None
        away.broken = True
        await looked(away)
        await looked(away)
        assert watching.trouble == "the database cannot be read at present"
        assert revoked.empty()
        await users.remove("carla")
        away.broken = False
        assert await revoked.next() == "carla"
        assert watching.trouble is None
    assert caplog.text.count("the database cannot be read: OSError('no route to host')") == 1


async def test_tickets_of_one_user_differ_and_tell_nothing_of_the_secret(users: Users) -> None:
    ann = await users.find(ANN)
    assert ann
    tickets = [users.ticket(ann) for _ in range(20)]
    assert len({*tickets}) == 20
    for ticket in tickets:
        shown = base64.urlsafe_b64decode(ticket.split(".")[0] + "==")
        assert ann.digest.hex().encode() not in shown
        assert users.of_ticket(ticket) == ann


class SlowAnswers(BreakableDatabase):
    """The answer to the first question comes when the test wants it to."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        first = not self.asked.is_set()
        async with super().connect() as connection:
            yield SimpleNamespace(execute=partial(self.execute, connection, first))

    async def execute(self, connection: Any, first: bool, statement: Any) -> Any:
        rows = (await connection.execute(statement)).all()
        self.asked.set()
        if first:
            await self.answer.wait()
        return rows


async def test_without_the_database_guesses_are_counted_as_ever(broken: tuple[Users, BreakableDatabase]) -> None:
    users, away = broken
    away.broken = True
    for _ in range(10):
        with pytest.raises(DatabaseUnavailable):
            await users.log_in("a guess", None, "10.0.0.1")
    for secret in ("a guess", ANN):
        with pytest.raises(TooManyFailures):
            await users.log_in(secret, None, "10.0.0.1")
    assert (await users.log_in(ANN, None, "10.0.0.2")).id == "ann"


async def test_an_answer_that_comes_after_a_later_one_revokes_nobody(nobody: Users, empty_database: Settings) -> None:
    revoked = Revoked()
    async with database.opened(empty_database) as engine:
        slow = SlowAnswers(engine)
        watching = Users.of(empty_database, slow)  # type: ignore[arg-type]
        async with watching.watched(revoked.put_nowait, seconds=3600):
            early = asyncio.create_task(watching.find("unknown"))
            await slow.asked.wait()
            secret = await nobody.add("carla")
            carla = await watching.log_in(secret, None, "10.0.0.1")
            slow.answer.set()
            await early
            assert revoked.empty()
            assert watching.of_ticket(watching.ticket(carla)) == carla
