"""The panel with the options of replies."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.steps import converse, entry, expect_reply, last_reply, send
from tests.support.scripted import ScriptedChat

ENTERED = {
    "System prompt": "Be brief.",
    "Temperature": "0.8",
    "Top-p": "0.5",
    "Length": "20",
    "Stop at": "END\nthe end",
    "Seed": "7",
}


def panel(page: Page) -> Locator:
    return page.get_by_role("dialog", name="Options")


def open_panel(page: Page) -> Locator:
    page.get_by_role("button", name=re.compile("^Options")).click()
    return panel(page)


def choose(page: Page, **fields: str) -> None:
    """Fill in fields and save; labels have underscores for blanks."""
    options = open_panel(page)
    for label, value in fields.items():
        options.get_by_label(label.replace("_", " ")).fill(value)
    options.get_by_role("button", name="Save").click()
    expect(options).to_be_hidden()


def test_options_are_sent_with_the_message(chat: Page, scripted: ScriptedChat) -> None:
    choose(chat, **{label.replace(" ", "_"): value for label, value in ENTERED.items()})
    converse(chat, "say one")
    _, options = scripted.heard[-1]
    assert (options.instructions, options.temperature, options.top_p) == ("Be brief.", 0.8, 0.5)
    assert (options.max_output_tokens, options.stop, options.seed) == (20, ("END", "the end"), 7)
    assert options.top_k == scripted.defaults.top_k


@pytest.mark.parametrize("reloaded", [False, True], ids=["same page", "after a reload"])
def test_options_stay_with_their_conversation(chat: Page, scripted: ScriptedChat, reloaded: bool) -> None:
    choose(chat, Temperature="0.8", Stop_at="END")
    converse(chat, "say zero", "say one")
    assert (scripted.heard[-1][1].temperature, scripted.heard[-1][1].stop) == (0.8, ("END",))
    chat.get_by_role("button", name="New chat").click()
    expect(open_panel(chat).get_by_label("Temperature")).to_have_value("")
    chat.keyboard.press("Escape")
    converse(chat, "say two")
    assert scripted.heard[-1][1] == scripted.defaults
    if reloaded:
        chat.reload()
    entry(chat, "say zero").get_by_role("link").click()
    expect_reply(chat, "one")
    expect(chat.get_by_role("button", name="Options, changed")).to_be_visible()
    options = open_panel(chat)
    expect(options.get_by_label("Temperature")).to_have_value("0.8")
    expect(options.get_by_label("Stop at")).to_have_value("END")
    chat.keyboard.press("Escape")
    converse(chat, "say more")
    assert (scripted.heard[-1][1].temperature, scripted.heard[-1][1].stop) == (0.8, ("END",))


def test_an_empty_field_means_the_default(chat: Page, scripted: ScriptedChat) -> None:
    choose(chat, Temperature="0.8")
    converse(chat, "say one")
    options = open_panel(chat)
    expect(options.get_by_label("Top-p")).to_have_attribute("placeholder", "0.9")
    expect(options.get_by_label("Temperature")).to_have_attribute("placeholder", "0.45")
    options.get_by_role("button", name="Reset").click()
    options.get_by_role("button", name="Save").click()
    converse(chat, "say two")
    assert scripted.heard[-1][1] == scripted.defaults


def test_options_that_are_not_saved_change_nothing(chat: Page, scripted: ScriptedChat) -> None:
    for way in ("Escape", "Close"):
        options = open_panel(chat)
        options.get_by_label("Temperature").fill("0.8")
        if way == "Escape":
            chat.keyboard.press("Escape")
        else:
            options.get_by_role("button", name="Close").click()
        expect(options).to_be_hidden()
        expect(chat.get_by_role("button", name="Options", exact=True)).to_be_focused()
    converse(chat, "say one")
    assert scripted.heard[-1][1] == scripted.defaults


@pytest.mark.parametrize(
    ("label", "value"),
    [("Temperature", "2.5"), ("Top-p", "0"), ("Length", "1.5"), ("Seed", "-1"), ("Stop at", "\n".join("abcdefghi"))],
)
def test_a_bad_value_is_shown_at_its_field(chat: Page, label: str, value: str) -> None:
    options = open_panel(chat)
    options.get_by_label(label).fill(value)
    options.get_by_role("button", name="Save").click()
    expect(options).to_be_visible()
    expect(options.get_by_label(label)).to_be_focused()
    assert options.get_by_label(label).evaluate("field => field.validationMessage")
    options.get_by_label(label).fill("1")
    options.get_by_role("button", name="Save").click()
    expect(options).to_be_hidden()


def test_an_error_of_the_server_is_shown_at_its_field(chat: Page) -> None:
    open_panel(chat).get_by_label("Temperature").evaluate("field => field.removeAttribute('max')")
    chat.keyboard.press("Escape")
    choose(chat, Temperature="3")
    send(chat, "say one")
    temperature = panel(chat).get_by_label("Temperature")
    expect(temperature).to_be_focused()
    assert "0 to 2" in temperature.evaluate("field => field.validationMessage")
    expect(chat.locator("#message")).to_have_value("say one")
    temperature.fill("1")
    panel(chat).get_by_role("button", name="Save").click()
    chat.locator("#message").press("Enter")
    expect(last_reply(chat)).to_have_text(re.compile("^one"))
