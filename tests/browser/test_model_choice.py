"""The choice of a model, where the server has several."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.steps import converse, entry, expect_reply
from tests.support.scripted import ScriptedChat


@pytest.fixture
def scripted() -> ScriptedChat:
    chat = ScriptedChat()
    chat.other_models = ("large", "huge")
    return chat


def choice(page: Page) -> Locator:
    return page.get_by_role("combobox", name="Model")


def test_the_first_model_answers_until_another_is_chosen(chat: Page, scripted: ScriptedChat) -> None:
    expect(choice(chat)).to_have_value("scripted")
    converse(chat, "say one")
    choice(chat).select_option("large")
    converse(chat, "say two")
    assert [request.model for request in scripted.requests] == ["scripted", "large"]


def test_a_conversation_keeps_its_model(chat: Page, scripted: ScriptedChat) -> None:
    choice(chat).select_option("large")
    converse(chat, "say one")
    chat.get_by_role("button", name="New chat").click()
    expect(choice(chat)).to_have_value("large")  # the one that was chosen last
    choice(chat).select_option("huge")
    converse(chat, "say two")
    chat.reload()
    expect(choice(chat)).to_have_value("huge")
    entry(chat, "say one").get_by_role("link").click()
    expect_reply(chat, "one")
    expect(choice(chat)).to_have_value("large")
    converse(chat, "say three")
    assert [request.model for request in scripted.requests] == ["large", "huge", "large"]
