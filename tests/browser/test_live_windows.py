"""Several windows of one user, which see each other's changes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.browsers import in_each_browser
from tests.browser.conftest import OpenPage
from tests.browser.proxy import Proxy
from tests.browser.steps import (
    PHONE,
    ask_again,
    branch,
    conversation_url,
    converse,
    edit,
    entry,
    expect_connection,
    expect_reply,
    last_reply,
    manage,
    open_chat,
    send,
    texts,
    versions,
)
from tests.browser.test_connection import cut, mend
from tests.support.client import BOB
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

pytestmark = in_each_browser

# Keeps what the page sends, until `release` sends it.
HOLD_FRAMES = """() => {
    const { send } = WebSocket.prototype;
    const held = [];
    WebSocket.prototype.send = function (text) { held.push(() => send.call(this, text)); };
    window.release = () => {
        WebSocket.prototype.send = send;
        held.forEach((go) => go());
    };
}"""


@pytest.fixture
def other(chat: Page, scripted_server: Served, open_page: OpenPage) -> Page:
    """Another window of ann, on a phone."""
    page = open_page(viewport=PHONE)
    open_chat(page, scripted_server.url)
    return page


@pytest.fixture
def both(chat: Page, other: Page) -> tuple[Page, Page]:
    """Two windows on one conversation, which has a question and a reply."""
    converse(chat, "say one")
    open_same(other, chat)
    return chat, other


def open_same(other: Page, page: Page) -> None:
    """Open the conversation of another window."""
    other.evaluate("hash => { location.hash = hash; }", page.evaluate("location.hash"))
    expect(texts(other)).to_have_text(texts(page).all_text_contents())


def delete(page: Page, title: str) -> None:
    manage(page, title, "Delete")
    page.get_by_role("alertdialog").get_by_role("button", name="Delete").click()


def test_a_question_and_its_streaming_reply_come_to_the_other_window(
    both: tuple[Page, Page], scripted: ScriptedChat, scripted_server: Served
) -> None:
    chat, other = both
    send(chat, "wait for both")
    expect_reply(other, "for both", "in_progress")
    expect(texts(other)).to_have_text(["say one", "one", "wait for both", "for both"])
    scripted_server.in_loop(scripted.release)
    for page in both:
        expect_reply(page, "for both")
    converse(other, "say back")
    expect_reply(chat, "back")


def test_a_reply_is_stopped_from_the_other_window(both: tuple[Page, Page]) -> None:
    chat, other = both
    send(chat, "wait for both")
    expect_reply(other, "for both", "in_progress")
    other.get_by_role("button", name="Stop").click()
    for page in both:
        expect_reply(page, "for both", "cancelled")


def test_an_edit_and_a_chosen_version_come_to_the_other_window(both: tuple[Page, Page]) -> None:
    chat, other = both
    edit(chat, "say better", 0)
    expect_reply(other, "better")
    versions(other, "Version 2 of 2").get_by_role("button", name="Older version").click()
    for page in both:
        expect(texts(page)).to_have_text(["say one", "one"])
        expect(versions(page, "Version 1 of 2")).to_be_visible()
    ask_again(other, "one")
    for page in both:
        expect(page.locator("article.assistant").get_by_role("group", name="Version 2 of 2")).to_be_visible()


def test_a_new_conversation_is_listed_in_the_other_window(chat: Page, other: Page) -> None:
    converse(chat, "say one")
    expect(other.locator("#entries a")).to_have_text(["say one"])


def test_a_new_title_is_shown_in_the_other_window(both: tuple[Page, Page]) -> None:
    chat, other = both
    manage(chat, "say one", "Rename")
    chat.get_by_label("New title").fill("Numbers")
    chat.get_by_label("New title").press("Enter")
    expect(other.get_by_role("heading", name="Numbers")).to_be_visible()
    expect(other).to_have_title("Numbers · Parley")
    expect(other.locator("#entries a")).to_have_text(["Numbers"])


def test_a_reply_that_runs_elsewhere_is_marked_in_the_list(
    chat: Page, open_page: OpenPage, scripted: ScriptedChat, scripted_server: Served
) -> None:
    converse(chat, "say one")
    other = open_page()
    open_chat(other, scripted_server.url)
    running = entry(other, "say one").get_by_role("img", name="A reply is running")
    expect(running).to_have_count(0)
    send(chat, "wait for me")
    expect(running).to_be_visible()
    scripted_server.in_loop(scripted.release)
    expect(running).to_have_count(0)


def test_a_conversation_that_is_deleted_elsewhere_is_closed_and_its_draft_is_kept(both: tuple[Page, Page]) -> None:
    chat, other = both
    other.locator("#message").fill("half a thought")
    delete(chat, "say one")
    expect(other.locator("article")).to_have_count(0)
    expect(other.get_by_role("alert")).to_have_text("There is no such conversation any more.")
    expect(other.locator("#message")).to_have_value("half a thought")
    expect(other.locator("#entries a")).to_have_count(0)
    expect(chat.get_by_role("alert")).to_be_hidden()
    converse(other, "say two")


def test_an_edit_that_is_being_written_is_kept_when_its_question_goes(both: tuple[Page, Page]) -> None:
    chat, other = both
    converse(chat, "say two")
    expect_reply(other, "two")
    other.get_by_role("button", name="Edit").last.click()
    other.get_by_label("Edit message").fill("half an edit")
    ask_again(chat, "one")
    expect(other.locator("article")).to_have_count(2)
    expect(other.locator("#message")).to_have_value("half an edit")


def test_what_stays_is_not_drawn_again(both: tuple[Page, Page]) -> None:
    chat, other = both
    other.evaluate("window.first = document.querySelector('article')")
    other.get_by_role("button", name="Edit").first.click()
    other.get_by_label("Edit message").fill("half an edit")
    converse(chat, "say two")
    expect_reply(other, "two")
    assert other.evaluate("window.first === document.querySelector('article')")
    expect(other.get_by_label("Edit message")).to_have_value("half an edit")


def test_a_reader_who_has_scrolled_up_stays_there(chat: Page, other: Page) -> None:
    converse(chat, "say " + "a line\n" * 60 + "the end")
    open_same(other, chat)
    other.locator("#log").evaluate("log => { log.scrollTop = 100; }")
    expect(other.get_by_role("button", name="Jump to latest")).to_be_visible()
    converse(chat, "say two")
    expect_reply(other, "two")
    assert other.locator("#log").evaluate("log => log.scrollTop") == 100


@pytest.mark.parametrize("act", ["ask", "edit", "ask again", "delete"])
def test_a_window_that_was_asleep_comes_back_exact(
    act: str, chat: Page, proxy: Proxy, open_page: OpenPage, scripted: ScriptedChat
) -> None:
    other = open_page()
    open_chat(other, proxy.url)
    converse(chat, "say one", "say two")
    open_same(other, chat)
    cut(other, proxy)
    if act == "ask":
        converse(chat, "say three")
    elif act == "edit":
        edit(chat, "say better", 0)
        expect_reply(chat, "better")
    elif act == "ask again":
        ask_again(chat, "two")
        expect(versions(chat, "Version 2 of 2")).to_be_visible()
    else:
        chat.get_by_role("button", name="New chat").click()
        delete(chat, "say one")
        expect(chat.locator("#entries a")).to_have_count(0)
    mend(other, proxy)
    expect(texts(other)).to_have_text(texts(chat).all_text_contents())
    expect(other.locator(".versions")).to_have_count(chat.locator(".versions").count())
    expect(other.locator("#entries a")).to_have_text(chat.locator("#entries a").all_text_contents())


def test_a_deleted_item_is_gone_when_the_window_wakes(both: tuple[Page, Page]) -> None:
    chat, other = both
    headers = {"Origin": chat.evaluate("location.origin")}
    question = branch(chat)[0]["id"]
    assert chat.request.delete(f"{conversation_url(chat)}/items/{question}", headers=headers).ok
    other.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(texts(other)).to_have_text(["", "one"])


def test_other_users_see_nothing_of_it(chat: Page, scripted_server: Served, open_page: OpenPage) -> None:
    bob = open_page()
    frames: list[str] = []
    bob.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(str(frame))))
    open_chat(bob, scripted_server.url, BOB)
    converse(chat, "say one")
    converse(bob, "say two")
    assert not any("say one" in frame for frame in frames)
    expect(bob.locator("#entries a")).to_have_text(["say two"])


def test_two_windows_that_ask_at_the_same_time_lose_nothing(
    both: tuple[Page, Page], scripted: ScriptedChat, scripted_server: Served
) -> None:
    chat, other = both
    other.evaluate(HOLD_FRAMES)
    send(other, "say second")
    send(chat, "wait first")
    expect_reply(chat, "first", "in_progress")
    other.evaluate("window.release()")
    expect(other.get_by_role("alert")).to_have_text("A reply is being made in this conversation already.")
    expect(other.locator("#message")).to_have_value("say second")
    expect_reply(other, "first", "in_progress")
    scripted_server.in_loop(scripted.release)
    for page in both:
        expect_reply(page, "first")
        expect(last_reply(page)).to_have_attribute("data-status", "completed")
    expect_connection(other)


@pytest.mark.parametrize("begun", [False, True], ids=["new conversation", "older conversation"])
def test_a_running_reply_stays_while_the_server_has_not_stored_it(
    chat: Page, scripted: ScriptedChat, scripted_server: Served, begun: bool
) -> None:
    known: dict[str, Any] = {"status": 404, "json": {"error": {"code": "conversation_not_found", "message": "gone"}}}
    if begun:
        converse(chat, "say one")
        known = {"json": chat.request.get(f"{conversation_url(chat)}/branch").json()}
    chat.route("**/branch*", lambda route: route.fulfill(**known))
    send(chat, "wait for me")
    expect_reply(chat, "for me", "in_progress")
    with chat.expect_response("**/branch*"):
        chat.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    chat.unroute("**/branch*")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "for me")
    expect(chat.get_by_role("alert")).to_be_hidden()


def test_a_title_that_changes_while_the_conversation_is_loaded_is_shown(chat: Page, other: Page) -> None:
    converse(chat, "say one")
    held: list[Callable[[], None]] = []

    def hold(route: Route) -> None:
        response = route.fetch()
        held.append(lambda: route.fulfill(response=response))

    other.route("**/branch?*", hold, times=1)
    other.evaluate("hash => { location.hash = hash; }", chat.evaluate("location.hash"))
    while not held:
        other.wait_for_timeout(20)
    manage(chat, "say one", "Rename")
    chat.get_by_label("New title").fill("Numbers")
    chat.get_by_label("New title").press("Enter")
    expect(other.locator("#entries a")).to_have_text(["Numbers"])
    held[0]()
    expect(texts(other)).to_have_text(["say one", "one"])
    expect(other.get_by_role("heading", name="Numbers")).to_be_visible()


def test_a_choice_that_the_reader_has_left_changes_nothing_in_the_next_conversation(both: tuple[Page, Page]) -> None:
    chat, other = both
    edit(chat, "say better", 0)
    expect_reply(chat, "better")
    chosen, held = versions(chat, "Version 2 of 2"), list[Route]()
    expect(chosen).to_be_visible()
    converse(other, "say more")
    expect_reply(chat, "more")
    other.get_by_role("button", name="New chat").click()
    converse(other, "say two")
    chat.route("**/v1/conversations/conv_*", lambda route: held.append(route), times=1)
    chosen.get_by_role("button", name="Older version").click()
    while not held:
        chat.wait_for_timeout(20)
    entry(chat, "say two").get_by_role("link").click()
    expect(texts(chat)).to_have_text(["say two", "two"])
    with chat.expect_response("**/v1/conversations/conv_*"):
        held[0].continue_()
    converse(other, "say " + "a line\n" * 80 + "the end")
    expect(last_reply(chat)).to_contain_text("the end")
    expect(chat.get_by_role("button", name="Jump to latest")).to_be_hidden()


def test_a_question_that_is_refused_later_does_not_replace_a_draft(
    both: tuple[Page, Page], scripted: ScriptedChat, scripted_server: Served
) -> None:
    chat, other = both
    other.evaluate(HOLD_FRAMES)
    send(other, "say second")
    other.locator("#message").fill("half a thought")
    address = other.evaluate("location.hash")
    other.evaluate("location.hash = ''")
    expect(other.locator("article")).to_have_count(0)
    send(chat, "wait first")
    expect_reply(chat, "first", "in_progress")
    other.evaluate("window.release()")
    expect(other.get_by_role("alert")).to_have_text("A reply is being made in this conversation already.")
    scripted_server.in_loop(scripted.release)
    other.evaluate("hash => { location.hash = hash; }", address)
    expect(other.locator("#message")).to_have_value("say second\n\nhalf a thought")
