"""The page with the embedded model, which says what a script would not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import Page, expect

from models.settings import Settings
from server import create_app
from tests.browser.steps import expect_connection, last_reply, open_chat, send
from tests.support.serving import Served, serve

pytestmark = pytest.mark.slow
SECONDS = 120_000  # milliseconds, for the reply of a model on a slow machine
ELEMENTS = "node => [...node.querySelectorAll('*')].map(({ tagName, dir, className }) => [tagName, dir, className])"


@pytest.fixture
def served(settings: Settings) -> Iterator[Served]:
    embedded = replace(settings, context=1024, options={"temperature": 0})
    with serve(create_app(embedded)) as served:
        yield served


def test_a_real_reply_reads_the_same_while_it_streams_and_after_a_reload(page: Page, served: Served) -> None:
    open_chat(page, served.url)
    other = page.context.new_page()
    other.goto(page.url)
    expect_connection(other)
    send(page, "Write a Python function that says whether a number is even. Then list three uses of it.")
    expect(other.locator("#entries a")).to_have_count(1)
    other.locator("#entries a").click()
    expect(last_reply(page).locator("pre code")).to_contain_text("def ", timeout=SECONDS)
    page.evaluate("window.first = document.querySelector('.assistant .content > *')")
    for window in (page, other):
        expect(last_reply(window)).to_have_attribute("data-status", "completed", timeout=SECONDS)
    assert page.evaluate("window.first === document.querySelector('.assistant .content > *')")
    grown, text = last_reply(page).locator(".content").evaluate(ELEMENTS), last_reply(page).inner_text()
    page.reload()
    expect(last_reply(page).locator("pre code")).to_contain_text("def ")
    for window in (page, other):
        assert last_reply(window).locator(".content").evaluate(ELEMENTS) == grown
        expect(last_reply(window)).to_have_text(text, use_inner_text=True)  # which a hidden window has late
