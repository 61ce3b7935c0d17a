"""The page in the browser's language."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.steps import converse, last_reply, open_chat, send
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

TEMPLATES = Path(__file__).parent.parent.parent / "templates"
LANGUAGES = json.loads((TEMPLATES / "languages.json").read_text(encoding="utf-8"))
PLACEHOLDER = re.compile(r"\{\w+\}")


@pytest.fixture
def chinese(scripted_server: Served, open_page: OpenPage) -> Page:
    """The page of ann, connected, in a Chinese browser."""
    page = open_page(locale="zh-CN")
    open_chat(page, scripted_server.url)
    return page


def test_all_languages_have_the_same_words_and_placeholders() -> None:
    english = LANGUAGES["en"]
    for words in LANGUAGES.values():
        assert words.keys() == english.keys()
        assert all(words.values())
        for key, text in words.items():
            assert sorted(PLACEHOLDER.findall(text)) == sorted(PLACEHOLDER.findall(english[key])), key


def test_every_word_of_the_page_exists_and_is_used() -> None:
    scripts = [*(TEMPLATES / "static").glob("*.js"), TEMPLATES / "chat.html"]
    source = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    used = re.findall(r"say\('(\w+)'", source) + re.findall(r"{ words\.(\w+)", source)
    assert set(used) <= LANGUAGES["en"].keys()
    built = ("error_", "reason_", "wrong_secret")  # their keys are built from codes, or sent by the server
    for key in LANGUAGES["en"]:
        assert key.startswith(built) or key.removesuffix("_hint") in source, key


def test_a_chinese_browser_gets_a_chinese_page(chinese: Page) -> None:
    expect(chinese.locator("html")).to_have_attribute("lang", "zh-Hans")
    expect(chinese.locator("#status")).to_have_text("已连接")
    expect(chinese.get_by_role("button", name="新对话").first).to_be_visible()
    converse(chinese, "say 你好")
    expect(last_reply(chinese)).to_have_attribute("aria-label", "回复")
    expect(last_reply(chinese).locator(".usage")).to_have_text(re.compile("^1 个 token"))


def test_other_browsers_get_an_english_page(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(locale="fr-FR")
    open_chat(page, scripted_server.url)
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator("#status")).to_have_text("Connected")


def test_errors_of_the_server_are_shown_in_chinese(chinese: Page, scripted: ScriptedChat) -> None:
    scripted.admission.shrink(0)
    send(chinese, "say one")
    expect(chinese.get_by_role("alert")).to_have_text("排队的回复太多了，请稍后再试。")


def test_a_failed_login_is_shown_in_chinese(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    page.goto(scripted_server.url)
    page.get_by_label("密钥").fill("no secret")
    page.get_by_role("button", name="登录").click()
    expect(page.get_by_role("alert")).to_have_text("密钥不正确。")
