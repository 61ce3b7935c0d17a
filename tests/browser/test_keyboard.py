"""Keys do what they say where the focus is, and nothing elsewhere."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsers import in_each_browser
from tests.browser.steps import converse, edit, entry, expect_reply, last_reply, manage, send
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

pytestmark = in_each_browser


def tab_to(page: Page, name: str) -> None:
    """Move the focus with Tab to a button."""
    button = page.get_by_role("button", name=name, exact=True)
    for _ in range(10):
        page.keyboard.press("Tab")
        if button.evaluate("one => one === document.activeElement"):
            return
    raise AssertionError(f"Tab does not reach {name}")


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_cancel_does_not_send_an_edit(chat: Page, scripted: ScriptedChat, key: str) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="Edit").click()
    chat.get_by_label("Edit message").fill("say two")
    tab_to(chat, "Cancel")
    chat.keyboard.press(key)
    expect(chat.get_by_label("Edit message")).to_be_hidden()
    expect_reply(chat, "one")
    assert len(scripted.heard) == 1


@pytest.mark.parametrize("name", ["Close", "Reset"])
def test_other_buttons_of_the_options_save_nothing(chat: Page, scripted: ScriptedChat, name: str) -> None:
    chat.get_by_role("button", name="Options").click()
    chat.get_by_label("Temperature").fill("0.5")
    if name == "Close":
        chat.get_by_label("System prompt").focus()
        chat.keyboard.press("Shift+Tab")
        chat.keyboard.press("Enter")
    else:
        tab_to(chat, name)
        chat.keyboard.press("Enter")
        expect(chat.get_by_label("Temperature")).to_have_value("")
        chat.keyboard.press("Escape")
    expect(chat.get_by_role("dialog", name="Options")).to_be_hidden()
    converse(chat, "say one")
    assert scripted.heard[-1][1] == scripted.defaults


def test_a_conversation_is_deleted_only_from_the_button_that_deletes(chat: Page) -> None:
    converse(chat, "say one")
    manage(chat, "say one", "Delete")
    chat.keyboard.press("Enter")
    expect(chat.get_by_role("alertdialog")).to_be_hidden()
    expect(entry(chat, "say one")).to_be_visible()
    manage(chat, "say one", "Delete")
    tab_to(chat, "Delete")
    chat.keyboard.press("Enter")
    expect(entry(chat, "say one")).to_have_count(0)


def test_escape_in_the_search_does_not_stop_the_reply(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    send(chat, "wait for more")
    expect_reply(chat, "for more", "in_progress")
    chat.get_by_label("Search").fill("more")
    chat.keyboard.press("Escape")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "for more")


def test_escape_in_a_new_title_does_not_stop_the_reply(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    send(chat, "wait for more")
    expect_reply(chat, "for more", "in_progress")
    manage(chat, "wait for more", "Rename")
    chat.keyboard.type("another title")
    chat.keyboard.press("Escape")
    expect(entry(chat, "wait for more")).to_be_visible()
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "for more")


def test_escape_in_an_edit_ends_only_the_edit(chat: Page) -> None:
    converse(chat, "say one")
    edit_button = chat.get_by_role("button", name="Edit")
    edit_button.click()
    chat.keyboard.press("Escape")
    expect(edit_button).to_be_focused()
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    edit(chat, "say two", 0)
    expect_reply(chat, "two")
