"""Two hosts with a network, a PostgreSQL and a Redis of their own, and what happens when each of these fails.

    sudo .venv/bin/python tests/bench/hosts.py
    sudo .venv/bin/python tests/bench/hosts.py --workers 2 --chapter freeze
    sudo .venv/bin/python tests/bench/hosts.py --upstreams

Needs root, `ip`, PostgreSQL and redis-server. Each host is a network namespace; a third one has the databases, the
clients and a bridge, and with `--upstreams` two servers that answer in place of the hosts' own chat. Replies count:
"0 1 2 3 ...", so that any gap shows. A trigger notes who writes which reply.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(ROOT := Path(__file__).parents[2]))

import asyncpg  # type: ignore[import-untyped]
import click
import httpx2
from starlette.applications import Starlette
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from models.hub.program import run_hub
from models.language.events import Done, Event, TextDelta
from models.validation import Json
from models.web.serving import serve
from server import create_app, lifespan
from tests.support.client import ANN, BOB, ENDS, bearer
from tests.support.databases import ACCESS, PostgreSQL
from tests.support.scripted import ScriptedChat, ScriptedReply

NETWORK = "10.77.0"
MIDDLE = "parley-net"
PATIENCE = 60.0  # seconds to wait for anything
STORED_SECONDS = 2.0  # what was said so long ago must be stored
WRITES = """
    CREATE TABLE writes (id TEXT, address INET, before TEXT, after TEXT);
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO writes VALUES (NEW.id, inet_client_addr(), OLD.content, NEW.content); RETURN NEW; END $$;
    CREATE TRIGGER note AFTER UPDATE ON items FOR EACH ROW WHEN (OLD.content IS DISTINCT FROM NEW.content)
        EXECUTE FUNCTION note();
