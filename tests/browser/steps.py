"""What somebody who chats does, and what is seen of it."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, ViewportSize, expect

DESKTOP: ViewportSize = {"width": 1200, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}


def log_in(page: Page, url: str, secret: str) -> None:
    """Open the page, log in and wait for the connection."""
    page.goto(url)
    page.locator("#secret").fill(secret)
    page.locator("#secret").press("Enter")
    expect(page.locator("#status")).to_have_attribute("data-state", "open")


def send(page: Page, text: str) -> None:
    """Type a message and send it with Enter."""
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def last_reply(page: Page) -> Locator:
    return page.locator("article.assistant").last


def expect_reply(page: Page, text: str, status: str = "completed") -> None:
    """See the last reply have this text and this status."""
    expect(last_reply(page)).to_have_attribute("data-status", status)
    expect(last_reply(page).locator(".content")).to_have_text(text)


def converse(page: Page, *questions: str) -> None:
    """Ask "say X" questions, each after the reply to the one before it."""
    for question in questions:
        send(page, question)
        expect_reply(page, question.removeprefix("say "))


def entry(page: Page, title: str) -> Locator:
    """The list's entry with a title."""
    return page.locator(".entry").filter(has=page.get_by_role("link", name=title, exact=True))


def manage(page: Page, title: str, action: str) -> None:
    """Choose what to do with a conversation of the list."""
    entry(page, title).hover()
    entry(page, title).get_by_role("button").click()
    page.locator("#entry-menu").get_by_text(action).click()
