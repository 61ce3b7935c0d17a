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

from models.errors import (
    DatabaseUnavailableError,
    DataFolderError,
    TooManyLoginsError,
    UsersError,
    WrongCredentialsError,
)
from models.settings import Settings
from models.store.database import open_database, users_table
from models.users.users import User, Users
from tests.support.client import ANN, BOB

pytestmark = pytest.mark.anyio

CARLA = "carla's secret 广州"
ADDRESS, OTHER_ADDRESS = "10.0.0.1", "10.0.0.2"


@pytest.fixture
def settings(empty_database: Settings) -> Settings:
    """Two users, ann and bob, and an empty database of either kind."""
    return replace(empty_database, users={"ann": ANN, "bob": BOB})


@asynccontextmanager
async def open_users(settings: Settings) -> AsyncIterator[Users]:
    async with open_database(settings) as database:
        yield Users.open(settings, database)


@pytest.fixture
async def users(settings: Settings) -> AsyncIterator[Users]:
    """The users ann and bob, of the settings."""
    async with open_users(settings) as users:
        yield users


@pytest.fixture
async def no_users(empty_database: Settings) -> AsyncIterator[Users]:
    async with open_users(empty_database) as users:
        yield users


async def all_ids(users: Users) -> list[str]:
    return [user.id for user in await users.all()]


def user_of(users: Users, token: str) -> User | None:
    """The user of a session token."""
    found = users.session(token)
    return found[0] if found else None


async def find_id(users: Users, secret: str, user_id: str | None = None) -> str | None:
    user = await users.find(secret, user_id)
    return user.id if user else None


# Secrets


async def test_a_created_user_is_found_by_the_secret(users: Users) -> None:
    assert await users.create("carla", CARLA) == CARLA
    assert await find_id(users, CARLA) == "carla"
    assert await find_id(users, CARLA, "carla") == "carla"


async def test_a_random_secret_is_long_and_different_each_time(users: Users) -> None:
    first, second = await users.create("carla"), await users.create("dora")
    assert len(first) >= 32
    assert first != second
    assert await find_id(users, first) == "carla"


@pytest.mark.parametrize(
    "secret",
    ["", "ann", "ann's secre", "ann's secret ", "ANN'S SECRET", "\ud800", "\x00"],
    ids=["empty", "the id", "cut", "with a space", "upper case", "surrogate", "U+0000"],
)
async def test_a_wrong_secret_finds_nobody(users: Users, secret: str) -> None:
    assert await users.find(secret) is None


@pytest.mark.parametrize("user_id", ["bob", "", "ANN", "nobody"])
async def test_a_secret_finds_only_its_own_user(users: Users, user_id: str) -> None:
    assert await find_id(users, ANN, "ann") == "ann"
    assert await users.find(ANN, user_id) is None


async def test_no_secret_is_stored_in_the_folder_or_the_database(users: Users, settings: Settings) -> None:
    secrets = [ANN, await users.create("carla", CARLA), await users.create("dora")]
    async with open_database(settings) as database, database.connect() as connection:
        stored = repr((await connection.execute(users_table.select())).all()).encode()
    assert b"carla" in stored
    stored += b"".join(path.read_bytes() for path in settings.data.iterdir())
    assert not any(secret.encode() in stored for secret in secrets)


# Create and remove


async def test_all_lists_configured_and_stored_users_by_id(users: Users) -> None:
    await users.create("aaron")
    await users.create("carla")
    assert await all_ids(users) == ["aaron", "ann", "bob", "carla"]
    assert await find_id(users, ANN) == "ann"


async def test_users_and_sessions_survive_a_restart(settings: Settings) -> None:
    async with open_users(settings) as users:
        await users.create("carla", CARLA)
        token = users.session_token(User("carla", (await users.all())[-1].digest))
    async with open_users(replace(settings, users={})) as users:
        assert await all_ids(users) == ["carla"]
        assert await find_id(users, CARLA) == "carla"
        assert user_of(users, token)


