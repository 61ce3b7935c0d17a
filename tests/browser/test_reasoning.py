"""What the model thinks before it answers, on the page."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from models.settings import Settings
from server import create_app
from tests.browser.conftest import OpenPage
from tests.browser.proxy import Proxy
from tests.browser.steps import (
    branch,
    clipboard,
    copy,
    expect_connection,
    expect_reply,
    last_reply,
    open_chat,
    pass_time,
    send,
)
from tests.browser.stepwise import StepwiseChat
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served, serve

THINKS = "perform think Let me see. | say The answer."
SECONDS = re.compile(r"^Thought for \d+ s$")


@pytest.fixture
def stepwise() -> StepwiseChat:
    return StepwiseChat()


@pytest.fixture
def stepwise_server(settings: Settings, stepwise: StepwiseChat) -> Iterator[Served]:
    with serve(create_app(settings, stepwise.opened)) as served:
        yield served


def fold(page: Page) -> Locator:
    """The reasoning of the last reply."""
    return last_reply(page).locator("details.reasoning")


def expect_thought(page: Page, text: str, label: str | re.Pattern[str]) -> None:
    """Wait until the last reply has folded reasoning with a text and a label."""
    expect(fold(page).locator("summary")).to_have_text(label)
    expect(fold(page).locator(".folded")).to_have_text(text)
    expect(fold(page).locator(".folded")).to_be_hidden()


def wait_until_stored(page: Page, text: str) -> None:
    """Wait until the last part of the reply is stored with a text."""
    while not (output := branch(page)[-1]["output"]) or output[-1]["content"][0]["text"] != text:
        page.wait_for_timeout(20)


def test_reasoning_is_open_while_it_grows_and_folded_when_the_answer_begins(
    page: Page, stepwise: StepwiseChat, stepwise_server: Served
) -> None:
    page.clock.install()
    open_chat(page, stepwise_server.url)
    send(page, THINKS)
    expect(fold(page).locator("summary")).to_have_text("Thinking…")
    expect(fold(page).get_by_text("Let me see.")).to_be_visible()
    pass_time(page, 12)
    stepwise_server.in_loop(stepwise.release)
    expect_reply(page, "The answer.", "in_progress")
    expect_thought(page, "Let me see.", re.compile("Thought for 1[2-9] s"))
    stepwise_server.in_loop(stepwise.release)
    expect_reply(page, "The answer.")
    expect_thought(page, "Let me see.", re.compile("Thought for 1[2-9] s"))
    expect(last_reply(page).locator(".parts > *")).to_have_text([re.compile("Let me see"), "The answer."])


def test_a_reload_keeps_reasoning_folded(chat: Page) -> None:
    send(chat, THINKS)
    expect_reply(chat, "The answer.")
    chat.reload()
    expect_reply(chat, "The answer.")
    expect_thought(chat, "Let me see.", SECONDS)


@pytest.mark.parametrize("way", ["reload", "cut"])
def test_reasoning_goes_on_after(way: str, page: Page, stepwise: StepwiseChat, stepwise_server: Served) -> None:
    with Proxy.to(stepwise_server.port) as proxy:
        open_chat(page, proxy.url)
        send(page, THINKS)
        expect(fold(page).get_by_text("Let me see.")).to_be_visible()
        if way == "reload":
            wait_until_stored(page, "Let me see.")
            page.reload()
        else:
            proxy.cut()
            expect(page.locator("#status")).to_have_text(re.compile("retrying in"))
            proxy.mend()
            page.evaluate("window.dispatchEvent(new Event('online'))")
        expect_connection(page)
        expect(fold(page).locator("summary")).to_have_text("Thinking…")
        expect(fold(page).locator(".folded")).to_have_text("Let me see.")
        expect(fold(page).locator(".folded")).to_be_visible()
        for status in ("in_progress", "completed"):
            stepwise_server.in_loop(stepwise.release)
            expect_reply(page, "The answer.", status)
        expect_thought(page, "Let me see.", SECONDS)
        assert len(stepwise.heard) == 1


def test_reasoning_that_has_ended_stays_folded_after_a_reload(
    page: Page, stepwise: StepwiseChat, stepwise_server: Served
) -> None:
    page.clock.install()
    open_chat(page, stepwise_server.url)
    send(page, THINKS)
    expect(fold(page).get_by_text("Let me see.")).to_be_visible()
    wait_until_stored(page, "Let me see.")
    page.reload()
    expect(fold(page).get_by_text("Let me see.")).to_be_visible()
    pass_time(page, 100)  # which is not how long it took: the page has not seen the beginning
    stepwise_server.in_loop(stepwise.release)
    expect_thought(page, "Let me see.", "Thought")
    wait_until_stored(page, "The answer.")
    page.reload()
    expect_reply(page, "The answer.", "in_progress")
    expect_thought(page, "Let me see.", "Thought")
    stepwise_server.in_loop(stepwise.release)
    expect_reply(page, "The answer.")
    expect_thought(page, "Let me see.", re.compile(r"^Thought for \d\d? s$"))


def test_what_the_reader_has_closed_or_opened_stays_so(
    page: Page, stepwise: StepwiseChat, stepwise_server: Served
) -> None:
    open_chat(page, stepwise_server.url)
    send(page, "perform think Let me see. | say One. | think And more. | say Two.")
    folds = page.locator("details.reasoning")
    expect(folds.first).to_have_attribute("open", "")
    folds.first.locator("summary").click(click_count=2)  # closed and opened again
    stepwise_server.in_loop(stepwise.release)
    expect_reply(page, "One.", "in_progress")
    stepwise_server.in_loop(stepwise.release)
    folds.last.get_by_text("Thinking…").click()
    stepwise_server.in_loop(stepwise.release)
    expect(last_reply(page).locator(".content")).to_have_text(["One.", "Two."])
    stepwise_server.in_loop(stepwise.release)
    expect(last_reply(page)).to_have_attribute("data-status", "completed")
    expect(folds.first).to_have_attribute("open", "")
    expect(folds.last).not_to_have_attribute("open", "")


def test_a_reply_that_is_stopped_while_it_thinks_keeps_its_reasoning(page: Page, stepwise_server: Served) -> None:
    open_chat(page, stepwise_server.url)
    send(page, THINKS)
    expect(fold(page).get_by_text("Let me see.")).to_be_visible()
    page.keyboard.press("Escape")
    expect(last_reply(page)).to_have_attribute("data-status", "cancelled")
    expect(last_reply(page).locator(".note")).to_have_text("Stopped.")
    expect_thought(page, "Let me see.", SECONDS)


def test_reasoning_without_an_answer_says_nothing(chat: Page) -> None:
    send(chat, "perform think Let me see.")
    expect(last_reply(chat).locator(".note")).to_have_text("The model said nothing.")
    expect_thought(chat, "Let me see.", SECONDS)


def test_opening_long_reasoning_does_not_move_the_reader(chat: Page) -> None:
    send(chat, f"perform think {'a thought' + chr(10) * 2}{'and more ' * 2000} | say The answer.")
    expect_reply(chat, "The answer.")
    fold(chat).locator("summary").click()
    expect(chat.get_by_role("button", name="Jump to latest")).to_be_visible()
    expect(fold(chat).locator("summary")).to_be_in_viewport()
    fold(chat).locator("summary").click()
    expect(chat.get_by_role("button", name="Jump to latest")).to_be_hidden()


def test_copying_an_answer_leaves_out_the_reasoning(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.clock.install()
    open_chat(page, scripted_server.url)
    send(page, THINKS)
    copy(page, "Copy")
    assert clipboard(page) == "The answer."


def test_reasoning_is_not_sent_as_an_answer(chat: Page, scripted: ScriptedChat) -> None:
    send(chat, THINKS)
    expect_reply(chat, "The answer.")
    send(chat, "say more")
    expect_reply(chat, "more")
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == [THINKS, "The answer.", "say more"]


def test_a_selection_in_the_reasoning_survives_the_end_of_the_reply(
    page: Page, stepwise: StepwiseChat, stepwise_server: Served
) -> None:
    open_chat(page, stepwise_server.url)
    send(page, THINKS)
    expect(fold(page).locator(".folded")).to_have_text("Let me see.")
    fold(page).locator("summary").click()  # so that it stays as the reader has it
    fold(page).locator("summary").click()
    select = "node => getSelection().selectAllChildren(node)"
    fold(page).locator(".block").evaluate(select)
    for _ in range(2):  # the end of the reasoning, and that of the reply
        stepwise_server.in_loop(stepwise.release)
        expect(last_reply(page).locator(".content")).to_have_text("The answer.")
    expect(last_reply(page)).to_have_attribute("data-status", "completed")
    assert page.evaluate("getSelection().toString()") == "Let me see."
