"""Answers messages with other servers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

from models.chat_request import ChatRequest
from models.errors import (
    APIError,
    InvalidValueError,
    UnsupportedParameterError,
    UpstreamUnavailableError,
)
from models.model_info import ModelInfo, ModelList
from models.ops.metrics import Metrics
from models.options import SAMPLING, Options
from models.settings import Settings
from models.upstream.conversation import BytesPerToken, Conversation
from models.upstream.endpoint import ANSWER_SECONDS, Endpoint, new_client
from models.upstream.kinds import VLLM, Body, Kind
from models.upstream.pool import Pool, beginning_of
from models.upstream.request_body import body_of, render_messages
from models.upstream.upstream_reply import Asked, UpstreamReply
from models.upstream.wire import Counted

logger = logging.getLogger("parley")

OWN = Options().updated(dict.fromkeys(SAMPLING))  # of a request that leaves all to the upstream
WAIT_SECONDS = 10.0  # until the log says again what the start waits for
COUNTED = ("model", "tools", "chat_template_kwargs")  # fields of a request that the count of its tokens needs
CERTAIN = 0.75  # of the limit: a prompt that seems to be shorter is not counted


class UpstreamChat:
    """A `Chat` over one or several upstreams, which may offer several models."""

    cache_usage = 0.0  # upstreams tell it in metrics of their own

    def __init__(self, settings: Settings, endpoints: Sequence[Endpoint], metrics: Metrics) -> None:
        self.died = asyncio.Event()
        self._settings = settings
        self._pool = Pool(endpoints)
        self._metrics = metrics
        self._bytes_per_token: dict[str, BytesPerToken] = {}  # by the model
        self._changed = asyncio.Event()
        self.models = ModelList(())
        self.models.replace(self._offered())
        for endpoint in endpoints:
            endpoint.on_change = self._learn
            metrics.upstream_running.labels(endpoint.url).set_function(partial(getattr, endpoint, "running"))

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, settings: Settings, metrics: Metrics, patience: float = ANSWER_SECONDS
    ) -> AsyncIterator[UpstreamChat]:
        """A chat that looks at its upstreams while the context lasts.

        It waits until one of them has told its models, unless the settings name some. `patience` is how many seconds an
        upstream has to answer a look.
        """
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(new_client(settings.upstream_key))
            endpoints = [Endpoint(url, client, patience) for url in settings.upstream]
            chat = cls(settings, endpoints, metrics)
            await chat.look()
            watching = [asyncio.create_task(endpoint.watch()) for endpoint in endpoints]
            try:
                await chat._wait_for_models()
                chat._compare_slots()
                yield chat
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.wait(watching)

    @property
    def trouble(self) -> str | None:
        """Why no model can answer at the moment; None if one can."""
        return None if len(self._missing) < len(self.models.all) else self.warning

    @property
    def warning(self) -> str | None:
        """Which upstreams are away, or which models no upstream has; None if all are there."""
        missing = f"no upstream has {', '.join(self._missing)}" if self._missing else None
        return self._pool.trouble or missing

    @property
    def _missing(self) -> list[str]:
        """The models that no upstream can answer with at the moment."""
        return [model.name for model in self.models.all if not self._pool.offering(model.name)]

    @property
    def arguments(self) -> dict[str, Any]:
        """The values in effect for the models, ready for JSON."""
        return {
            "models": {
                model.name: {
                    "context": model.context,
                    "options": {**model.defaults.as_json(), "instructions": None},  # the operator's text is not public
                }
                for model in self.models.all
            },
            "upstreams": [one.arguments for one in self._pool.endpoints],
        }

    async def prepare(self, request: ChatRequest) -> UpstreamReply:
        """Find the upstreams for a reply, and choose which messages they get.

        Raises UnsupportedParameterError, ContextLengthExceededError or UpstreamUnavailableError.
        """
        model = self.models.of(request.model)
        if request.model not in (None, *model.names):  # it has gone a moment ago
            raise UpstreamUnavailableError
        endpoints = self._offering(model.name, bool(request.tools.callable))
        bodies = _bodies(request, {one.kind for one in endpoints}, model.name)
        conversation = Conversation(request, self._settings.options.get("instructions"), model.has_images)
        bytes_per_token = self._bytes_per_token.setdefault(model.name, BytesPerToken())
        if request.truncate and model.context:
            await self._fit(conversation, request.options.max_output_tokens, model, endpoints, bodies)
        asked = Asked(
            model.name,
            model.context,
            bodies,
            request.options.max_output_tokens,
            conversation,
            request.prompt,
            request.truncate,
            bool(request.tools.callable),
            beginning_of(request, model.name),
        )
        return UpstreamReply(asked, self._pool, bytes_per_token, self._metrics)

    def _offering(self, model: str, has_tools: bool) -> list[Endpoint]:
        """The upstreams for a request. Raises UpstreamUnavailableError, or UnsupportedParameterError for tools."""
        offering = self._pool.offering(model)
        if not offering:
            raise UpstreamUnavailableError
        if fitting := [one for one in offering if one.models[model].tools or not has_tools]:
            return fitting
        raise UnsupportedParameterError("tools are not supported by the chat template of this model", "tools")

    async def look(self) -> None:
        """Look at all upstreams now."""
        await asyncio.gather(*(endpoint.look() for endpoint in self._pool.endpoints))

    async def _fit(
        self,
        conversation: Conversation,
        max_tokens: int | None,
        model: ModelInfo,
        endpoints: Sequence[Endpoint],
        bodies: Mapping[Kind, Body],
    ) -> None:
        """Leave out the oldest turns that have no room in the context."""
        assert model.context
        limit = model.context - min(max_tokens or model.context, model.context // 4)
        if conversation.size <= limit:  # no token is empty
            return
        tokens = int(conversation.size / self._bytes_per_token[model.name].value)
        counting = next((one for one in endpoints if one.kind is VLLM and VLLM in bodies), None)
        if tokens > CERTAIN * limit and counting:
            asked = {name: bodies[VLLM][name] for name in COUNTED if name in bodies[VLLM]}
            body = {**asked, "messages": render_messages(conversation.messages, VLLM)}
            with suppress(APIError):
                tokens = (await counting.count("/tokenize", body, Counted)).count
                self._bytes_per_token[model.name].learn(conversation.size, tokens)
        conversation.fit(tokens, limit)

    async def _wait_for_models(self) -> None:
        while not self.models.all:
            logger.warning("the start waits for an upstream: %s", self._pool.trouble or "they have no models")
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    self._changed.clear()
                    await self._changed.wait()

    def _compare_slots(self) -> None:
        """Warn if more replies may run than the upstreams run at once, if all of them tell."""
        told = [one.slots for one in self._pool.endpoints]
        if None not in told and (there := sum(filter(None, told))) < self._settings.slots:
            logger.warning(
                "PARLEY_SLOTS=%d is more than the %d replies that the upstreams run at once: "
                "the others wait there, where users do not take turns",
                self._settings.slots,
                there,
            )

    def _learn(self) -> None:
        """Offer what the upstreams have by now."""
        if offered := [*self._offered()]:
            self.models.replace(offered)
        self._changed.set()

    def _offered(self) -> Iterator[ModelInfo]:
        """The models of the settings, or else those of the upstreams."""
        found = [name for endpoint in self._pool.endpoints for name in endpoint.models]
        kept = [model.name for model in self.models.all[:1] if model.name in found]  # the default model stays
        names = list(dict.fromkeys(self._settings.upstream_model or [*kept, *found]))
        for name in names:
            told = [one.models[name] for one in self._pool.endpoints if name in one.models]
            contexts = [one.context for one in told if one.context]
            if self._settings.context:
                contexts.append(self._settings.context)
            defaults = _learned(told[0].defaults if told else {}).updated(self._settings.options)
            aliases = self._settings.aliases_of(name, names[0])
            tools, images = all(one.tools for one in told), bool(told) and all(one.images for one in told)
            # Of reasoning, no upstream tells; it refuses what its model cannot do.
            knows = {"tools": tools, "reasoning": True, "images": images}
            capabilities = tuple(capability for capability, known in knows.items() if known)
            yield ModelInfo(name, min(contexts, default=None), defaults, aliases, capabilities)


def _bodies(request: ChatRequest, kinds: set[Kind], model: str) -> dict[Kind, Body]:
    """The request for each kind of server that can do it. Raises UnsupportedParameterError if none can."""
    bodies: dict[Kind, Body] = {}
    error: UnsupportedParameterError | None = None
    for kind in kinds:
        try:
            bodies[kind] = body_of(request, kind, model)
        except UnsupportedParameterError as unsupported:
            error = unsupported
    if error and not bodies:
        raise error
    return bodies


def _learned(told: Mapping[str, Any]) -> Options:
    """The default options of an upstream, as far as it tells them and ours can be the same."""
    options = OWN
    for name in SAMPLING:
        if (value := told.get(name)) is not None:
            with suppress(InvalidValueError):
                # llama-server tells float32 numbers with all digits of a double.
                options = options.updated({name: round(value, 6) if isinstance(value, float) else value})
    return options
