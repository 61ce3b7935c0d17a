from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.chat_request import ChatRequest
from models.engine.kv_cache import DTYPES
from models.errors import (
    ContextLengthExceededError,
    FormatFailedError,
    InvalidValueError,
    MessagesRejectedError,
    QueueFullError,
    SettingsError,
    TooManyResponsesError,
    UnsupportedParameterError,
)
from models.generation.admission import Admission
from models.language.engine_chat import EngineChat, EngineReply
from models.language.events import Done, Event, ReasoningDelta, TextDelta
from models.language.loader import load
from models.messages import Message
from models.model_info import ModelInfo
from models.options import Options
from models.output_format import OutputFormat
from models.settings import Settings
from models.tools import Tool, Tools
from tests.support.chat_templates import GEMMA, MISTRAL, PARTS_ONLY, QWEN
from tests.support.tiny import TEMPLATE, tiny_tokenizer

pytestmark = pytest.mark.anyio

GREEDY = Options(temperature=0, repetition_penalty=1)
CAPITAL: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def greedy(max_output_tokens: int, **changes: Any) -> Options:
    return structs.replace(GREEDY, max_output_tokens=max_output_tokens, **changes)


@asynccontextmanager
async def opened(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, /, **settings: Any
) -> AsyncIterator[EngineChat]:
    """A chat over a model, with some settings changed."""
    changed = replace(Settings(context=256, slots=2, compile=False), **settings)
    async with EngineChat.opened(tokenizer, model, changed) as chat:
        yield chat


@pytest.fixture
async def chat(tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel) -> AsyncIterator[EngineChat]:
    async with opened(tokenizer, llama) as chat:
        yield chat


