"""The login, and the link by which one came to it."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.steps import expect_connection, open_stored
from tests.support.client import ANN
from tests.support.serving import Served


def log_in(page: Page, secret: str) -> None:
    """Fill in the form that the page shows."""
    page.locator("#secret").fill(secret)
    page.locator("#secret").press("Enter")


def link_to_stored(page: Page) -> str:
    """The link of a conversation that is stored now."""
    open_stored(page, "say one")
    return page.url


def test_a_link_to_a_conversation_leads_there_through_the_login(chat: Page, scripted_server: Served) -> None:
    link = link_to_stored(chat)
    chat.context.clear_cookies()
    chat.goto("about:blank")
    chat.goto(link)
    log_in(chat, "wrong")
    expect(chat.locator("#login-error")).to_be_visible()
    log_in(chat, "wrong again")
    expect(chat.locator("#login-error")).to_be_visible()
    log_in(chat, ANN)
    expect_connection(chat)
    assert chat.url == link
    expect(chat.locator("article")).to_have_text([re.compile("say one"), re.compile("one")])


def test_a_session_that_expires_while_the_page_is_open_keeps_the_conversation(chat: Page) -> None:
    link = link_to_stored(chat)
    chat.context.clear_cookies()
    chat.locator("#search").fill("anything")  # which the server refuses
    expect(chat.locator("#secret")).to_be_visible()
    log_in(chat, ANN)
    expect_connection(chat)
    assert chat.url == link
    expect(chat.locator("article")).to_have_count(2)


def test_a_login_without_a_link_opens_a_new_chat(page: Page, scripted_server: Served) -> None:
    page.goto(scripted_server.url)
    log_in(page, "wrong")
    expect(page.locator("#login-error")).to_be_visible()
    log_in(page, ANN)
    expect_connection(page)
    assert page.url == f"{scripted_server.url}/"
    expect(page.locator("article")).to_have_count(0)


def test_a_login_after_logging_out_opens_a_new_chat(chat: Page, scripted_server: Served) -> None:
    link_to_stored(chat)
    chat.locator("#logout button").click()
    expect(chat.locator("#secret")).to_be_visible()
    log_in(chat, ANN)
    expect_connection(chat)
    assert chat.url == f"{scripted_server.url}/"
