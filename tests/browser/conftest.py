"""The page in a browser, at a server with a scripted model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, WebError

from tests.browser.browsers import PATHS, Browsers
from tests.browser.proxy import Proxy
from tests.browser.steps import open_chat
from tests.support.serving import Served

Params = dict[str, object]

# Firefox reports a WebSocket that cannot connect as an error of the page, although the page handles it and tries again.
NO_CONNECTION = "Firefox can\N{RIGHT SINGLE QUOTATION MARK}t establish a connection"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run each test at one process and at two workers, but not with all other parameters: that takes too long.

    Chromium has one process, and Firefox two workers. A test of Chromium alone has both with its first parameters, and
    one of them in turn with the others.
    """
    seen: dict[str, list[Params]] = {}  # the parameters of each test, without the server
    doubled = {item for item in items if is_doubled(item, seen)}
    items[:] = [item for item in items if item not in doubled]
    config.hook.pytest_deselected(items=[*doubled])


def is_doubled(item: pytest.Item, seen: dict[str, list[Params]]) -> bool:
    """Whether the test runs with these parameters at another server."""
    params: Params = (
        dict(item.callspec.params) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    )
    server = params.pop("scripted_server", None)
    if server is None:
        return False
    if "browser" in params:
        return (params["browser"] == "firefox") is (server == "one process")
    earlier = seen.setdefault(item.nodeid.partition("[")[0], [])
    if params not in earlier:
        earlier.append(params)
    number = earlier.index(params)
    return number > 0 and (number % 2 == 0) is (server == "one process")


class OpenPage(Protocol):
    def __call__(self, **options: Any) -> Page: ...


# Its scope is this folder, since no asyncio test can run while Playwright does.
@pytest.fixture(scope="package")
def browsers() -> Iterator[Browsers]:
    with Browsers.opened() as browsers:
        yield browsers


@pytest.fixture
def browser(request: pytest.FixtureRequest, browsers: Browsers) -> Browser:
    """Chromium, or the one that `in_each_browser` chooses."""
    name: str = getattr(request, "param", "chromium")
    if PATHS[name] is None:
        pytest.skip(f"there is no {name.title()} on PATH")
    return browsers.get(name)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages with cookies of their own. No page may raise an error or break the Content-Security-Policy."""
    errors: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            errors.append(message.text)

    def on_error(error: WebError) -> None:
        if not str(error.error).startswith(NO_CONNECTION):
            errors.append(str(error.error))

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**options)
        context.on("console", on_console)
        context.on("weberror", on_error)
        return context.new_page()

    yield open_page
    for context in browser.contexts:
        context.close()
    assert not errors


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    return open_page()


@pytest.fixture
def chat(scripted_server: Served, page: Page) -> Page:
    """The page of ann, connected."""
    open_chat(page, scripted_server.url)
    return page


@pytest.fixture
def proxy(scripted_server: Served) -> Iterator[Proxy]:
    """A proxy before the server, whose connections can be cut."""
    with Proxy.to(scripted_server.port) as proxy:
        yield proxy
