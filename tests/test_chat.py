from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import chain

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.admission import QueueFull, TooManyResponses
from models.chat import Chat
from models.item import Item, Message, left_out, messages
from models.options import Options
from models.reply import ContextLengthExceeded, Delta, Done, Event, MessagesRefused, Queued, Started
from models.settings import Settings, SettingsError
from models.weights import load
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.anyio

GREEDY = Options(temperature=0, repetition_penalty=1)
CAPITAL: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def embedded() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The embedded model; the first run of it on a machine downloads and converts it."""
    return load(Settings(device="cpu"))


@pytest.fixture
async def chat(embedded: tuple[PreTrainedTokenizerBase, PreTrainedModel]) -> AsyncIterator[Chat]:
    async with Chat.running(*embedded, Settings(context=512, slots=4, compile=False)) as chat:
        yield chat


@asynccontextmanager
async def tiny_chat(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, **settings: int) -> AsyncIterator[Chat]:
    defaults = Settings(context=256, slots=2, queue=4, responses_per_user=8, compile=False)
    async with Chat.running(tokenizer, model, replace(defaults, **settings)) as chat:  # type: ignore[arg-type]
        yield chat


async def events(reply: AsyncGenerator[Event, None]) -> list[Event]:
    async with aclosing(reply):
        return [event async for event in reply]


async def ask(chat: Chat, messages: list[Message], options: Options, user: str = "ann") -> AsyncGenerator[Event, None]:
    """A reply that has a place for as long as it is not closed."""
    with chat.admission.place(user) as ticket:
        async with aclosing(chat.reply(ticket, messages, options)) as reply:
            async for event in reply:
                yield event


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def say(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


async def test_the_embedded_model_knows_the_capital_of_france(chat: Chat) -> None:
    started, *deltas, done = await events(ask(chat, CAPITAL, GREEDY))
    assert text(deltas) == "The capital of France is Paris."
    assert done == Done("stop")
    assert isinstance(started, Started)
    assert (started.usage.input_tokens, started.usage.output_tokens) == (37, 8)


async def test_it_remembers_what_was_said_before(chat: Chat) -> None:
    history: list[Message] = [
        {"role": "user", "content": "My dog is called Rex."},
        {"role": "assistant", "content": "Rex is a lovely name for a dog."},
        {"role": "user", "content": "What is the name of my dog?"},
    ]
    assert text(await events(ask(chat, history, GREEDY))) == "The name of your dog is Rex."


async def test_a_seed_gives_the_same_reply_whoever_else_is_chatting(chat: Chat) -> None:
    async def reply(user: str, seed: int) -> str:
        options = Options(temperature=0.9, seed=seed, max_output_tokens=24)
        return text(await events(ask(chat, say("Write a line of a poem."), options, user)))

    alone = await reply("ann", 7)
    others = [reply("bob", seed) for seed in (1, 2, 3)]
    assert (await asyncio.gather(reply("ann", 7), *others))[0] == alone


async def test_a_stop_string_ends_the_reply_and_does_not_show(chat: Chat) -> None:
    reply = await events(ask(chat, CAPITAL, replace(GREEDY, stop=("of Fr",))))
    assert text(reply) == "The capital "
    assert reply[-1] == Done("stop")


async def test_instructions_come_first_unless_the_messages_have_their_own(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async def input_tokens(chat: Chat, messages: list[Message], instructions: str | None) -> int:
        options = Options(instructions=instructions, max_output_tokens=1)
        started = (await events(ask(chat, messages, options)))[0]
        assert isinstance(started, Started)
        return started.usage.input_tokens

    own: list[Message] = [{"role": "system", "content": "Be brief."}, *say("Hi")]
    async with tiny_chat(tokenizer, llama) as chat:
        assert await input_tokens(chat, say("Hi"), "Be brief.") == await input_tokens(chat, own, None)
        assert await input_tokens(chat, own, "Be long and boring.") == await input_tokens(chat, own, None)


async def test_a_reply_cut_anywhere_is_the_beginning_of_the_whole_one_and_shows_no_half_character(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async def reply(chat: Chat, tokens: int) -> str:
        wild = Options(temperature=1.5, top_p=1, repetition_penalty=1, seed=4, max_output_tokens=tokens)
        return text(await events(ask(chat, say("Hi"), wild)))

    async with tiny_chat(tokenizer, llama) as chat:
        whole = await reply(chat, 40)
        assert any(ord(character) > 0x7F for character in whole.replace("\ufffd", ""))
        for tokens in range(1, 40):
            assert whole.startswith(await reply(chat, tokens))


async def test_messages_that_fill_the_context_are_refused_with_the_numbers(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async with tiny_chat(tokenizer, llama, context=64) as chat:
        for length in (200, 100_000):
            with pytest.raises(ContextLengthExceeded, match="64"):
                await events(ask(chat, say("x" * length), GREEDY))
        assert len(text(await events(ask(chat, say("short"), replace(GREEDY, seed=1))))) > 0


async def test_a_history_that_outgrows_the_context_loses_its_oldest_turns_and_keeps_the_system_prompt(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    system: Message = {"role": "system", "content": "Be brief."}
    turns = [[*say("x" * 20), Message(role="assistant", content="y" * 20)] for _ in range(40)]
    options = replace(GREEDY, max_output_tokens=10)
    async with tiny_chat(tokenizer, llama) as chat:
        messages = [system, *chain.from_iterable(turns), *say("What now?")]
        started = (await events(ask(chat, messages, options)))[0]
        assert isinstance(started, Started)
        assert started.left_out % 2 == 0
        assert 0 < started.left_out < 80
        left = [system, *messages[1 + started.left_out :]]
        again = (await events(ask(chat, left, options)))[0]
        assert isinstance(again, Started)  # the system prompt and the latest turns, whole
        assert (again.usage.input_tokens, again.left_out) == (started.usage.input_tokens, 0)
        assert started.usage.input_tokens < 256 - 10


async def test_the_next_turn_of_a_shortened_history_begins_like_the_last_and_is_found_in_the_cache(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    options, history, seen = replace(GREEDY, max_output_tokens=8), say("x" * 60), list[tuple[int, int]]()
    async with tiny_chat(tokenizer, llama) as chat:
        for _ in range(30):
            started, *rest = await events(ask(chat, history, options))
            assert isinstance(started, Started)
            seen.append((started.left_out, started.usage.cached_tokens))
            history = [*history[started.left_out :], Message(role="assistant", content=text(rest)), *say("go on")]
    shortened = [left_out for left_out, _ in seen[1:] if left_out]
    assert 1 < len(shortened) < 10
    assert all(cached > 0 for left_out, cached in seen[1:] if not left_out)


async def test_a_word_of_the_systems_in_every_turn_never_fills_the_context_nor_takes_the_instructions_place(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    options, items = replace(GREEDY, instructions="Be brief.", max_output_tokens=4), list[Item]()
    asked: list[Message] = [{"role": "system", "content": "n" * 30}, *say("x" * 30)]
    async with tiny_chat(tokenizer, llama) as chat:
        await events(ask(chat, say("first"), options))
        items += [Item("a", "user", "first", 1.0), Item("b", "assistant", "yes", 1.0, left_out=0)]
        for turn in range(20):
            started, *rest = await events(ask(chat, [*messages(items), *asked], options))
            assert isinstance(started, Started)
            unseen = left_out(items) + started.left_out
            items += [Item.said(message, 1.0) for message in asked]
            items.append(Item(f"{turn}", "assistant", text(rest), 1.0, left_out=unseen))
            assert messages(items)[0]["role"] == "user"
    assert left_out(items) > 30


async def test_the_last_message_is_kept_whole_and_refused_where_it_is_too_long_by_itself(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    history = [*say("before"), Message(role="assistant", content="yes")]
    async with tiny_chat(tokenizer, llama) as chat:
        started = (await events(ask(chat, [*history, *say("x" * 200)], GREEDY)))[0]
        assert (isinstance(started, Started) and started.left_out) == 2
        with pytest.raises(ContextLengthExceeded, match="256"):
            await events(ask(chat, [*history, *say("x" * 250)], GREEDY))


async def test_a_reply_without_text_is_passed_over_and_the_messages_around_it_are_one(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    silent = [*say("one"), Message(role="assistant", content=""), *say("two")]
    options = replace(GREEDY, max_output_tokens=20)
    async with tiny_chat(tokenizer, llama) as chat:
        said = await events(ask(chat, silent, options))
        assert text(said) == text(await events(ask(chat, say("one\n\ntwo"), options)))
        joined = (await events(ask(chat, say("one\n\ntwo"), options)))[0]
        assert isinstance(said[0], Started)
        assert isinstance(joined, Started)
        assert said[0].usage.input_tokens == joined.usage.input_tokens


async def test_what_the_template_refuses_is_refused_with_its_words(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async with tiny_chat(tokenizer, llama) as chat:
        with pytest.raises(MessagesRefused, match="it cannot begin"):
            await events(ask(chat, [{"role": "assistant", "content": "Hi"}], GREEDY))


async def test_messages_that_come_to_nothing_or_hold_an_unknown_token_are_refused(llama: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})  # beyond what the model embeds
    async with tiny_chat(tokenizer, llama) as chat:
        with pytest.raises(MessagesRefused, match="a token that the model does not know"):
            await events(ask(chat, say("Look: <|image|>"), GREEDY))
        tokenizer.chat_template = ""
        with pytest.raises(MessagesRefused, match="come to nothing"):
            await events(ask(chat, say("Hi"), GREEDY))


async def test_who_waits_hears_each_new_position_and_gets_the_slot_that_becomes_free(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async with tiny_chat(tokenizer, llama, slots=1) as chat:
        replies = [ask(chat, say("Hi"), replace(GREEDY, max_output_tokens=20)) for _ in range(3)]
        for reply in replies:
            await anext(reply)
        first, second, third = (asyncio.create_task(events(reply)) for reply in replies)
        assert not any(isinstance(event, Queued) for event in await first)
        assert [event for event in await second if isinstance(event, Queued)] == [Queued(1)]
        assert [event for event in await third if isinstance(event, Queued)] == [Queued(2), Queued(1)]
        assert text(second.result()) == text(third.result()) == text(first.result())


async def test_refusals_cost_nothing_and_places_come_back(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    async with tiny_chat(tokenizer, llama, slots=1, queue=1, responses_per_user=2) as chat:
        running = [ask(chat, say("Hi"), GREEDY) for _ in range(2)]
        for reply in running:
            await anext(reply)
        with pytest.raises(TooManyResponses):
            await anext(ask(chat, say("Hi"), GREEDY))
        with pytest.raises(QueueFull):
            await anext(ask(chat, say("Hi"), GREEDY, "bob"))
        for reply in running:
            await reply.aclose()
        assert text(await events(ask(chat, say("Hi"), replace(GREEDY, max_output_tokens=9), "bob")))
        assert (chat.admission.free, dict(chat.admission.in_flight)) == (1, {})


@pytest.mark.parametrize("deltas", [0, 1, 5])
async def test_closing_a_reply_frees_its_slot_for_the_next(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel, deltas: int
) -> None:
    async with tiny_chat(tokenizer, llama, slots=1, context=512) as chat:
        async with aclosing(ask(chat, say("Hi"), replace(GREEDY, max_output_tokens=400))) as reply:
            for _ in range(1 + deltas):
                await anext(reply)
        next_reply = await events(ask(chat, say("Hi"), replace(GREEDY, max_output_tokens=9), "bob"))
        assert not any(isinstance(event, Queued) for event in next_reply)
        assert isinstance(next_reply[-1], Done)
    assert chat.free_slots == 1


async def test_defaults_are_the_operators_else_the_models_else_ours(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    llama.generation_config.temperature, llama.generation_config.top_k = 0.7, 20
    llama.generation_config.repetition_penalty = 5.0  # out of bounds
    try:
        async with tiny_chat(tokenizer, llama, options={"temperature": 0.1}) as chat:  # type: ignore[arg-type]
            assert chat.defaults == Options(temperature=0.1, top_k=20)
    finally:
        for name in ("temperature", "top_k", "repetition_penalty"):
            setattr(llama.generation_config, name, None)


async def test_a_context_beyond_the_models_own_is_refused(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    with pytest.raises(SettingsError, match="512"):
        async with tiny_chat(tokenizer, llama, context=1024):
            pass


async def test_a_reply_is_sampled_by_its_options(tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel) -> None:
    async def reply(chat: Chat, **changes: float) -> str:
        options = replace(Options(temperature=0.8, top_p=1, seed=4, max_output_tokens=30), **changes)  # type: ignore[arg-type]
        return text(await events(ask(chat, say("Hi"), options)))

    changes = {
        "temperature": 1.5,
        "top_p": 0.5,
        "top_k": 2,
        "repetition_penalty": 2,
        "frequency_penalty": 2,
        "presence_penalty": -2,
    }
    async with tiny_chat(tokenizer, llama) as chat:
        replies = [await reply(chat), *[await reply(chat, **{name: value}) for name, value in changes.items()]]
    assert len(set(replies)) == len(replies)
