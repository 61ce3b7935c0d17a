"""What a user has written and the server does not have is never lost."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.proxy import Proxy
from tests.browser.steps import ask_again, conversation_url, converse, open_chat, send, texts, versions
from tests.browser.test_connection import cut, mend


def write_edit(page: Page, text: str) -> None:
    """Write an edit of the last question, without sending it."""
    page.get_by_role("button", name="Edit").last.click()
    page.get_by_label("Edit message").fill(text)


def begin_new_chat(page: Page) -> None:
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)


def come_back(page: Page) -> None:
    """Open the conversation again that was open before a new chat."""
    page.go_back()
    expect(page.locator("article").last).to_be_visible()


def delete(page: Page, proxy: Proxy) -> None:
    """Delete the open conversation, as another device does."""
    server = f"http://127.0.0.1:{proxy.server_port}"
    url = conversation_url(page).replace(proxy.url, server)
    assert page.request.delete(url, headers={"Origin": server}).ok


def test_a_question_that_comes_back_stands_before_what_was_written_since(page: Page, proxy: Proxy) -> None:
    open_chat(page, proxy.url)
    converse(page, "say one")
    proxy.lost.add("up")
    send(page, "say two")
    page.locator("#message").fill("and more")
    begin_new_chat(page)
    cut(page, proxy)
    mend(page, proxy)
    come_back(page)
    expect(page.locator("#message")).to_have_value("say two\n\nand more")


def test_a_question_that_was_left_without_a_connection_comes_back(page: Page, proxy: Proxy) -> None:
    open_chat(page, proxy.url)
    converse(page, "say one")
    proxy.lost.add("up")
    send(page, "say two")
    cut(page, proxy)
    begin_new_chat(page)
    mend(page, proxy)
    come_back(page)
    expect(page.locator("#message")).to_have_value("say two")


def test_an_edit_in_a_conversation_that_is_left_becomes_its_draft(chat: Page) -> None:
    converse(chat, "say one")
    write_edit(chat, "half an edit")
    begin_new_chat(chat)
    expect(chat.locator("#message")).to_have_value("")
    come_back(chat)
    expect(chat.locator("#message")).to_have_value("half an edit")


def test_an_edit_below_a_reply_that_is_asked_for_again_becomes_a_draft(chat: Page) -> None:
    converse(chat, "say one", "say two")
    write_edit(chat, "half an edit")
    ask_again(chat, "one")
    expect(versions(chat, "Version 2 of 2")).to_be_visible()
    expect(texts(chat)).to_have_text(["say one", "one"])
    expect(chat.locator("#message")).to_have_value("half an edit")


def test_texts_in_a_conversation_that_was_deleted_meanwhile_go_to_a_new_one(page: Page, proxy: Proxy) -> None:
    open_chat(page, proxy.url)
    converse(page, "say one")
    write_edit(page, "half an edit")
    page.locator("#message").fill("half a thought")
    proxy.cut()
    delete(page, proxy)
    mend(page, proxy)
    expect(page.get_by_role("alert")).to_have_text("There is no such conversation any more.")
    expect(page.locator("#message")).to_have_value("half an edit\n\nhalf a thought")


def test_a_question_to_a_conversation_that_is_deleted_meanwhile_goes_to_a_new_one(page: Page, proxy: Proxy) -> None:
    open_chat(page, proxy.url)
    converse(page, "say one")
    proxy.lost.add("up")
    send(page, "say two")
    delete(page, proxy)
    expect(page.get_by_role("alert")).to_have_text("There is no such conversation any more.")
    expect(page.locator("#message")).to_have_value("say two")
