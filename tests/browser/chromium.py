"""Chromium without a window, and the two things that are done first on every page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def launched() -> Iterator[Browser]:
    """The browser at PATH, which has to be there."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATH, args=ARGUMENTS)
        yield browser
        browser.close()


def log_in(page: Page, url: str, secret: str) -> None:
    """Open the page, log in and wait for the connection."""
    page.goto(url)
    page.get_by_label("Secret").fill(secret)
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#status")).to_have_text("Connected")


def send(page: Page, text: str) -> None:
    """Type a message and send it with Enter."""
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")
