"""The load test: many users for a long time. Some vanish, stall, cancel, come back or send nonsense; nothing gets lost.

    python tests/bench/soak.py --users 64 --seconds 600
    python tests/bench/soak.py --hostile --users 20 --seconds 180

The server has a process of its own, with a tiny random model on few slots. Exits with 1 where a request had no end or a
wrong one, where the server logged an error, or where at the end, without clients, it has more tasks, threads or
descriptors than after the first tenth of the time. With `--hostile`, the users are honest; they chat first alone, then
beside all attacks of `hostile.py` at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx2
import torch
import uvicorn
from platformdirs import user_cache_path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from models.engine.native import build
from models.settings import Settings
from models.web.http_protocol import HTTPProtocol
from models.web.serving import SHUTDOWN_SECONDS, UVICORN_FRAME_BYTES, listen
from server import create_app
from tests.bench.actions import GOOD, deck
from tests.bench.clients import DEADLINE, Action, Tally, User
from tests.bench.hostile import ATTACKS, Attacker, repeat
from tests.support.tiny import opens_tiny

MALLORY = "mallory"  # a user who only attacks
QUIET = 300  # tenths of a second until the server must have ended what the last clients left
processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Plan:
    """The size of a load: each user acts for `seconds`, or `actions` times where that is given."""

    users: int = 64
    seconds: float = 600
    actions: int | None = None
    pause: float = 3.0  # seconds between two actions of a user, on average
    slots: int = 8
    queue: int = 32
    linger: int = 2
    seed: int = 0

    def settings(self, data: Path) -> Settings:
        """The settings of the server."""
        users = {f"user{number}": f"secret of user{number}" for number in range(self.users)}
        users |= {MALLORY: f"secret of {MALLORY}"}
        return Settings(
            slots=self.slots,
            queue=self.queue,
            linger=self.linger,
            responses_per_user=8,
            compile=False,
            data=data,
            users=users,
            proxies=("127.0.0.1/32",),  # clients choose their address, since wrong secrets count against it
            options={"max_output_tokens": 60},
        )

    def part(self, share: float) -> Plan:
        """A share of the load."""
        actions = self.actions and math.ceil(self.actions * share)
        return replace(self, seconds=self.seconds * share, actions=actions)


# The server


def run_app(app: Callable[..., Any], started: Connection) -> None:
    """Serve as `python server.py` does, until a signal. Sends the port first."""
    listener = listen("127.0.0.1", 0)
    started.send(listener.getsockname()[1])
    config = uvicorn.Config(app, log_config=None, ws_max_size=UVICORN_FRAME_BYTES, ws_per_message_deflate=False)
    config.http, config.proxy_headers = HTTPProtocol if isinstance(app, Starlette) else "h11", False
    config.timeout_graceful_shutdown = SHUTDOWN_SECONDS
    with suppress(KeyboardInterrupt):  # uvicorn raises it after a signal
        uvicorn.Server(config).run([listener])


@contextmanager
def in_process(serve: Callable[..., None], *arguments: Any) -> Iterator[tuple[int, str]]:
    """A server in a process of its own: the id of the process, and host:port."""
    reading, writing = processes.Pipe(duplex=False)
    process = processes.Process(target=serve, args=(*arguments, writing))
    process.start()
    writing.close()  # else a server that fails leaves us waiting for its port
    try:
        yield process.pid or 0, f"127.0.0.1:{reading.recv()}"
    finally:
        process.terminate()
        process.join()


def serve(settings: Settings, started: Connection) -> None:
    """Serve a tiny model, and what the process holds at `/reading`."""
    torch.set_num_threads(1)
    build.load_kernels(build.build_library(user_cache_path("parley")))
    errors = Errors()
    logging.basicConfig(level=logging.WARNING, handlers=[errors])
    app = create_app(settings, opens_tiny)
    app.state.errors = errors.seen
    app.router.routes.append(Route("/reading", read))
    run_app(app, started)


class Errors(logging.StreamHandler[TextIO]):
    """Prints and keeps logged errors, except for frames of clients that are not UTF-8."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith("Invalid UTF-8"):
            self.seen.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")
            super().emit(record)


def memory(process: int | str) -> int:
    """The resident memory of a process, in bytes."""
    return resource.getpagesize() * int(Path(f"/proc/{process}/statm").read_text().split()[1])


def links() -> list[str]:
    """The targets of the file descriptors of this process."""
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


async def read(request: Request) -> Response:
    """What the process of the server holds, without the database, whose pool grows up to fifteen connections."""
    gc.collect()
    state = request.app.state
    tasks = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    threads = [thread.name for thread in threading.enumerate() if "_connection_worker" not in thread.name]
    descriptors = [link.partition(":[")[0] for link in links() if not link.startswith(str(state.settings.data))]
    admission, scheduler = state.admission, state.chat._engine.scheduler
    reading = {"tasks": tasks, "threads": threads, "descriptors": descriptors, "errors": state.errors}
    reading |= {"places": sum(admission.in_flight.values()) + len(admission.waiting)}
    reading |= {"slots": state.settings.slots - min(admission.free, scheduler.free_slots)}
    return JSONResponse(reading | {"memory": memory("self")})


