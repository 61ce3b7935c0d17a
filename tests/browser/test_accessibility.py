"""Accessibility: axe-core finds no violations, the keyboard is enough, targets are large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Page, ViewportSize, expect

from models.validation import Json
from tests.browser.conftest import OpenPage
from tests.browser.steps import (
    DESKTOP,
    PHONE,
    ask_again,
    converse,
    edit,
    entry,
    expect_reply,
    last_reply,
    log_in,
    open_chat,
    open_items,
    send,
)
from tests.support.client import ANN
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

FORMATTED = (
    """\
# A heading

Some **bold** words, `code` and [a link](https://example.com/).

> A quotation

| a | b |
|---|---|
| 1 | 2 |

```python
print("hello")
```

- [ ] to do
- [x] done

https://example.com/ and ![a picture](https://example.com/x.png), with a note[^1] and $x^2$.

[^1]: The note.
"""
    + f"""
| {"| ".join(["heading"] * 20)}|
| {"| ".join(["---"] * 20)}|
| {"| ".join(["cell"] * 20)}|

    {"a long line of code " * 20}
"""
)


RICH = (
    """\
- [x] a task that is done
- [ ] one that is not

A footnote[^1], a formula \\(a^2\\), and a long one:

$$\\sum_{n=1}^{\\infty} \\frac{1}{n^2} = \\frac{\\pi^2}{6}$$

[^1]: With a text.

https://example.com/ ![a picture](https://example.com/picture.png)

```python
"""
    + "print('one of many lines')\n" * 60
    + "```\n"
)


def expect_accessible(page: Page) -> None:
    # Parts that are fading in have less contrast. The mark of a running reply pulses without an end.
    page.evaluate("""Promise.allSettled(document.getAnimations()
        .filter(({ effect }) => effect.getComputedTiming().endTime < Infinity)
        .map(({ finished }) => finished))""")
    results = Axe().run(page)
    assert not results.response["violations"], results.generate_report()


def empty(page: Page) -> None:
    """A new conversation."""


def formatted(page: Page) -> None:
    send(page, f"say {FORMATTED}")
    expect(last_reply(page)).to_have_attribute("data-status", "completed")


def rich(page: Page) -> None:
    """Tasks, footnotes, formulas, and code that is folded: once as it came and once as it was stored."""
    open_items(page, {"role": "user", "content": "a question"}, {"role": "assistant", "content": RICH}, *asks(RICH))
    expect(last_reply(page)).to_have_attribute("data-status", "completed")


def asks(text: str) -> list[Json]:
    return [{"role": "user", "content": f"say {text}"}]


def versions(page: Page) -> None:
    converse(page, "say one")
    edit(page, "say two", 0)
    expect_reply(page, "two")
    ask_again(page, "two")
    expect(page.get_by_role("group", name="Version")).to_have_count(2)


def lost(page: Page) -> None:
    """An error is shown."""
    page.evaluate("location.hash = 'conv_none'")
    expect(page.get_by_role("alert").filter(visible=True)).not_to_be_empty()


def found(page: Page) -> None:
    listed(page)
    page.get_by_label("Search").fill("one")
    expect(entry(page, "say one")).to_be_visible()


def not_found(page: Page) -> None:
    listed(page)
    page.get_by_label("Search").fill("nothing of that kind")
    expect(page.get_by_text("Nothing found.")).to_be_visible()


def unfolded(page: Page) -> None:
    """Reasoning, a call and a result, all open."""
    call = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"x": 1}'}
    result = {"type": "function_call_output", "call_id": "call_1", "output": "perform think A | call g {} | say B"}
    open_items(page, {"role": "user", "content": "a question"}, call, result)
    for fold in page.locator("summary").all():
        fold.click()
    expect(page.locator("details[open]")).to_have_count(4)


def failed(page: Page) -> None:
    send(page, "break in the middle")
    expect_reply(page, "in the middle", "failed")


def streaming(page: Page) -> None:
    send(page, "wait for more")
    expect_reply(page, "for more", "in_progress")


def editing(page: Page) -> None:
    formatted(page)
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Edit message")).to_be_focused()


def options(page: Page) -> None:
    page.get_by_role("button", name="Options").click()
    expect(page.get_by_role("dialog", name="Options")).to_be_visible()


