"""With forced colours, as in a high-contrast mode, everything that says something is still visible."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.steps import PHONE, converse, entry, expect_reply, last_reply, open_chat, open_items, send
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served


@pytest.fixture
def chat(chat: Page) -> Page:
    chat.emulate_media(forced_colors="active", reduced_motion="reduce")
    return chat


def edges(part: Locator, pseudo: str = "") -> list[str]:
    """The sides of a part that have a line, of its border or outline."""
    script = """(one, pseudo) => {
        const style = getComputedStyle(one, pseudo);
        const isDrawn = (side) => style[`${side}Style`] !== 'none' && parseFloat(style[`${side}Width`]) > 0;
        return ['borderTop', 'borderBottom', 'borderLeft', 'borderRight', 'outline'].filter(isDrawn);
    }"""
    found: list[str] = part.evaluate(script, pseudo)
    return found


def test_the_current_conversation_is_marked(chat: Page) -> None:
    converse(chat, "say one")
    expect(entry(chat, "say one").get_by_role("link")).to_have_attribute("aria-current", "page")
    chat.locator("#message").focus()
    assert "outline" in edges(entry(chat, "say one"))
    chat.get_by_role("button", name="New chat").click()
    expect(entry(chat, "say one").get_by_role("link")).not_to_have_attribute("aria-current", "page")
    assert "outline" not in edges(entry(chat, "say one"))


def test_the_focus_of_the_composer_is_visible(chat: Page) -> None:
    chat.locator("#message").focus()
    assert "outline" in edges(chat.locator(".box"))
    chat.get_by_label("Search").focus()
    assert "outline" not in edges(chat.locator(".box"))


def test_changed_options_have_a_dot(chat: Page) -> None:
    chat.get_by_role("button", name="Options").click()
    chat.get_by_label("Temperature").fill("0.5")
    chat.get_by_role("button", name="Save").click()
    assert "borderTop" in edges(chat.get_by_role("button", name="Options, changed"), "::after")


def test_dots_and_cursors_are_drawn(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    assert "borderTop" in edges(chat.locator("#status"), "::before")
    send(chat, "wait for more")
    expect_reply(chat, "for more", "in_progress")
    assert "borderTop" in edges(chat.locator(".running"))
    cursor = last_reply(chat).locator(".content, .content *").last
    assert "borderTop" in edges(cursor, "::after")


def test_bubbles_errors_and_code_have_frames(chat: Page) -> None:
    converse(chat, "say one")
    open_items(chat, {"role": "user", "content": "say ```\ncode\n```"})
    chat.evaluate("document.getElementById('error').hidden = false")
    for part in (".user .content", ".code", "#error", "#search", "#send", ".box"):
        assert "borderTop" in edges(chat.locator(part).first), part


def test_panels_have_an_edge(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(viewport=PHONE, forced_colors="active")
    open_chat(page, scripted_server.url)
    page.get_by_role("button", name="Options").click()
    assert "borderLeft" in edges(page.get_by_role("dialog", name="Options"))
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Conversations").click()
    assert "borderRight" in edges(page.get_by_role("dialog", name="Conversations"))
