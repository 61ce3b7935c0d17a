"""Which models upstreams offer, which of them gets a reply, and what operators learn."""

from __future__ import annotations

import asyncio

import pytest

from models.errors import ModelNotFoundError, UnsupportedParameterError, UpstreamUnavailableError
from models.messages import Image
from models.model_info import ModelInfo
from models.ops.metrics import Metrics
from models.options import Options
from models.output_format import OutputFormat
from models.settings import Settings
from models.tools import Tool, Tools
from models.upstream.endpoint import Endpoint, new_client
from models.upstream.upstream_chat import OWN, UpstreamChat
from tests.support.fake_upstream import Exchange, FakeUpstream, endless
from tests.support.upstreams import chat_over, reply_of, request_of, user

pytestmark = pytest.mark.anyio

USUAL = ("tools", "reasoning")
REGEX = OutputFormat("regex", "[0-9]+", "structured_outputs.regex")


# Models


async def test_all_models_of_all_upstreams_are_offered() -> None:
    async with FakeUpstream.running("small", "large") as one, FakeUpstream.running("large", context=64) as two:
        async with chat_over(one, two) as chat:
            assert [(model.name, model.context) for model in chat.models.all] == [("small", 4096), ("large", 64)]
            await reply_of(chat, model="large")
            await reply_of(chat)
    assert [asked.body["model"] for asked in [*one.asked, *two.asked]] in (["large", "small"], ["small", "large"])


async def test_the_settings_choose_and_order_the_models() -> None:
    async with FakeUpstream.running("small", "large", "huge") as upstream:
        async with chat_over(upstream, upstream_model=("large", "small")) as chat:
            assert [model.name for model in chat.models.all] == ["large", "small"]
            with pytest.raises(ModelNotFoundError, match="these models: large, small"):
                chat.models.choose("huge")


async def test_models_have_other_names() -> None:
    async with FakeUpstream.running("small", "large") as upstream:
        async with chat_over(upstream, model_aliases=("gpt-4o-mini", "gpt-4o=large", "*")) as chat:
            names = {name: chat.models.choose(name).name for name in ("gpt-4o-mini", "gpt-4o", "small", "other")}
    assert names == {"gpt-4o-mini": "small", "gpt-4o": "large", "small": "small", "other": "small"}


