"""Versions: what was edited or asked again stays, and the page shows it again."""

from __future__ import annotations

import re

from playwright.sync_api import Page, Route, expect

from tests.browser.browsers import in_each_browser
from tests.browser.steps import (
    ask_again,
    branch,
    conversation_url,
    converse,
    edit,
    expect_connection,
    expect_reply,
    last_reply,
    load_branch,
    send,
    texts,
    versions,
)
from tests.browser.test_branches import said
from tests.browser.test_history import open_long
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

pytestmark = in_each_browser

TOP = "node => node.getBoundingClientRect().top"
TURNS = ["say one", "one", "say two", "two"]


def test_an_edited_question_has_versions(chat: Page) -> None:
    converse(chat, "say one", "say two")
    edit(chat, "say better", 1)
    expect_reply(chat, "better")
    versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    expect(texts(chat)).to_have_text(TURNS)
    assert said(branch(chat)) == TURNS
    versions(chat, "Version 1 of 2").get_by_role("button", name="Newer version").click()
    expect(texts(chat)).to_have_text(["say one", "one", "say better", "better"])


def test_the_button_that_edits_stands_beside_the_question_whether_it_has_versions_or_not(chat: Page) -> None:
    converse(chat, "say one")
    edit(chat, "say better", 0)
    expect_reply(chat, "better")
    chat.reload()
    expect(versions(chat, "Version 2 of 2")).to_be_visible()
    bubble = chat.locator(".user .content").bounding_box()
    button = chat.get_by_role("button", name="Edit").bounding_box()
    assert bubble
    assert button
    assert button["y"] < bubble["y"] + bubble["height"]
    assert button["x"] < bubble["x"]


def test_a_question_that_is_edited_shows_no_versions(chat: Page) -> None:
    converse(chat, "say one")
    edit(chat, "say better", 0)
    expect_reply(chat, "better")
    chat.get_by_role("button", name="Edit").click()
    expect(chat.locator(".user .versions")).to_be_hidden()
    chat.get_by_label("Edit message").press("Escape")
    expect(chat.locator(".user .versions")).to_be_visible()


def test_a_message_that_was_never_changed_has_no_versions(chat: Page) -> None:
    converse(chat, "say one", "say two")
    edit(chat, "say better", 1)
    expect_reply(chat, "better")
    expect(chat.locator("article:has(.versions)")).to_have_text([re.compile("say better")])


def test_a_reply_that_was_asked_for_again_has_versions(chat: Page) -> None:
    converse(chat, "say one", "say two")
    for count in (2, 3):
        ask_again(chat, "one")
        expect(versions(chat, f"Version {count} of {count}")).to_be_visible()
        expect(texts(chat)).to_have_text(["say one", "one"])
    versions(chat, "Version 3 of 3").get_by_role("button", name="Older version").click()
    expect(texts(chat)).to_have_text(["say one", "one"])
    expect(versions(chat, "Version 2 of 3")).to_be_visible()
    versions(chat, "Version 2 of 3").get_by_role("button", name="Older version").click()
    expect(texts(chat)).to_have_text(TURNS)
    expect(versions(chat, "Version 1 of 3").get_by_role("button", name="Older version")).to_be_disabled()


def test_versions_of_the_first_question_are_reachable(chat: Page) -> None:
    converse(chat, "say one", "say two")
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    expect(texts(chat)).to_have_text(TURNS)


def test_the_newest_messages_of_a_version_are_shown(chat: Page) -> None:
    converse(chat, "say one", "say two")
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    converse(chat, "say more")
    versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    expect(texts(chat)).to_have_text(TURNS)
    versions(chat, "Version 1 of 2").get_by_role("button", name="Newer version").click()
    expect(texts(chat)).to_have_text(["say other", "other", "say more", "more"])


def test_a_version_survives_a_reload(chat: Page) -> None:
    converse(chat, "say one")
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    expect(texts(chat)).to_have_text(["say one", "one"])
    chat.reload()
    expect(texts(chat)).to_have_text(["say one", "one"])
    expect(versions(chat, "Version 1 of 2")).to_be_visible()


def test_the_keyboard_goes_through_versions(chat: Page) -> None:
    converse(chat, "say one")
    for text in ("say two", "say three"):
        edit(chat, text, 0)
        expect_reply(chat, text.removeprefix("say "))
    versions(chat, "Version 3 of 3").get_by_role("button", name="Older version").press("Enter")
    older = versions(chat, "Version 2 of 3").get_by_role("button", name="Older version")
    expect(older).to_be_focused()
    expect(chat.locator("#announcer")).to_contain_text("Version 2 of 3")
    older.press("Enter")
    expect(versions(chat, "Version 1 of 3").get_by_role("button", name="Newer version")).to_be_focused()


def test_the_buttons_stay_where_they_are_when_the_version_changes(chat: Page) -> None:
    long = "a line\n" * 40
    for number, text in enumerate((f"say one {long}", f"say other {long}")):
        if number:
            edit(chat, text, 0)
        else:
            send(chat, text)
        expect(last_reply(chat)).to_have_attribute("data-status", "completed")
        send(chat, "say more " + long)
        expect(chat.locator("article[data-status=completed]")).to_have_count(2)
    shown = versions(chat, "Version 2 of 2")
    shown.scroll_into_view_if_needed()
    before = shown.evaluate(TOP)
    shown.get_by_role("button", name="Older version").click()
    other = versions(chat, "Version 1 of 2")
    expect(other.get_by_role("button", name="Newer version")).to_be_focused()
    assert abs(other.evaluate(TOP) - before) < 1


