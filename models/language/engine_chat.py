"""Answers messages with our own engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from platformdirs import user_cache_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.chat_request import ChatRequest
from models.engine.architecture import check_architecture
from models.engine.async_engine import AsyncEngine
from models.engine.engine import Engine
from models.engine.kv_cache import DTYPES
from models.engine.quantization import shares
from models.engine.runner import make_runner
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence, Token
from models.errors import InvalidValueError, MessagesRejectedError
from models.language.byte_detokenizer import detokenizers_of
from models.language.chat_template import ChatTemplate
from models.language.events import Done, Event
from models.language.grammar.constraint import GrammarConstraint
from models.language.grammar.grammars import Grammars
from models.language.grammar.lark import lark_of
from models.language.memory import Memory, size_of_model, tell_memory
from models.language.model_config import context_length, default_options, stop_token_ids
from models.language.prompt import Prompt, PromptBuilder
from models.language.replies.parser import MarkedReply, ReplyParser
from models.language.reply_events import ReplyEvents, joined
from models.language.reply_format import ReplyFormat
from models.language.reply_grammar import Grammar, reply_grammar
from models.language.text_logprobs import TextLogprobs
from models.language.token_bytes import TokenBytes
from models.messages import Usage
from models.model_info import ModelInfo, ModelList
from models.options import SAMPLING, Options
from models.settings import Settings


class EngineChat:
    """A `Chat` over our engine: builds prompts, shares the engine, turns tokens into text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        settings: Settings,
        on_shrink: Callable[[int], None] | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        self._context = context_length(model, settings)
        self._defaults = default_options(model, settings)
        self._weights = {kind: round(share, 4) for kind, share in shares(model).items()}
        size = size_of_model(model)  # without the cache, which the runner adds
        template = ChatTemplate.of(tokenizer, self._defaults.instructions)
        self._prompts = PromptBuilder(template, self._context, self._defaults.instructions)
        self._format = ReplyFormat.of(tokenizer, template.tools is not None)
        knows = {"tools": template.tools is not None, "reasoning": self._format.thinks}
        aliases = settings.aliases_of(settings.model_name, settings.model_name)
        names = settings.model_name, self._context, self._defaults, aliases
        self.models = ModelList([ModelInfo(*names, tuple(name for name, known in knows.items() if known))])
        self._stop_ids = stop_token_ids(template, model)
        self._token_bytes = TokenBytes(tokenizer)
        self._new_detokenizer = detokenizers_of(tokenizer, self._format.special.values())
        check_architecture(model)
        runner = make_runner(model, settings.slots, self._context, DTYPES.get(settings.kv_cache))
        self._engine = Engine(runner)
        self._grammars = Grammars(tokenizer, runner.logits_size, self._stop_ids)
        memory = Memory(size, runner.cache.size, settings.slots, self._context, runner.capacity)
        tell_memory(memory, model.device)
        self._async_engine = AsyncEngine(self._engine, on_shrink, on_step)
        if settings.compile and runner.compiles:
            self._async_engine.compile(user_cache_path("parley") / "compiled")
        # Encoding a long prompt takes a second: the event loop stays free. One thread, since tokenizers are not
        # thread-safe. One prompt of each user at a time, so that a user with many waits for the others' first ones.
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        settings: Settings,
        on_shrink: Callable[[int], None] | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> AsyncIterator[EngineChat]:
        """A chat whose threads end when the context ends.

        `on_shrink` is called when the memory runs out, with the number of slots that are left. `on_step` is called in
        the engine's thread, with the seconds of each step.
        """
        chat = cls(tokenizer, model, settings, on_shrink, on_step)
        try:
            yield chat
        finally:
            await chat._async_engine.stop()
            chat._tokenizer_thread.shutdown(wait=False)
            chat._grammars.close()

    @property
    def trouble(self) -> str | None:
        """Why the model cannot answer at the moment; None if it can."""
        return self._async_engine.trouble

    @property
    def warning(self) -> str | None:
        """What else is wrong; None, since nothing else can be."""
        return None

    @property
    def died(self) -> asyncio.Event:
        """Set when the model can never answer again."""
        return self._async_engine.died

    @property
    def arguments(self) -> dict[str, Any]:
        """The values in effect for this model, ready for JSON."""
        runner = self._engine.runner
        return {
            "model": self.models.default.name,
            "context": self._context,
            "device": str(runner.device),
            "dtype": str(runner.model.dtype).removeprefix("torch."),
            "weights": self._weights,
            "kv_cache": runner.cache.dtype_name,
            "compiled": runner.compiled,
            "options": {**self._defaults.as_json(), "instructions": None},  # the operator's text is not public
        }

    @property
    def cache_usage(self) -> float:
        """The share of the key-value cache in use, from 0 to 1."""
        return self._engine.cache_usage

    async def prepare(self, request: ChatRequest) -> EngineReply:
        """Make the prompt of a reply to the last message, and the constraint of its form.

        Raises MessagesRejectedError, ContextLengthExceededError, InvalidValueError and UnsupportedParameterError.
        """
        user, options = request.user, request.options
        async with self._turns.setdefault(user, asyncio.Lock()):
            prompt, parser, grammar = await asyncio.get_running_loop().run_in_executor(
                self._tokenizer_thread, partial(self._build, request)
            )
        if not prompt.ids or max(prompt.ids) >= self._engine.runner.vocabulary:
            raise MessagesRejectedError("the prompt is empty, or has a token that the model does not know")
        sequence = Sequence(
            prompt.ids,
            self._sampling_params(options, request.top_logprobs),
            options.max_output_tokens or self._context,
            frozenset() if request.ignore_eos else self._stop_ids,
            options.seed,
            owner=user,
            public=prompt.public,
            constraint=await self._constraint(request, grammar),
        )
        # A text in a format ends where the format does, and calls are no text, also if one of them is cut off.
        stop = options.stop if request.format.type == "text" and not request.tools.forced else ()
        parts = ReplyEvents(self._new_detokenizer(), parser, stop)
        logprobs = None if request.top_logprobs is None else TextLogprobs(self._token_bytes)
        return EngineReply(self._async_engine, sequence, parts, prompt.left_out, logprobs)

    def _build(self, request: ChatRequest) -> tuple[Prompt, ReplyParser, Grammar | None]:
        """The prompt, the parser of the reply, and its grammar, if its form is not free."""
        if request.prompt is not None:
            return self._prompts.complete(request.prompt), MarkedReply(), None
        prompt = self._prompts.build(request)
        end = self._prompts.end_of(prompt)
        grammar = reply_grammar(self._format, request, self._format.is_thinking(end), lark_of)
        return prompt, self._format.parser(request.tools, end), grammar

    async def _constraint(self, request: ChatRequest, grammar: Grammar | None) -> GrammarConstraint | None:
        if grammar is None:
            return await self._grammars.compile(request.format, request.user)
        return await self._grammars.compile_lark(grammar.lark, grammar.param, request.user, request.format)

    def _sampling_params(self, options: Options, top_logprobs: int | None) -> SamplingParams:
        """How the engine chooses tokens. Raises InvalidValueError for a bias of a token that the model has not."""
        known = self._engine.runner.vocabulary
        if any(not (token_id.isdecimal() and int(token_id[:9]) < known) for token_id in options.logit_bias):
            raise InvalidValueError(
                f"logit_bias must have token ids of this model, from 0 to {known - 1}", "logit_bias"
            )
        chosen = {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
        bias = {int(token_id): value for token_id, value in options.logit_bias.items()}
        return SamplingParams(**chosen, logit_bias=bias, logprobs=top_logprobs)


class EngineReply:
    """A reply that is ready for our engine to generate."""

    def __init__(
        self,
        engine: AsyncEngine,
        sequence: Sequence,
        parts: ReplyEvents,
        left_out: int,
        logprobs: TextLogprobs | None = None,
    ) -> None:
        self.usage = Usage(input_tokens=len(sequence.prompt))
        self.left_out = left_out
        self._engine = engine
        self._sequence = sequence
        self._parts = parts
        self._logprobs = logprobs

    async def events(self) -> AsyncGenerator[Event, None]:
        """Generate the reply. Closing the generator frees its slot within one step.

        Raises EngineError, and FormatFailedError if the reply cannot go on in its format.
        """
        async with aclosing(self._engine.generate(self._sequence)) as steps:
            async for tokens in steps:
                self.usage.cached_tokens = self._sequence.reused
                for event in self._events_of(tokens):
                    yield event
                    if isinstance(event, Done):
                        return

    def _events_of(self, tokens: list[Token]) -> Iterable[Event]:
        """The events that are certain after some tokens, up to the end of the reply."""
        events: list[Event] = []
        for token in tokens:
            self.usage.output_tokens += 1
            if self._logprobs:
                self._logprobs.push(token)
            events += self._parts.push(None if token.stops else token.id, token.finish_reason)
            self.usage.reasoning_tokens = self._parts.reasoning_tokens
            if events and isinstance(events[-1], Done):
                break
        return self._logprobs.attach(joined(events)) if self._logprobs else joined(events)
