"""What stays: conversations over reloads, in other tabs, behind back and forward."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import pytest
from playwright.sync_api import Locator, Page, expect

from models.admission import Ticket
from models.item import Message
from models.options import Options
from models.reply import Event, Started
from models.settings import Settings
from server import create_app
from tests.browser.steps import converse, entry, expect_reply, last_reply, log_in, send
from tests.conftest import ANN
from tests.scripted import ScriptedChat
from tests.serving import Served, serve


class ForgetfulChat(ScriptedChat):
    """Leaves all but the last two messages out."""

    async def reply(
        self, ticket: Ticket, messages: Sequence[Message], options: Options, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        async for event in super().reply(ticket, messages, options):
            yield Started(event.usage, max(0, len(messages) - 3)) if isinstance(event, Started) else event


def texts(page: Page) -> Locator:
    """What was said, message by message."""
    return page.locator("article .content")


def test_a_reload_keeps_the_conversation(chat: Page) -> None:
    converse(chat, "say one", "say two")
    chat.reload()
    expect(texts(chat)).to_have_text(["say one", "one", "say two", "two"])
    converse(chat, "say three")
    expect(texts(chat)).to_have_count(6)


def test_a_conversation_is_loaded_once(chat: Page) -> None:
    converse(chat, "say one")
    loaded: list[str] = []
    chat.on("request", lambda request: loaded.append(request.url) if "/v1/conversations/" in request.url else None)
    chat.reload()
    converse(chat, "say two")
    assert len(loaded) == 1


def test_a_reload_in_mid_reply_goes_on_with_it(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    send(chat, "wait I am thinking of it.")
    expect_reply(chat, "I am thinking of it.", "in_progress")
    chat.reload()
    expect_reply(chat, "I am thinking of it.", "in_progress")
    expect(chat.get_by_role("button", name="Stop")).to_be_visible()
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "I am thinking of it.")
    assert len(scripted.heard) == 1


def test_a_reload_in_the_queue_keeps_the_place(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
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


def test_back_and_forward_lead_through_conversations(chat: Page) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="New chat").click()
    converse(chat, "say two")
    chat.go_back()
    expect(texts(chat)).to_have_text(["say one", "one"])
    expect(chat).to_have_title("say one · Parley")
    chat.go_forward()
    expect(texts(chat)).to_have_text(["say two", "two"])


def test_two_tabs_on_one_reply_show_it_whole(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
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


def test_who_asks_while_another_tab_is_answered_sees_that_reply(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    converse(chat, "say one")
    other = chat.context.new_page()
    other.goto(chat.url)
    expect_reply(other, "one")
    send(chat, "wait for it")
    expect_reply(chat, "for it", "in_progress")
    send(other, "say two")
    expect(other.get_by_role("alert")).to_have_text("A reply is being made in this conversation already.")
    expect(other.get_by_label("Message", exact=True)).to_have_value("say two")
    expect_reply(other, "for it", "in_progress")
    scripted_server.in_loop(scripted.release)
    expect_reply(other, "for it")
    expect(texts(other)).to_have_text(["say one", "one", "wait for it", "for it"])


def test_what_another_tab_said_shows_when_a_tab_is_looked_at_again(chat: Page) -> None:
    converse(chat, "say one")
    other = chat.context.new_page()
    other.goto(chat.url)
    converse(other, "say two")
    expect(texts(chat)).to_have_count(2)
    chat.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(texts(chat)).to_have_text(["say one", "one", "say two", "two"])


def test_a_conversation_that_is_gone_is_told(chat: Page, scripted_server: Served) -> None:
    chat.goto(f"{scripted_server.url}/#conv_none")
    expect(chat.get_by_role("alert")).to_have_text("There is no such conversation any more.")
    converse(chat, "say one")


def test_a_line_says_from_where_on_the_model_sees(page: Page, settings: Settings) -> None:
    with serve(create_app(settings, ForgetfulChat().opened)) as served:
        log_in(page, served.url, ANN)
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
def test_a_question_can_be_edited_and_asked_again(chat: Page, scripted: ScriptedChat, key: str) -> None:
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


def test_the_first_question_can_be_edited(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one", "say two")
    chat.get_by_role("button", name="Edit").first.click()
    chat.get_by_label("Edit message").fill("say first")
    chat.get_by_label("Edit message").press("Enter")
    expect_reply(chat, "first")
    expect(texts(chat)).to_have_text(["say first", "first"])
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say first"]


def test_an_edit_can_be_given_up(chat: Page, scripted: ScriptedChat) -> None:
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


def test_giving_up_an_edit_stops_no_reply(chat: Page) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="Edit").click()
    send(chat, "wait for me")
    expect_reply(chat, "for me", "in_progress")
    chat.get_by_label("Edit message").press("Escape")
    expect(chat.get_by_label("Edit message")).to_have_count(0)
    expect_reply(chat, "for me", "in_progress")


def test_an_edit_that_is_refused_loses_nothing(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one", "say two")
    chat.get_by_role("button", name="Edit").first.click()
    chat.get_by_label("Edit message").fill("say better")
    scripted.admission.queue = scripted.admission.free = 0
    chat.get_by_label("Edit message").press("Enter")
    expect(chat.get_by_role("alert")).to_have_text("Too many replies are waiting already: try again later.")
    expect(chat.get_by_label("Edit message")).to_have_value("say better")
    chat.get_by_label("Edit message").press("Escape")
    expect(texts(chat)).to_have_text(["say one", "one", "say two", "two"])


def test_what_failed_can_be_asked_again(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one")
    send(chat, "break half a reply")
    expect_reply(chat, "half a reply", "failed")
    again = chat.get_by_role("button", name="Ask again")
    expect(again).to_have_count(1)
    again.click()
    expect_reply(chat, "half a reply", "failed")
    expect(texts(chat)).to_have_text(["say one", "one", "break half a reply", "half a reply"])
    assert len(scripted.heard) == 3
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say one", "one", "break half a reply"]