def test_versions_wait_while_a_reply_runs(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    converse(chat, "say one")
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    send(chat, "wait for me")
    expect_reply(chat, "for me", "in_progress")
    older = versions(chat, "Version 2 of 2").get_by_role("button", name="Older version", include_hidden=True)
    expect(older).to_be_hidden()
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "for me")
    expect(older).to_be_visible()


def test_another_reply_can_be_asked_for_anywhere(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one", "say two", "say three")
    before = branch(chat)
    ask_again(chat, "one")
    expect(texts(chat)).to_have_text(["say one", "one"])
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    assert [message["content"] for message in scripted.heard[-1][0]] == ["say one"]
    versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    expect(texts(chat)).to_have_text(said(before))


def test_versions_far_above_are_shown_where_they_are(chat: Page) -> None:
    """A page of a conversation has 100 messages: the version that is chosen begins further up."""
    converse(chat, "say first")
    open_long(chat)
    for oldest in ("say 50", "say 0"):
        chat.locator("#log").evaluate("log => { log.scrollTop = 0; }")
        expect(texts(chat).first).to_have_text(oldest)
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    expect(texts(chat).first).to_have_text("say 0")
    expect(versions(chat, "Version 1 of 2")).to_be_in_viewport()
    expect_connection(chat)


def test_enter_on_cancel_does_not_send_the_edit(chat: Page, scripted: ScriptedChat) -> None:
    converse(chat, "say one")
    chat.locator("article.user").hover()
    chat.get_by_role("button", name="Edit").click()
    chat.get_by_label("Edit message").fill("say something else")
    chat.keyboard.press("Tab")
    expect(chat.get_by_role("button", name="Cancel")).to_be_focused()
    chat.keyboard.press("Enter")
    expect(chat.get_by_label("Edit message")).to_have_count(0)
    expect(texts(chat)).to_have_text(["say one", "one"])
    assert len(scripted.heard) == 1


def test_short_versions_have_nothing_to_jump_to(chat: Page) -> None:
    converse(chat, "say one")
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    expect(versions(chat, "Version 1 of 2").get_by_role("button", name="Newer version")).to_be_focused()
    expect(chat.get_by_role("button", name="Jump to latest")).to_be_hidden()


def test_a_version_that_is_gone_loads_nothing_else(chat: Page) -> None:
    open_long(chat)
    ask_again(chat, "248")
    shown = versions(chat, "Version 2 of 2")
    loaded: list[str] = []
    chat.on("request", lambda request: loaded.append(request.url) if "before=" in request.url else None)
    error = {"error": {"code": "item_not_found", "message": "gone"}}
    chat.route("**/v1/conversations/conv_*", lambda route: route.fulfill(status=404, json=error))
    with chat.expect_response("**/branch?*"):
        shown.get_by_role("button", name="Older version").click()
    expect(chat.get_by_role("alert")).to_be_visible()
    load_branch(chat)
    expect(shown).to_be_visible()
    assert not loaded


def test_the_only_version_that_is_left_has_no_buttons(chat: Page) -> None:
    converse(chat, "say one")
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    url, _, _ = conversation_url(chat).partition("conversations")
    headers = {"Origin": chat.evaluate("location.origin")}
    reply = branch(chat)[-1]["id"]
    versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    expect(versions(chat, "Version 1 of 2")).to_be_visible()
    assert chat.request.delete(f"{url}responses/{reply}", headers=headers).ok
    chat.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(chat.locator(".versions")).to_have_count(0)
    expect(texts(chat)).to_have_text(["say one", "one"])


def hold_changes(page: Page) -> list[Route]:
    """Keeps the requests that change a conversation: they go on when the test says so."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        if route.request.method == "POST":
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/conversations/*", hold)
    return held


def test_a_version_that_comes_late_leaves_the_focus_where_the_user_writes(chat: Page) -> None:
    converse(chat, "say one")
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    held = hold_changes(chat)
    with chat.expect_request("**/v1/conversations/*"):
        versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    chat.locator("#message").press_sequentially("half a ")
    held[0].continue_()
    expect(versions(chat, "Version 1 of 2")).to_be_visible()
    expect(chat.locator("#announcer")).to_contain_text("Version 1 of 2")
    expect(chat.locator("#message")).to_be_focused()


def test_a_version_that_comes_late_does_not_keep_another_conversation_from_following(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    converse(chat, "say one")
    edit(chat, "say other", 0)
    expect_reply(chat, "other")
    held = hold_changes(chat)
    with chat.expect_request("**/v1/conversations/*"):
        versions(chat, "Version 2 of 2").get_by_role("button", name="Older version").click()
    chat.get_by_role("button", name="New chat").click()
    send(chat, "wait " + "a line\n" * 60 + "the end")
    expect(last_reply(chat)).to_contain_text("the end")
    with chat.expect_response("**/v1/conversations/*"):
        held[0].continue_()
    scripted_server.in_loop(scripted.release)
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    expect(last_reply(chat).locator(".usage")).to_be_in_viewport()
    expect(chat.get_by_role("button", name="Jump to latest")).to_be_hidden()
