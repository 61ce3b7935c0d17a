"""The words of the page for screen readers."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, WebSocketRoute, expect

from tests.browser.steps import expect_reply, open_chat, pass_time, send
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

COLLECT = """() => {
    window.announced = [];
    const collect = (changes) => {
        for (const { target } of changes) if (target.id === 'announcer') window.announced.push(target.textContent);
    };
    new MutationObserver(collect).observe(document, { childList: true, subtree: true });
}"""
STORED = """async (text) => {
    const read = async () => (await fetch(`v1/conversations/${location.hash.slice(1)}/branch`)).json();
    return (await read()).data.at(-1).output.at(-1)?.content[0].text.includes(text);
}"""
STORED_AS_ENDED = """async () => {
    const branch = await (await fetch(`v1/conversations/${location.hash.slice(1)}/branch`)).json();
    return branch.data.at(-1).status === 'completed';
}"""
ENGLISH = """\
## A walk

It takes 3.5 hours. Do you **like** that?
1. Take [water](https://example.com/).
2. Go slowly

```python
print("Hello. World.")
```
That is all. Or is it"""
ENGLISH_ANNOUNCED = (
    "A walk It takes 3.5 hours. Do you like that? Take water. Go slowly Code block skipped. That is all. Or is it "
    "The reply is finished."
)
CHINESE = "你好！今天去哪里？带上“水。”慢慢走"
CHINESE_ANNOUNCED = "你好！ 今天去哪里？ 带上“水。” 慢慢走 The reply is finished."


@pytest.fixture
def chat(page: Page, scripted_server: Served) -> Page:
    """The page of ann, connected, with a clock that tests set forward."""
    page.clock.install()
    open_chat(page, scripted_server.url)
    expect(page.locator("#announcer")).to_have_text("Connected")
    pass_time(page, 1)  # until the page may announce something else
    page.evaluate(COLLECT)
    return page


def expect_announced(page: Page, text: str) -> None:
    """Wait until the page has announced a text, in as many pieces as it likes."""
    pass_time(page, 1)  # the pause after a piece
    page.wait_for_function("text => window.announced.join(' ') === text", arg=text)


@pytest.mark.parametrize(
    ("text", "announced"), [(ENGLISH, ENGLISH_ANNOUNCED), (CHINESE, CHINESE_ANNOUNCED)], ids=["en", "zh"]
)
def test_a_reply_is_announced_sentence_by_sentence(chat: Page, text: str, announced: str) -> None:
    send(chat, f"say {text}")
    expect(chat.locator("article.assistant")).to_have_attribute("data-status", "completed")
    expect_announced(chat, announced)


def test_a_sentence_is_announced_when_it_is_complete(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    send(chat, "wait One sentence. Half of ano")
    expect_reply(chat, "One sentence. Half of ano", "in_progress")
    expect_announced(chat, "One sentence.")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "One sentence. Half of ano")
    expect_announced(chat, "One sentence. Half of ano The reply is finished.")


def test_reasoning_is_not_read_aloud_and_calls_are_named(chat: Page) -> None:
    send(chat, "perform think One thought. Another one. | say I look. Wait | call get_time {} | say It is noon.")
    expect(chat.locator("article.assistant")).to_have_attribute("data-status", "completed")
    expect_announced(chat, "Thinking… I look. Wait Calls get_time It is noon. The reply is finished.")


def test_the_message_log_itself_is_not_live(chat: Page) -> None:
    expect(chat.get_by_role("log")).to_have_attribute("aria-live", "off")


def test_text_from_before_a_reload_is_not_announced_again(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    chat.add_init_script(f"({COLLECT})()")
    send(chat, "wait One sentence. ```\nOne more")
    expect_reply(chat, "One sentence. ```\nOne more", "in_progress")
    while not chat.evaluate(STORED, "more"):
        chat.wait_for_timeout(20)
    chat.reload()
    expect_reply(chat, "One sentence. ```\nOne more", "in_progress")
    scripted_server.in_loop(scripted.release)
    expect_reply(chat, "One sentence. ```\nOne more")
    expect_announced(chat, "Connected The reply is finished.")


def test_a_sentence_that_does_not_end_is_read_in_pieces(chat: Page, scripted: ScriptedChat) -> None:
    text = "word " * 300
    send(chat, f"wait {text}")
    chat.wait_for_function("() => document.querySelector('article.assistant').textContent.includes('word')")
    pass_time(chat, 1)
    chat.wait_for_function("() => window.announced.join(' ').includes('word')")


def test_the_end_of_a_reply_is_announced_also_if_the_page_finds_it_in_the_conversation(
    page: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    def hold_back(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()
        server.on_message(lambda frame: None if '"response.completed"' in str(frame) else socket.send(frame))

    page.route_web_socket("**/ws", hold_back)
    page.clock.install()
    open_chat(page, scripted_server.url)
    send(page, "wait for it")
    expect_reply(page, "for it", "in_progress")
    scripted_server.in_loop(scripted.release)
    page.wait_for_function(STORED_AS_ENDED)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect_reply(page, "for it")
    pass_time(page, 1)
    expect(page.locator("#announcer")).to_contain_text("The reply is finished.")
