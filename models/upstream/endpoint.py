"""One upstream: a server with OpenAI's API, at a URL."""

from __future__ import annotations

import asyncio
import http.cookiejar
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from httpx2 import (
    AsyncClient,
    ConnectError,
    EventSource,
    HTTPError,
    Limits,
    ReadError,
    RemoteProtocolError,
    Request,
    Response,
    Timeout,
    TimeoutException,
    WriteError,
)

from models.errors import APIError, InvalidRequestError, UpstreamFailedError, one_line
from models.upstream.failures import failure_of
from models.upstream.kinds import LLAMA_CPP, OPENAI, OTHER, PARLEY, VLLM, Body, Kind, kind_of
from models.upstream.wire import Args, Counted, Model, Models, Props, decode_model
from models.validation import printable

logger = logging.getLogger("parley")

POLL_SECONDS = 5.0  # from one look at an upstream to the next
AWAY_SECONDS = 1.0  # the same, while it does not answer
ANSWER_SECONDS = 5.0  # for an answer to a look, and for a connection
PAUSE_SECONDS = 0.5  # between two looks at least: replies may fail all at once
MISSED = 3  # looks in a row without a good answer, after which it is away
SILENCE_SECONDS = 600.0  # without a byte of a reply: a long prompt may take minutes
END_SECONDS = 0.1  # from the last event of a stream to its end
KEEP_SECONDS = 3.0  # an unused connection: uvicorn, and so vLLM, closes it after 5
BODY_BYTES = 2**16  # of an error that is read
EVENT_BYTES = 2**20  # of one event of a stream
LOOK_BYTES = 2**22  # of an answer to a look: OpenRouter lists 400 models in 500 kB
MODELS = 1000  # of one upstream
TURN = 50  # events that are read before others have a turn: a compressed stream of empty ones took 4 s
RESEND_SECONDS = 0.25  # within which a kept connection that the upstream has closed is noticed
SHOWN = 20  # models in the log

PIXEL = (  # a picture of one pixel
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)

T = TypeVar("T")


@dataclass(frozen=True)
class UpstreamModel:
    """A model of an upstream, as far as that tells of it."""

    name: str
    context: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of our options, by their names
    images: bool = False  # whether it reads pictures
    tools: bool = True  # whether it can call tools, as far as is known


