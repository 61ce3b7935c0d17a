"""How replies are shown, and how they are copied."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.steps import clipboard, copy, expect_reply, last_reply, open_chat, open_stored, send
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

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


@pytest.mark.parametrize("reloaded", [False, True], ids=["live", "reloaded"])
def test_a_finished_reply_is_formatted(chat: Page, reloaded: bool) -> None:
    send(chat, f"say {FORMATTED}")
    reply = last_reply(chat)
    expect(reply).to_have_attribute("data-status", "completed")
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