async def test_a_removed_user_can_be_created_again(users: Users) -> None:
    await users.create("carla", CARLA)
    await users.remove("carla")
    assert await users.find(CARLA) is None
    assert "carla" not in await all_ids(users)
    await users.create("carla", CARLA)
    assert await find_id(users, CARLA) == "carla"


@pytest.mark.parametrize(
    ("user_id", "message"),
    [("nobody", "there is no user nobody"), ("ann", "ann comes from PARLEY_USERS")],
    ids=["unknown", "configured"],
)
async def test_a_user_who_is_not_stored_cannot_be_removed(users: Users, user_id: str, message: str) -> None:
    with pytest.raises(UsersError, match=message):
        await users.remove(user_id)
    assert await all_ids(users) == ["ann", "bob"]


@pytest.mark.parametrize(
    ("user_id", "secret", "message"),
    [
        pytest.param("", "new", "cannot be the id of a user", id="empty id"),
        pytest.param("a b", "new", "cannot be the id of a user", id="id with a space"),
        pytest.param("a\n", "new", "cannot be the id of a user", id="id with a line break"),
        pytest.param("a" * 65, "new", "cannot be the id of a user", id="long id"),
        pytest.param("ann", "new", "there is a user ann already", id="configured id"),
        pytest.param("carla", "new", "there is a user carla already", id="stored id"),
        pytest.param("dora", CARLA, "another user has this secret", id="stored secret"),
        pytest.param("dora", ANN, "another user has this secret", id="configured secret"),
        pytest.param("dora", "", "the secret is empty", id="empty secret"),
        pytest.param("dora", " new", "has spaces around it", id="secret with a space before it"),
    ],
)
async def test_a_user_who_cannot_be_created_changes_nothing(
    users: Users, user_id: str, secret: str, message: str
) -> None:
    await users.create("carla", CARLA)
    with pytest.raises(UsersError, match=message):
        await users.create(user_id, secret)
    assert await all_ids(users) == ["ann", "bob", "carla"]
    assert await find_id(users, CARLA) == "carla"


@pytest.mark.parametrize("other", [("carla", "another secret"), ("dora", CARLA)], ids=["same id", "same secret"])
async def test_one_of_two_users_that_conflict_is_created(users: Users, other: tuple[str, str]) -> None:
    results = await asyncio.gather(users.create("carla", CARLA), users.create(*other), return_exceptions=True)
    assert [type(result) for result in results if not isinstance(result, str)] == [UsersError]
    assert len(await all_ids(users)) == 3


@pytest.mark.parametrize(
    "user_id",
    ["a", "a" * 64, "ann.b@example-1.org", "姓名"],
    ids=["one letter", "64 letters", "mail address", "Chinese"],
)
async def test_letters_digits_and_some_signs_make_an_id(users: Users, user_id: str) -> None:
    assert await find_id(users, await users.create(user_id)) == user_id


# The first user


async def test_the_first_user_is_created_only_where_there_is_no_user(no_users: Users) -> None:
    secret = await no_users.create_first()
    assert secret
    assert await find_id(no_users, secret) == "admin"
    assert await no_users.create_first() is None
    assert await all_ids(no_users) == ["admin"]


async def test_no_first_user_is_created_beside_configured_users(users: Users) -> None:
    assert await users.create_first() is None
    assert await all_ids(users) == ["ann", "bob"]


class OvertakenUsers(Users):
    """Another process creates `admin` right after this one has seen that there is no user."""

    rival: Users

    async def all(self) -> list[User]:
        users = await super().all()
        if not users:
            await self.rival.create("admin")
        return users


async def test_a_process_that_is_overtaken_creates_no_first_user(no_users: Users, empty_database: Settings) -> None:
    async with open_database(empty_database) as database:
        overtaken = OvertakenUsers.open(empty_database, database)
        assert isinstance(overtaken, OvertakenUsers)
        overtaken.rival = no_users
        assert await overtaken.create_first() is None
        assert await all_ids(no_users) == ["admin"]


