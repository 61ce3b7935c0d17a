from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.engine.kv_cache import DTYPES
from models.errors import (
    ContextLengthExceededError,
    MessagesRejectedError,
    QueueFullError,
    SettingsError,
    TooManyResponsesError,
)
from models.generation.admission import Admission
from models.language.engine_chat import EngineChat, EngineReply
from models.language.events import Done, Event, TextPiece
from models.language.loader import load
from models.messages import Message
from models.options import Options
from models.settings import Settings
from tests.support.chat_templates import GEMMA, MISTRAL, PARTS_ONLY
from tests.support.tiny import tiny_tokenizer

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


async def events_of(reply: EngineReply) -> list[Event]:
    """All events of a reply."""
    async with aclosing(reply.events()) as events:
        return [event async for event in events]


async def answer(chat: EngineChat, messages: list[Message], options: Options) -> tuple[str, Event]:
    """The text of a reply, and its last event."""
    *deltas, last = await events_of(await chat.prepare("ann", messages, options))
    return text_of(deltas), last


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextPiece))


# The embedded model


@pytest.mark.slow
@pytest.mark.compiler
async def test_the_embedded_model_knows_the_capital_of_france(embedded_chat: EngineChat) -> None:
    reply = await embedded_chat.prepare("ann", CAPITAL, GREEDY)
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
    reply = await chat.prepare("ann", user("Hi"), greedy(10))
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (len("(user\nHi)\n(assistant\n"), 0)
    await events_of(reply)
    assert reply.usage.output_tokens == 10


async def test_a_prompt_that_fills_the_context_is_refused(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async with opened(tokenizer, llama, context=64) as chat:
        for length in (200, 1_000, 100_000):
            with pytest.raises(
                ContextLengthExceededError, match="the context holds 64 tokens, including the reply"
            ) as raised:
                await chat.prepare("ann", user("x" * length), GREEDY)
            assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "input")
        assert (await answer(chat, user("short"), structs.replace(GREEDY, seed=1)))[0]


async def test_the_oldest_messages_are_left_out_but_a_long_last_one_is_refused(chat: EngineChat) -> None:
    history: list[Message] = [*user("before"), {"role": "assistant", "content": "yes"}]
    assert (await chat.prepare("ann", [*history, *user("x" * 200)], GREEDY)).left_out == 2
    with pytest.raises(ContextLengthExceededError, match="256"):
        await chat.prepare("ann", [*history, *user("x" * 250)], GREEDY)


async def test_a_whole_prompt_is_refused_instead_of_shortened(chat: EngineChat) -> None:
    messages: list[Message] = [*user("x" * 150), {"role": "assistant", "content": "y" * 150}, *user("now")]
    assert (await chat.prepare("ann", messages, GREEDY)).left_out == 2
    with pytest.raises(ContextLengthExceededError):
        await chat.prepare("ann", messages, GREEDY, keep_all=True)


async def test_the_prompts_after_a_cut_are_found_in_the_prefix_cache(chat: EngineChat) -> None:
    messages, seen = user("x" * 60), list[tuple[int, int]]()
    for _ in range(30):
        reply = await chat.prepare("ann", messages, greedy(8))
        text = text_of(await events_of(reply))
        seen.append((reply.left_out, reply.usage.cached_tokens))
        messages = [*messages[reply.left_out :], {"role": "assistant", "content": text}, *user("go on")]
    shortened = [left_out for left_out, _ in seen[1:] if left_out]
    assert 1 < len(shortened) < 10
    assert all(cached > 0 for left_out, cached in seen[1:] if not left_out)


async def test_a_rejection_by_the_chat_template_is_told(chat: EngineChat) -> None:
    with pytest.raises(MessagesRejectedError, match="it cannot begin"):
        await chat.prepare("ann", [{"role": "assistant", "content": "Hi"}], GREEDY)


async def test_a_prompt_with_a_token_that_the_model_lacks_is_refused(llama: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    async with opened(tokenizer, llama) as chat:
        assert await answer(chat, user("Look: <|image|>"), greedy(1))  # as text
        assert tokenizer.chat_template
        tokenizer.chat_template += "<|image|>"
        with pytest.raises(MessagesRejectedError, match="a token that the model does not know"):
            await chat.prepare("ann", user("Look"), GREEDY)


@pytest.mark.parametrize("template", [GEMMA, MISTRAL, PARTS_ONLY], ids=["gemma", "mistral", "parts"])
async def test_instructions_and_two_questions_in_a_row_reach_the_model(llama: PreTrainedModel, template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    async with opened(tokenizer, llama, options={"instructions": "i" * 40}) as chat:
        short = await chat.prepare("ann", [*user("one"), *user("x")], chat.defaults)
        long = await chat.prepare("ann", [*user("one"), *user("x" * 21)], chat.defaults)
    assert short.usage.input_tokens > 40
    assert long.usage.input_tokens == short.usage.input_tokens + 20


async def test_an_empty_prompt_is_refused(llama: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    async with opened(tokenizer, llama) as chat:
        tokenizer.chat_template = ""
        with pytest.raises(MessagesRejectedError, match="the prompt is empty"):
            await chat.prepare("ann", user("Hi"), GREEDY)


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
    *deltas, last = await events_of(await chat.prepare("ann", user("Hi"), wild))
    assert deltas
    assert all(isinstance(delta, TextPiece) and delta.text for delta in deltas)
    assert isinstance(last, Done)


async def test_every_sampling_option_changes_the_reply(chat: EngineChat) -> None:
    options = Options(temperature=0.8, top_p=1, seed=4, max_output_tokens=30)
    changes: list[dict[str, Any]] = [
        {},
        {"temperature": 1.5},
        {"top_p": 0.5},
        {"top_k": 2},
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


# Slots


async def replies_in_turn(
    chat: EngineChat, admission: Admission, options: Options, name: str = "ann"
) -> AsyncGenerator[int | Event, None]:
    """The positions and then the events of a reply that waits for its slot."""
    with admission.ticket(name) as ticket:
        reply = await chat.prepare("ann", user("Hi"), options)
        yield ticket.position
        async for position in ticket.wait():
            yield position
        async with aclosing(reply.events()) as events:
            async for event in events:
                yield event


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
    assert events[0] == events[1] == events[2]
    assert events[0][-1] == Done("max_output_tokens")


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
        reply = await chat.prepare("ann", user("Hi"), greedy(400))
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
        cancelled = asyncio.create_task(events_of(await chat.prepare("ann", user("Hi"), greedy(400))))
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
        assert (chat.model_name, chat.defaults) == ("Tiny", Options(instructions="a secret", top_k=7))


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
            await chat.prepare(name, user(content), GREEDY)
            order.append(name)

        greedy_user = [prepare("ann", "x" * 100) for _ in range(5)]
        await asyncio.gather(*greedy_user, prepare("bob", "Hi"))
    assert order.index("bob") <= 1


async def test_a_prompt_that_waits_for_the_tokenizer_can_be_cancelled(chat: EngineChat) -> None:
    first, second = (asyncio.create_task(chat.prepare("ann", user(word), GREEDY)) for word in ("one", "two"))
    await asyncio.sleep(0)
    second.cancel()
    assert (await first).usage.input_tokens
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (await chat.prepare("ann", user("three"), GREEDY)).usage.input_tokens


async def cached_tokens(chat: EngineChat, user_id: str, content: str, options: Options = GREEDY) -> int:
    """How many tokens of a message's prompt were in the prefix cache."""
    reply = await chat.prepare(user_id, user(content), structs.replace(options, max_output_tokens=1))
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