async def test_a_model_has_the_options_of_the_operator_and_else_those_of_the_upstream() -> None:
    async with FakeUpstream.running(owner="llamacpp", context=None) as upstream:
        params = {"temperature": 0.800000011920929, "top_k": 40, "repeat_penalty": 1.0, "top_p": 7}
        upstream.pages["/props"] = {"default_generation_settings": {"n_ctx": 512, "params": params}, "total_slots": 3}
        async with chat_over(upstream, options={"top_k": 5, "instructions": "Rhyme."}) as chat:
            told = OWN.updated({"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.0, "instructions": "Rhyme."})
            assert chat.models.default == ModelInfo("tiny", 512, told, (), USUAL)
            assert chat.arguments["upstreams"][0]["slots"] == 3
            assert chat.arguments["models"]["tiny"]["options"]["instructions"] is None
            await reply_of(chat)
    assert upstream.asked[0].body["messages"] == [{"role": "system", "content": "Rhyme."}, *user("Hi")]


async def test_the_options_of_another_parley_are_its_own() -> None:
    async with FakeUpstream.running(owner="parley") as upstream:
        upstream.pages["/args"] = {"args": {"slots": 4, "options": Options(temperature=0.1).as_json()}}
        async with chat_over(upstream) as chat:
            assert chat.models.default.defaults.temperature == 0.1


async def test_an_upstream_of_an_unknown_kind_keeps_its_options() -> None:
    async with FakeUpstream.running(owner="somebody", context=None) as upstream, chat_over(upstream) as chat:
        assert chat.models.default == ModelInfo("tiny", None, OWN, (), USUAL)
        await reply_of(chat)
    assert upstream.asked[0].body.keys() == {"model", "messages", "stream", "stream_options"}


async def test_the_context_of_the_settings_is_a_limit(upstream: FakeUpstream) -> None:
    async with chat_over(upstream, context=100) as chat:
        assert chat.models.default.context == 100


async def test_models_that_come_later_are_offered_then(upstream: FakeUpstream) -> None:
    async with chat_over(upstream) as chat:
        changes = []
        chat.models.on_change = lambda: changes.append([model.name for model in chat.models.all])
        await chat.look()
        upstream.models.append({"id": "new", "owned_by": "vllm"})
        await chat.look()
        assert changes == [["tiny", "new"]]


async def test_entries_that_are_no_models_are_left_out() -> None:
    async with FakeUpstream.running("tiny") as upstream:
        bad = [{"id": ""}, {"id": "a\nb"}, {"id": "a" * 257}, {"id": "a", "max_model_len": 10**30}, {"owned_by": 5}, 7]
        upstream.models.extend(bad)  # type: ignore[arg-type]
        async with chat_over(upstream) as chat:
            assert [model.name for model in chat.models.all] == ["tiny"]


async def test_a_list_of_models_without_an_end_is_not_read_to_its_end() -> None:
    async with FakeUpstream.running("tiny") as upstream:
        upstream.models[0]["description"] = "a" * 2**22
        async with chat_over(upstream, upstream_model=("tiny",)) as chat:
            assert "answers with something else" in str(chat.trouble)


async def test_looks_go_on_after_an_error_that_nobody_expected(upstream: FakeUpstream) -> None:
    failed, changed = asyncio.Event(), asyncio.Event()

    def fail() -> None:
        failed.set()
        raise OverflowError("a model is too large")

    async with chat_over(upstream) as chat:
        (endpoint,) = chat._pool.endpoints
        for on_change, called in ((fail, failed), (changed.set, changed)):
            chat.models.on_change = on_change
            upstream.models.append({"id": f"model-{len(upstream.models)}", "owned_by": "vllm"})
            endpoint.cool(0)
            await called.wait()


async def test_the_default_model_stays_as_long_as_it_is_offered() -> None:
    async with FakeUpstream.running("a", "b") as upstream, chat_over(upstream) as chat:
        upstream.models.reverse()
        await chat.look()
        assert [model.name for model in chat.models.all] == ["a", "b"]


async def test_a_model_that_has_just_gone_is_not_replaced_by_another(upstream: FakeUpstream) -> None:
    async with chat_over(upstream) as chat:
        request = request_of(chat)
        upstream.models[0] |= {"id": "new"}
        await chat.look()
        with pytest.raises(UpstreamUnavailableError):
            await chat.prepare(request)


async def test_the_start_waits_for_the_models_of_an_upstream(upstream: FakeUpstream) -> None:
    await upstream.stop()
    opening = chat_over(upstream)
    entering = asyncio.create_task(opening.__aenter__())
    await asyncio.sleep(0)
    await upstream.start()
    chat = await entering
    assert chat.models.default.name == "tiny"
    await opening.__aexit__(None, None, None)


async def test_the_start_does_not_wait_for_models_that_the_settings_name(upstream: FakeUpstream) -> None:
    await upstream.stop()
    async with chat_over(upstream, upstream_model=("tiny",)) as chat:
        assert (chat.models.default.context, chat.trouble is None) == (None, False)
        await upstream.start()
        await chat.look()
        assert (chat.models.default.context, chat.trouble is None) == (4096, True)


# Which upstream


async def test_replies_go_to_the_upstream_that_runs_the_fewest(upstream: FakeUpstream, other: FakeUpstream) -> None:
    for fake in (upstream, other):
        fake.will(*[endless] * 4)
    async with chat_over(upstream, other) as chat:
        replying = [asyncio.create_task(reply_of(chat, user(f"Hi {number}"))) for number in range(8)]
        for _ in range(4):
            await upstream.next()
            await other.next()
        for task in replying:
            task.cancel()
        await asyncio.wait(replying)


async def test_a_conversation_stays_with_its_upstream(upstream: FakeUpstream, other: FakeUpstream) -> None:
    async with chat_over(upstream, other) as chat:
        for number in range(6):
            await reply_of(chat, user(f"Hi {number}"))
        assert (len(upstream.asked), len(other.asked)) == (3, 3)
        for number in range(6):
            await reply_of(chat, [*user(f"Hi {number}"), {"role": "assistant", "content": "a"}, *user("And?")])
    for fake in (upstream, other):
        first = [asked.body["messages"][0]["content"] for asked in fake.asked]
        assert first[:3] == first[3:]


async def test_a_conversation_leaves_an_upstream_that_is_busy(upstream: FakeUpstream, other: FakeUpstream) -> None:
    async with chat_over(upstream, other) as chat:
        await reply_of(chat, user("Hi"))
        first, second = (upstream, other) if upstream.asked else (other, upstream)
        first.will(*[endless] * 5)
        replying = [asyncio.create_task(reply_of(chat, user("Hi"))) for _ in range(6)]
        for _ in range(6):
            await first.next()
        await second.next()
        for task in replying:
            task.cancel()
        await asyncio.wait(replying)


async def test_the_same_question_of_two_users_may_go_to_two_upstreams(
    upstream: FakeUpstream, other: FakeUpstream
) -> None:
    async with chat_over(upstream, other) as chat:
        for name in ("ann", "bob", "ann", "bob"):
            await reply_of(chat, user=name)
    for fake in (upstream, other):
        salts = {asked.body["cache_salt"] for asked in fake.asked}
        assert (len(fake.asked), len(salts)) == (2, 1)


async def test_only_upstreams_that_can_do_it_are_asked() -> None:
    async with FakeUpstream.running(owner="vllm") as can, FakeUpstream.running(owner="llamacpp") as cannot:
        async with chat_over(cannot, can) as chat:
            for _ in range(2):
                await reply_of(chat, format=REGEX)
        assert (len(can.asked), len(cannot.asked)) == (2, 0)
        async with chat_over(cannot) as chat:
            with pytest.raises(UnsupportedParameterError) as caught:
                await chat.prepare(request_of(chat, format=REGEX))
        assert caught.value.param == "structured_outputs.regex"


async def test_only_upstreams_whose_template_knows_tools_get_them() -> None:
    tools = Tools((Tool("f"),))
    async with FakeUpstream.running(owner="llamacpp") as cannot, FakeUpstream.running(owner="vllm") as can:
        cannot.pages["/props"] = {"chat_template_caps": {"supports_tools": False}}
        async with chat_over(cannot, can) as chat:
            for _ in range(2):
                await reply_of(chat, tools=tools)
        assert (len(can.asked), len(cannot.asked)) == (2, 0)
        async with chat_over(cannot) as chat:
            assert chat.models.default.capabilities == ("reasoning",)
            with pytest.raises(UnsupportedParameterError) as caught:
                await chat.prepare(request_of(chat, tools=tools))
            await reply_of(chat, tools=Tools((Tool("f"),), "none"))
        assert caught.value.param == "tools"


# What operators learn


@pytest.mark.parametrize(("slots", "warned"), [(2, False), (3, True)])
async def test_more_slots_than_the_upstreams_have_are_warned_of(
    caplog: pytest.LogCaptureFixture, slots: int, warned: bool
) -> None:
    async with FakeUpstream.running(owner="llamacpp") as upstream:
        upstream.pages["/props"] = {"total_slots": 2}
        async with chat_over(upstream, slots=slots):
            pass
    assert ("PARLEY_SLOTS=3 is more than the 2 replies" in caplog.text) == warned


async def test_an_upstream_that_is_away_is_named(upstream: FakeUpstream, other: FakeUpstream) -> None:
    async with chat_over(upstream, other) as chat:
        assert (chat.trouble, chat.warning) == (None, None)
        await other.stop()
        await chat.look()
        assert chat.trouble is None
        told = str(chat.warning)
        assert (other.url in told, upstream.url in told) == (True, False)
        await upstream.stop()
        await chat.look()
        assert upstream.url in str(chat.trouble)


async def test_an_upstream_is_away_after_three_bad_answers_and_nobody_reads_its_words(upstream: FakeUpstream) -> None:
    async with chat_over(upstream) as chat:
        upstream.pages["/v1/models"] = 401
        for _ in range(2):
            await chat.look()
            assert chat.trouble is None
        await chat.look()
        assert chat.trouble == f"{upstream.url} is away: GET /models is answered with status 401"


async def test_replies_go_on_at_an_upstream_that_comes_back(upstream: FakeUpstream) -> None:
    upstream.will(endless)
    async with new_client(None) as client:
        endpoint = Endpoint(upstream.url, client)
        await endpoint.look()
        async with endpoint.stream("/chat/completions", {}) as data:
            await anext(data)
            waiting = asyncio.ensure_future(anext(data))
            upstream.pages["/v1/models"] = 500
            while not endpoint.trouble:
                await endpoint.look()
            (deadline,) = endpoint._waiting
            assert deadline.when() is not None
            del upstream.pages["/v1/models"]
            await endpoint.look()
            assert deadline.when() is None
            waiting.cancel()
            await asyncio.wait([waiting])


async def test_a_model_that_no_upstream_has_is_named(upstream: FakeUpstream) -> None:
    async with chat_over(upstream, upstream_model=("tiny", "huge")) as chat:
        assert (chat.trouble, chat.warning) == (None, "no upstream has huge")
    async with chat_over(upstream, upstream_model=("huge",)) as chat:
        assert chat.trouble == "no upstream has huge"


async def test_metrics_tell_the_upstreams_apart(upstream: FakeUpstream) -> None:
    async def fail(exchange: Exchange) -> None:
        exchange.vanish()

    metrics = Metrics()
    async with UpstreamChat.opened(Settings(upstream=(upstream.url,)), metrics) as chat:
        upstream.will(fail, fail, endless)
        with pytest.raises(Exception, match="has failed"):
            await reply_of(chat)
        reply = await chat.prepare(request_of(chat))
        events = reply.events()
        await anext(events)
        text = metrics.text().decode()
        assert f'parley_upstream_requests_running{{upstream="{upstream.url}"}} 1.0' in text
        assert f'parley_upstream_failures_total{{upstream="{upstream.url}"}} 1.0' in text
        assert f'parley_upstream_time_to_first_token_seconds_count{{upstream="{upstream.url}"}} 1.0' in text
        await events.aclose()


async def test_the_key_is_sent(upstream: FakeUpstream) -> None:
    async with chat_over(upstream, upstream_key="the-key") as chat:
        await reply_of(chat)
    assert upstream.asked[0].headers["authorization"] == "Bearer the-key"


# Pictures

PNG = "data:image/png;base64,iVBORw0KGgo="


def modalities(*names: str) -> dict[str, object]:
    return {"architecture": {"input_modalities": [*names]}}


@pytest.mark.parametrize(
    ("owner", "told", "pages", "reads"),
    [
        ("llamacpp", modalities("text", "image"), {}, True),
        ("llamacpp", modalities("text"), {}, False),
        ("parley", modalities("text", "image"), {}, True),
        ("parley", {}, {}, False),
        ("vllm", {}, {"/tokenize": {"count": 3}}, True),
        ("vllm", {}, {"/tokenize": 400}, False),
        ("openai", {}, {}, True),
        ("somebody", {}, {}, False),
    ],
)
async def test_whether_a_model_reads_pictures_is_found_out(
    owner: str, told: dict[str, object], pages: dict[str, object], reads: bool
) -> None:
    async with FakeUpstream.running(owner=owner) as upstream:
        upstream.models[0] |= told
        upstream.pages |= pages
        async with chat_over(upstream) as chat:
            assert chat.models.default.has_images == reads


async def test_a_vllm_is_asked_again_whether_it_reads_pictures_until_it_tells() -> None:
    async with FakeUpstream.running("base", "adapter") as upstream:
        upstream.pages["/tokenize"] = 503
        async with chat_over(upstream) as chat:
            assert not chat.models.default.has_images
            upstream.pages["/tokenize"] = {"count": 3}
            await chat.look()
            assert [model.has_images for model in chat.models.all] == [True, True]


async def test_conversations_that_begin_with_other_pictures_are_others(
    upstream: FakeUpstream, other: FakeUpstream
) -> None:
    for fake in (upstream, other):
        fake.models[0] |= modalities("image")
    async with chat_over(upstream, other) as chat:
        for end in "abcd":
            images: list[Image] = [{"url": f"{PNG}{end}", "at": 0}]
            await reply_of(chat, [{"role": "user", "content": "", "images": images}])
    assert (len(upstream.asked), len(other.asked)) == (2, 2)


async def test_a_question_that_is_a_picture_stays_one_for_a_model_that_reads_only_text(upstream: FakeUpstream) -> None:
    async with chat_over(upstream) as chat:
        await reply_of(chat, [{"role": "user", "content": "", "images": [{"url": PNG, "at": 0}]}])
    assert upstream.asked[0].body["messages"] == user("[picture]")


@pytest.mark.parametrize("reads", [True, False])
async def test_pictures_are_passed_on_to_models_that_read_them(upstream: FakeUpstream, reads: bool) -> None:
    upstream.models[0] |= modalities("text", *["image"] * reads)
    async with chat_over(upstream) as chat:
        await reply_of(chat, [{"role": "user", "content": "Look", "images": [{"url": PNG, "at": 4}]}])
    (message,) = upstream.asked[0].body["messages"]
    picture = {"type": "image_url", "image_url": {"url": PNG}}
    assert message["content"] == ([{"type": "text", "text": "Look"}, picture] if reads else "Look\n[picture]")