def listed(page: Page) -> None:
    """The list of conversations, in the drawer on a phone."""
    converse(page, "say one")
    if page.viewport_size == PHONE:
        page.get_by_role("button", name="Conversations").click()
    expect(entry(page, "say one")).to_be_visible()


def menu(page: Page) -> None:
    listed(page)
    entry(page, "say one").hover()
    entry(page, "say one").get_by_role("button").click()
    expect(page.get_by_role("button", name="Rename")).to_be_focused()


def renaming(page: Page) -> None:
    menu(page)
    page.get_by_role("button", name="Rename").click()
    expect(page.get_by_label("New title")).to_be_focused()


def deleting(page: Page) -> None:
    menu(page)
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("alertdialog")).to_be_visible()


IN_MESSAGES = [empty, formatted, rich, unfolded, versions, failed, lost, streaming, editing, options]
STATES = [*IN_MESSAGES, listed, found, not_found, menu, renaming, deleting]


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def viewport(request: pytest.FixtureRequest) -> ViewportSize:
    size: ViewportSize = request.param
    return size


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_axe_finds_no_violation(chat: Page, viewport: ViewportSize, state: Callable[[Page], None]) -> None:
    chat.set_viewport_size(viewport)
    state(chat)
    schemes: list[Literal["light", "dark"]] = ["light", "dark"]
    for colors in schemes:
        chat.emulate_media(color_scheme=colors)
        expect_accessible(chat)
    chat.emulate_media(forced_colors="active")
    expect_accessible(chat)


@pytest.mark.parametrize("state", [formatted, rich, unfolded, versions], ids=lambda state: state.__name__)
def test_axe_finds_no_violation_on_paper(chat: Page, state: Callable[[Page], None]) -> None:
    state(chat)
    chat.emulate_media(media="print", color_scheme="dark")
    expect_accessible(chat)


def test_axe_finds_no_violation_on_the_login_form(scripted_server: Served, page: Page, viewport: ViewportSize) -> None:
    page.set_viewport_size(viewport)
    page.goto(scripted_server.url)
    page.get_by_label("Secret").fill("no secret")
    page.get_by_label("Secret").press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    expect_accessible(page)
    page.emulate_media(color_scheme="dark")
    expect_accessible(page)


def test_everything_can_be_done_with_the_keyboard(scripted_server: Served, page: Page, scripted: ScriptedChat) -> None:
    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()")
            if focused == name:
                return
        raise AssertionError(f"Tab does not reach {name}")

    log_in(page, scripted_server.url, ANN)
    page.keyboard.type("perform think A | say one")
    page.keyboard.press("Enter")
    expect_reply(page, "one")
    tab_to("Thought for 1 s")
    page.keyboard.press("Enter")
    expect(page.get_by_text("A", exact=True)).to_be_visible()
    tab_to("Manage “perform think A | say one”")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.keyboard.type("Numbers")
    page.keyboard.press("Enter")
    tab_to("Options")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    tab_to("Edit")
    page.keyboard.press("Enter")
    page.keyboard.type(" and two")
    page.keyboard.press("Enter")
    expect_reply(page, "one and two")
    tab_to("New chat")
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    tab_to("Numbers")
    page.keyboard.press("Enter")
    expect_reply(page, "one and two")


def test_nothing_moves_with_reduced_motion(chat: Page) -> None:
    chat.emulate_media(reduced_motion="reduce")
    chat.get_by_role("button", name="Options").click()
    expect(chat.get_by_role("dialog", name="Options")).to_be_visible()
    chat.keyboard.press("Escape")
    send(chat, "hold on")
    expect(last_reply(chat)).to_have_attribute("data-status", "in_progress")
    assert chat.evaluate("document.getAnimations().length") == 0


def test_targets_are_large_on_a_touch_screen(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(has_touch=True, is_mobile=True, viewport=PHONE)
    open_chat(page, scripted_server.url)
    converse(page, "say one")
    send(page, "perform think A | call f {} | say B")
    expect_reply(page, "B")
    shown = page.locator("button:visible, summary:visible, #entries a:visible")
    for is_list in (False, True):
        if is_list:
            page.get_by_role("button", name="Conversations").click()
            expect(entry(page, "say one")).to_be_visible()
        sizes = shown.evaluate_all("all => all.map(one => [one.offsetWidth, one.offsetHeight, one.outerHTML])")
        assert [html for width, height, html in sizes if min(width, height) < 40] == []
