"""Measure how smooth the page is: `python tests/browser/smoothness.py`.

Prints the time from one frame to the next, in milliseconds, while 500 messages are opened, scrolled and extended by 100
deltas per second. The first row, in which nothing happens, shows what the machine can do.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import CDPSession, Page, expect

from models.language.events import Event
from models.settings import Settings
from server import create_app
from tests.browser.chromium import launched
from tests.browser.steps import DESKTOP, STORE, entry, last_reply, open_chat, send
from tests.support.scripted import ScriptedChat, ScriptedReply
from tests.support.serving import serve

MESSAGES = 500
PAGE = 100  # of them are loaded at once
DELTAS_PER_SECOND = 100
SECONDS = 5
SCROLLED_PIXELS = 30_000
SECRET = "the stopwatch's"
REPLY = """\
## Heading {number}

Some **bold** words and `code`, then a list of what matters here, in sentences as long as replies have them.

- the first thing to think of
- the second thing to think of

```python
def answer(question):
    return {number} if question else None
```

That is all there is to say about it.
"""
WATCH = """() => {
    window.frames = [];
    window.watching = true;
    const frame = (now) => { window.frames.push(now); window.watching && requestAnimationFrame(frame); };
    requestAnimationFrame(frame);
}"""
# Two more frames: the first may be the late one.
STOP_WATCHING = """() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => {
    window.watching = false;
    resolve(window.frames);
})))"""


class SteadyChat(ScriptedChat):
    """Says DELTAS_PER_SECOND pieces per second."""

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        async for event in super().events(reply):
            yield event
            await asyncio.sleep(1 / DELTAS_PER_SECOND)


def main() -> None:
    """Measure, and print the table."""
    print(f"{'':28}{'median':>8}{'95 %':>8}{'longest':>9}{'script':>9}{'layout':>9}")
    with tempfile.TemporaryDirectory() as data, launched() as browser:
        settings = Settings(users={"ann": SECRET}, data=Path(data))
        with serve(create_app(settings, SteadyChat().opened)) as served:
            page = browser.new_page(viewport=DESKTOP)
            open_chat(page, served.url, SECRET)
            devices = page.context.new_cdp_session(page)
            devices.send("Performance.enable")

            def row(name: str, act: Callable[[], None]) -> None:
                measure(page, devices, name, act)

            row("nothing happens", lambda: page.wait_for_timeout(1000 * SECONDS))
            row("stream into a new chat", lambda: stream(page))
            contents = [REPLY.format(number=number) for number in range(MESSAGES - 1)]
            page.evaluate(STORE, ["say hello", *contents[1:-1], "say hello"])
            page.reload()
            row(f"open {PAGE} of {MESSAGES}", lambda: open_long(page))
            row("scroll through them", lambda: scroll(devices))
            page.get_by_role("button", name="Jump to latest").click()
            row("stream below them", lambda: stream(page))


def measure(page: Page, devices: CDPSession, name: str, act: Callable[[], None]) -> None:
    page.wait_for_timeout(500)
    before = metrics(devices)
    page.evaluate(WATCH)
    act()
    frames: list[float] = page.evaluate(STOP_WATCHING)
    spent = {key: value - before[key] for key, value in metrics(devices).items()}
    gaps = sorted(after - now for now, after in pairwise(frames))
    columns = statistics.median(gaps), gaps[int(len(gaps) * 0.95)], gaps[-1]
    shares = [f"{spent[key] / (frames[-1] - frames[0]) * 1e5:8.1f}%" for key in ("ScriptDuration", "LayoutDuration")]
    print(f"{name:28}{columns[0]:8.1f}{columns[1]:8.1f}{columns[2]:9.1f}{''.join(shares)}", flush=True)


def metrics(devices: CDPSession) -> dict[str, Any]:
    return {metric["name"]: metric["value"] for metric in devices.send("Performance.getMetrics")["metrics"]}


def stream(page: Page) -> None:
    send(page, "say " + "some words. " * (DELTAS_PER_SECOND * SECONDS // 3))
    expect(last_reply(page)).to_have_attribute("data-status", "completed", timeout=60_000)


def open_long(page: Page) -> None:
    entry(page, "say hello").get_by_role("link").click()
    expect(page.locator("article")).to_have_count(PAGE, timeout=60_000)
    expect(last_reply(page).locator("p")).to_have_text("hello")


def scroll(devices: CDPSession) -> None:
    gesture = {"x": 700, "y": 400, "yDistance": SCROLLED_PIXELS, "speed": SCROLLED_PIXELS // SECONDS}
    devices.send("Input.synthesizeScrollGesture", gesture)


if __name__ == "__main__":
    main()