def run_at_once(settings: Settings, act: Callable[[Users], Awaitable[object]], workers: int = 6) -> list[object]:
    """What `act` returns in each of some workers that open the users at the same time."""
    barrier, results = threading.Barrier(workers), list[object]()

    async def work() -> object:
        barrier.wait()
        async with open_users(settings) as users:
            return await act(users)

    threads = [threading.Thread(target=lambda: results.append(asyncio.run(work()))) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


async def test_workers_that_start_at_once_create_one_first_user(empty_database: Settings) -> None:
    results = await asyncio.to_thread(run_at_once, empty_database, Users.create_first)
    assert len(results) == 6
    assert sum(secret is not None for secret in results) == 1


# Session tokens


async def test_a_session_token_is_valid_until_the_secret_changes(users: Users) -> None:
    await users.create("carla", CARLA)
    carla = await users.find(CARLA)
    assert carla
    token = users.session_token(carla)
    assert user_of(users, token) == carla
    assert user_of(users, token[:-1]) is None
    assert user_of(users, token.replace(".", "x.", 1)) is None
    await users.remove("carla")
    assert user_of(users, token) is None
    await users.create("carla")
    assert user_of(users, token) is None


async def test_a_new_configured_secret_or_key_ends_a_session(settings: Settings) -> None:
    async with open_users(settings) as users:
        ann = await users.find(ANN)
        assert ann
        token = users.session_token(ann)
    async with open_users(replace(settings, users={"ann": "a new secret"})) as users:
        assert user_of(users, token) is None
    (settings.data / "key").unlink()
    async with open_users(settings) as users:
        assert user_of(users, token) is None


async def test_session_tokens_differ_and_do_not_show_the_digest(users: Users) -> None:
    ann = await users.find(ANN)
    assert ann
    tokens = [users.session_token(ann) for _ in range(20)]
    assert len({*tokens}) == 20
    for token in tokens:
        shown = base64.urlsafe_b64decode(token.split(".")[0] + "==")
        assert ann.digest.hex().encode() not in shown
        assert user_of(users, token) == ann


# The key file and the data folder


async def test_a_key_file_of_wrong_length_is_refused(settings: Settings) -> None:
    settings.data.mkdir()
    (settings.data / "key").write_bytes(b"")
    with pytest.raises(UsersError, match="32 bytes"):
        async with open_users(settings):
            pass


@pytest.mark.usefixtures("users")
async def test_only_the_owner_can_read_the_key_and_the_folder(settings: Settings) -> None:
    assert stat.S_IMODE(settings.data.stat().st_mode) == 0o700
    assert stat.S_IMODE((settings.data / "key").stat().st_mode) == 0o600
    assert len((settings.data / "key").read_bytes()) == 32
    assert {path.name for path in settings.data.iterdir()} - {"parley.db", "parley.db-wal", "parley.db-shm"} == {"key"}


async def first_digest(users: Users) -> bytes:
    """The digest of ann's secret, which depends on the key."""
    return (await users.all())[0].digest


async def test_workers_that_create_the_key_at_once_share_it(settings: Settings) -> None:
    before = await asyncio.to_thread(run_at_once, settings, first_digest, workers=1)
    (settings.data / "key").unlink()
    digests = await asyncio.to_thread(run_at_once, settings, first_digest)
    assert len(digests) == 6
    assert len(set(digests)) == 1
    assert digests[0] not in before


@pytest.mark.parametrize("obstacle", ["data", "data/key"], ids=["a file for the folder", "a folder for the key"])
async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, obstacle: str) -> None:
    folder = tmp_path / "other-data"
    if obstacle == "data":
        folder.write_text("a file")
    else:
        (folder / "key").mkdir(parents=True)
    async with open_database(Settings(data=tmp_path / "data")) as database:
        with pytest.raises(DataFolderError, match=f"PARLEY_DATA={folder} cannot be used: .* can write to"):
            Users.open(Settings(data=folder), database)


# Logins


@pytest.mark.parametrize("user_id", [None, "ann"], ids=["without id", "with id"])
async def test_the_right_secret_logs_in(users: Users, user_id: str | None) -> None:
    assert await users.log_in(ANN, user_id, ADDRESS) == await users.find(ANN)
    assert await users.log_in(await users.create("carla", CARLA), None, ADDRESS) == await users.find(CARLA)