@pytest.fixture(scope="module")
def embedded() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The embedded model. The first run on a machine downloads and converts it."""
    return load(Settings(device="cpu"))


@pytest.fixture
async def embedded_chat(embedded: tuple[PreTrainedTokenizerBase, PreTrainedModel]) -> AsyncIterator[EngineChat]:
    async with opened(*embedded, context=512, slots=4) as chat:
        yield chat


def asked(user: str, messages: list[Message], options: Options, keep_all: bool = False) -> ChatRequest:
    """A request whose oldest messages may be left out, unless `keep_all` is set."""
    return ChatRequest(user, messages, options, truncate=not keep_all)


async def events_of(reply: EngineReply) -> list[Event]:
    """All events of a reply."""
    async with aclosing(reply.events()) as events:
        return [event async for event in events]


async def answer(chat: EngineChat, messages: list[Message], options: Options) -> tuple[str, Event]:
    """The text of a reply, and its last event."""
    *deltas, last = await events_of(await chat.prepare(asked("ann", messages, options)))
    return text_of(deltas), last


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


# The embedded model


@pytest.mark.slow
@pytest.mark.compiler
async def test_the_embedded_model_knows_the_capital_of_france(embedded_chat: EngineChat) -> None:
    reply = await embedded_chat.prepare(asked("ann", CAPITAL, GREEDY))
    *deltas, done = await events_of(reply)
    assert text_of(deltas) == "The capital of France is Paris."
    assert done == Done("stop")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (37, 8)


@pytest.mark.slow
@pytest.mark.compiler
async def test_the_model_sees_the_earlier_messages(embedded_chat: EngineChat) -> None:
    messages: list[Message] = [
        {"role": "user", "content": "My dog is called Rex."},
        {"role": "assistant", "content": "Rex is a lovely name for a dog."},
        {"role": "user", "content": "What is the name of my dog?"},
    ]
    assert await answer(embedded_chat, messages, GREEDY) == ("The name of your dog is Rex.", Done("stop"))


@pytest.mark.slow
@pytest.mark.compiler
async def test_a_seed_gives_the_same_reply_while_others_chat(embedded_chat: EngineChat) -> None:
    async def poem(seed: int) -> str:
        options = Options(temperature=0.9, seed=seed, max_output_tokens=24)
        return (await answer(embedded_chat, user("Write a line of a poem."), options))[0]

    alone = await poem(7)
    assert (await asyncio.gather(poem(7), *map(poem, (1, 2, 3))))[0] == alone


@pytest.mark.slow
@pytest.mark.compiler
async def test_a_stop_string_ends_the_reply(embedded_chat: EngineChat) -> None:
    options = structs.replace(GREEDY, stop=("of Fr",))
    assert await answer(embedded_chat, CAPITAL, options) == ("The capital ", Done("stop"))


# Prompts


async def test_the_usage_counts_the_tokens_of_the_prompt_and_the_reply(chat: EngineChat) -> None:
    reply = await chat.prepare(asked("ann", user("Hi"), greedy(10)))
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (len("(user\nHi)\n(assistant\n"), 0)
    await events_of(reply)
    assert reply.usage.output_tokens == 10


async def test_a_prompt_that_fills_the_context_is_refused(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async with opened(tokenizer, llama, context=64) as chat:
        for length in (200, 1_000, 100_000):
            with pytest.raises(
                ContextLengthExceededError, match=r"^This model's maximum context length is 64 tokens\. However, "
            ) as raised:
                await chat.prepare(asked("ann", user("x" * length), GREEDY))
            assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "input")
        assert (await answer(chat, user("short"), structs.replace(GREEDY, seed=1)))[0]


async def test_the_oldest_messages_are_left_out_but_a_long_last_one_is_refused(chat: EngineChat) -> None:
    history: list[Message] = [*user("before"), {"role": "assistant", "content": "yes"}]
    assert (await chat.prepare(asked("ann", [*history, *user("x" * 200)], GREEDY))).left_out == 2
    with pytest.raises(ContextLengthExceededError, match="256"):
        await chat.prepare(asked("ann", [*history, *user("x" * 250)], GREEDY))


async def test_a_whole_prompt_is_refused_instead_of_shortened(chat: EngineChat) -> None:
    messages: list[Message] = [*user("x" * 150), {"role": "assistant", "content": "y" * 150}, *user("now")]
    assert (await chat.prepare(asked("ann", messages, GREEDY))).left_out == 2
    with pytest.raises(ContextLengthExceededError):
        await chat.prepare(asked("ann", messages, GREEDY, keep_all=True))


async def test_the_prompts_after_a_cut_are_found_in_the_prefix_cache(chat: EngineChat) -> None:
    messages, seen = user("x" * 60), list[tuple[int, int]]()
    for _ in range(30):
        reply = await chat.prepare(asked("ann", messages, greedy(8)))
        text = text_of(await events_of(reply))
        seen.append((reply.left_out, reply.usage.cached_tokens))
        messages = [*messages[reply.left_out :], {"role": "assistant", "content": text}, *user("go on")]
    shortened = [left_out for left_out, _ in seen[1:] if left_out]
    assert 1 < len(shortened) < 10
    assert all(cached > 0 for left_out, cached in seen[1:] if not left_out)


async def test_a_rejection_by_the_chat_template_is_told(chat: EngineChat) -> None:
    with pytest.raises(MessagesRejectedError, match="it cannot begin"):
        await chat.prepare(asked("ann", [{"role": "assistant", "content": "Hi"}], GREEDY))


async def test_a_prompt_with_a_token_that_the_model_lacks_is_refused(llama: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    async with opened(tokenizer, llama) as chat:
        assert await answer(chat, user("Look: <|image|>"), greedy(1))  # as text
        assert tokenizer.chat_template
        tokenizer.chat_template += "<|image|>"
        with pytest.raises(MessagesRejectedError, match="a token that the model does not know"):
            await chat.prepare(asked("ann", user("Look"), GREEDY))


@pytest.mark.parametrize("template", [GEMMA, MISTRAL, PARTS_ONLY], ids=["gemma", "mistral", "parts"])
async def test_instructions_and_two_questions_in_a_row_reach_the_model(llama: PreTrainedModel, template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    async with opened(tokenizer, llama, options={"instructions": "i" * 40}) as chat:
        short = await chat.prepare(asked("ann", [*user("one"), *user("x")], chat.models.default.defaults))
        long = await chat.prepare(asked("ann", [*user("one"), *user("x" * 21)], chat.models.default.defaults))
    assert short.usage.input_tokens > 40
    assert long.usage.input_tokens == short.usage.input_tokens + 20


async def test_an_empty_prompt_is_refused(llama: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    async with opened(tokenizer, llama) as chat:
        tokenizer.chat_template = ""
        with pytest.raises(MessagesRejectedError, match="the prompt is empty"):
            await chat.prepare(asked("ann", user("Hi"), GREEDY))


# Text


async def test_a_shorter_reply_is_the_beginning_of_a_longer_one(chat: EngineChat) -> None:
    """Wherever it is cut, so it never ends with half a character."""

    async def text(tokens: int) -> str:
        wild = Options(temperature=1.5, top_p=1, repetition_penalty=1, seed=4, max_output_tokens=tokens)
        return (await answer(chat, user("Hi"), wild))[0]

    whole = await text(40)
    assert any(ord(character) > 0x7F for character in whole.replace("\ufffd", ""))
    for tokens in range(1, 40):
        assert whole.startswith(await text(tokens))


async def test_no_text_delta_is_empty(chat: EngineChat) -> None:
    wild = Options(temperature=1.5, top_p=1, repetition_penalty=1, seed=4, max_output_tokens=100)
    *deltas, last = await events_of(await chat.prepare(asked("ann", user("Hi"), wild)))
    assert deltas
    assert all(isinstance(delta, TextDelta) and delta.text for delta in deltas)
    assert isinstance(last, Done)


async def test_every_sampling_option_changes_the_reply(chat: EngineChat) -> None:
    options = Options(temperature=0.8, top_p=1, seed=4, max_output_tokens=30)
    changes: list[dict[str, Any]] = [
        {},
        {"temperature": 1.5},
        {"top_p": 0.5},
        {"top_k": 2},
        {"min_p": 0.5},
        {"logit_bias": {"100": 5}},
        {"repetition_penalty": 2},
        {"frequency_penalty": 2},
        {"presence_penalty": -2},
        {"seed": 5},
    ]
    texts = [(await answer(chat, user("Hi"), options.updated(change)))[0] for change in changes]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("context", "reason"), [(256, "max_output_tokens"), (40, "context_length")], ids=["output-tokens", "context"]
)
async def test_a_reply_that_is_cut_says_why(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel, context: int, reason: str
) -> None:
    async with opened(tokenizer, llama, context=context) as chat:
        assert (await answer(chat, user("Hi"), greedy(25)))[1] == Done(reason)  # type: ignore[arg-type]


# Reasoning and tools

THINKING = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


async def test_a_prompt_that_opens_the_reasoning_makes_a_reply_of_reasoning(llama: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    async with opened(tokenizer, llama) as chat:
        reply = await chat.prepare(asked("ann", user("Hi"), greedy(20)))
        *deltas, last = await events_of(reply)
    assert deltas
    assert all(isinstance(delta, ReasoningDelta) for delta in deltas)
    assert (last, reply.usage.reasoning_tokens) == (Done("max_output_tokens"), 20)


async def test_an_answer_has_no_tokens_of_reasoning(chat: EngineChat) -> None:
    reply = await chat.prepare(asked("ann", user("Hi"), greedy(20)))
    await events_of(reply)
    assert (reply.usage.output_tokens, reply.usage.reasoning_tokens) == (20, 0)


async def test_tools_are_refused_where_the_chat_template_knows_none(chat: EngineChat) -> None:
    tools = Tools((Tool("weather"),))
    with pytest.raises(UnsupportedParameterError, match="the chat template of this model knows no tools"):
        await chat.prepare(ChatRequest("ann", user("Hi"), GREEDY, tools))
    with pytest.raises(ContextLengthExceededError):
        await chat.prepare(ChatRequest("ann", user("Hi"), GREEDY, replace(tools, choice="required")))


async def test_a_stop_string_in_a_call_that_is_cut_off_does_not_complete_the_reply(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    tools = Tools((Tool("weather"),), choice="required")
    async with opened(tokenizer, llama, context=512) as chat:
        reply = await chat.prepare(ChatRequest("ann", user("Hi"), greedy(5, stop=("t",)), tools))
        assert (await events_of(reply))[-1] == Done("max_output_tokens")


# Slots


async def replies_in_turn(
    chat: EngineChat, admission: Admission, options: Options, name: str = "ann"
) -> AsyncGenerator[int | Event, None]:
    """The positions and then the events of a reply that waits for its slot."""
    async with admission.ticket(name) as ticket:
        reply = await chat.prepare(asked("ann", user("Hi"), options))
        yield ticket.position
        async for position in ticket.wait():
            yield position
        async with aclosing(reply.events()) as events:
            async for event in events:
                yield event


async def test_a_chat_says_what_its_model_does_by_its_chat_template(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    thinking = deepcopy(tokenizer)
    thinking.chat_template = QWEN
    async with opened(tokenizer, llama) as plain:
        assert plain.models.default.capabilities == ()
    async with opened(thinking, llama) as chat:
        assert chat.models.default.capabilities == ("tools", "reasoning")


async def test_a_waiting_reply_gets_the_next_free_slot(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    admission = Admission(slots=1, queue=4, per_user=8)
    async with opened(tokenizer, llama, slots=1) as chat:
        replies = [replies_in_turn(chat, admission, greedy(20)) for _ in range(3)]
        assert [await anext(reply) for reply in replies] == [0, 1, 2]

        async def rest(reply: AsyncGenerator[int | Event, None]) -> list[int | Event]:
            return [one async for one in reply]

        first, second, third = await asyncio.gather(*map(rest, replies))
    assert [one for one in first if isinstance(one, int)] == []
    assert [one for one in second if isinstance(one, int)] == [1]
    assert [one for one in third if isinstance(one, int)] == [2, 1]
    events = [[one for one in reply if not isinstance(one, int)] for reply in (first, second, third)]
    assert text_of(events[0]) == text_of(events[1]) == text_of(events[2]) != ""
    assert [each[-1] for each in events] == [Done("max_output_tokens")] * 3


async def test_a_refused_reply_costs_nothing_and_closed_ones_free_their_slots(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    admission = Admission(slots=1, queue=1, per_user=2)
    async with opened(tokenizer, llama, slots=1) as chat:
        running = [replies_in_turn(chat, admission, GREEDY) for _ in range(2)]
        assert [await anext(reply) for reply in running] == [0, 1]
        with pytest.raises(TooManyResponsesError):
            await anext(replies_in_turn(chat, admission, GREEDY))
        with pytest.raises(QueueFullError):
            await anext(replies_in_turn(chat, admission, GREEDY, "bob"))
        for reply in running:
            await reply.aclose()
        assert [one async for one in replies_in_turn(chat, admission, greedy(9), "bob")][-1] == Done(
            "max_output_tokens"
        )
    assert (admission.free, dict(admission.in_flight)) == (1, {})


@pytest.mark.parametrize("deltas", [0, 1, 5])
async def test_closing_a_reply_frees_its_slot(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel, deltas: int
) -> None:
    async with opened(tokenizer, llama, slots=1, context=512) as chat:
        reply = await chat.prepare(asked("ann", user("Hi"), greedy(400)))
        async with aclosing(reply.events()) as events:
            for _ in range(deltas):
                await anext(events)
        assert reply.usage.output_tokens < 400
        assert (await answer(chat, user("Hi"), greedy(9)))[1] == Done("max_output_tokens")
        assert chat.cache_usage == 0


async def test_cancelling_a_reply_before_its_first_token_frees_its_slot(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async with opened(tokenizer, llama, slots=1, context=512) as chat:
        cancelled = asyncio.create_task(events_of(await chat.prepare(asked("ann", user("Hi"), greedy(400)))))
        await asyncio.sleep(0)  # it begins
        cancelled.cancel()
        assert (await answer(chat, user("Hi"), greedy(9)))[1] == Done("max_output_tokens")
        assert chat.cache_usage == 0
    assert cancelled.cancelled()


# Settings


async def test_the_arguments_say_how_the_model_runs(tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel) -> None:
    settings = {"model": "models/Tiny.gguf", "options": {"instructions": "a secret", "top_k": 7}}
    async with opened(tokenizer, llama, **settings) as chat:
        assert chat.arguments == {
            "model": "Tiny",
            "context": 256,
            "device": "cpu",
            "dtype": "float32",
            "weights": {"float32": 1.0},
            "kv_cache": "float32",
            "compiled": False,
            "options": {**Options(top_k=7).as_json(), "instructions": None},
        }
        assert chat.models.all == (ModelInfo("Tiny", 256, Options(instructions="a secret", top_k=7)),)


@pytest.mark.parametrize("name", DTYPES)
async def test_the_setting_of_the_cache_is_in_effect(
    name: str, tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async with opened(tokenizer, llama, kv_cache=name) as chat:
        assert chat.arguments["kv_cache"] == name


async def test_a_context_larger_than_the_models_is_refused(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    with pytest.raises(SettingsError, match="512"):
        async with opened(tokenizer, llama, context=1024):
            pass


# Users beside each other


async def test_a_user_has_one_prompt_at_a_time_in_the_tokenizer(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    order: list[str] = []
    async with opened(tokenizer, llama) as chat:

        async def prepare(name: str, content: str) -> None:
            await chat.prepare(asked(name, user(content), GREEDY))
            order.append(name)

        greedy_user = [prepare("ann", "x" * 100) for _ in range(5)]
        await asyncio.gather(*greedy_user, prepare("bob", "Hi"))
    assert order.index("bob") <= 1


async def test_a_prompt_that_waits_for_the_tokenizer_can_be_cancelled(chat: EngineChat) -> None:
    first, second = (asyncio.create_task(chat.prepare(asked("ann", user(word), GREEDY))) for word in ("one", "two"))
    await asyncio.sleep(0)
    second.cancel()
    assert (await first).usage.input_tokens
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (await chat.prepare(asked("ann", user("three"), GREEDY))).usage.input_tokens


async def cached_tokens(chat: EngineChat, user_id: str, content: str, options: Options = GREEDY) -> int:
    """How many tokens of a message's prompt were in the prefix cache."""
    reply = await chat.prepare(asked(user_id, user(content), structs.replace(options, max_output_tokens=1)))
    await events_of(reply)
    return reply.usage.cached_tokens


