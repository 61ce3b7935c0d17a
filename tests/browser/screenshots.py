"""Take the pictures of the page: `python tests/browser/screenshots.py`. It needs fonts for Chinese and Arabic."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import Browser, Page, ViewportSize, expect

from models.chat_request import ChatRequest
from models.language.events import Event
from models.settings import EMBEDDED, Settings
from server import create_app
from tests.browser.browsers import launched
from tests.browser.steps import PHONE, entry, open_chat, send
from tests.support.scripted import ScriptedChat, ScriptedReply
from tests.support.serving import serve

PICTURES = Path(__file__).parent / "pictures"
SECRET = "the photographer's"
PIECES_PER_SECOND = 20
DESKTOP: ViewportSize = {"width": 1280, "height": 880}

# Greedy replies of the embedded model.
CONVERSATION = {
    "Give me three tips for a walk in the mountains.": """\
1. **Be prepared**: Don't forget to pack your carry-on and bring essentials like sunscreen, snacks, water, and a map \
or GPS device with you.

2. **Take it slow**: Walk at a pace that allows you to enjoy the scenery without feeling rushed. Take breaks every 5 \
minutes to rest your feet and breathe.

3. **Enjoy the moment**: Enjoy the beauty of nature while you're walking. Take photos, listen to music, and soak up \
the atmosphere.""",
    "Write a Python function that says whether a number is even.": """\
```python
def is_even(num):
    if num % 2 == 0:
        return True
    else:
        return False
```
This function uses the modulus operator (`%`) to check if the input `num` is divisible by 2 (i.e., `num % 2 = 0`). \
If it's not divisible by 2, it returns `False`. Otherwise, it returns `True`, indicating that the input is even.""",
}


# What the page can show, in a reply that no model has given.
RICH = {
    "How fast does a sum of reciprocals grow?": r"""
The harmonic numbers grow like the **logarithm**:

$$H_n = \sum_{k=1}^{n} \frac{1}{k} \approx \ln n + \gamma + \frac{1}{2n}$$

with Euler's constant $\gamma \approx 0.5772$.[^1]

| $n$ | $H_n$ | $\ln n + \gamma$ |
|---:|---:|---:|
| 10 | 2.9290 | 2.8798 |
| 100 | 5.1874 | 5.1824 |
| 1000 | 7.4855 | 7.4850 |

```python
def harmonic(n: int) -> float:
    return sum(1 / k for k in range(n, 0, -1))  # small ones first
```

- [x] compare the first values
- [ ] prove the limit

[^1]: The limit of $H_n - \ln n$.""",
}
CHINESE = {
    "怎样泡一杯好喝的绿茶？": """\
**注意：**水温不要太高。

1. 水烧开后放到 **80 °C** 左右；
2. 每 150 毫升水放 3 克茶叶；
3. 泡两分钟，第一泡不要倒掉。

| 茶 | 水温 | 时间 |
|---|---|---|
| 绿茶 | 80 °C | 2 分钟 |
| 乌龙茶 | 95 °C | 1 分钟 |
| 红茶 | 95 °C | 3 分钟 |""",
}
ARABIC = {
    "كيف أطبع نصًا بلغة بايثون؟": """\
استخدم الدالة `print`:

```python
print("مرحبا")
```

- تكتب الدالة سطرًا واحدًا.
- يمكنك إضافة `end=""` لتبقى في السطر نفسه.""",
}
REPLIES = CONVERSATION | RICH | CHINESE | ARABIC

# Other conversations, of which only the titles are shown.
EARLIER = [
    "Translate a menu from French",
    "Names for a small grey cat",
    "How do tides work?",
    "A birthday poem for my grandmother",
    "Explain recursion to a ten-year-old",
    "What to cook with leeks and potatoes",
    "Packing list for a week by the sea",
    "Why is the sky blue?",
]


class RecordedChat(ScriptedChat):
    """Says what the embedded model said, about as fast, or what else is to be shown."""

    model_name = EMBEDDED

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        text = REPLIES.get(request.messages[-1]["content"], "...")
        return await super().prepare(replace(request, messages=[{"role": "user", "content": f"say {text}"}]))

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        async for event in super().events(reply):
            yield event
            await asyncio.sleep(1 / PIECES_PER_SECOND)


def main() -> None:
    """Have the conversations once, and take pictures of them."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as data, launched() as browser:
        settings = Settings(users={"ann": SECRET}, data=Path(data))
        with serve(create_app(settings, RecordedChat().opened)) as served:
            page = browser.new_page(viewport=DESKTOP, reduced_motion="reduce")
            open_chat(page, served.url, SECRET)
            for questions in (*([question] for question in reversed(EARLIER)), CHINESE, ARABIC, RICH, CONVERSATION):
                converse(page, *questions)
            take(page, "chat-light")
            on_phone(browser, page)
            show(page, next(iter(RICH)))
            show_versions(page)
            in_the_dark(page)
            show(page, next(iter(ARABIC)))
            take(page, "chat-arabic")
            in_chinese(browser, page)


def in_the_dark(page: Page) -> None:
    """The page of someone who prefers dark colors."""
    page.emulate_media(color_scheme="dark")
    take(page, "rich-dark")
    page.emulate_media(color_scheme="light")


def on_phone(browser: Browser, page: Page) -> None:
    """The same conversation and the list, on a phone."""
    state = page.context.storage_state()
    options: dict[str, Any] = {"viewport": PHONE, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    phone = browser.new_page(**options, reduced_motion="reduce", storage_state=state)
    phone.goto(page.url)
    take(phone, "chat-phone")
    phone.get_by_role("button", name="Conversations").tap()
    take(phone, "list-phone")
    phone.close()


def in_chinese(browser: Browser, page: Page) -> None:
    """The page of a browser whose language is Chinese."""
    chinese = browser.new_page(
        viewport=DESKTOP, locale="zh-CN", reduced_motion="reduce", storage_state=page.context.storage_state()
    )
    chinese.goto(page.url)
    show(chinese, next(iter(CHINESE)))
    take(chinese, "chat-chinese")
    chinese.close()


def show(page: Page, title: str) -> None:
    """Open a conversation of the list."""
    entry(page, title).get_by_role("link").click()
    expect(page.locator(".user .content").first).to_have_text(title)
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")


def show_versions(page: Page) -> None:
    """Ask again, so that there are two versions."""
    page.get_by_role("button", name="Ask again").last.click()
    expect(page.locator(".versions")).to_be_visible(timeout=60_000)
    expect(page.locator(".assistant[data-status=completed]")).to_have_count(1, timeout=60_000)


def converse(page: Page, *questions: str) -> None:
    """Ask questions in a new conversation."""
    page.get_by_role("button", name="New chat").click()
    for count, question in enumerate(questions, start=1):
        send(page, question)
        expect(page.locator(".assistant[data-status=completed]")).to_have_count(count, timeout=60_000)


def take(page: Page, name: str) -> None:
    """A picture of the page, once all of it is there. Speeds are those that were meant, so that they never differ."""
    page.locator(".assistant .content > *").first.wait_for()
    expect(page.locator(".running")).to_have_count(0)
    page.wait_for_function("() => !document.querySelector('.math:not([data-source])')")
    page.evaluate(
        """(speed) => {
        document.activeElement.blur();
        for (const line of document.querySelectorAll('.usage')) {
            line.textContent = line.textContent.replace(/· [\\d.]+/, `· ${speed.toFixed(1)}`);
        }
    }""",
        PIECES_PER_SECOND,
    )
    page.mouse.move(0, 0)
    page.screenshot(path=PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