@pytest.mark.parametrize(
    ("secret", "user_id"),
    [
        pytest.param("wrong", None, id="wrong"),
        pytest.param("", None, id="empty"),
        pytest.param(ANN, "bob", id="ann's with bob's id"),
        pytest.param(ANN, "", id="ann's with an empty id"),
        pytest.param(BOB, "ann", id="bob's with ann's id"),
    ],
)
async def test_a_login_with_a_wrong_secret_or_id_is_refused(users: Users, secret: str, user_id: str | None) -> None:
    with pytest.raises(WrongCredentialsError, match="authentication failed") as raised:
        await users.log_in(secret, user_id, ADDRESS)
    assert (raised.value.type, raised.value.code) == ("authentication_error", "invalid_credentials")


async def fail_logins(users: Users, address: str, times: int) -> list[type[BaseException]]:
    """The errors of some wrong logins that come at once, by name."""
    guesses = (users.log_in(f"guess {number}", None, address) for number in range(times))
    results = await asyncio.gather(*guesses, return_exceptions=True)
    return sorted((type(result) for result in results if isinstance(result, BaseException)), key=str)


async def test_after_ten_failures_even_the_right_secret_is_refused(users: Users) -> None:
    assert await fail_logins(users, ADDRESS, 9) == [WrongCredentialsError] * 9
    assert await users.log_in(ANN, None, ADDRESS)
    assert await fail_logins(users, ADDRESS, 1) == [WrongCredentialsError]
    with pytest.raises(TooManyLoginsError, match="wait up to a minute") as raised:
        await users.log_in(ANN, None, ADDRESS)
    assert (raised.value.type, raised.value.code) == ("rate_limit_error", "too_many_failures")
    assert await users.log_in(ANN, None, OTHER_ADDRESS)


async def test_of_thirty_guesses_at_once_ten_are_checked(users: Users) -> None:
    assert await fail_logins(users, ADDRESS, 30) == [TooManyLoginsError] * 20 + [WrongCredentialsError] * 10


async def test_successful_logins_do_not_count_as_failures(users: Users) -> None:
    for _ in range(11):
        await users.log_in(ANN, None, ADDRESS)
    assert await fail_logins(users, ADDRESS, 1) == [WrongCredentialsError]


# Devices


@pytest.fixture
async def device(users: Users) -> str:
    """The token of a device of ann's."""
    return users.device_token(await users.log_in(ANN, None, OTHER_ADDRESS))


@pytest.fixture
async def blocked(users: Users) -> str:
    """An address from which nobody can log in without a device."""
    await fail_logins(users, ADDRESS, 10)
    return ADDRESS


@pytest.mark.parametrize("user_id", [None, "ann"], ids=["without id", "with id"])
async def test_from_a_blocked_address_a_user_logs_in_on_a_device(
    users: Users, device: str, blocked: str, user_id: str | None
) -> None:
    assert (await users.log_in(ANN, user_id, blocked, device)).id == "ann"
    assert await fail_logins(users, blocked, 1) == [TooManyLoginsError]


async def test_from_a_blocked_address_a_device_is_for_its_user_only(users: Users, device: str, blocked: str) -> None:
    with pytest.raises(WrongCredentialsError):  # as for a wrong secret
        await users.log_in(BOB, None, blocked, device)
    with pytest.raises(WrongCredentialsError):
        await users.log_in("wrong", None, blocked, device)
    for user_id in ("bob", ""):
        await fail_logins_as(users, blocked, user_id)
        with pytest.raises(TooManyLoginsError):
            await users.log_in(BOB, user_id, blocked, device)


async def fail_logins_as(users: Users, address: str, user_id: str) -> None:
    for _ in range(10):
        with pytest.raises(WrongCredentialsError):
            await users.log_in("wrong", user_id, address)


async def test_from_any_other_address_a_device_is_for_everybody(users: Users, device: str) -> None:
    assert (await users.log_in(BOB, None, OTHER_ADDRESS, device)).id == "bob"


