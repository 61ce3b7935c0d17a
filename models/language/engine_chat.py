"""Answers messages with our own engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from platformdirs import user_cache_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.engine.architecture import check_architecture
from models.engine.async_engine import AsyncEngine
from models.engine.engine import Engine
from models.engine.kv_cache import DTYPES
from models.engine.quantization import shares
from models.engine.runner import make_runner
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence, Token
from models.errors import MessagesRejectedError
from models.language.chat_template import ChatTemplate
from models.language.detokenizer import Detokenizer
from models.language.events import Done, Event, TextPiece
from models.language.memory import Memory, size_of_model, tell_memory
from models.language.model_config import context_length, default_options, stop_token_ids
from models.language.prompt import PromptBuilder
from models.language.reply_text import ReplyText
from models.language.stop_strings import StopStrings
from models.messages import FinishReason, Message, Usage
from models.options import Options
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
        self.model_name = settings.model_name
        self.context = context_length(model, settings)
        self.defaults = default_options(model, settings)
        self._weights = {kind: round(share, 4) for kind, share in shares(model).items()}
        size = size_of_model(model)  # without the cache, which the runner adds
        self._tokenizer = tokenizer
        template = ChatTemplate.of(tokenizer, self.defaults.instructions)
        self._prompts = PromptBuilder(template, self.context, self.defaults.instructions)
        self._stop_ids = stop_token_ids(template, model)
        check_architecture(model)
        runner = make_runner(model, settings.slots, self.context, DTYPES.get(settings.kv_cache))
        self._engine = Engine(runner)
        memory = Memory(size, runner.cache.size, settings.slots, self.context, runner.capacity)
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

    @property
    def trouble(self) -> str | None:
        """Why the model cannot answer at the moment; None if it can."""
        return self._async_engine.trouble

    @property
    def died(self) -> asyncio.Event:
        """Set when the model can never answer again."""
        return self._async_engine.died

    @property
    def arguments(self) -> dict[str, Any]:
        """The values in effect for this model, ready for JSON."""
        runner = self._engine.runner
        return {
            "model": self.model_name,
            "context": self.context,
            "device": str(runner.device),
            "dtype": str(runner.model.dtype).removeprefix("torch."),
            "weights": self._weights,
            "kv_cache": runner.cache.dtype_name,
            "compiled": runner.compiled,
            "options": {**self.defaults.as_json(), "instructions": None},  # the operator's text is not public
        }

    @property
    def cache_usage(self) -> float:
        """The share of the key-value cache in use, from 0 to 1."""
        return self._engine.cache_usage

    async def prepare(
        self, user: str, messages: list[Message], options: Options, keep_all: bool = False
    ) -> EngineReply:
        """Make the prompt of a reply to the last message. Raises MessagesRejectedError, ContextLengthExceededError."""
        build = partial(self._prompts.build, messages, options, keep_all)
        async with self._turns.setdefault(user, asyncio.Lock()):
            prompt = await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, build)
        if not prompt.ids or max(prompt.ids) >= self._engine.runner.vocabulary:
            raise MessagesRejectedError("the prompt is empty, or has a token that the model does not know")
        sequence = Sequence(
            prompt.ids,
            SamplingParams(
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                repetition_penalty=options.repetition_penalty,
                frequency_penalty=options.frequency_penalty,
                presence_penalty=options.presence_penalty,
            ),
            options.max_output_tokens or self.context,
            self._stop_ids,
            options.seed,
            owner=user,
            public=prompt.public,
        )
        text = ReplyText(Detokenizer(self._tokenizer), StopStrings(options.stop))
        return EngineReply(self._async_engine, sequence, text, prompt.left_out)


class EngineReply:
    """A reply that is ready for our engine to generate."""

    def __init__(self, engine: AsyncEngine, sequence: Sequence, text: ReplyText, left_out: int) -> None:
        self.usage = Usage(input_tokens=len(sequence.prompt))
        self.left_out = left_out
        self._engine = engine
        self._sequence = sequence
        self._text = text

    async def events(self) -> AsyncGenerator[Event, None]:
        """Generate the reply. Closing the generator frees its slot within one step. Raises EngineError."""
        async with aclosing(self._engine.generate(self._sequence)) as steps:
            async for tokens in steps:
                self.usage.cached_tokens = self._sequence.reused
                text, finish_reason = self._push(tokens)
                if text:
                    yield TextPiece(text)
                if finish_reason:
                    yield Done(finish_reason)
                    return

    def _push(self, tokens: list[Token]) -> tuple[str, FinishReason | None]:
        """The text that is certain after some tokens, and why the reply ends, if it does."""
        text = ""
        for token in tokens:
            self.usage.output_tokens += 1
            piece, finish_reason = self._text.push(token.id, token.finish_reason)
            text += piece
            if finish_reason:
                return text, finish_reason
        return text, None
