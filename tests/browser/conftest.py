"""The page in Chromium, over a server whose model says what the test wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, WebError

from tests.browser.chromium import PATH, launched
from tests.browser.proxy import Proxy
from tests.browser.steps import log_in
from tests.conftest import ANN
from tests.serving import Served


class OpenPage(Protocol):
    def __call__(self, **options: Any) -> Page: ...


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

    def failed(error: WebError) -> None:
        wrong.append(str(error.error))

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**options)
        context.on("console", told)
        context.on("weberror", failed)
        return context.new_page()

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


@pytest.fixture
def proxy(scripted_server: Served) -> Iterator[Proxy]:
    """A way to the server that can be cut."""
    with Proxy.to(scripted_server.port) as proxy:
        yield proxy
