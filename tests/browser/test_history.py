"""Conversations after reloads, in other tabs, with back and forward, and after edits."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, Route, expect

from models.chat_request import ChatRequest
from models.settings import Settings
from server import create_app
from tests.browser.browsers import in_each_browser
from tests.browser.steps import (
    STORE,
    branch,
    conversation_url,
    converse,
    entry,
    expect_connection,
    expect_reply,
    last_reply,
    open_chat,
    send,
    texts,
)
from tests.support.scripted import ScriptedChat, ScriptedReply
from tests.support.serving import Served, serve

pytestmark = in_each_browser


class ForgetfulChat(ScriptedChat):
    """Has room for three messages in the context."""

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        reply = await super().prepare(request)
        reply.left_out = max(0, len(request.messages) - 3)
        return reply


def test_a_reload_keeps_the_conversation(chat: Page) -> None:
    converse(chat, "say one", "say two")
    chat.reload()
    expect(texts(chat)).to_have_text(["say one", "one", "say two", "two"])
    converse(chat, "say three")
    expect(texts(chat)).to_have_count(6)


def test_a_reload_loads_the_conversation_only_once(chat: Page) -> None:
    converse(chat, "say one")
    loaded: list[str] = []
    chat.on("request", lambda request: loaded.append(request.url) if "/v1/conversations/" in request.url else None)
    chat.reload()
    expect_connection(chat)
    expect(texts(chat)).to_have_text(["say one", "one"])
    converse(chat, "say two")
    assert len(loaded) == 1


def test_a_reload_during_a_reply_goes_on_with_it(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    send(chat, "wait I am thinking of it.")
    expect_reply(chat, "I am thinking of it.", "in_progress")
    chat.reload()
    expect_reply(chat, "I am thinking of it.", "in_progress")
    expect(chat.get_by_role("button", name="Stop")).to_be_visible()
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "I am thinking of it.")
    assert len(scripted.heard) == 1


def test_a_part_that_has_ended_is_formatted_after_a_reload(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    send(chat, "pause say **one** | call f {}")
    expect(last_reply(chat).locator("details.call")).to_be_visible()
    while "{}" not in str(branch(chat)[-1]["output"]):  # until both parts are stored
        chat.wait_for_timeout(20)
    chat.reload()
    expect(last_reply(chat).locator("details.call")).to_be_visible()
    expect(last_reply(chat).locator("strong")).to_have_text("one")
    expect(last_reply(chat)).to_have_attribute("data-status", "in_progress")
    scripted_server.in_loop(scripted.release)
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")


def test_a_reload_in_the_wait_queue_keeps_the_position(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    send(chat, "hold on")
    expect(last_reply(chat)).to_have_text("Waiting, position 3")
    chat.reload()
    expect(last_reply(chat)).to_have_text("Waiting, position 3")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "on", "in_progress")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "on")


def test_a_reply_goes_on_while_another_conversation_is_open(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="New chat").click()
    send(chat, "wait for me")
    expect_reply(chat, "for me", "in_progress")
    entry(chat, "say one").get_by_role("link").click()
    expect(texts(chat)).to_have_text(["say one", "one"])
    converse(chat, "say two")
    entry(chat, "wait for me").get_by_role("link").click()
    expect_reply(chat, "for me", "in_progress")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "for me")
    expect(texts(chat)).to_have_text(["wait for me", "for me"])


def test_back_and_forward_open_other_conversations(chat: Page) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="New chat").click()
    converse(chat, "say two")
    chat.go_back()
    expect(texts(chat)).to_have_text(["say one", "one"])
    expect(chat).to_have_title("say one · Parley")
    chat.go_forward()
    expect(texts(chat)).to_have_text(["say two", "two"])


def test_two_tabs_show_the_same_reply(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    send(chat, "wait for both of us")
    expect_reply(chat, "for both of us", "in_progress")
    other = chat.context.new_page()
    other.goto(chat.url)
    expect_reply(other, "for both of us", "in_progress")
    scripted_server.in_loop(scripted.release)
    for tab in (chat, other):
        expect_reply(tab, "for both of us")


def test_a_reply_can_be_stopped_from_another_tab(chat: Page) -> None:
    send(chat, "wait for nobody")
    expect_reply(chat, "for nobody", "in_progress")
    other = chat.context.new_page()
    other.goto(chat.url)
    expect_reply(other, "for nobody", "in_progress")
    other.get_by_role("button", name="Stop").click()
    for tab in (other, chat):
        expect_reply(tab, "for nobody", "cancelled")


def test_a_deleted_conversation_is_an_error(chat: Page, scripted_server: Served) -> None:
    chat.goto(f"{scripted_server.url}/#conv_none")
    expect(chat.get_by_role("alert")).to_have_text("There is no such conversation any more.")
    converse(chat, "say one")


def test_a_divider_shows_where_the_context_begins(page: Page, settings: Settings) -> None:
    with serve(create_app(settings, ForgetfulChat().opened)) as served:
        open_chat(page, served.url)
        converse(page, "say one")
        expect(page.locator(".divider")).to_have_count(0)
        converse(page, "say two", "say three")
        for _ in range(2):
            after = page.locator(".divider + article .content")
            expect(page.locator(".divider")).to_have_text("The model no longer sees what is above")
            expect(after).to_have_text("one" if page.locator("article").count() == 4 else "say two")
            page.reload()
            expect(page.locator("article")).to_have_count(6)


@pytest.mark.parametrize("key", ["Enter", "button"])
def test_a_message_can_be_edited_and_asked_again(chat: Page, scripted: ScriptedChat, key: str) -> None:
    converse(chat, "say one", "say two", "say three")
    chat.get_by_role("button", name="Edit").nth(1).click()
    expect(chat.get_by_label("Edit message")).to_have_value("say two")
    chat.get_by_label("Edit message").fill("say better")
    if key == "Enter":
        chat.get_by_label("Edit message").press("Enter")
    else:
        chat.locator(".editor").get_by_role("button", name="Ask again").click()
    expect_reply(chat, "better")
    expect(texts(chat)).to_have_text(["say one", "one", "say better", "better"])
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say one", "one", "say better"]
    chat.reload()
    expect(texts(chat)).to_have_text(["say one", "one", "say better", "better"])


def test_the_first_message_can_be_edited(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one", "say two")
    chat.get_by_role("button", name="Edit").first.click()
    chat.get_by_label("Edit message").fill("say first")
    chat.get_by_label("Edit message").press("Enter")
    expect_reply(chat, "first")
    expect(texts(chat)).to_have_text(["say first", "first"])
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say first"]


def test_an_edit_can_be_cancelled(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one")
    for way in ("Escape", "Cancel"):
        chat.get_by_role("button", name="Edit").click()
        chat.get_by_label("Edit message").fill("say something else")
        if way == "Escape":
            chat.get_by_label("Edit message").press("Escape")
        else:
            chat.get_by_role("button", name="Cancel").click()
        expect(chat.get_by_role("button", name="Edit")).to_be_focused()
        expect(texts(chat)).to_have_text(["say one", "one"])
    assert len(scripted.heard) == 1


def test_escape_in_an_edit_does_not_stop_the_reply(chat: Page) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="Edit").click()
    send(chat, "wait for me")
    expect_reply(chat, "for me", "in_progress")
    chat.get_by_label("Edit message").press("Escape")
    expect(chat.get_by_label("Edit message")).to_have_count(0)
    expect_reply(chat, "for me", "in_progress")


def test_a_refused_edit_loses_nothing(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one", "say two")
    chat.get_by_role("button", name="Edit").first.click()
    chat.get_by_label("Edit message").fill("say better")
    scripted.admission.shrink(0)
    chat.get_by_label("Edit message").press("Enter")
    expect(chat.get_by_role("alert")).to_have_text("Too many replies are waiting already: try again later.")
    expect(chat.get_by_label("Edit message")).to_have_value("say better")
    chat.get_by_label("Edit message").press("Escape")
    expect(texts(chat)).to_have_text(["say one", "one", "say two", "two"])


def test_a_failed_reply_can_be_asked_again(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one")
    send(chat, "break half a reply")
    expect_reply(chat, "half a reply", "failed")
    chat.get_by_role("button", name="Ask again").last.click()
    expect_reply(chat, "half a reply", "failed")
    expect(texts(chat)).to_have_text(["say one", "one", "break half a reply", "half a reply"])
    assert len(scripted.heard) == 3
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say one", "one", "break half a reply"]


def open_long(page: Page, count: int = 250) -> None:
    """Open a new conversation with many messages; a page of the history has 100 of them."""
    contents = [f"{'say' if index % 2 == 0 else 'reply'} {index}" for index in range(count - 1)]
    page.evaluate("id => { location.hash = id; }", page.evaluate(STORE, contents))
    expect_reply(page, str(count - 2))


def test_earlier_messages_are_loaded_when_the_reader_scrolls_up(chat: Page) -> None:
    open_long(chat)
    expect(texts(chat)).to_have_count(100)
    first, earlier = texts(chat).first, chat.get_by_role("button", name="Show earlier messages")
    for oldest in ("say 50", "say 0"):
        chat.locator("#log").evaluate("log => { log.scrollTop = 0; }")
        expect(first).to_have_text(oldest)
    expect(texts(chat)).to_have_count(250)
    expect(earlier).to_be_hidden()


def test_earlier_messages_come_above_what_the_reader_sees(chat: Page) -> None:
    open_long(chat)
    chat.locator("#log").evaluate("log => { log.scrollTop = 0; }")
    expect(chat.locator("article")).to_have_count(200)
    seen = chat.evaluate(
        """() => {
            const log = document.getElementById('log').getBoundingClientRect();
            const inside = ({ top, bottom }) => bottom > log.top && top < log.bottom;
            return [...document.querySelectorAll('article .content')]
                .filter((content) => inside(content.getBoundingClientRect())).map((content) => content.textContent);
        }"""
    )
    assert "say 150" in seen


def test_earlier_messages_are_loaded_although_those_of_another_conversation_are_on_their_way(chat: Page) -> None:
    for _ in range(2):
        open_long(chat)
    held: list[Route] = []
    chat.route("**/v1/conversations/*/branch?before=*", lambda route: held.append(route), times=1)
    with chat.expect_request("**/v1/conversations/*/branch?before=*"):
        chat.locator("#log").evaluate("log => { log.scrollTop = 0; }")
    chat.go_back()
    expect(texts(chat)).to_have_count(100)
    expect_reply(chat, "248")
    chat.locator("#log").evaluate("log => { log.scrollTop = 0; }")
    expect(texts(chat)).to_have_count(200)
    held[0].abort()  # else Playwright waits for the answer, and complains when the page is gone


def test_a_new_chat_stays_empty_although_a_conversation_is_on_its_way(chat: Page) -> None:
    converse(chat, "say one")
    url = f"{conversation_url(chat)}/branch"
    held: list[Route] = []
    chat.reload()
    expect(texts(chat)).to_have_text(["say one", "one"])
    chat.route("**/branch?*", lambda route: held.append(route), times=1)
    with chat.expect_request("**/branch?*"):
        chat.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    chat.get_by_role("button", name="New chat").click()
    with chat.expect_response("**/branch?*"):
        held[0].continue_()
    for _ in range(3):  # in which the page could load it again
        chat.evaluate("url => fetch(url).then((response) => response.json())", url)
    expect(texts(chat)).to_have_count(0)


def test_a_first_question_loads_nothing(chat: Page) -> None:
    loaded: list[str] = []
    chat.on("request", lambda request: loaded.append(request.url) if "/branch" in request.url else None)
    converse(chat, "say one", "say two")
    assert not loaded


def test_a_question_is_edited_where_earlier_messages_are_not_loaded(chat: Page, scripted: ScriptedChat) -> None:
    open_long(chat)
    text = str(texts(chat).first.text_content())
    chat.route("**/v1/conversations/*/branch?before=*", lambda route: route.abort())
    chat.locator("#log").evaluate("log => { log.scrollTop = 0; }")
    chat.locator("article").first.get_by_role("button", name="Edit").click()
    expect(chat.get_by_label("Edit message")).to_have_value(text)
    chat.get_by_label("Edit message").fill("say it again")
    chat.get_by_label("Edit message").press("Enter")
    expect_reply(chat, "it again")
    expect(texts(chat)).to_have_text(["say it again", "it again"])
    messages, _ = scripted.heard[-1]
    assert len(messages) == int(text.split()[1]) + 1
    assert messages[0]["content"] == "say 0"
    chat.unroute("**/v1/conversations/*/branch?before=*")
    chat.get_by_role("button", name="Show earlier messages").click()
    expect(texts(chat)).to_have_count(102)
    expect(texts(chat).last).to_have_text("it again")
    expect(texts(chat).first).to_have_text("say 50")