"""


# A host: `hosts.py host`


class CountingChat(ScriptedChat):
    """Counts. "count N R" counts up to N, R numbers a second."""

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        count, rate = map(int, reply.text.split())
        for number in range(count):
            await asyncio.sleep(1 / rate)
            reply.usage.output_tokens += 1
            yield TextDelta(f"{number} ")
        yield Done("stop")


@asynccontextmanager
async def opens_counting(app: Starlette) -> AsyncIterator[Any]:
    yield CountingChat()


def counting() -> Starlette:
    """The app of one process, or of the hub."""
    return create_app(open_chat=opens_counting)


def worker() -> Starlette:
    """The app of a worker."""
    app = create_app()
    app.state.hub_command = [sys.executable, __file__, "hub"]
    return app


# The network


def run(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, stderr=None if check else subprocess.DEVNULL)


@contextmanager
def network() -> Iterator[None]:
    """A bridge in the middle, and a namespace for each host, which is plugged in there."""
    remove = [f"ip netns del {name}" for name in (MIDDLE, "parley-1", "parley-2")]
    for command in remove:
        run(command, check=False)
    try:
        run(f"ip netns add {MIDDLE}")
        middle = f"ip -n {MIDDLE}"
        run(f"{middle} link set lo up")
        run(f"{middle} link add bridge type bridge")
        run(f"{middle} addr add {NETWORK}.254/24 dev bridge")
        run(f"{middle} link set bridge up")
        for number in (1, 2):
            run(f"ip netns add parley-{number}")
            run(f"{middle} link add plug{number} type veth peer name eth0 netns parley-{number}")
            run(f"{middle} link set plug{number} master bridge up")
            host = f"ip -n parley-{number}"
            run(f"{host} link set lo up")
            run(f"{host} addr add {NETWORK}.{number}/24 dev eth0")
            run(f"{host} link set eth0 up")
        yield
    finally:
        for command in remove:
            run(command, check=False)


def plug(number: int, state: str) -> None:
    """Plug a host in ("up") or out ("down")."""
    run(f"ip link set plug{number} {state}")


def hosts_see_each_other(seen: bool) -> None:
    """Cut the two hosts off from each other, but from nobody else; or undo it."""
    for number in (1, 2):
        run(f"bridge link set dev plug{number} isolated {'off' if seen else 'on'}")


# The servers


class NetworkPostgreSQL(PostgreSQL):
    """A PostgreSQL server that the hosts reach."""

    listens = f"{NETWORK}.254"
    access = f"{ACCESS}host all all {NETWORK}.0/24 trust\n"


POSTGRESQL_URL = f"postgresql://postgres@{NETWORK}.254/postgres"
REDIS = ["redis-server", "--bind", f"{NETWORK}.254", "--protected-mode", "no", "--save", "", "--loglevel", "warning"]


class NetworkRedis:
    """A Redis server that the hosts reach, and that keeps nothing."""

    def start(self) -> None:
        self._process = subprocess.Popen(REDIS, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Upstream:
    """A server that counts for all hosts."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{NETWORK}.254:{port}/v1"
        self._command = [sys.executable, str(ROOT / "tests/bench/paced_upstream.py"), str(port), f"{NETWORK}.254"]

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Host:
    """A host, and its process. It counts by itself, or has upstreams for that."""

    def __init__(self, number: int, data: Path, workers: int, upstreams: Sequence[Upstream]) -> None:
        self.number = number
        self.workers = workers  # 0: one process
        self.address = f"{NETWORK}.{number}:7777"
        self.log = data / f"host-{number}.log"
        self._settings = {
            "PARLEY_DATA": str(data / str(number)),
            "PARLEY_KEY": "one key for all hosts, at least 32 characters",
            "PARLEY_DATABASE_URL": POSTGRESQL_URL,
            "PARLEY_REDIS_URL": f"redis://{NETWORK}.254:6379/0",
            "PARLEY_PEER_ADDRESS": f"{NETWORK}.{number}:7778",
            "PARLEY_RESPONSES_PER_USER": "50",
            "PARLEY_UPSTREAM": ",".join(upstream.url for upstream in upstreams),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        address = f"{NETWORK}.{self.number}"
        command = [__file__, "host", address]
        if self._settings["PARLEY_UPSTREAM"]:
            options = [f"--host={address}", "--port=7777", f"--workers={self.workers or 1}"]
            command = [str(ROOT / "server.py"), *options]
        elif self.workers:
            options = [f"--workers={self.workers}", f"--host={address}", "--port=7777", "--factory"]
            command = ["-m", "uvicorn", *options, "tests.bench.hosts:worker"]
        self.process = self._popen(command)

    async def ready(self) -> str:
        """What `/ready` says, once it answers."""
        while True:
            with suppress(httpx2.HTTPError):
                async with httpx2.AsyncClient(timeout=2) as client:
                    response = await client.get(f"http://{self.address}/ready")
                    if response.status_code == 200:
                        return response.text.strip()
            await asyncio.sleep(0.1)

    def send(self, number: int) -> None:
        """Send a signal to all processes of the host."""
        pids = subprocess.check_output(["ip", "netns", "pids", f"parley-{self.number}"])
        for pid in map(int, pids.split()):
            os.kill(pid, number)

    def wait(self) -> int:
        """Wait until the server has ended, and return how."""
        assert self.process
        return self.process.wait(PATIENCE)

    def users(self, *arguments: str) -> None:
        """Run `server.py users` on the host."""
        assert self._popen([str(ROOT / "server.py"), "users", *arguments]).wait() == 0

    def _popen(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = ["ip", "netns", "exec", f"parley-{self.number}", sys.executable, *arguments]
        environment = os.environ | self._settings
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    async def call(self, method: str, path: str, **more: Any) -> tuple[int, Json]:
        async with httpx2.AsyncClient(timeout=20) as client:
            response = await client.request(method, f"http://{self.address}{path}", headers=bearer(ANN), **more)
            return response.status_code, response.json()


# Clients


class Client:
    """A client of a host. It keeps when each event came."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.events: list[tuple[float, Json]] = []
        self.closed: tuple[float, int | None] | None = None
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    @asynccontextmanager
    async def of(cls, host: Host, secret: str = ANN) -> AsyncIterator[Client]:
        url, headers = f"ws://{host.address}/ws", bearer(secret)
        protocols = [Subprotocol("chat.v2")]
        async with connect(url, subprotocols=protocols, additional_headers=headers, ping_interval=None) as connection:
            client = cls(connection)
            await client.until(lambda: bool(client.events))
            try:
                yield client
            finally:
                client._reading.cancel()

    async def _read(self) -> None:
        with suppress(ConnectionClosed):
            async for frame in self._connection:
                self.events.append((time.monotonic(), json.loads(frame)))
                self._changed.set()
        self.closed = time.monotonic(), self._connection.close_code
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def send(self, type: str, **fields: Any) -> None:
        await self._connection.send(json.dumps({"type": type, **fields}))

    async def ask(self, count: int, rate: int = 20, **fields: Any) -> str:
        """Ask for a reply that counts; returns its id once it has begun to."""
        before = {event["response"]["id"] for event in self.found("response.created")}
        await self.send("response.create", input=f"count {count} {rate}", stream_id=f"s{len(before)}", **fields)

        def new() -> set[str]:
            return {event["response"]["id"] for event in self.found("response.created")} - before

        await self.until(lambda: bool(new()))
        (id,) = new()
        await self.until(lambda: len(self.text(id)) > 20)
        return id

    async def resume(self, id: str, after: int | None = None) -> None:
        more = {} if after is None else {"starting_after": after}
        await self.send("parley.response.resume", response_id=id, **more)

    def found(self, *types: str) -> list[Json]:
        return [event for _, event in self.events if event["type"] in types]

    def deltas(self, id: str) -> list[tuple[float, Json]]:
        part = id.removeprefix("resp_")
        wanted = [(at, event) for at, event in self.events if event["type"] == "response.output_text.delta"]
        return [(at, event) for at, event in wanted if part in event["item_id"]]

    def text(self, id: str, before: float = float("inf")) -> str:
        return "".join(event["delta"] for at, event in self.deltas(id) if at < before)

    def end(self, id: str) -> Json | None:
        """The end of a reply, if it has come."""
        return next((event["response"] for event in self.found(*ENDS) if event["response"]["id"] == id), None)

    async def ended(self, id: str) -> str:
        """The status of a reply at its end, and why it failed."""
        await self.until(lambda: self.end(id) is not None)
        response = self.end(id) or {}
        return str(response["status"])


def counted(count: int) -> str:
    return "".join(f"{number} " for number in range(count))


# What happens

CHAPTERS = (
    *("resume", "cancel", "remove_user", "cut_hosts_apart", "stop_redis", "stop_postgresql", "freeze", "unplug"),
    "stop_upstreams",
)


class Story:
    """The two hosts, what fails, and what is said about it."""

    def __init__(
        self,
        hosts: tuple[Host, Host],
        postgresql: NetworkPostgreSQL,
        redis: NetworkRedis,
        upstreams: Sequence[Upstream],
    ) -> None:
        self.one, self.two = hosts
        self._postgresql = postgresql
        self._redis = redis
        self._upstreams = upstreams
        self._said: dict[str, str] = {}  # what clients have seen of each reply, and must be stored
        self._failures = 0

    def check(self, good: object, what: str) -> None:
        self._failures += not good
        print(f"    {'ok ' if good else 'BAD'} {what}", flush=True)

    async def tell(self, chapters: Sequence[str]) -> int:
        """Run some chapters; returns how many checks have failed."""
        for name in chapters:
            chapter = getattr(self, name)
            print(f"{name}: {chapter.__doc__}", flush=True)
            await chapter()
        return self._failures

    async def resume(self) -> None:
        """A client of host 1 disconnects and resumes its reply at host 2."""
        async with Client.of(self.one) as client:
            id = await client.ask(100)
            last = client.deltas(id)[-1][1]["sequence_number"]
            seen = client.text(id)
        async with Client.of(self.two) as other:
            began = time.monotonic()
            await other.resume(id, last)
            await other.until(lambda: bool(other.deltas(id)))
            waited = other.deltas(id)[0][0] - began
            self.check(await other.ended(id) == "completed", "it is completed")
            self.check(seen + other.text(id) == counted(100), "nothing is missing and nothing comes twice")
            gaps = [b[0] - a[0] for a, b in zip(other.deltas(id), other.deltas(id)[1:], strict=False)]
            self.check(
                waited < 1, f"the first text came after {1000 * waited:.0f} ms, the largest gap {max(gaps):.2f} s"
            )
            self._keep(id, counted(100))

    async def cancel(self) -> None:
        """Host 2 cancels a reply of host 1, and deletes another one."""
        async with Client.of(self.one) as client, Client.of(self.two) as other:
            for path in ("http", "socket"):
                id = await client.ask(1000)
                began = time.monotonic()
                if path == "http":
                    status, body = await self.two.call("POST", f"/v1/responses/{id}/cancel")
                    self.check((status, body["status"]) == (200, "cancelled"), "the answer says that it is cancelled")
                else:
                    await other.send("parley.response.cancel", response_id=id)
                await client.ended(id)
                seconds = time.monotonic() - began
                self.check(seconds < 1, f"its client at host 1 heard of it after {1000 * seconds:.0f} ms")
                self._keep(id, client.text(id))
            id = await client.ask(1000)
            status, _ = await self.two.call("DELETE", f"/v1/responses/{id}")
            self.check(status == 200 and await client.ended(id), "a reply is deleted, and ends")

    async def remove_user(self) -> None:
        """A user who is connected to both hosts is removed at host 1."""
        self.one.users("add", "bob", "--secret", BOB)
        await asyncio.sleep(1)
        async with Client.of(self.one, BOB) as client, Client.of(self.two, BOB) as other:
            await asyncio.gather(client.ask(1000), other.ask(1000))
            removing = asyncio.create_task(asyncio.to_thread(self.one.users, "remove", "bob"))
            began = await self._removed("bob")
            await removing
            for number, one in enumerate((client, other), 1):
                await one.until(lambda one=one: one.closed is not None)  # type: ignore[misc]
                assert one.closed
                seconds, code = one.closed[0] - began, one.closed[1]
                self.check(seconds < 1 and code == 4401, f"out of host {number} with {code}, {seconds:.2f} s later")

    async def cut_hosts_apart(self) -> None:
        """The hosts cannot reach each other, but the database and the clients can. Then they can again."""
        async with Client.of(self.one) as client, Client.of(self.two) as other:
            id = await client.ask(500)
            await other.resume(id)
            await other.until(lambda: len(other.text(id)) > 100)
            hosts_see_each_other(False)
            await asyncio.sleep(12)
            gaps = [b[0] - a[0] for a, b in zip(other.deltas(id), other.deltas(id)[1:], strict=False)]
            behind = len(client.text(id).split()) - len(other.text(id).split())
            self.check(behind < 60, f"{behind} numbers behind, 12 s later; the largest gap was {max(gaps):.1f} s")
            began = time.monotonic()
            status, body = await self.two.call("POST", f"/v1/responses/{id}/cancel")
            self.check(
                status == 503, f"a cancel gets 503 after {time.monotonic() - began:.1f} s: {body['error']['message']}"
            )
            hosts_see_each_other(True)
            self.check(await other.ended(id) == "completed", "it is completed")
            self.check(other.text(id) == counted(500) == client.text(id), "both clients have all of it, once")
            self._keep(id, counted(500))

    async def stop_redis(self) -> None:
        """Redis ends, and is started again."""
        async with Client.of(self.one) as client, Client.of(self.two) as other:
            id = await client.ask(300)
            self._redis.stop()
            await self._until_ready(self.one, good=False)
            self.check(True, f"/ready says: {await self.one.ready()}")
            began = time.monotonic()
            await other.resume(id)
            await other.until(lambda: bool(other.deltas(id)))
            self.check(True, f"a resume at the other host took {time.monotonic() - began:.2f} s")
            new = await other.ask(20)
            self._redis.start()
            await self._until_ready(self.one)
            for at, name in ((client, "host 1"), (other, "host 2")):
                self.check(await at.ended(id) == "completed", f"the reply is completed at {name}")
                self.check(at.text(id) == counted(300), "it is whole")
            self.check(await other.ended(new) == "completed", "so is one that began meanwhile")
            self._keep(id, counted(300))

    async def stop_postgresql(self) -> None:
        """PostgreSQL stops for 10 s while replies run and are followed from the other host."""
        async with Client.of(self.one) as client, Client.of(self.two) as other:
            ids = [await client.ask(400), await other.ask(100)]
            await other.resume(ids[0])
            await other.until(lambda: len(other.text(ids[0])) > 20)
            self._postgresql.stop()
            await asyncio.sleep(10)
            self.check(await other.ended(ids[1]) == "completed", "a reply of host 2 is completed without it")
            self._postgresql.start()
            for at, name in ((client, "host 1"), (other, "host 2")):
                self.check(await at.ended(ids[0]) == "completed", f"the reply is completed at {name}")
                self.check(at.text(ids[0]) == counted(400), "it is whole")
            self._keep(ids[0], counted(400))
            self._keep(ids[1], counted(100))
            await self._until_ready(self.one)
            await self._until_ready(self.two)
            await asyncio.sleep(2)

    async def freeze(self) -> None:
        """Host 1 is stopped by SIGSTOP while its reply is followed at host 2."""
        await self._lose(lambda: self.one.send(signal.SIGSTOP), lambda: self.one.send(signal.SIGCONT))

    async def unplug(self) -> None:
        """The cable of host 1 is pulled while its reply is followed at host 2."""
        await self._lose(lambda: plug(1, "down"), lambda: plug(1, "up"))

    async def stop_upstreams(self) -> None:
        """Both upstreams are killed in turn while host 1 has replies, which are followed at host 2."""
        for upstream in self._upstreams:
            async with Client.of(self.one) as client, Client.of(self.two) as other:
                _, made = await self.one.call("POST", "/v1/conversations", json={})
                # Another text begins another conversation, which is free to go to another upstream.
                ids = [await client.ask(200, conversation=made["id"]), await client.ask(201), await client.ask(202)]
                for id in ids:
                    await other.resume(id)
                    await other.until(lambda id=id: bool(other.text(id)))  # type: ignore[misc]
                began = time.monotonic()
                upstream.stop()
                ends = {id: await other.ended(id) for id in ids}
                failed = [id for id in ids if ends[id] == "failed"]
                self.check(0 < len(failed) < 3, f"{len(failed)} of 3 replies failed, the others are completed")
                at = max((when for when, event in other.events if event["type"] == "response.failed"), default=0)
                self.check(at - began < 1, f"host 2 heard of it after {1000 * (at - began):.0f} ms")
                for id in ids:
                    await client.ended(id)
                    self.check(client.text(id) == other.text(id), f"both clients have the same {ends[id]} text")
                    self._keep(id, client.text(id))
                new = await other.ask(20, conversation=made["id"])
                self.check(await other.ended(new) == "completed", "the conversation goes on, at host 2")
                self._keep(new, counted(20))
                self.check(upstream.url in await self.two.ready(), f"/ready says: {await self.two.ready()}")
                upstream.start()
                await self._until_ready(self.one)
                await self._until_ready(self.two)

    async def _lose(self, lose: Callable[[], None], find: Callable[[], None]) -> None:
        async with Client.of(self.one) as client, Client.of(self.two) as other:
            _, made = await self.one.call("POST", "/v1/conversations", json={})
            conversation = made["id"]
            id = await client.ask(10_000, conversation=conversation)
            own = await other.ask(900)
            await asyncio.sleep(3)
            await other.resume(id)
            await other.until(lambda: len(other.text(id)) > 100)
            began = time.monotonic()
            lose()
            said = max(client.text(id, began - STORED_SECONDS), other.text(id, began - STORED_SECONDS), key=len)
            status = await other.ended(id)
            self.check(status == "failed", f"the reply is {status}, {time.monotonic() - began:.0f} s later")
            end = json.dumps(other.end(id))
            self.check(
                f"{said} "[:-1] in end, f"with {len(said.split())} numbers, of those said {STORED_SECONDS:g} s before"
            )
            self.check(counted(10_000).startswith(other.text(id)), "without a gap")
            new = await other.ask(20, conversation=conversation)
            self.check(await other.ended(new) == "completed", "the conversation goes on at host 2")
            self._keep(id, said)
            self._keep(new, counted(20))
            find()
            if not self.one.workers:
                code = await asyncio.to_thread(self.one.wait)
                self.check(code == 1, f"host 1 comes back, sees that it was given up, and ends with {code}")
                self.one.start()
            await self._until_ready(self.one)
            self.check(await other.ended(own) == "completed", "a reply of host 2 has noticed nothing")
            self._keep(own, counted(900))

    async def audit(self) -> None:
        """What the database has in the end."""
        connection = await asyncpg.connect(POSTGRESQL_URL)
        lost = []
        for id, said in self._said.items():
            content = await connection.fetchval("SELECT content FROM items WHERE id = $1", id)
            if not (content or "").startswith(said.rstrip()):
                lost.append(id)
        self.check(not lost, f"of {len(self._said)} replies, {len(lost)} have lost what was said")
        two = "SELECT count(*) FROM (SELECT id FROM writes GROUP BY id HAVING count(DISTINCT address) > 1) AS two"
        number, written = await connection.fetchval(two), await connection.fetchval("SELECT count(*) FROM writes")
        self.check(number == 0, f"of {written} writes of text, {number} replies were written by two hosts")
        shorter = "SELECT count(*) FROM writes WHERE NOT starts_with(after, before)"
        self.check(await connection.fetchval(shorter) == 0, "no write has replaced text")
        running = await connection.fetchval("SELECT count(*) FROM items WHERE status = 'in_progress'")
        self.check(running == 0, "no reply seems to run")
        await connection.close()

    def _keep(self, id: str, said: str) -> None:
        self._said[id] = said

    async def _removed(self, user: str) -> float:
        """Wait until the database does not have a user any more, and return when."""
        connection = await asyncpg.connect(POSTGRESQL_URL)
        while await connection.fetchval("SELECT 1 FROM users WHERE id = $1", user):
            pass
        await connection.close()
        return time.monotonic()

    async def _until_ready(self, host: Host, good: bool = True) -> None:
        """Wait until `/ready` has nothing to complain about, or has something."""
        async with asyncio.timeout(PATIENCE):
            while True:
                if (await host.ready() == "ready") == good:
                    return
                await asyncio.sleep(0.2)


async def story(
    chapters: Sequence[str],
    hosts: tuple[Host, Host],
    postgresql: NetworkPostgreSQL,
    redis: NetworkRedis,
    upstreams: Sequence[Upstream],
) -> int:
    """Start the hosts, and tell what happens."""
    hosts[0].start()
    await hosts[0].ready()
    hosts[1].start()
    await hosts[1].ready()
    hosts[0].users("add", "ann", "--secret", ANN)
    connection = await asyncpg.connect(POSTGRESQL_URL)
    await connection.execute(WRITES)
    await connection.close()
    await asyncio.sleep(1)
    return await Story(hosts, postgresql, redis, upstreams).tell([*chapters, "audit"])


# The command line


@click.group(invoke_without_command=True)
@click.option("--workers", default=0, help="Workers of each host; with 0, it is one process.")
@click.option("--upstreams", default=False, is_flag=True, help="Two upstreams in place of the hosts' own chat.")
@click.option("--chapter", "chapters", multiple=True, type=click.Choice(CHAPTERS), default=CHAPTERS)
@click.pass_context
def main(context: click.Context, workers: int, upstreams: bool, chapters: Sequence[str]) -> None:
    """Tell what happens to two hosts. Ends with 1 if something is wrong."""
    if context.invoked_subcommand is None:
        with network():
            again = [
                "ip",
                "netns",
                "exec",
                MIDDLE,
                sys.executable,
                __file__,
                "middle",
                str(workers),
                str(2 * upstreams),
                *chapters,
            ]
            sys.exit(subprocess.run(again, cwd=ROOT).returncode)


@main.command(hidden=True)
@click.argument("workers", type=int)
@click.argument("upstream_count", type=int)
@click.argument("chapters", nargs=-1)
def middle(workers: int, upstream_count: int, chapters: Sequence[str]) -> None:
    """Run the databases and the clients, in the middle of the network."""
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parley-hosts-")))
        upstreams = [Upstream(8001 + number) for number in range(upstream_count)]
        hosts = Host(1, data, workers, upstreams), Host(2, data, workers, upstreams)
        postgresql = stack.enter_context(NetworkPostgreSQL.running())
        redis = NetworkRedis()
        servers: tuple[NetworkRedis | Upstream, ...] = redis, *upstreams
        for server in servers:
            server.start()
        try:
            failures = asyncio.run(story(chapters, hosts, postgresql, redis, upstreams))
        finally:
            for server in servers:
                server.stop()
            for host in hosts:
                host.send(signal.SIGKILL)
                print(f"the log of host {host.number}:\n{host.log.read_text()}", file=sys.stderr)
    sys.exit(bool(failures))


@main.command(hidden=True)
@click.argument("address")
def host(address: str) -> None:
    """Run a host."""
    serve(counting(), address, 7777)


@main.command(hidden=True)
@click.option("--supervisor", type=int)
@click.argument("lock", type=int)
def hub(supervisor: int, lock: int) -> None:
    """Run the hub of a host."""
    app = counting()
    asyncio.run(run_hub(app.state, lifespan(app), supervisor))


if __name__ == "__main__":
    main()
