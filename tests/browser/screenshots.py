"""Take the README's pictures: `python -m tests.browser.screenshots` in the repository's root."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from playwright.sync_api import Page, expect

from models.conversations import Message
from models.options import Options
from models.reply import Event
from models.settings import EMBEDDED, Settings
from server import create_app
from tests.browser.chromium import launched, log_in, send
from tests.scripted import ScriptedChat
from tests.serving import serve

PICTURES = Path(__file__).parent / "pictures"
SECRET = "the photographer's"
PIECES_A_SECOND = 20

# What the embedded model said, greedily, when it was asked.
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


class RecordedChat(ScriptedChat):
    """Says what the embedded model said, about as fast as it did."""

    model_name = EMBEDDED

    async def reply(self, user: str, messages: Sequence[Message], options: Options) -> AsyncGenerator[Event, None]:
        said = CONVERSATION[messages[-1]["content"]]
        async for event in super().reply(user, [{"role": "user", "content": f"say {said}"}], options):
            yield event
            await asyncio.sleep(1 / PIECES_A_SECOND)


def main() -> None:
    """Hold the conversation once, and look at it in three ways."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as data, launched() as browser:
        settings = Settings(users={"ann": SECRET}, data=Path(data))
        with serve(create_app(settings, RecordedChat().opened)) as served:
            page = browser.new_page(viewport={"width": 1200, "height": 800})
            log_in(page, served.url, SECRET)
            converse(page)
            take(page, "chat-light")
            page.emulate_media(color_scheme="dark")
            take(page, "chat-dark")
            page.emulate_media(color_scheme="light")
            page.set_viewport_size({"width": 390, "height": 844})
            take(page, "chat-phone")


def converse(page: Page) -> None:
    for count, question in enumerate(CONVERSATION, start=1):
        send(page, question)
        expect(page.locator(".assistant[data-status=completed]")).to_have_count(count, timeout=60_000)


def take(page: Page, name: str) -> None:
    page.screenshot(path=PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