# The load


@dataclass(frozen=True)
class Reading:
    """What the process of the server holds at some moment."""

    tasks: list[str]
    threads: list[str]
    descriptors: list[str]
    errors: list[str]  # all logged ones so far
    places: int  # taken ones, in slots and in the wait queue
    slots: int  # taken ones
    memory: int

    def more_than(self, before: Reading, *kinds: str) -> list[str]:
        """What is there of some kinds and was not before, and the places that are taken."""
        left = Counter({"places": self.places, "slots": self.slots})
        for kind in kinds:
            more = Counter(getattr(self, kind)) - Counter(getattr(before, kind))
            left.update({f"{kind}: {name}": count for name, count in more.items()})
        return [f"{count} {name}" for name, count in left.items() if count]


@dataclass(frozen=True)
class Soak:
    """The result of a load: what the clients tell, and what the server held after the warm-up and at the end."""

    tally: Tally
    warm: Reading
    end: Reading

    @property
    def left(self) -> list[str]:
        """What the server still holds."""
        return self.end.more_than(self.warm, "tasks", "threads", "descriptors")

    @property
    def outcomes(self) -> Counter[str]:
        """How many requests ended in each way."""
        return Counter(reply.outcome or "without an end" for reply in self.tally.replies)

    @property
    def waits(self) -> list[list[float]]:
        """For each user, the seconds from requests to first deltas."""
        waits = defaultdict(list)
        for reply in self.tally.replies:
            if reply.wait is not None:
                waits[reply.user].append(reply.wait)
        return list(waits.values())


async def soak(plan: Plan, data: Path) -> Soak:
    """Put a load on a server, twice: first for a tenth of the time, in which it makes everything that it keeps."""
    tally, actions, seeds = Tally(), deck(random.Random(plan.seed)), random.Random(plan.seed)
    with in_process(serve, plan.settings(data)) as (_, address):
        idle = await reading(address)
        await load(plan.part(0.1), address, tally, actions, seeds)
        warm = await reading_at_rest(plan, address, idle)
        await load(plan.part(0.9), address, tally, actions, seeds)
        return Soak(tally, warm, await reading_at_rest(plan, address, warm))


async def load(plan: Plan, address: str, tally: Tally, actions: Iterator[Action], seeds: random.Random) -> None:
    """Let all users act, and leave."""
    until = time.monotonic() + plan.seconds
    fresh = httpx2.Limits(max_keepalive_connections=0)  # uvicorn closes idle connections without notice
    url = f"http://{address}"
    async with httpx2.AsyncClient(base_url=url, timeout=DEADLINE, trust_env=False, limits=fresh) as http:
        secrets = plan.settings(Path()).users
        ids = [id for id in secrets if id != MALLORY]
        users = [User(id, secrets[id], address, http, tally, random.Random(seeds.random())) for id in ids]
        async with asyncio.TaskGroup() as group:
            for user, neighbour in zip(users, [*users[1:], users[0]], strict=True):
                user.neighbour = neighbour
                group.create_task(live(user, plan, actions, until))


async def live(user: User, plan: Plan, actions: Iterator[Action], until: float) -> None:
    """Act again and again, with pauses."""
    done = 0
    while time.monotonic() < until if plan.actions is None else done < plan.actions:
        await user.act(next(actions))
        await asyncio.sleep(user.chance.uniform(0, 2 * plan.pause))
        done += 1


async def reading(address: str) -> Reading:
    """What the server holds now."""
    async with httpx2.AsyncClient(timeout=DEADLINE, trust_env=False) as http:
        return Reading(**(await http.get(f"http://{address}/reading")).raise_for_status().json())


async def reading_at_rest(plan: Plan, address: str, before: Reading) -> Reading:
    """What the server holds when the replies of clients that left have ended, or after a while where they have not."""
    await asyncio.sleep(plan.linger)  # so long it keeps replies that nobody follows
    for _ in range(QUIET):
        held = await reading(address)
        if not held.more_than(before, "tasks", "descriptors"):
            break
        await asyncio.sleep(0.1)
    return held


# The hostile mode


@dataclass(frozen=True)
class Hostile:
    """How honest users fared alone and beside attacks, how often each attack came, and the memory of the server."""

    alone: Tally
    beside: Tally
    attacks: Mapping[str, int]
    readings: list[Reading]  # after the time alone, after the first half of the attacks, and at the end

    @property
    def lost(self) -> list[str]:
        return [*self.alone.lost, *self.beside.lost]


