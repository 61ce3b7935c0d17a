"""Printing gives the whole conversation, and nothing else of the page."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsers import in_each_browser
from tests.browser.steps import STORE, converse, last_reply, manage, open_stored, send

# In the place of the dialog, which no test could close: counts the messages, and the replies that are formatted.
PRINT = """() => { window.print = () => {
    window.printed = ['article', '.assistant strong'].map((parts) => document.querySelectorAll(parts).length);
}; }"""
PAPER = 1000  # pixels on a page, at most
WAIT = "() => window.printed"
CODE = "say ```\n" + "a line that is far too long for a page " * 20 + "\n```"
WIDE = "say " + "\n".join(f"| {' | '.join([cell] * 30)} |" for cell in ("head", "---", "cell"))


@pytest.fixture
def long_chat(chat: Page) -> Page:
    """A conversation of 250 messages, of which the last 100 are loaded."""
    chat.evaluate(PRINT)
    contents = [f"message {number}" if number % 2 else f"**reply** {number}" for number in range(1, 249)]
    store(chat, *contents, "say **the end**")
    expect(chat.locator("article").first).to_contain_text("message 151")
    return chat


def store(page: Page, *contents: str) -> None:
    """Open a new conversation with messages, of which only the last page is loaded."""
    page.evaluate("id => { location.hash = id; }", page.evaluate(STORE, contents))
    expect(last_reply(page)).to_have_attribute("data-status", "completed")


def pages(page: Page) -> int:
    """How many pages the browser prints."""
    return len(re.findall(rb"/Type\s*/Page\b", page.pdf()))


@in_each_browser
def test_the_command_of_the_keyboard_prints_all_messages(long_chat: Page) -> None:
    long_chat.keyboard.press("ControlOrMeta+p")
    assert long_chat.wait_for_function(WAIT).json_value() == [250, 125]
    expect(long_chat.locator("article").first).to_contain_text("message 1")


@in_each_browser
def test_the_menu_prints_a_conversation_that_is_not_open(long_chat: Page) -> None:
    title = "message 1"
    long_chat.get_by_role("button", name="New chat").click()
    expect(long_chat.locator("article")).to_have_count(0)
    manage(long_chat, title, "Print")
    assert long_chat.wait_for_function(WAIT).json_value() == [250, 125]
    expect(long_chat.get_by_role("heading", name=title)).to_be_visible()


def test_all_messages_are_on_the_paper(long_chat: Page) -> None:
    long_chat.keyboard.press("ControlOrMeta+p")
    long_chat.wait_for_function(WAIT)
    long_chat.emulate_media(media="print")
    heights = long_chat.locator("article").evaluate_all("all => all.map(one => one.offsetHeight)")
    assert min(heights) > 10
    assert pages(long_chat) >= sum(heights) // PAPER


def test_a_message_that_was_not_yet_visible_is_formatted_on_paper(chat: Page) -> None:
    store(chat, *(f"**reply** {number}\n\n" + "a line\n\n" * 40 for number in range(31)), "say the end")
    assert chat.locator(".assistant strong").count() < 15
    chat.pdf()
    expect(chat.locator(".assistant strong")).to_have_count(15)


def test_only_the_messages_are_on_the_paper(chat: Page) -> None:
    send(chat, "perform think A secret thought | say an answer")
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    chat.get_by_role("button", name="Edit").click()
    chat.locator("#message").fill("a draft")
    chat.get_by_role("button", name="Options").click()
    chat.emulate_media(media="print")
    shown = chat.evaluate("""[...document.body.querySelectorAll('*')].filter((one) => one.checkVisibility()
        && [...one.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim())
        && !one.matches('.visually-hidden')).map((one) => one.textContent.trim())""")
    title = "perform think A secret thought | say an answer"
    assert shown == [title, title, "Thought for 1 s", "an answer"]
    expect(chat.get_by_role("button")).to_have_count(0)
    expect(chat.get_by_role("textbox")).to_have_count(0)


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_paper_is_white(chat: Page, colors: str) -> None:
    converse(chat, "say one")
    chat.emulate_media(media="print", color_scheme="dark" if colors == "dark" else "light")
    style = "one => [getComputedStyle(one).color, getComputedStyle(document.body).backgroundColor]"
    assert last_reply(chat).locator("p").evaluate(style) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]


@pytest.mark.parametrize("text", [CODE, WIDE], ids=["code", "table"])
def test_what_is_wider_than_a_page_is_wrapped(chat: Page, text: str) -> None:
    open_stored(chat, text)
    inner = last_reply(chat).locator("pre, table")
    expect(inner).to_be_visible()
    chat.set_viewport_size({"width": 680, "height": 900})  # as wide as a page
    chat.emulate_media(media="print")
    assert inner.evaluate("one => one.getBoundingClientRect().right") <= 680
    assert inner.evaluate("one => one.scrollWidth <= one.clientWidth + 1")
