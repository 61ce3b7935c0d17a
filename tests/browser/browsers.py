"""Starts browsers without a window: Chromium, and Firefox over WebDriver BiDi."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from playwright.sync_api import Browser, Playwright, sync_playwright

NAMES = ["chromium", "firefox"]
PROGRAMS = {  # the first one that is installed is taken
    # The headless shell is Chromium without windows: tests take a quarter less time.
    "chromium": ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"],
    "firefox": ["firefox-esr", "firefox"],
}
PATHS = {name: next(filter(None, map(shutil.which, programs)), None) for name, programs in PROGRAMS.items()}
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--enable-features=NetworkServiceInProcess2",  # one process less, which makes pages load a little faster
]

# A mark for tests, or for a file of them, that run in each browser. Tests without it run in Chromium.
in_each_browser = pytest.mark.parametrize("browser", NAMES, indirect=True)


class Browsers:
    """The browsers of a run of tests. Each starts when it is first asked for."""

    def __init__(self, playwright: Playwright, running: ExitStack) -> None:
        self._playwright = playwright
        self._running = running
        self._started: dict[str, Browser] = {}

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[Browsers]:
        with ExitStack() as running:
            yield cls(running.enter_context(sync_playwright()), running)

    def get(self, name: str) -> Browser:
        """One of NAMES, whose program must exist."""
        if name not in self._started:
            browser = self._chromium() if name == "chromium" else self._firefox()
            self._running.callback(browser.close)
            self._started[name] = browser
        return self._started[name]

    def _chromium(self) -> Browser:
        return self._playwright.chromium.launch(executable_path=PATHS["chromium"], args=ARGUMENTS)

    # A released Firefox, not the build that Playwright patches.
    def _firefox(self) -> Browser:
        return self._playwright.firefox.launch(executable_path=PATHS["firefox"], channel="moz-firefox")


@contextmanager
def launched(name: str = "chromium") -> Iterator[Browser]:
    """One browser alone, for a program."""
    with Browsers.opened() as browsers:
        yield browsers.get(name)
