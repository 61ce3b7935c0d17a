"""Measure how smooth the page is: `python tests/browser/smoothness.py`.

Prints the time from one frame to the next, in milliseconds, while 500 messages are opened, scrolled and extended by 100
deltas per second; then the number of tasks over 50 ms and the longest, the shift of the layout (CLS), and the added
memory in MB. The first row, in which nothing happens, shows what the machine can do.
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

from models.chat_request import ChatRequest
from models.language.events import Event
from models.settings import Settings
from server import create_app
from tests.browser.browsers import launched
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
RICH = """\
## Part {number}

Some **bold** words, `code`, a [link](https://example.com/), and $a_{number}^2 + b^2 = c^2$ in a sentence.

1. the first thing, with *emphasis*
2. the second thing
   - and what belongs to it

| name | value | share |
|---|---:|---:|
| alpha | {number} | 10 % |
| beta | 12 | 20 % |

```python
def answer(question: str) -> int:
    # The answer
    return {number} if question else 0  # always
```

$$
\\sum_{{k=1}}^{{n}} k = \\frac{{n(n+1)}}{{2}}
$$

"""
KILOBYTES = 35
LONG = {  # what a reply of 35 kB can be
    "Markdown": "".join(RICH.format(number=number) for number in range(80)),
    "one code block": "```python\n" + "value = compute(value, 12)  # and again\n" * 1000,
    "one table": "| a | b | c |\n|---|---|---|\n" + "| some words | 12 | **more** |\n" * 1300,
    "one list": "- an item of the list, with `code` and **bold** words\n" * 800,
    "one paragraph": "some words and **bold** ones in a very long line, ",
}
LONG = {name: (text * (1 + KILOBYTES * 1000 // len(text)))[: KILOBYTES * 1000] for name, text in LONG.items()}
WATCH = """() => {
    window.frames = [];
    window.tasks = [];
    window.shift = 0;
    const log = document.getElementById('messages');
    window.observers = ['longtask', 'layout-shift'].map((type) => {
        const observer = new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
            if (type === 'longtask') window.tasks.push(entry.duration);
            else if (entry.sources.some(({ node }) => log.contains(node))) window.shift += entry.value;
        }));
        observer.observe({ type });
        return observer;
    });
    window.watching = true;
    const frame = (now) => { window.frames.push(now); window.watching && requestAnimationFrame(frame); };
    requestAnimationFrame(frame);
}"""
# Two more frames: the first may be the late one.
STOP_WATCHING = """() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => {
    window.watching = false;
    window.observers.forEach((observer) => observer.disconnect());
    resolve({ frames: window.frames, tasks: window.tasks, shift: window.shift });
})))"""

# The page itself waits: the questions that `expect` asks again and again take up to 60 ms each.
REPLY_ENDS = """() => new Promise((resolve) => {
    const messages = document.getElementById('messages');
    const observer = new MutationObserver(() => {
        if (!messages.lastElementChild?.matches('.assistant[data-status=completed]')) return;
        observer.disconnect();
        resolve();
    });
    observer.observe(messages, { attributeFilter: ['data-status'], subtree: true });
})"""


class SteadyChat(ScriptedChat):
    """Says DELTAS_PER_SECOND pieces of four characters per second, and a long text if it is asked for by its name."""

    async def prepare(self, request: ChatRequest) -> ScriptedReply:
        reply = await super().prepare(request)
        reply.text = LONG.get(reply.text, reply.text)
        return reply

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        async for event in super().events(reply):
            yield event
            await asyncio.sleep(1 / DELTAS_PER_SECOND)


def main() -> None:
    """Measure, and print the table."""
    columns = ("median", "95 %", "longest", "script", "layout", "tasks", "longest", "shift", "MB")
    print(f"{'':28}{''.join(f'{column:>9}' for column in columns)}")
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
            for name in LONG:
                row(f"stream {name}", lambda: stream(page, name))  # noqa: B023


def measure(page: Page, devices: CDPSession, name: str, act: Callable[[], None]) -> None:
    page.wait_for_timeout(500)
    devices.send("HeapProfiler.collectGarbage")
    before = metrics(devices)
    page.evaluate(WATCH)
    act()
    seen: dict[str, Any] = page.evaluate(STOP_WATCHING)
    devices.send("HeapProfiler.collectGarbage")
    spent = {key: value - before[key] for key, value in metrics(devices).items()}
    frames, tasks = seen["frames"], seen["tasks"]
    gaps = sorted(after - now for now, after in pairwise(frames))
    times = [f"{gap:9.1f}" for gap in (statistics.median(gaps), gaps[int(len(gaps) * 0.95)], gaps[-1])]
    shares = [f"{spent[key] / (frames[-1] - frames[0]) * 1e5:8.1f}%" for key in ("ScriptDuration", "LayoutDuration")]
    rest = [f"{len(tasks):9}", f"{max(tasks, default=0):9.0f}", f"{seen['shift']:9.3f}"]
    memory = f"{spent['JSHeapUsedSize'] / 1e6:9.1f}"
    print(f"{name:28}{''.join(times + shares + rest)}{memory}", flush=True)


def metrics(devices: CDPSession) -> dict[str, Any]:
    return {metric["name"]: metric["value"] for metric in devices.send("Performance.getMetrics")["metrics"]}


def stream(page: Page, text: str = "some words. " * (DELTAS_PER_SECOND * SECONDS // 3)) -> None:
    send(page, f"say {text}")
    page.evaluate(REPLY_ENDS)


def open_long(page: Page) -> None:
    entry(page, "say hello").get_by_role("link").click()
    expect(page.locator("article")).to_have_count(PAGE, timeout=60_000)
    expect(last_reply(page).locator("p")).to_have_text("hello")


def scroll(devices: CDPSession) -> None:
    gesture = {"x": 700, "y": 400, "yDistance": SCROLLED_PIXELS, "speed": SCROLLED_PIXELS // SECONDS}
    devices.send("Input.synthesizeScrollGesture", gesture)


if __name__ == "__main__":
    main()
