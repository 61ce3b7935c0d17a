"""How replies are shown, and how they are copied."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsers import in_each_browser
from tests.browser.conftest import OpenPage
from tests.browser.steps import clipboard, copy, expect_reply, last_reply, open_chat, open_stored, send
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

pytestmark = in_each_browser

MARKUP = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><b>bold</b>"
FORMATTED = """\
Some **bold** words

- first
- second

```python
print("<hello>")
```

[a script](javascript:alert(1)), [a path](/logout), [a site](https://example.com/), ![a picture](https://example.com/x.png)
"""


@pytest.mark.parametrize("reloaded", [False, True], ids=["live", "reloaded"])
def test_markup_in_a_reply_is_text(chat: Page, scripted: ScriptedChat, scripted_server: Served, reloaded: bool) -> None:
    send(chat, f"wait {MARKUP}")
    expect_reply(chat, MARKUP, "in_progress")
    expect(chat.locator("#log :is(img, script, b)")).to_have_count(0)
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, MARKUP)
    if reloaded:
        chat.reload()
        expect_reply(chat, MARKUP)
    expect(chat.locator(":is(#log, #sidebar) :is(img, script, b)")).to_have_count(0)
    expect(chat).not_to_have_title("run")


@pytest.mark.parametrize("order", ["say", "wait"], ids=["finished", "growing"])
@pytest.mark.parametrize("reloaded", [False, True], ids=["live", "reloaded"])
def test_a_reply_is_formatted(chat: Page, order: str, reloaded: bool) -> None:
    send(chat, f"{order} {FORMATTED}")
    reply = last_reply(chat)
    expect(reply).to_have_attribute("data-status", "completed" if order == "say" else "in_progress")
    expect(reply.get_by_role("link")).to_have_count(2)
    if reloaded:
        chat.reload()
    expect(reply.locator("strong")).to_have_text("bold")
    expect(reply.get_by_role("listitem")).to_have_text(["first", "second"])
    expect(reply.locator("pre code")).to_have_text('print("<hello>")')


def test_only_full_urls_are_links_and_images_are_not_loaded(chat: Page) -> None:
    send(chat, f"say {FORMATTED}")
    expect(last_reply(chat).get_by_role("link")).to_have_text(["a site", "a picture"])
    expect(last_reply(chat).get_by_role("link").first).to_have_attribute("rel", "noopener noreferrer")
    expect(chat.locator("#log img")).to_have_count(0)


def test_a_long_history_is_formatted_where_it_is_visible(chat: Page) -> None:
    open_stored(chat, *["a line\n" * 30] * 24, "say **the end**")
    expect(last_reply(chat).locator("strong")).to_have_text("the end")
    first = chat.locator("article.assistant").first
    expect(first.locator("p")).to_have_count(0)
    first.scroll_into_view_if_needed()
    expect(first.locator("p").first).to_contain_text("a line")


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_a_reply_can_be_copied_as_markdown(scripted_server: Served, open_page: OpenPage, scheme: str) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.clock.install()
    if scheme == "http":
        page.add_init_script("Object.defineProperty(Navigator.prototype, 'clipboard', { value: undefined })")
    open_chat(page, scripted_server.url)
    send(page, f"say {FORMATTED}")
    copy(page, "Copy")
    assert clipboard(page) == FORMATTED.rstrip()


def test_a_code_block_can_be_copied(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.clock.install()
    open_chat(page, scripted_server.url)
    send(page, f"say {FORMATTED}")
    copy(page, "Copy code")
    assert clipboard(page) == 'print("<hello>")\n'


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("words with `code`", "words with code"),
        ("- one\n- two `code`", "two code"),
        ("- one\n  1. two\n     - three", "three"),
        ("> a quotation", "a quotation"),
        ("## heading", "heading"),
        ("```python\nx = 1", "x = 1"),
        ("- one\n\n  ```\n  x = 1", "x = 1"),
        ("$$\nx + 1", "$$\nx + 1"),
        ("one[^1]\n\n[^1]: a note", "a note"),
        ("- [x] done", "done"),
    ],
)
def test_a_growing_reply_has_one_cursor_in_its_last_block(
    text: str, last: str, chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    send(chat, f"wait {text}")
    cursors = """reply => [...reply.querySelectorAll('*')].filter((node) => {
        return ['::before', '::after'].some((side) => getComputedStyle(node, side).width === '8px');
    }).map((node) => node.textContent.trim())"""
    expect(last_reply(chat)).to_contain_text(last)
    assert last_reply(chat).evaluate(cursors) == [last]
    scripted_server.in_loop(scripted.release)
