"""What those who listen to the page are told."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.steps import expect_reply, send
from tests.scripted import ScriptedChat
from tests.serving import Served

COLLECT = """() => {
    window.told = [];
    const collect = (changes) => {
        for (const { target } of changes) if (target.id === 'announcer') window.told.push(target.textContent);
    };
    new MutationObserver(collect).observe(document, { childList: true, subtree: true });
}"""
KEPT = """async (text) => {
    const read = async () => (await fetch(`v1/conversations/${location.hash.slice(1)}`)).json();
    for (let tries = 100; !(await read()).items.at(-1).content.includes(text); tries--) {
        if (!tries) throw new Error('the reply is not kept');
        await new Promise((resolve) => setTimeout(resolve, 100));
    }
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
ENGLISH_TOLD = (
    "A walk It takes 3.5 hours. Do you like that? Take water. Go slowly Code block skipped. That is all. Or is it "
    "The reply is finished."
)
CHINESE = "你好！今天去哪里？带上“水。”慢慢走"
CHINESE_TOLD = "你好！ 今天去哪里？ 带上“水。” 慢慢走 The reply is finished."


def expect_told(page: Page, text: str) -> None:
    page.wait_for_function("text => window.told.join(' ') === text", arg=text)


@pytest.mark.parametrize(("said", "told"), [(ENGLISH, ENGLISH_TOLD), (CHINESE, CHINESE_TOLD)], ids=["en", "zh"])
def test_a_reply_is_read_sentence_by_sentence(chat: Page, said: str, told: str) -> None:
    chat.wait_for_function("() => document.getElementById('announcer').textContent === 'Connected'")
    chat.evaluate(COLLECT)
    send(chat, f"say {said}")
    expect_told(chat, told)


def test_a_sentence_is_read_when_it_is_finished(chat: Page, scripted: ScriptedChat, scripted_server: Served) -> None:
    chat.wait_for_function("() => document.getElementById('announcer').textContent === 'Connected'")
    chat.evaluate(COLLECT)
    send(chat, "wait One sentence. Half of ano")
    expect_told(chat, "One sentence.")
    scripted_server.in_loop(scripted.release)
    expect_told(chat, "One sentence. Half of ano The reply is finished.")


def test_the_log_itself_is_not_live(chat: Page) -> None:
    expect(chat.get_by_role("log")).to_have_attribute("aria-live", "off")


def test_what_was_read_before_a_reload_is_not_read_again(
    chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    chat.add_init_script(f"({COLLECT})()")
    send(chat, "wait One sentence. ```\nOne more")
    expect_reply(chat, "One sentence. ```\nOne more", "in_progress")
    chat.evaluate(KEPT, "more")  # wait_for_function takes any promise for true
    chat.reload()
    expect_reply(chat, "One sentence. ```\nOne more", "in_progress")
    scripted_server.in_loop(scripted.release)
    expect_told(chat, "Connected The reply is finished.")
