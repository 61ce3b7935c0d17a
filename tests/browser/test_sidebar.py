"""The list of conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.steps import PHONE, converse, entry, expect_reply, manage, open_chat, pass_time, send
from tests.support.client import BOB
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served


def titles(page: Page) -> Locator:
    return page.locator("#entries a")


def begin(page: Page, *messages: str) -> None:
    """Send each message in a new conversation."""
    for message in messages:
        page.get_by_role("button", name="New chat").click()
        converse(page, message)


def test_a_conversation_is_listed_when_it_begins(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    expect(chat.locator("#entries-note")).to_have_text("Your conversations will be listed here.")
    send(chat, "wait for me")
    expect(titles(chat)).to_have_text(["wait for me"])
    expect(chat.locator("#entries-note")).to_be_empty()
    expect(chat.get_by_role("heading", name="wait for me")).to_be_visible()
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "for me")


def test_the_newest_conversation_comes_first(chat: Page) -> None:
    begin(chat, "say one", "say two", "say three")
    expect(titles(chat)).to_have_text(["say three", "say two", "say one"])
    entry(chat, "say one").get_by_role("link").click()
    expect_reply(chat, "one")
    converse(chat, "say more")
    expect(titles(chat)).to_have_text(["say one", "say three", "say two"])


def test_the_open_conversation_is_marked(chat: Page) -> None:
    begin(chat, "say one", "say two")
    current = chat.locator("#entries [aria-current=page]")
    expect(current).to_have_text(["say two"])
    entry(chat, "say one").get_by_role("link").click()
    expect(current).to_have_text(["say one"])
    chat.get_by_role("button", name="New chat").click()
    expect(current).to_have_count(0)


def test_conversations_of_other_users_are_not_listed(chat: Page, scripted_server: Served, open_page: OpenPage) -> None:
    begin(chat, "say one")
    other = open_page()
    open_chat(other, scripted_server.url, BOB)
    expect(other.locator("#entries-note")).to_have_text("Your conversations will be listed here.")


def test_a_long_list_is_loaded_while_it_is_scrolled(chat: Page) -> None:
    chat.evaluate("""() => new Promise((resolve) => {
        const socket = new WebSocket('ws', ['chat.v2']);
        let asked = 0;
        const ask = () => socket.send(JSON.stringify(
            { type: 'response.create', input: `say ${++asked}`, conversation: 'new' }));
        socket.onmessage = ({ data }) => {
            const { type } = JSON.parse(data);
            if (type === 'parley.session.created') ask();
            if (type === 'response.completed') asked < 120 ? ask() : resolve();
        };
    })""")
    chat.reload()
    expect(titles(chat)).to_have_count(50)
    titles(chat).last.scroll_into_view_if_needed()
    expect(titles(chat)).to_have_count(100)
    titles(chat).last.focus()
    expect(titles(chat)).to_have_count(120)
    assert titles(chat).all_inner_texts() == [f"say {number}" for number in range(120, 0, -1)]


def test_a_list_that_is_cut_off_is_an_error(chat: Page) -> None:
    chat.route("**/v1/conversations?*", lambda route: route.fulfill(body='{"data": ['))
    chat.reload()
    expect(chat.locator("#entries-note")).to_have_text("The list could not be loaded.")


def search_for(page: Page, words: str) -> None:
    """Type into the search field, and skip the time for which the page waits for more words."""
    page.get_by_label("Search").fill(words)
    pass_time(page, 1)


def test_a_search_finds_titles_and_messages(chat: Page) -> None:
    begin(chat, "say apples and pears", "say plums")
    converse(chat, "say cherries")
    chat.clock.install()
    search_for(chat, "apples")
    expect(titles(chat)).to_have_text(["say apples and pears"])
    search_for(chat, "cherries")
    expect(titles(chat)).to_have_text(["say plums"])
    search_for(chat, "bananas")
    expect(titles(chat)).to_have_count(0)
    expect(chat.get_by_role("status")).to_have_text("Nothing found.")
    search_for(chat, "")
    expect(titles(chat)).to_have_count(2)


@pytest.mark.parametrize("way", ["Enter", "blur"])
def test_a_conversation_can_be_renamed(chat: Page, way: str) -> None:
    begin(chat, "say one", "say two")
    manage(chat, "say one", "Rename")
    title = chat.get_by_label("New title")
    expect(title).to_be_focused()
    title.fill("Numbers")
    if way == "Enter":
        title.press("Enter")
        expect(entry(chat, "Numbers").get_by_role("link")).to_be_focused()
    else:
        chat.get_by_label("Search").click()
    expect(titles(chat)).to_have_text(["say two", "Numbers"])
    chat.reload()
    expect(titles(chat)).to_have_text(["say two", "Numbers"])


def test_the_open_conversation_shows_its_new_title(chat: Page) -> None:
    begin(chat, "say one")
    manage(chat, "say one", "Rename")
    chat.get_by_label("New title").fill("Numbers")
    chat.get_by_label("New title").press("Enter")
    expect(chat.get_by_role("heading", name="Numbers")).to_be_visible()
    expect(chat).to_have_title("Numbers · Parley")


def test_a_rename_can_be_cancelled(chat: Page) -> None:
    begin(chat, "say one")
    manage(chat, "say one", "Rename")
    chat.get_by_label("New title").fill("Numbers")
    chat.get_by_label("New title").press("Escape")
    expect(titles(chat)).to_have_text(["say one"])
    chat.reload()
    expect(titles(chat)).to_have_text(["say one"])


def test_a_conversation_is_deleted_after_confirmation(chat: Page) -> None:
    begin(chat, "say one", "say two")
    manage(chat, "say one", "Delete")
    question = chat.get_by_role("alertdialog", name="Delete this conversation?")
    expect(question).to_contain_text("“\u2068say one\u2069” will be gone for good.")
    question.get_by_role("button", name="Cancel").click()
    expect(titles(chat)).to_have_text(["say two", "say one"])
    manage(chat, "say one", "Delete")
    question.get_by_role("button", name="Delete").click()
    expect(titles(chat)).to_have_text(["say two"])
    expect(titles(chat)).to_be_focused()
    chat.reload()
    expect(titles(chat)).to_have_text(["say two"])


def test_deleting_the_open_conversation_opens_a_new_one(chat: Page, scripted: ScriptedChat) -> None:
    send(chat, "wait for me")
    expect_reply(chat, "for me", "in_progress")
    manage(chat, "wait for me", "Delete")
    chat.get_by_role("alertdialog").get_by_role("button", name="Delete").click()
    expect(chat.locator("#messages")).to_be_empty()
    expect(chat.locator("#entries-note")).to_have_text("Your conversations will be listed here.")
    assert scripted.running == 0
    converse(chat, "say one")


@pytest.mark.parametrize(("action", "ending"), [("Export as Markdown", "md"), ("Export as JSON", "json")])
def test_a_conversation_can_be_exported(chat: Page, action: str, ending: str) -> None:
    begin(chat, "say one")
    with chat.expect_download() as download:
        manage(chat, "say one", action)
    assert download.value.suggested_filename.endswith(f".{ending}")
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert "say one" in text
    if ending == "json":
        assert [item["content"][0]["text"] for item in json.loads(text)["items"]] == ["say one", "one"]


def test_the_list_is_a_drawer_on_a_phone(chat: Page) -> None:
    begin(chat, "say one", "say two")
    chat.set_viewport_size(PHONE)
    drawer, opener = chat.get_by_role("dialog"), chat.get_by_role("button", name="Conversations")
    expect(titles(chat).first).to_be_hidden()
    opener.click()
    expect(drawer).to_be_visible()
    chat.keyboard.press("Escape")
    expect(drawer).to_be_hidden()
    expect(opener).to_be_focused()
    opener.click()
    for _ in range(20):  # the focus stays in the drawer, and perhaps the bars of the browser
        chat.keyboard.press("Tab")
        assert chat.evaluate("document.activeElement.closest('.room')") is None
    entry(chat, "say one").get_by_role("link").click()
    expect(drawer).to_be_hidden()
    expect_reply(chat, "one")
    chat.set_viewport_size({"width": 1200, "height": 800})
    expect(titles(chat).first).to_be_visible()


def test_escape_in_the_drawer_does_not_stop_the_reply(chat: Page, scripted: ScriptedChat) -> None:
    chat.set_viewport_size(PHONE)
    send(chat, "wait for me")
    expect_reply(chat, "for me", "in_progress")
    chat.get_by_role("button", name="Conversations").click()
    chat.keyboard.press("Escape")
    expect(chat.get_by_role("dialog")).to_be_hidden()
    expect_reply(chat, "for me", "in_progress")
    chat.keyboard.press("Escape")
    expect_reply(chat, "for me", "cancelled")
