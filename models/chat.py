"""Messages in, a stream of text pieces out."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from platformdirs import user_cache_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.admission import Admission, Ticket
from models.detokenizer import UNDECODABLE, Detokenizer, StopStrings
from models.engine import Engine
from models.engine_thread import EngineThread
from models.item import Message
from models.options import InvalidOption, Options
from models.rates import Rates
from models.reply import ContextLengthExceeded, Delta, Done, Event, MessagesRefused, Queued, Started, Usage
from models.sampling import Sampling
from models.sequence import Finish, Sequence
from models.settings import Settings, SettingsError


class Chat:
    """A model that answers: templates and tokenizes messages, shares the engine, turns tokens into text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        settings: Settings,
        observe_step: Callable[[float], None] | None = None,
    ) -> None:
        self.model_name = settings.model_name
        self.context = _context(model, settings)
        self.defaults = _defaults(model, settings)
        rates = Rates(settings.rate, settings.token_rate) if settings.rate or settings.token_rate else None
        self.admission = Admission(settings.slots, settings.queue, settings.responses_per_user, rates)
        self._tokenizer = tokenizer
        self._stop_ids = _stop_ids(tokenizer, model)
        self._engine = Engine(model, settings.slots, self.context)
        self._thread = EngineThread(self._engine, self.admission.shrink, observe_step)
        if settings.compile and self._engine.native:
            self._thread.compile(user_cache_path("parley") / "compiled")
        # One thread, since a tokenizer may not be changed by two at once; the event loop stays free meanwhile.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @classmethod
    @asynccontextmanager
    async def running(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        settings: Settings,
        observe_step: Callable[[float], None] | None = None,
    ) -> AsyncIterator[Chat]:
        """A chat whose threads end with the context; `observe_step` is told the seconds of each step."""
        chat = cls(tokenizer, model, settings, observe_step)
        try:
            yield chat
        finally:
            await chat._thread.stop()
            chat._encoder.shutdown(wait=False)

    @property
    def trouble(self) -> str | None:
        """Why no reply can be had at present, if so."""
        return self._thread.trouble

    @property
    def died(self) -> asyncio.Event:
        """Set when no reply can be had any more."""
        return self._thread.died

    @property
    def arguments(self) -> dict[str, Any]:
        """What the settings came to, ready for JSON."""
        model = self._engine.model
        return {
            "model": self.model_name,
            "context": self.context,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantize": "int8" if self._engine.quantized else "none",
            "compiled": self._engine.program is not None,
            "options": {**self.defaults.public(), "instructions": None},  # the operator's words are not for everybody
        }

    @property
    def free_slots(self) -> int:
        """How many more sequences the engine could decode at once."""
        return self._engine.free_slots

    @property
    def cache_usage(self) -> float:
        """How much of the slots' room for tokens is taken, from 0 to 1."""
        cached = sum(sequence.cached for sequence in self._engine.slots if sequence)
        return cached / (len(self._engine.slots) * self.context)

    async def reply(
        self, ticket: Ticket, messages: list[Message], options: Options, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Answer the last of the messages: Started, Queued while the ticket waits, Deltas, Done.

        Where they outgrow the context the oldest are left out, or, if it has to be the `whole`, they are refused.

        Close the generator to cancel: the slot is free within a step. Raises MessagesRefused or
        ContextLengthExceeded before Started, EngineFailed after.
        """
        prompt, left_out = await self._encode(messages, options, whole)
        del messages  # a reply may wait long, and a history be large
        usage = Usage(input_tokens=len(prompt))
        yield Started(usage, left_out)
        async for position in ticket.turn():
            yield Queued(position)
        sequence = self._sequence(prompt, options)
        async with aclosing(self._text(sequence, options.stop, usage)) as events:
            async for event in events:
                yield event

    async def _text(self, sequence: Sequence, stop: tuple[str, ...], usage: Usage) -> AsyncGenerator[Event, None]:
        detokenizer, stops = Detokenizer(self._tokenizer), StopStrings(stop)
        async with aclosing(self._thread.tokens(sequence)) as tokens:
            async for token in tokens:
                usage.output_tokens += 1
                usage.cached_tokens = sequence.reused
                piece = stops.push("" if token.finish == "stop" else detokenizer.push(token.id))
                if token.finish:
                    rest = stops.push(detokenizer.flush()) + stops.flush()
                    piece += rest if token.finish == "stop" else rest.rstrip(UNDECODABLE)
                if piece:
                    yield Delta(piece.replace("\0", UNDECODABLE))  # as it is stored: PostgreSQL has no U+0000
                finish: Finish | None = "stop" if stops.found else token.finish
                if finish:
                    yield Done(finish)
                    return

    async def _encode(self, messages: list[Message], options: Options, whole: bool) -> tuple[list[int], int]:
        """The prompt's token ids, fewer than the context holds, and how many messages had no room in it."""
        loop = asyncio.get_running_loop()
        try:
            prompt, left_out = await loop.run_in_executor(self._encoder, self._prompt, messages, options, whole)
        except TemplateError as error:
            raise MessagesRefused(f"the model's chat template refuses these messages: {error}") from error
        if not prompt or max(prompt) >= self._engine.vocabulary:
            raise MessagesRefused("the messages come to nothing, or hold a token that the model does not know")
        if len(prompt) >= self.context:
            raise ContextLengthExceeded(
                f"the prompt is {len(prompt)} tokens long or longer, and the context holds {self.context}, the reply "
                "included: shorten the message"
            )
        return prompt, left_out

    def _prompt(self, messages: list[Message], options: Options, whole: bool) -> tuple[list[int], int]:
        """The prompt, and how many messages had to be left out: the oldest turns, to have room for the reply."""
        system, turns = _turns(messages)
        if options.instructions and not system:
            system = [{"role": "system", "content": options.instructions}]
        prompt = self._template(system, turns)
        limit = self.context - min(options.max_output_tokens or self.context, self.context // 4)
        if whole or len(prompt) <= limit:
            return prompt, 0
        # More than need be: the prompts of the next turns then begin alike, and are found in the cache.
        enough = (len(self._template(system, turns[-1:])) + limit) // 2
        gone = bisect_left(
            range(len(turns) - 1), True, key=lambda gone: len(self._template(system, turns[gone:])) <= enough
        )
        return self._template(system, turns[gone:]), sum(map(len, turns[:gone]))

    def _template(self, system: list[Message], turns: list[list[Message]]) -> list[int]:
        rendered = self._tokenizer.apply_chat_template(
            _spoken([*system, *chain.from_iterable(turns)]),  # type: ignore[arg-type]  # a TypedDict is not a dict to mypy
            add_generation_prompt=True,
            tokenize=False,
        )
        text = str(rendered)
        # The beginning tells when a text is far too long: a megabyte would hold up everybody's prompts for a second.
        beginning = text[: 8 * self.context]
        prompt = self._tokenizer.encode(beginning, add_special_tokens=False)
        if len(prompt) <= self.context and beginning != text:
            prompt = self._tokenizer.encode(text, add_special_tokens=False)
        return list(prompt)

    def _sequence(self, prompt: list[int], options: Options) -> Sequence:
        return Sequence(
            prompt,
            Sampling(
                options.temperature,
                options.top_p,
                options.top_k,
                options.repetition_penalty,
                options.frequency_penalty,
                options.presence_penalty,
            ),
            options.max_output_tokens or self.context,
            self._stop_ids,
            options.seed,
        )


def _turns(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system prompt, and the rest in turns: what a user said and the answer, after what the system said before."""
    start = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[start:]:
        if not turns or (message["role"] != "assistant" and turns[-1][-1]["role"] != "system"):
            turns.append([])
        turns[-1].append(message)
    return messages[:start], turns


def _spoken(messages: list[Message]) -> list[Message]:
    """The messages without replies that came to nothing; what stands around one becomes one message, since many
    templates want the roles in turns."""
    spoken: list[Message] = []
    silence = False
    for message in messages:
        if message["content"] and silence and spoken and spoken[-1]["role"] == message["role"]:
            spoken[-1] = {"role": message["role"], "content": f"{spoken[-1]['content']}\n\n{message['content']}"}
        elif message["content"]:
            spoken.append(message)
        silence = not message["content"]
    return spoken


def _context(model: PreTrainedModel, settings: Settings) -> int:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 4096
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond it one long sequence would change the factors of all others
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    if settings.context and settings.context > limit:
        raise SettingsError(f"PARLEY_CONTEXT={settings.context} is not allowed: the model can hold {limit} here")
    return settings.context or min(limit, 4096)


def _defaults(model: PreTrainedModel, settings: Settings) -> Options:
    """The operator's options, else the model's where they are in bounds, else ours."""
    options = Options()
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        if (wish := getattr(model.generation_config, name, None)) is not None:
            with suppress(InvalidOption):
                options = options.updated({name: wish})
    return options.updated(settings.options)


def _stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end a turn: the model may name one or several, and the tokenizer another."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None)
