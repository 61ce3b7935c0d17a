"""The page, as somebody who chats meets it."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from playwright.sync_api import Locator, Page, ViewportSize, expect

from models.admission import Admission
from models.settings import Settings
from server import create_app
from tests.browser.chromium import log_in, send
from tests.browser.conftest import OpenPage
from tests.conftest import ANN, BOB
from tests.scripted import ScriptedChat
from tests.serving import Served, serve

DESKTOP: ViewportSize = {"width": 1200, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
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
WIDE = f"""\
{"long" * 100}

```
{"code " * 100}
```

| {"| ".join(["heading"] * 20)}|
| {"| ".join(["---"] * 20)}|
| {"| ".join(["cell"] * 20)}|
"""


def last_reply(page: Page) -> Locator:
    return page.get_by_role("article", name="Reply").last


def expect_reply(page: Page, text: str, status: str = "completed") -> None:
    expect(last_reply(page)).to_have_attribute("data-status", status)
    expect(last_reply(page).locator(".content")).to_have_text(text)


def test_a_secret_opens_the_chat(scripted_server: Served, page: Page) -> None:
    log_in(page, scripted_server.url, ANN)
    expect(page.get_by_role("button", name="Log out")).to_contain_text("ann")
    expect(page.get_by_label("Message")).to_be_focused()


def test_a_wrong_secret_is_told_on_the_login_form(scripted_server: Served, page: Page) -> None:
    page.goto(scripted_server.url)
    page.get_by_label("Secret").fill("no secret")
    page.get_by_label("Secret").press("Enter")
    expect(page.get_by_role("alert")).to_have_text("That secret is not right.")
    expect(page.get_by_label("Secret")).to_be_focused()


def test_logging_out_leads_to_the_login_form(chat: Page) -> None:
    chat.get_by_role("button", name="Log out").click()
    expect(chat.get_by_label("Secret")).to_be_visible()
    chat.reload()
    expect(chat.get_by_label("Secret")).to_be_visible()


def test_a_session_that_has_ended_leads_to_the_login_form(chat: Page) -> None:
    chat.context.clear_cookies()
    chat.get_by_role("button", name="New chat").click()
    expect(chat.get_by_label("Secret")).to_be_visible()


def test_a_reply_shows_as_it_grows(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    send(chat, "wait I am thinking.")
    expect(chat.get_by_role("article", name="You")).to_have_text("wait I am thinking.")
    expect_reply(chat, "I am thinking.", "streaming")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "I am thinking.")
    expect(last_reply(chat).locator("footer")).to_contain_text("4 tokens")


def test_the_next_question_goes_on_with_the_conversation(chat: Page, scripted: ScriptedChat) -> None:
    send(chat, "say one")
    expect_reply(chat, "one")
    send(chat, "say two")
    expect_reply(chat, "two")
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say one", "one", "say two"]


@pytest.mark.parametrize("way", ["button", "escape"])
def test_a_reply_can_be_stopped(chat: Page, scripted: ScriptedChat, way: str) -> None:
    send(chat, "wait half a reply")
    expect_reply(chat, "half a reply", "streaming")
    assert scripted.running == 1
    if way == "button":
        chat.get_by_role("button", name="Stop").click()
    else:
        chat.keyboard.press("Escape")
    expect_reply(chat, "half a reply", "cancelled")
    expect(last_reply(chat).locator(".note")).to_have_text("Stopped.")
    expect(chat.get_by_role("button", name="Send")).to_be_visible()
    assert scripted.running == 0


@pytest.mark.parametrize("way", ["reload", "button"])
def test_a_fresh_chat_knows_nothing_of_the_last(chat: Page, scripted: ScriptedChat, way: str) -> None:
    send(chat, "say one")
    expect_reply(chat, "one")
    if way == "reload":
        chat.reload()
    else:
        chat.get_by_role("button", name="New chat").click()
    expect(chat.locator("#log")).to_be_empty()
    expect(chat.locator("#status")).to_have_text("Connected")
    send(chat, "say two")
    expect_reply(chat, "two")
    messages, _ = scripted.heard[-1]
    assert [message["content"] for message in messages] == ["say two"]


def test_a_text_not_yet_sent_outlives_a_reload(chat: Page) -> None:
    chat.get_by_label("Message").fill("say nothing lost")
    chat.reload()
    expect(chat.get_by_label("Message")).to_have_value("say nothing lost")


def test_a_reader_who_scrolls_up_is_left_there(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    jump, usage = chat.get_by_role("button", name="Jump to latest"), last_reply(chat).locator("footer")
    send(chat, "wait " + "a line\n" * 200)
    expect(last_reply(chat)).to_contain_text("a line")
    chat.locator("#log").hover()
    chat.mouse.wheel(0, -500)
    expect(jump).to_be_visible()
    scripted_server.in_loop(scripted.release)
    expect(usage).to_be_attached()
    expect(usage).not_to_be_in_viewport()
    jump.click()
    expect(usage).to_be_in_viewport()
    expect(jump).to_be_hidden()


def test_markup_in_a_reply_is_text(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    send(chat, f"wait {MARKUP}")
    expect_reply(chat, MARKUP, "streaming")
    expect(chat.locator("#log :is(img, script, b)")).to_have_count(0)
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, MARKUP)
    expect(chat.locator("#log :is(img, script, b)")).to_have_count(0)
    expect(chat).to_have_title("Parley")


def test_a_finished_reply_is_formatted(chat: Page) -> None:
    send(chat, f"say {FORMATTED}")
    reply = last_reply(chat)
    expect(reply.locator("strong")).to_have_text("bold")
    expect(reply.get_by_role("listitem")).to_have_text(["first", "second"])
    expect(reply.locator("pre code")).to_have_text('print("<hello>")')


def test_only_full_addresses_are_links_and_pictures_are_not_loaded(chat: Page) -> None:
    send(chat, f"say {FORMATTED}")
    expect(last_reply(chat).get_by_role("link")).to_have_text(["a site", "a picture"])
    expect(last_reply(chat).get_by_role("link").first).to_have_attribute("rel", "noopener noreferrer")
    expect(chat.locator("#log img")).to_have_count(0)


def test_shift_and_enter_break_the_line(chat: Page) -> None:
    message = chat.get_by_label("Message")
    message.press_sequentially("say one")
    message.press("Shift+Enter")
    message.press_sequentially("two")
    expect(message).to_have_value("say one\ntwo")
    message.press("Enter")
    expect_reply(chat, "one\ntwo")


def test_the_place_in_the_queue_is_shown(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    send(chat, "hold on")
    expect(last_reply(chat)).to_have_text("Waiting, position 3")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "on", "streaming")
    expect(last_reply(chat).locator(".note")).to_be_hidden()
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "on")


def test_a_reply_that_fails_keeps_its_text_and_says_so(chat: Page) -> None:
    send(chat, "break half a reply")
    expect_reply(chat, "half a reply", "failed")
    expect(last_reply(chat).locator(".note")).to_have_text("The server failed; try again.")
    send(chat, "say better")
    expect_reply(chat, "better")


def test_a_refused_text_comes_back_to_be_sent_again(chat: Page, scripted: ScriptedChat) -> None:
    scripted.admission = Admission(slots=0, queue=0, per_user=1)
    send(chat, "say it later")
    expect(chat.get_by_role("alert")).to_have_text("0 replies wait already: try again later")
    expect(chat.get_by_label("Message")).to_have_value("say it later")
    expect(chat.locator("#log")).to_be_empty()


def test_others_who_come_are_told(chat: Page, scripted_server: Served, open_page: OpenPage) -> None:
    log_in(open_page(), scripted_server.url, BOB)
    expect(chat.locator("#notice")).to_have_text("bob joined")


def test_the_page_comes_back_after_a_restart(page: Page, settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(settings, scripted.opened)) as first:
        log_in(page, first.url, ANN)
        send(page, "wait for it")
        expect_reply(page, "for it", "streaming")
    expect_reply(page, "for it", "interrupted")
    expect(page.locator("#status")).to_have_text(re.compile("retrying in"))
    with serve(create_app(settings, scripted.opened), port=first.port):
        expect(page.locator(".divider")).to_contain_text("Reconnected.", timeout=30_000)
        expect(page.locator("#status")).to_have_text("Connected")
        send(page, "say hello again")
        expect_reply(page, "hello again")


@pytest.mark.parametrize("colors", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everything_is_in_sight_and_in_reach(
    chat: Page, colors: Literal["light", "dark"], viewport: ViewportSize
) -> None:
    chat.emulate_media(color_scheme=colors)
    chat.set_viewport_size(viewport)
    send(chat, f"say {WIDE}")
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    for wide in (":root", "#log"):
        assert chat.locator(wide).evaluate("part => part.scrollWidth - part.clientWidth") == 0
    chat.get_by_label("Message").fill("say " + "line\n" * 30)
    for name in ("New chat", "Log out", "Send"):
        expect(chat.get_by_role("button", name=name)).to_be_in_viewport(ratio=1)
        chat.get_by_role("button", name=name).click(trial=True)