async def hostile(plan: Plan, data: Path) -> Hostile:
    """Let honest users chat alone, then beside all attacks at once, each for `plan.seconds`."""
    tallies, seeds, attacks = (Tally(), Tally()), random.Random(plan.seed), Counter[str]()
    with in_process(serve, plan.settings(data)) as (_, address):
        await load(plan, address, tallies[0], cycle(GOOD), seeds)
        readings = [await reading(address)]
        for _ in range(2):
            async with asyncio.TaskGroup() as group:
                attacking = [group.create_task(attack_all(plan, address, attacks, seeds))]
                await load(plan.part(0.5), address, tallies[1], cycle(GOOD), seeds)
                await asyncio.wait(attacking)
            readings.append(await reading(address))
        return Hostile(*tallies, attacks, readings)


async def attack_all(plan: Plan, address: str, attacks: Counter[str], seeds: random.Random) -> None:
    """Run all attacks at once, again and again, and count them."""
    secret = plan.settings(Path()).users[MALLORY]
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=f"http://{address}", timeout=30, trust_env=False, limits=limits) as http:
        attackers = [Attacker(address, secret, http, random.Random(seeds.random())) for _ in ATTACKS]
        times = await asyncio.gather(*map(repeat, ATTACKS, attackers, [plan.seconds / 2] * len(ATTACKS)))
        attacks.update({attack.__name__: count for attack, count in zip(ATTACKS, times, strict=True)})


def report_hostile(hostile: Hostile) -> Iterator[str]:
    """The lines of the report of the hostile mode."""
    yield from (f"{times:7} {name.replace('_', ' ')}" for name, times in hostile.attacks.items())
    for name, tally in (("alone", hostile.alone), ("beside all attacks", hostile.beside)):
        waits = [reply.wait for reply in tally.replies if reply.wait is not None]
        gaps = [reply.gap for reply in tally.replies if reply.deltas > 1]
        outcomes = Counter(reply.outcome or "without an end" for reply in tally.replies)
        yield f"\n{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        yield f"    first delta: median {statistics.median(waits):.3f} s, worst {max(waits):.3f} s"
        yield f"    gap between deltas: median {statistics.median(gaps):.3f} s, worst {max(gaps):.3f} s"
    yield f"\n{len(hostile.lost):7} LOST"
    yield from (f"    {complaint}" for complaint in hostile.lost[:20])
    yield "memory: " + ", ".join(f"{reading.memory / 2**20:.1f}" for reading in hostile.readings) + " MiB"
    yield from (f"    LOGGED {error}" for error in hostile.readings[-1].errors[:20])


# The report


def report(soak: Soak) -> Iterator[str]:
    """The lines of the report."""
    yield from (f"{times:7} {name.replace('_', ' ')}" for name, times in sorted(soak.tally.actions.items()))
    yield from (f"{times:7} left in the {stage}" for stage, times in sorted(soak.tally.vanished.items()))
    yield f"\n{len(soak.tally.replies):7} asked"
    yield from (f"{count:7} {outcome}" for outcome, count in soak.outcomes.most_common())
    yield f"{len(soak.tally.lost):7} LOST\n"
    yield from (f"    {complaint}" for complaint in soak.tally.lost[:20])
    for name, choose in (("median", statistics.median), ("worst", max)):
        each = [choose(waits) for waits in soak.waits]
        yield f"{name} wait for the first delta: {min(each):.3f} to {max(each):.3f} s, by user"
    for kind in ("tasks", "threads", "descriptors"):
        yield f"{kind}: {len(getattr(soak.warm, kind))} after the warm-up, {len(getattr(soak.end, kind))} at the end"
    yield f"memory: {soak.warm.memory / 2**20:.1f} MiB after the warm-up, {soak.end.memory / 2**20:.1f} at the end"
    yield from (f"    LEFT {left}" for left in soak.left)
    yield from (f"    LOGGED {error}" for error in soak.end.errors[:20])


def main() -> None:
    parser = argparse.ArgumentParser(description="Many users for a long time.")
    parser.add_argument("--hostile", action="store_true", help="honest users alone, then beside attacks")
    for name, default in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=int if name == "actions" else type(default), default=default)
    arguments = vars(parser.parse_args())
    run = run_hostile if arguments.pop("hostile") else run_soak
    with tempfile.TemporaryDirectory() as data:
        sys.exit(1 if run(Plan(**arguments), Path(data)) else 0)


def run_soak(plan: Plan, data: Path) -> bool:
    """Run the load test and print its report; returns whether anything is wrong."""
    done = asyncio.run(soak(plan, data))
    print("\n".join(report(done)))
    return bool(done.tally.lost or done.left or done.end.errors)


def run_hostile(plan: Plan, data: Path) -> bool:
    """Run the hostile mode and print its report; returns whether anything is wrong."""
    done = asyncio.run(hostile(plan, data))
    print("\n".join(report_hostile(done)))
    return bool(done.lost or done.readings[-1].errors)


if __name__ == "__main__":
    main()
