"""The page in the browser's language."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.steps import converse, last_reply, log_in, send
from tests.conftest import ANN
from tests.scripted import ScriptedChat
from tests.serving import Served

TEMPLATES = Path(__file__).parent.parent.parent / "templates"
LANGUAGES = json.loads((TEMPLATES / "languages.json").read_text(encoding="utf-8"))
PLACE = re.compile(r"\{\w+\}")


@pytest.fixture
def chinese(scripted_server: Served, open_page: OpenPage) -> Page:
    """The page with ann logged in, in a browser that speaks Chinese."""
    page = open_page(locale="zh-CN")
    log_in(page, scripted_server.url, ANN)
    return page


def test_every_language_has_the_same_words_with_the_same_places() -> None:
    english = LANGUAGES["en"]
    for words in LANGUAGES.values():
        assert words.keys() == english.keys()
        assert all(words.values())
        for key, text in words.items():
            assert sorted(PLACE.findall(text)) == sorted(PLACE.findall(english[key])), key


def test_every_word_of_the_page_is_there_and_none_for_nothing() -> None:
    scripts = [*(TEMPLATES / "static").glob("*.js"), TEMPLATES / "chat.html"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    asked = re.findall(r"say\('(\w+)'", source) + re.findall(r"{ words\.(\w+)", source)
    assert set(asked) <= LANGUAGES["en"].keys()
    composed = ("error_", "reason_", "wrong_secret")  # from codes, or named by the server
    for key in LANGUAGES["en"]:
        assert key.startswith(composed) or key.removesuffix("_hint") in source, key


def test_a_browser_that_speaks_chinese_gets_a_chinese_page(chinese: Page) -> None:
    expect(chinese.locator("html")).to_have_attribute("lang", "zh-Hans")
    expect(chinese.locator("#status")).to_have_text("已连接")
    expect(chinese.get_by_role("button", name="新对话").first).to_be_visible()
    converse(chinese, "say 你好")
    expect(last_reply(chinese)).to_have_attribute("aria-label", "回复")
    expect(last_reply(chinese).locator(".usage")).to_have_text(re.compile("^1 个 token"))


def test_other_browsers_get_an_english_page(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(locale="fr-FR")
    log_in(page, scripted_server.url, ANN)
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator("#status")).to_have_text("Connected")


def test_errors_of_the_server_are_told_in_the_pages_language(chinese: Page, scripted: ScriptedChat) -> None:
    scripted.admission.free = scripted.admission.queue = 0
    send(chinese, "say one")
    expect(chinese.get_by_role("alert")).to_have_text("排队的回复太多了，请稍后再试。")


def test_the_login_is_refused_in_the_pages_language(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    page.goto(scripted_server.url)
    page.get_by_label("密钥").fill("no secret")
    page.get_by_role("button", name="登录").click()
    expect(page.get_by_role("alert")).to_have_text("密钥不正确。")
