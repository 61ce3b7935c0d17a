"""Steps of tests: what a user does on the page, and what the page must show then."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, ViewportSize, expect

from models.validation import Json
from tests.support.client import ANN

DESKTOP: ViewportSize = {"width": 1200, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}

# Stores a conversation that begins with some items, and resolves to its id.
STORE_ITEMS = """(input) => new Promise((resolve) => {
    const socket = new WebSocket('ws', ['chat.v2']);
    socket.onmessage = ({ data }) => {
        const { type, response } = JSON.parse(data);
        const request = { type: 'response.create', input, conversation: 'new' };
        if (type === 'parley.session.created') socket.send(JSON.stringify(request));
        if (type === 'response.completed') resolve(response.conversation.id);
    };
})"""
STORE = f"""(contents) => {{
    const input = contents.map((content, index) => ({{ role: index % 2 ? 'assistant' : 'user', content }}));
    return ({STORE_ITEMS})(input);
}}"""


def open_chat(page: Page, url: str, secret: str = ANN) -> None:
    """Log in without the form, open the page and wait for the connection."""
    page.request.post(f"{url}/login", form={"secret": secret}, max_redirects=0)  # which sets the cookie of the page
    page.goto(url)
    expect_connection(page)


def log_in(page: Page, url: str, secret: str) -> None:
    """Open the page, log in with the form and wait for the connection."""
    page.goto(url)
    page.locator("#secret").fill(secret)
    page.locator("#secret").press("Enter")
    expect_connection(page)


def expect_connection(page: Page) -> None:
    expect(page.locator("#status")).to_have_attribute("data-state", "open")


def pass_time(page: Page, seconds: float) -> None:
    """Set the clock of the page forward, so that its timers run. To be used after `page.clock.install()`."""
    page.clock.fast_forward(int(1000 * seconds))


def send(page: Page, text: str) -> None:
    """Type a message and send it with Enter."""
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def last_reply(page: Page) -> Locator:
    return page.locator("article.assistant").last


def expect_reply(page: Page, text: str, status: str = "completed") -> None:
    """Wait until the last reply has a text and a status."""
    expect(last_reply(page)).to_have_attribute("data-status", status)
    expect(last_reply(page).locator(".content")).to_have_text(text)


def texts(page: Page) -> Locator:
    """The texts of all messages and replies."""
    return page.locator("article .content")


def versions(page: Page, label: str) -> Locator:
    """The buttons of a message that is shown in a version."""
    return page.get_by_role("group", name=label, exact=True)


def converse(page: Page, *messages: str) -> None:
    """Send messages "say X", each after the reply to the one before it."""
    for message in messages:
        send(page, message)
        expect_reply(page, message.removeprefix("say "))


def open_stored(page: Page, *contents: str) -> None:
    """Open a new conversation with messages of the user and the assistant in turn, and the reply to the last one."""
    page.evaluate("id => { location.hash = id; }", page.evaluate(STORE, contents))
    expect(page.locator("article")).to_have_count(len(contents) + 1)


def open_items(page: Page, *items: Json) -> None:
    """Open a new conversation with some items, and the reply to the last one."""
    page.evaluate("id => { location.hash = id; }", page.evaluate(STORE_ITEMS, items))
    expect(page.locator("article")).to_have_count(len(items) + 1)


def edit(page: Page, text: str, number: int) -> None:
    """Edit a question, by its number from 0, and ask it again."""
    page.locator("article.user").nth(number).hover()
    page.get_by_role("button", name="Edit").nth(number).click()
    page.get_by_label("Edit message").fill(text)
    page.get_by_label("Edit message").press("Enter")


def ask_again(page: Page, text: str) -> None:
    """Ask for another reply instead of the one with a text."""
    reply = page.locator("article.assistant").filter(has=page.locator(".content").get_by_text(text, exact=True))
    reply.hover()
    reply.get_by_role("button", name="Ask again").click()


def branch(page: Page) -> list[Json]:
    """The current branch of the open conversation, as the server has it, but for the versions beside it."""
    nodes: list[Json] = page.request.get(f"{conversation_url(page)}/branch").json()["data"]
    for node in nodes:
        del node["parley"]["versions"]
    return nodes


def load_branch(page: Page) -> None:
    """Load what the page loads to show a conversation; by then, it shows what it has loaded before."""
    page.evaluate("url => fetch(url).then((response) => response.json())", f"{conversation_url(page)}/branch?")


def show_branch(page: Page, leaf: str) -> None:
    """Make the branch that ends at a node the current one, and load the page again."""
    headers = {"Origin": page.evaluate("location.origin")}  # which browsers send, and requests of tests do not
    assert page.request.post(conversation_url(page), data={"leaf": leaf}, headers=headers).ok
    page.reload()


def conversation_url(page: Page) -> str:
    """The URL of the open conversation."""
    address, _, id = page.url.partition("#")
    return f"{address.rstrip('/')}/v1/conversations/{id}"


def entry(page: Page, title: str) -> Locator:
    """The entry of the list with a title."""
    return page.locator(".entry").filter(has=page.get_by_role("link", name=title, exact=True))


def manage(page: Page, title: str, action: str) -> None:
    """Choose an action in the menu of an entry."""
    entry(page, title).hover()
    entry(page, title).get_by_role("button").click()
    page.locator("#entry-menu").get_by_text(action).click()


def clipboard(page: Page) -> str:
    """The text of the clipboard."""
    message = page.get_by_label("Message", exact=True)
    message.fill("")
    message.press("ControlOrMeta+v")
    return message.input_value()


def copy(page: Page, button: str) -> None:
    """Click on a button that copies something, and wait until the page has announced it."""
    page.get_by_role("button", name=button, exact=True).wait_for()
    pass_time(page, 1)  # until the reply is announced
    page.get_by_role("button", name=button, exact=True).click()
    pass_time(page, 1)  # until the next announcement
    expect(page.locator("#announcer")).to_have_text(re.compile("Copied"))