class Endpoint:
    """An upstream, with what it is known to have, and the replies that run there.

    `on_change` is called when its models have changed, or when it has gone or come back.
    """

    def __init__(
        self,
        url: str,
        client: AsyncClient,
        patience: float = ANSWER_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        self.kind: Kind = OTHER
        self.models: Mapping[str, UpstreamModel] = {}
        self._listed: list[Model] = []
        self.slots: int | None = None  # replies that it runs at once, if it tells
        self.trouble: str | None = "it has not answered yet"  # why it is away; None: it answers
        self.running = 0
        self.used = 0.0  # when a reply began there last
        self.on_change: Callable[[], None] = lambda: None
        self._client = client
        self._patience = patience  # seconds for an answer to a look
        self._clock = clock
        self._cool_at = 0.0  # until then, others are preferred
        self._failed = asyncio.Event()  # since the last look
        self._is_learned = True  # whether it has answered all questions
        self._missed = 0  # looks in a row without a good answer
        self._waiting: set[asyncio.Timeout] = set()  # for the next piece of a reply

    @property
    def is_cooling(self) -> bool:
        """Whether it has failed a moment ago, or has asked for a pause."""
        return self._clock() < self._cool_at

    def cool(self, seconds: float) -> None:
        """Prefer other upstreams for some seconds, and look at this one soon."""
        self._cool_at = self._clock() + seconds
        self._failed.set()

    @property
    def arguments(self) -> dict[str, Any]:
        """What operators may know, ready for JSON."""
        known = {"url": self.url, "kind": self.kind.name, "models": [*self.models], "slots": self.slots}
        return known | {"trouble": self.trouble}

    # Looks

    async def watch(self) -> None:
        """Look at the upstream every few seconds, and when a reply has failed, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(AWAY_SECONDS if self._missed else POLL_SECONDS):
                    await self._failed.wait()
            self._failed.clear()
            try:
                await self.look()
            except Exception:  # nothing that an upstream says may end the looks
                logger.exception("the look at %s has failed", self.url)
            await asyncio.sleep(PAUSE_SECONDS)

    async def look(self) -> None:
        """Ask the upstream for its models. It is away if it refuses a connection, or after several bad answers."""
        try:
            async with asyncio.timeout(self._patience):
                await self._learn()
        except (TimeoutError, TimeoutException):
            self._miss(f"it does not answer within {self._patience:g} s")
        except ConnectError as error:
            self._lose(one_line(error))
        except (APIError, HTTPError, OSError) as error:
            self._miss(one_line(error))
        else:
            self._missed = 0
            self._find()

    async def _learn(self) -> None:
        listed = _models_of((await self._ask("/models", Models)).data)
        if self.trouble or not self._is_learned or listed != self._listed:
            self._is_learned = True
            self.kind = kind_of(next((model.owned_by for model in listed if model.owned_by), ""))
            details = await self._details()
            images = self.kind is OPENAI or (self.kind is VLLM and await self._counts_images(listed))
            self._listed = listed
            self.models = {
                one.id: UpstreamModel(
                    one.id, **{"context": _context_of(one), **details}, images=_reads_images(one, images)
                )
                for one in listed
            }

    async def _details(self) -> dict[str, Any]:
        """The fields of all its models that an upstream tells in another place, where it also tells its slots."""
        with self._asked_again():
            if self.kind is LLAMA_CPP:
                props = await self._ask("/props", Props, at_root=True)
                self.slots = props.total_slots
                params, names = props.default_generation_settings.params, self.kind.options.items()
                defaults = {ours: params.get(theirs) for ours, theirs in names}
                context = props.default_generation_settings.n_ctx
                told = {"defaults": defaults, "tools": props.chat_template_caps.supports_tools}
                return told | ({"context": context} if context else {})
            if self.kind is PARLEY:
                args = (await self._ask("/args", Args, at_root=True)).args
                self.slots = args.slots
                return {"defaults": args.options}
        return {}

    async def _counts_images(self, listed: Sequence[Model]) -> bool:
        """Whether a vLLM reads pictures. It does not tell: it is asked to count the tokens of one.

        All its models are the same one, by other names or with adapters.
        """
        content = [{"type": "image_url", "image_url": {"url": PIXEL}}]
        for model in listed[:1]:
            with self._asked_again(), suppress(InvalidRequestError):
                await self.count(
                    "/tokenize", {"model": model.id, "messages": [{"role": "user", "content": content}]}, Counted
                )
                return True
        return False

    @contextmanager
    def _asked_again(self) -> Iterator[None]:
        """Ask again at the next look what the upstream fails to answer."""
        try:
            yield
        except APIError:
            self._is_learned = False

    async def _ask(self, path: str, kind: type[T], at_root: bool = False) -> T:
        """What a GET answers. Raises UpstreamFailedError, or HTTPError if there is no answer."""
        status, answer = await self._answer(self._client.build_request("GET", self._url(path, at_root)))
        if status != 200:  # anybody may read this: it has nothing of what the upstream says, such as a wrong key
            raise UpstreamFailedError(f"GET {path} is answered with status {status}")
        return _decoded(answer, kind)

    async def count(self, path: str, body: Body, kind: type[T]) -> T:
        """What a POST at the root answers, within seconds. Raises APIError."""
        request = self._client.build_request("POST", self._url(path, at_root=True), content=encode(body))
        try:
            async with asyncio.timeout(self._patience):
                status, answer = await self._answer(request)
        except (HTTPError, TimeoutError) as error:
            raise UpstreamFailedError(f"{self.url}: {one_line(error)}") from error
        if status != 200:
            raise failure_of(status, answer)
        return _decoded(answer, kind)

    async def _answer(self, request: Request) -> tuple[int, bytes]:
        response = await self._client.send(request, stream=True)
        try:
            return response.status_code, await _beginning(response, LOOK_BYTES)
        finally:
            await response.aclose()

    def _url(self, path: str, at_root: bool) -> str:
        return f"{self.url.removesuffix('/v1') if at_root else self.url}{path}"

    def _find(self) -> None:
        if self.trouble:
            more = f" and {len(self.models) - SHOWN} more" if len(self.models) > SHOWN else ""
            logger.info("%s answers (%s): %s%s", self.url, self.kind.name, ", ".join([*self.models][:SHOWN]), more)
        self.trouble = None
        for waiting in self._waiting:
            if not waiting.expired():
                waiting.reschedule(None)
        self.on_change()

    def _miss(self, trouble: str) -> None:
        self._missed += 1
        self._is_learned = False
        if self.trouble or self._missed >= MISSED:
            self._lose(trouble)

    def _lose(self, trouble: str) -> None:
        self._missed = max(self._missed, 1)
        if self.trouble != trouble:
            logger.warning("%s is away: %s", self.url, trouble)
        self.trouble = trouble
        until = asyncio.get_running_loop().time() + self._patience  # one that drains goes on with its replies
        for waiting in self._waiting:
            if waiting.when() is None:
                waiting.reschedule(until)
        self.on_change()

    # Replies

    @contextmanager
    def _held(self) -> Iterator[None]:
        self.running += 1
        self.used = self._clock()
        try:
            yield
        finally:
            self.running -= 1

    @asynccontextmanager
    async def stream(self, path: str, body: Body) -> AsyncIterator[AsyncIterator[str]]:
        """The data of the events of a streamed reply. It ends there when the context ends.

        Raises APIError: UpstreamFailedError also if the upstream vanishes or stays silent meanwhile.
        """
        with self._held():
            async with self._opened(path, body) as response:
                yield self._data(response)

    @asynccontextmanager
    async def _opened(self, path: str, body: Body) -> AsyncIterator[Response]:
        response = await self._send(path, encode(body))
        content_type = response.headers.get("content-type", "")
        try:
            if response.status_code != 200 or not content_type.lower().startswith("text/event-stream"):
                with self._told():
                    async with self._patient():
                        answer = await _beginning(response, BODY_BYTES)
                if response.status_code != 200:
                    raise failure_of(response.status_code, answer, response.headers.get("retry-after"))
                raise UpstreamFailedError(f"it answers with {content_type!r}, not with a stream: {printable(answer)}")
            yield response
        finally:
            await response.aclose()

    async def _send(self, path: str, body: bytes) -> Response:
        """Send a request, and wait for the head of its answer."""
        with self._told():
            async with self._patient():
                began = self._clock()
                try:
                    return await self._client.send(self._request(path, body), stream=True)
                except (RemoteProtocolError, ReadError, WriteError):  # it may have closed a kept connection
                    if self._clock() - began > RESEND_SECONDS:
                        raise
                return await self._client.send(self._request(path, body), stream=True)

    def _request(self, path: str, body: bytes) -> Request:
        return self._client.build_request("POST", self._url(path, at_root=False), content=body)

    async def _data(self, response: Response) -> AsyncIterator[str]:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise UpstreamFailedError(f"{self.url} compresses its answer, which it was not asked for")
        response.encoding = "utf-8-sig"  # of all streams of events
        events = aiter(EventSource(response, EVENT_BYTES))
        for number in itertools.count(1):
            with self._told():
                async with self._patient():
                    event = await anext(events, None)
            if event is None:
                return
            if number % TURN == 0:
                await asyncio.sleep(0)
            data = event.data.strip()
            if data != "[DONE]":
                if data:
                    yield data
                continue
            with suppress(TimeoutError, HTTPError):  # a connection is kept if its stream is read to its end
                async with asyncio.timeout(END_SECONDS):
                    await anext(events, None)
            return

    @asynccontextmanager
    async def _patient(self) -> AsyncIterator[None]:
        """Wait for the upstream, as long as it is not away."""
        async with asyncio.timeout(None) as waiting:
            self._waiting.add(waiting)
            try:
                yield
            finally:
                self._waiting.discard(waiting)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise UpstreamFailedError for what is wrong with a connection."""
        try:
            yield
        except TimeoutError as error:
            raise UpstreamFailedError(f"{self.url} is away: {self.trouble}") from error
        except (HTTPError, OSError) as error:
            raise UpstreamFailedError(f"{self.url}: {one_line(error)}") from error


def new_client(key: str | None) -> AsyncClient:
    """A client for all upstreams, with a key if they want one."""
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    no_cookies = http.cookiejar.DefaultCookiePolicy(allowed_domains=[])  # else users would share those of a reply
    return AsyncClient(
        headers=headers | ({"authorization": f"Bearer {key}"} if key else {}),
        cookies=http.cookiejar.CookieJar(no_cookies),
        timeout=Timeout(ANSWER_SECONDS, read=SILENCE_SECONDS, write=SILENCE_SECONDS, pool=None),
        limits=Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_SECONDS),
    )


encode = msgspec.json.Encoder().encode


def _decoded(answer: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(answer, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UpstreamFailedError(f"it answers with something else: {one_line(error)}") from error


async def _beginning(response: Response, limit: int) -> bytes:
    """The first bytes of a body."""
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) >= limit:
            break
    return bytes(body[:limit])


def _models_of(listed: Sequence[msgspec.Raw]) -> list[Model]:
    """The entries of a list that can be read as models."""
    models = []
    for entry in listed[:MODELS]:
        with suppress(msgspec.ValidationError):
            models.append(decode_model(entry))
    return [model for model in models if model.id.isprintable()]


def _reads_images(model: Model, otherwise: bool) -> bool:
    """Whether a model reads pictures, if it tells."""
    if model.architecture is None or model.architecture.input_modalities is None:
        return otherwise
    return "image" in model.architecture.input_modalities


def _context_of(model: Model) -> int | None:
    meta = model.meta
    return model.max_model_len or model.context_length or (meta and (meta.n_ctx or meta.n_ctx_train)) or None
