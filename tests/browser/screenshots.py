"""Take the pictures of README.md: `python tests/browser/screenshots.py`."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import Page, ViewportSize, expect

from models.chat_request import ChatRequest
from models.language.events import Event
from models.settings import EMBEDDED, Settings
from server import create_app
from tests.browser.chromium import launched
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
    """Says what the embedded model said, about as fast."""

    model_name = EMBEDDED

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        text = CONVERSATION.get(request.messages[-1]["content"], "...")
        return await super().prepare(replace(request, messages=[{"role": "user", "content": f"say {text}"}]))

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        async for event in super().events(reply):
            yield event
            await asyncio.sleep(1 / PIECES_PER_SECOND)


def main() -> None:
    """Have the conversations once, and take four pictures of them."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as data, launched() as browser:
        settings = Settings(users={"ann": SECRET}, data=Path(data))
        with serve(create_app(settings, RecordedChat().opened)) as served:
            page = browser.new_page(viewport=DESKTOP)
            open_chat(page, served.url, SECRET)
            for question in reversed(EARLIER):
                converse(page, question)
            converse(page, *CONVERSATION)
            expect(entry(page, next(iter(CONVERSATION)))).to_be_visible()
            page.mouse.move(0, 0)
            take(page, "chat-light")
            page.emulate_media(color_scheme="dark")
            take(page, "chat-dark")
            phone = browser.new_page(
                viewport=PHONE,
                device_scale_factor=2,
                is_mobile=True,
                has_touch=True,
                reduced_motion="reduce",
                storage_state=page.context.storage_state(),
            )
            phone.goto(page.url)
            expect(phone.locator(".assistant").last.locator("pre")).to_be_visible()
            phone.locator("#message").blur()
            take(phone, "chat-phone")
            phone.get_by_role("button", name="Conversations").tap()
            take(phone, "list-phone")


def converse(page: Page, *questions: str) -> None:
    """Ask questions in a new conversation."""
    page.get_by_role("button", name="New chat").click()
    for count, question in enumerate(questions, start=1):
        send(page, question)
        expect(page.locator(".assistant[data-status=completed]")).to_have_count(count, timeout=60_000)


def take(page: Page, name: str) -> None:
    page.screenshot(path=PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