async def test_a_user_finds_only_own_messages_and_the_operators_instructions_in_the_prefix_cache(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    instructions = "Answer in one short sentence."
    async with opened(tokenizer, llama, options={"instructions": instructions}) as chat:
        shared = len(f"(system\n{instructions})\n(user\n")
        options = structs.replace(GREEDY, instructions=instructions)
        assert await cached_tokens(chat, "ann", "My number is 123456.", options) == 0
        assert await cached_tokens(chat, "bob", "My number is 123456.", options) == shared
        assert await cached_tokens(chat, "ann", "My number is 123456!", options) > shared + 15
        own = structs.replace(GREEDY, instructions=instructions[:20])
        assert await cached_tokens(chat, "carl", "My number", own) == 0


# A text in place of messages


async def test_a_text_is_continued_as_it_is(chat: EngineChat) -> None:
    texts = []
    for prompt in ("Once upon", "Once upon a"):
        reply = await chat.prepare(ChatRequest("ann", [], greedy(4), prompt=prompt))
        assert reply.usage.input_tokens == len(prompt)
        *pieces, end = await events_of(reply)
        assert end == Done("max_output_tokens")
        texts.append("".join(piece.text for piece in pieces if isinstance(piece, TextDelta)))
    assert texts[0] != texts[1]


async def test_a_reply_goes_on_after_its_end_if_the_request_says_so(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    bias = {str(llama.config.eos_token_id): 100.0}  # so the model ends at once
    async with opened(tokenizer, llama) as chat:
        for ignore_eos, end, tokens in ((False, Done("stop"), 1), (True, Done("max_output_tokens"), 5)):
            request = ChatRequest("ann", user("Hi"), greedy(5, logit_bias=bias), ignore_eos=ignore_eos)
            reply = await chat.prepare(request)
            assert (await events_of(reply))[-1] == end
            assert reply.usage.output_tokens == tokens


# Formats


WILD = Options(temperature=1.0, top_p=1, repetition_penalty=1, seed=4, max_output_tokens=200)


def formatted(format: OutputFormat, options: Options = WILD, top_logprobs: int | None = None) -> ChatRequest:
    return ChatRequest("ann", user("Hi"), options, format=format, top_logprobs=top_logprobs)


@pytest.mark.parametrize(
    ("format", "pattern"),
    [
        (OutputFormat("json_schema", {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                                      "additionalProperties": False}), r'\{\s*"a"\s*:\s*[12]\s*\}'),
        (OutputFormat("regex", "[a-c]{5}"), "[a-c]{5}"),
        (OutputFormat("choice", ("yes", "no")), "yes|no"),
        (OutputFormat("grammar", 'start: "(" start ")" | "x"'), r"\(*x\)*"),
    ],
    ids=lambda value: getattr(value, "type", None),
)  # fmt: skip
async def test_a_reply_keeps_to_its_format_and_ends_by_itself(
    chat: EngineChat, format: OutputFormat, pattern: str
) -> None:
    *deltas, done = await events_of(await chat.prepare(formatted(format)))
    assert re.fullmatch(pattern, text_of(deltas))
    assert done == Done("stop")


async def test_a_reply_that_is_cut_in_its_format_is_no_whole_one(chat: EngineChat) -> None:
    options = structs.replace(WILD, max_output_tokens=4)
    *deltas, done = await events_of(await chat.prepare(formatted(OutputFormat("regex", "[a-c]{5}"), options)))
    assert re.fullmatch("[a-c]{4}", text_of(deltas))
    assert done == Done("max_output_tokens")


async def test_a_format_that_cannot_be_honoured_is_refused_before_the_reply(chat: EngineChat) -> None:
    format = OutputFormat("json_schema", {"not": {}}, "response_format.json_schema.schema")
    with pytest.raises(InvalidValueError, match='Unimplemented keys: \\["not"\\]') as raised:
        await chat.prepare(formatted(format))
    assert raised.value.param == "response_format.json_schema.schema"


async def test_a_format_that_becomes_too_complex_ends_its_reply_and_no_other_one(chat: EngineChat) -> None:
    ambiguous = OutputFormat("grammar", 'start: s\ns: s s s s s s | "a" | "b" | ""', "text.grammar")
    options = structs.replace(WILD, logit_bias={"2": -100})
    failing = await chat.prepare(formatted(ambiguous, options))
    expected = await answer(chat, user("Hi"), greedy(40))
    failure, reply = await asyncio.gather(
        events_of(failing), answer(chat, user("Hi"), greedy(40)), return_exceptions=True
    )
    assert isinstance(failure, FormatFailedError)
    assert str(failure).startswith("the reply cannot go on in its format: ")
    assert failure.param == "text.grammar"
    assert reply == expected
    assert chat.trouble is None


async def test_a_bias_makes_a_token_come_always_or_never(chat: EngineChat, tokenizer: PreTrainedTokenizerBase) -> None:
    (letter,) = tokenizer.encode("z")
    always, _ = await answer(chat, user("Hi"), greedy(5, logit_bias={str(letter): 100}))
    assert always == "zzzzz"
    text, _ = await answer(chat, user("Hi"), greedy(20))
    ids = {str(token_id): -100 for token_id in tokenizer.encode(text)}
    other, _ = await answer(chat, user("Hi"), greedy(20, logit_bias=ids))
    assert not set(other) & set(text.replace("\ufffd", ""))


@pytest.mark.parametrize("token_id", ["259", "-1", "1e3", "five", "", "99999999999999999999"])
async def test_a_bias_of_an_unknown_token_is_refused(chat: EngineChat, token_id: str) -> None:
    with pytest.raises(InvalidValueError, match="token ids of this model, from 0 to 258") as raised:
        await chat.prepare(asked("ann", user("Hi"), greedy(5, logit_bias={token_id: 1})))
    assert raised.value.param == "logit_bias"


@pytest.mark.parametrize("length", [0, 1, 2, 5])
async def test_the_tokens_with_probabilities_make_the_text_up_to_a_stop_string(chat: EngineChat, length: int) -> None:
    letters, wild = OutputFormat("regex", "[a-zé日!]{60}"), structs.replace(WILD, temperature=1.5)
    whole = text_of(await events_of(await chat.prepare(formatted(letters, wild))))
    if length:
        wild = structs.replace(wild, stop=(whole[40 : 40 + length],))
    *deltas, done = await events_of(await chat.prepare(formatted(letters, wild, top_logprobs=2)))
    *plain, same = await events_of(await chat.prepare(formatted(letters, wild)))
    assert (text_of(deltas), done) == (text_of(plain), same)
    assert text_of(deltas)
    for delta in deltas:
        assert isinstance(delta, TextDelta)
        assert delta.logprobs
        assert b"".join(token.token for token in delta.logprobs).decode() == delta.text
        assert all(len(token.top) == 2 and token.logprob <= token.top[0][1] <= 0 for token in delta.logprobs)
    assert all(delta.logprobs is None for delta in plain if isinstance(delta, TextDelta))