async def test_the_devices_of_a_user_may_fail_ten_times(users: Users, device: str, blocked: str) -> None:
    for _ in range(10):
        with pytest.raises(WrongCredentialsError):
            await users.log_in(BOB, None, blocked, device)
    for secret in (ANN, BOB, "wrong"):
        with pytest.raises(TooManyLoginsError):
            await users.log_in(secret, None, blocked, device)
    assert (await users.log_in(ANN, None, OTHER_ADDRESS, device)).id == "ann"


async def test_wrong_guesses_on_a_device_count_against_the_address_too(users: Users, device: str) -> None:
    for number in range(10):
        with pytest.raises(WrongCredentialsError):
            await users.log_in(f"guess {number}", None, ADDRESS, device)
    with pytest.raises(TooManyLoginsError):
        await users.log_in(ANN, None, ADDRESS)


async def test_the_device_of_a_removed_user_or_an_old_secret_is_worth_nothing(users: Users, blocked: str) -> None:
    await users.create("carla", CARLA)
    device = users.device_token(await users.log_in(CARLA, None, OTHER_ADDRESS))
    assert (await users.log_in(CARLA, None, blocked, device)).id == "carla"
    await users.remove("carla")
    secret = await users.create("carla")
    for old_or_new in (CARLA, secret):
        with pytest.raises(TooManyLoginsError):
            await users.log_in(old_or_new, None, blocked, device)


async def test_a_device_is_no_session_and_a_session_is_no_device(users: Users, device: str, blocked: str) -> None:
    ann = await users.find(ANN)
    assert ann
    assert users.session(device) is None
    with pytest.raises(TooManyLoginsError):
        await users.log_in(ANN, None, blocked, users.session_token(ann))


@pytest.mark.parametrize("forged", ["", "nonsense", "WyJhbm4iLCJ4Il0.aaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbb"])
async def test_a_forged_device_is_worth_nothing(users: Users, blocked: str, forged: str) -> None:
    with pytest.raises(TooManyLoginsError):
        await users.log_in(ANN, None, blocked, forged)


# A database that changes, fails or is slow


class BreakableDatabase:
    """A database that cannot be read while `broken` is True, and counts the reads."""

    def __init__(self, database: Any) -> None:
        self._database = database
        self.broken = False
        self.reads = 0
        self._read = asyncio.Event()

    def connect(self) -> Any:
        self.reads += 1
        self._read.set()
        if self.broken:
            raise OSError("no route to host")
        return self._database.connect()

    def begin(self) -> Any:
        return self._database.begin()

    async def next_read(self) -> None:
        """Wait until a read that begins from now on has ended, where one comes after the other."""
        before = self.reads
        while self.reads < before + 2:
            self._read.clear()
            await self._read.wait()


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[BreakableDatabase]:
    """The database as another process uses it, whose users are `watching`."""
    async with open_database(settings) as database:
        yield BreakableDatabase(database)


@pytest.fixture
def watching(users: Users, settings: Settings, database: BreakableDatabase) -> Users:
    """The users of another process. It shares its database and key with `users`."""
    return Users.open(settings, database)  # type: ignore[arg-type]


class Revocations(asyncio.Queue[User]):
    """The users whose secrets are no longer valid, as `watched` tells them."""

    async def next(self) -> str:
        async with asyncio.timeout(10):
            return (await self.get()).id


async def test_a_user_whom_another_process_removes_is_revoked(users: Users, watching: Users) -> None:
    await users.create("carla")
    await users.create("dora")
    revocations = Revocations()
    await watching.all()
    async with watching.watched(revocations.put_nowait, seconds=0.01):
        await users.remove("carla")
        assert await revocations.next() == "carla"
        await users.remove("dora")
        await users.create("dora")
        assert await revocations.next() == "dora"
    assert revocations.empty()


async def test_a_user_who_exists_only_between_two_reads_is_revoked(users: Users, watching: Users) -> None:
    revocations = Revocations()
    await watching.all()
    async with watching.watched(revocations.put_nowait, seconds=3600):
        secret = await users.create("carla")
        assert await find_id(watching, secret) == "carla"
        await users.remove("carla")
        await watching.find("an unknown secret")
        assert await revocations.next() == "carla"


