"""Logging in, chatting and stopping, drafts, scrolling and layout."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from playwright.sync_api import Page, ViewportSize, expect

from tests.browser.browsers import in_each_browser
from tests.browser.conftest import OpenPage
from tests.browser.steps import DESKTOP, PHONE, converse, expect_reply, last_reply, log_in, open_chat, send
from tests.support.client import ANN, BOB
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

pytestmark = in_each_browser

WIDE = f"""\
{"long" * 100}

```
{"code " * 100}
```

| {"| ".join(["heading"] * 20)}|
| {"| ".join(["---"] * 20)}|
| {"| ".join(["cell"] * 20)}|
"""


def test_a_secret_opens_the_chat(scripted_server: Served, page: Page) -> None:
    log_in(page, scripted_server.url, ANN)
    expect(page.get_by_role("button", name="Log out")).to_contain_text("ann")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    expect(page.locator("#status")).to_have_text("Connected")


def test_a_wrong_secret_is_an_error_on_the_login_form(scripted_server: Served, page: Page) -> None:
    page.goto(scripted_server.url)
    page.get_by_label("Secret").fill("no secret")
    page.get_by_label("Secret").press("Enter")
    expect(page.get_by_role("alert")).to_have_text("That secret is not right.")
    expect(page.get_by_label("Secret")).to_be_focused()


def test_logging_out_opens_the_login_form(chat: Page) -> None:
    chat.get_by_role("button", name="Log out").click()
    expect(chat.get_by_label("Secret")).to_be_visible()
    chat.reload()
    expect(chat.get_by_label("Secret")).to_be_visible()


def test_an_expired_session_opens_the_login_form(chat: Page) -> None:
    chat.context.clear_cookies()
    chat.get_by_label("Search").fill("anything")
    expect(chat.get_by_label("Secret")).to_be_visible()


def test_a_reply_is_shown_while_it_grows(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    send(chat, "wait I am thinking.")
    expect(chat.get_by_role("article", name="You")).to_have_text("wait I am thinking.")
    expect_reply(chat, "I am thinking.", "in_progress")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "I am thinking.")


def test_a_finished_reply_shows_its_tokens_and_their_speed(chat: Page) -> None:
    send(chat, "say I am thinking.")
    usage = last_reply(chat).locator(".usage")
    expect(usage).to_have_text(re.compile(r"^4 tokens · \d+\.\d tokens/s$"))
    before = usage.inner_text()
    chat.reload()
    expect(usage).to_have_text(before)


def test_the_next_message_continues_the_conversation(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one", "say two")
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say one", "one", "say two"]


@pytest.mark.parametrize("way", ["button", "escape"])
def test_a_reply_can_be_stopped(chat: Page, scripted: ScriptedChat, way: str) -> None:
    send(chat, "wait half a reply")
    expect_reply(chat, "half a reply", "in_progress")
    assert scripted.running == 1
    if way == "button":
        chat.get_by_role("button", name="Stop").click()
    else:
        chat.keyboard.press("Escape")
    expect_reply(chat, "half a reply", "cancelled")
    expect(last_reply(chat).locator(".note")).to_have_text("Stopped.")
    expect(chat.get_by_role("button", name="Send")).to_be_visible()
    assert scripted.running == 0


def test_a_new_chat_starts_without_the_old_messages(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="New chat").click()
    expect(chat.locator("#messages")).to_be_empty()
    converse(chat, "say two")
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say two"]


def test_a_draft_survives_a_reload(chat: Page) -> None:
    chat.get_by_label("Message", exact=True).fill("say nothing lost")
    chat.reload()
    expect(chat.get_by_label("Message", exact=True)).to_have_value("say nothing lost")


def test_each_conversation_has_its_own_draft(chat: Page) -> None:
    message = chat.get_by_label("Message", exact=True)
    converse(chat, "say one")
    message.fill("more of one")
    chat.get_by_role("button", name="New chat").click()
    expect(message).to_have_value("")
    message.fill("something new")
    chat.evaluate("history.back()")  # since go_forward waits for ever in Firefox
    expect(message).to_have_value("more of one")
    chat.evaluate("history.forward()")
    expect(message).to_have_value("something new")


def test_logging_out_deletes_drafts(chat: Page, scripted_server: Served) -> None:
    chat.get_by_label("Message", exact=True).fill("a secret thought")
    chat.get_by_role("button", name="Log out").click()
    chat.get_by_label("Secret").wait_for()
    log_in(chat, scripted_server.url, ANN)
    expect(chat.get_by_label("Message", exact=True)).to_have_value("")


def test_a_growing_reply_does_not_scroll_a_reader_down(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    jump, usage = chat.get_by_role("button", name="Jump to latest"), last_reply(chat).locator("footer")
    send(chat, "wait " + "a line\n" * 200)
    expect(last_reply(chat)).to_contain_text("a line")
    chat.locator("#log").hover()
    chat.mouse.wheel(0, -500)
    expect(jump).to_be_visible()
    scripted_server.in_loop(scripted.release)
    expect(usage).to_be_attached()
    expect(usage).not_to_be_in_viewport()
    jump.click()
    expect(usage).to_be_in_viewport()
    expect(jump).to_be_hidden()


def test_the_page_follows_a_reply_that_grows_again_before_the_browser_says_how_far_it_has_scrolled(chat: Page) -> None:
    converse(chat, "say " + "a line\n" * 60)
    chat.evaluate(
        """() => new Promise((resolve) => {
            const grow = () => {
                const line = document.querySelector('article:last-child').appendChild(document.createElement('p'));
                line.style.height = '50px';
            };
            const scrolled = () => {
                grow(); // before the page hears of the event
                requestAnimationFrame(resolve);
            };
            document.addEventListener('scroll', scrolled, { capture: true, once: true });
            grow(); // so that the page scrolls to the end
        })"""
    )
    expect(chat.get_by_role("button", name="Jump to latest")).to_be_hidden()
    expect(last_reply(chat).locator(".usage")).to_be_in_viewport()


def test_shift_and_enter_start_a_new_line(chat: Page) -> None:
    message = chat.get_by_label("Message", exact=True)
    message.press_sequentially("say one")
    message.press("Shift+Enter")
    message.press_sequentially("two")
    expect(message).to_have_value("say one\ntwo")
    message.press("Enter")
    expect_reply(chat, "one\ntwo")


def test_the_position_in_the_wait_queue_is_shown(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    send(chat, "hold on")
    expect(last_reply(chat)).to_have_text("Waiting, position 3")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "on", "in_progress")
    expect(last_reply(chat).locator(".note")).to_be_hidden()
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "on")


def test_a_failed_reply_keeps_its_text_and_shows_an_error(chat: Page) -> None:
    send(chat, "break half a reply")
    expect_reply(chat, "half a reply", "failed")
    expect(last_reply(chat).locator(".note")).to_have_text("The server failed; try again.")
    send(chat, "say better")
    expect_reply(chat, "better")


def test_a_refused_message_returns_to_the_input(chat: Page, scripted: ScriptedChat) -> None:
    scripted.admission.shrink(0)
    send(chat, "say it later")
    expect(chat.get_by_role("alert")).to_have_text("Too many replies are waiting already: try again later.")
    expect(chat.get_by_label("Message", exact=True)).to_have_value("say it later")
    expect(chat.locator("#messages")).to_be_empty()


def test_other_users_who_join_are_announced(chat: Page, scripted_server: Served, open_page: OpenPage) -> None:
    open_chat(open_page(), scripted_server.url, BOB)
    expect(chat.locator("#notice")).to_have_text("bob joined")


@pytest.mark.parametrize("colors", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everything_is_visible_and_can_be_clicked(
    chat: Page, colors: Literal["light", "dark"], viewport: ViewportSize
) -> None:
    chat.emulate_media(color_scheme=colors)
    chat.set_viewport_size(viewport)
    send(chat, f"say {WIDE}")
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    for wide in (":root", "#log"):
        assert chat.locator(wide).evaluate("part => part.scrollWidth - part.clientWidth") == 0
    chat.get_by_label("Message", exact=True).fill("say " + "line\n" * 30)
    for name in ("New chat", "Options", "Send"):
        expect(chat.get_by_role("button", name=name)).to_be_in_viewport(ratio=1)
        chat.get_by_role("button", name=name).click(trial=True)
    if viewport is PHONE:
        chat.get_by_role("button", name="Conversations").click()
    for part in (chat.get_by_role("button", name="Log out"), chat.get_by_label("Search")):
        expect(part).to_be_in_viewport(ratio=1)
        part.click(trial=True)
