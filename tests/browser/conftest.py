"""The page in Chromium, over a server whose model says what the test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page

from tests.browser.chromium import PATH, launched, log_in
from tests.conftest import ANN
from tests.serving import Served

OpenPage = Callable[[], Page]


# For a module and no longer: while Playwright runs, no asyncio test can.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if PATH is None:
        pytest.skip("no Chromium is installed: there is none on PATH")
    with launched() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a page with cookies of its own. None may fail, nor try what the Content-Security-Policy forbids."""
    wrong: list[str] = []

    def told(message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            wrong.append(message.text)

    def failed(error: Error) -> None:
        wrong.append(str(error))

    def open_page() -> Page:
        page = browser.new_page()
        page.on("console", told)
        page.on("pageerror", failed)
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    return open_page()


@pytest.fixture
def chat(scripted_server: Served, page: Page) -> Page:
    """The page with ann logged in."""
    log_in(page, scripted_server.url, ANN)
    return page
