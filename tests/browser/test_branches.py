"""Editing and asking again add branches: what was said before stays."""

from __future__ import annotations

from playwright.sync_api import Page, WebSocketRoute, expect

from models.validation import Json
from tests.browser.browsers import in_each_browser
from tests.browser.steps import (
    ask_again,
    branch,
    converse,
    edit,
    expect_connection,
    expect_reply,
    send,
    show_branch,
)
from tests.support.scripted import ScriptedChat

pytestmark = in_each_browser


def said(nodes: list[Json]) -> list[str]:
    """The texts of a branch."""
    outputs = [node["output"] if node.get("object") == "response" else [node] for node in nodes]
    return ["".join(item["content"][0]["text"] for item in output) for output in outputs]


def open_other(chat: Page) -> Page:
    """Another window with the same conversation, which hears of no changes, as if they were on their way."""

    def hold_back(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()
        server.on_message(lambda frame: None if '"parley.conversation.' in str(frame) else socket.send(frame))

    other = chat.context.new_page()
    other.route_web_socket("**/ws", hold_back)
    other.goto(chat.url)
    expect_connection(other)
    expect(other.locator("article")).to_have_count(chat.locator("article").count())
    return other


def expect_still_there(page: Page, before: list[Json]) -> None:
    """Check that an earlier branch can still be shown, with all that it had."""
    show_branch(page, before[-1]["id"])
    expect(page.locator("article .content")).to_have_text(said(before))
    assert branch(page) == before


def test_an_edit_deletes_nothing(chat: Page) -> None:
    converse(chat, "say one", "say two", "say three")
    before = branch(chat)
    edit(chat, "say better", 1)
    expect_reply(chat, "better")
    after = branch(chat)
    assert said(after) == ["say one", "one", "say better", "better"]
    assert after[:2] == before[:2]
    expect_still_there(chat, before)


def test_an_edit_of_the_first_question_deletes_nothing(chat: Page) -> None:
    converse(chat, "say one", "say two")
    before = branch(chat)
    edit(chat, "say better", 0)
    expect_reply(chat, "better")
    assert said(branch(chat)) == ["say better", "better"]
    expect_still_there(chat, before)


def test_asking_again_adds_another_reply_to_the_same_question(chat: Page) -> None:
    converse(chat, "say one", "say two")
    before = branch(chat)
    for _ in range(2):  # with the question as it was sent, then as it was loaded
        earlier = branch(chat)[-1]["id"]
        ask_again(chat, "two")
        while (after := branch(chat))[-1]["id"] == earlier or after[-1]["status"] != "completed":
            chat.wait_for_timeout(20)
        assert said(after) == said(before)
        assert after[:3] == before[:3]
        chat.reload()
        expect_reply(chat, "two")
    expect_still_there(chat, before)


def test_a_window_with_an_older_state_that_asks_again_adds_a_branch(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one")
    other = open_other(chat)
    converse(chat, "say two", "say three", "say four")
    before = branch(chat)
    assert len(before) == 8
    ask_again(other, "one")
    expect(other.locator("article[data-status=in_progress]")).to_have_count(0)
    expect_reply(other, "one")
    assert said(branch(other)) == ["say one", "one"]
    assert branch(other)[-1]["id"] != before[1]["id"]
    assert [message["content"] for message in scripted.heard[-1][0]] == ["say one"]
    expect_still_there(other, before)


def test_a_window_with_an_older_state_goes_on_from_what_it_shows(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one")
    other = open_other(chat)
    converse(chat, "say two")
    before = branch(chat)
    send(other, "say another")
    expect_reply(other, "another")
    assert [message["content"] for message in scripted.heard[-1][0]] == ["say one", "one", "say another"]
    assert said(branch(other)) == ["say one", "one", "say another", "another"]
    expect_still_there(other, before)


def test_an_edit_that_is_not_sent_becomes_the_draft_when_another_conversation_is_opened(chat: Page) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="Edit").click()
    chat.get_by_label("Edit message").fill("half an edit")
    chat.get_by_role("button", name="New chat").click()
    expect(chat.locator("#message")).to_have_value("")
    chat.go_back()
    expect(chat.locator("#message")).to_have_value("half an edit")