async def test_a_removed_user_is_revoked_once_and_a_new_one_is_not(
    users: Users, watching: Users, database: BreakableDatabase
) -> None:
    revocations = Revocations()
    await users.create("carla")
    await watching.all()
    async with watching.watched(revocations.put_nowait, seconds=0.01):
        await users.remove("carla")
        await users.create("dora", CARLA)
        assert await revocations.next() == "carla"
        await database.next_read()
        assert revocations.empty()
    assert await find_id(watching, CARLA) == "dora"


async def test_known_users_log_in_while_the_database_fails(
    users: Users, watching: Users, database: BreakableDatabase
) -> None:
    await users.create("carla", CARLA)
    token = users.session_token(await users.log_in(CARLA, None, ADDRESS))
    await watching.all()
    database.broken = True
    for secret, user in ((CARLA, "carla"), (ANN, "ann")):
        assert (await watching.log_in(secret, None, ADDRESS)).id == user
    assert user_of(watching, token)
    with pytest.raises(DatabaseUnavailableError):
        await watching.log_in("unknown", None, ADDRESS)
    database.broken = False
    with pytest.raises(WrongCredentialsError):
        await watching.log_in("unknown", None, ADDRESS)


async def test_failed_logins_count_while_the_database_fails(watching: Users, database: BreakableDatabase) -> None:
    database.broken = True
    for _ in range(10):
        with pytest.raises(DatabaseUnavailableError):
            await watching.log_in("a guess", None, ADDRESS)
    for secret in ("a guess", ANN):
        with pytest.raises(TooManyLoginsError):
            await watching.log_in(secret, None, ADDRESS)
    assert (await watching.log_in(ANN, None, OTHER_ADDRESS)).id == "ann"


async def test_guesses_from_a_blocked_address_read_nothing(watching: Users, database: BreakableDatabase) -> None:
    await fail_logins(watching, ADDRESS, 10)
    before = database.reads
    assert await fail_logins(watching, ADDRESS, 20) == [TooManyLoginsError] * 20
    assert database.reads == before
    assert await fail_logins(watching, OTHER_ADDRESS, 1) == [WrongCredentialsError]
    assert database.reads == before + 1


async def test_a_failing_database_is_logged_once_and_revokes_nobody(
    users: Users, watching: Users, database: BreakableDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    revocations = Revocations()
    await users.create("carla", CARLA)
    await watching.all()
    async with watching.watched(revocations.put_nowait, seconds=0.01):
        assert watching.trouble is None
        database.broken = True
        await database.next_read()
        await database.next_read()
        assert watching.trouble == "the database cannot be read at the moment"
        assert revocations.empty()
        await users.remove("carla")
        database.broken = False
        assert await revocations.next() == "carla"
        assert watching.trouble is None
    assert caplog.text.count("the database cannot be read: OSError: no route to host") == 1


class SlowDatabase(BreakableDatabase):
    """The first query waits for its answer until `answer` is set; `queried` is set when it waits."""

    def __init__(self, database: Any) -> None:
        super().__init__(database)
        self.queried, self.answer = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        is_first = not self.queried.is_set()
        async with super().connect() as connection:
            yield SimpleNamespace(execute=partial(self._execute, connection, is_first))

    async def _execute(self, connection: Any, is_first: bool, statement: Any) -> Any:
        rows = (await connection.execute(statement)).all()
        self.queried.set()
        if is_first:
            await self.answer.wait()
        return rows


async def test_a_read_that_ends_after_a_later_one_revokes_nobody(no_users: Users, empty_database: Settings) -> None:
    revocations = Revocations()
    async with open_database(empty_database) as database:
        slow = SlowDatabase(database)
        watching = Users.open(empty_database, slow)  # type: ignore[arg-type]
        async with watching.watched(revocations.put_nowait, seconds=3600):
            early = asyncio.create_task(watching.find("unknown"))
            await slow.queried.wait()
            secret = await no_users.create("carla")
            carla = await watching.log_in(secret, None, ADDRESS)
            slow.answer.set()
            await early
            assert revocations.empty()
            assert user_of(watching, watching.session_token(carla)) == carla
