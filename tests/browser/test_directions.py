"""Text that is written from right to left."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from tests.browser.browsers import in_each_browser
from tests.browser.steps import converse, entry, last_reply, manage, open_items, send

ARABIC = "مرحبا بالعالم"
HEBREW = "שלום עולם"

pytestmark = in_each_browser

# Whether the first line of text in an element ends at its right edge, and does not begin at the left one.
ON_THE_RIGHT = """(element) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    const parts = [...range.getClientRects()].filter((part) => part.width);
    const line = parts.filter((part) => Math.abs(part.top - parts[0].top) < 4);
    const left = Math.min(...line.map((part) => part.left));
    const right = Math.max(...line.map((part) => part.right));
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    const space = (side) => parseFloat(style[`padding${side}`]) + parseFloat(style[`border${side}Width`]) + 1;
    return right >= box.right - space('Right') && left > box.left + space('Left');
}"""

# Where the first and the last letter of an element's text begin.
ENDS = """({ firstChild: text }) => [0, text.length - 1].map((start) => {
    const range = document.createRange();
    range.setStart(text, start);
    range.setEnd(text, start + 1);
    return range.getBoundingClientRect().left;
})"""


def is_on_the_right(text: Locator) -> bool:
    return bool(text.evaluate(ON_THE_RIGHT))


def test_titles_are_written_in_their_own_direction(chat: Page) -> None:
    converse(chat, f"say {HEBREW}")
    manage(chat, f"say {HEBREW}", "Rename")
    chat.keyboard.insert_text(ARABIC)
    expect(chat.get_by_label("New title")).to_have_css("direction", "rtl")
    chat.keyboard.press("Enter")
    link = entry(chat, ARABIC).get_by_role("link")
    expect(link).to_be_visible()
    assert is_on_the_right(link)
    assert is_on_the_right(chat.get_by_role("heading", name=ARABIC))


def test_each_paragraph_of_a_question_has_its_own_direction(chat: Page) -> None:
    send(chat, f"{ARABIC}\na longer line of English words")
    question = chat.locator(".user .content")
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    assert is_on_the_right(question)
    chat.reload()
    expect(question).to_be_visible()
    assert is_on_the_right(question)


def test_fields_have_the_direction_of_what_is_written_in_them(chat: Page) -> None:
    converse(chat, "say one")
    chat.get_by_role("button", name="Edit").click()
    for name in ("Message", "Search", "Edit message"):
        field = chat.get_by_label(name, exact=True)
        for text, direction in ((HEBREW, "rtl"), ("words", "ltr")):
            field.fill(text)
            expect(field).to_have_css("direction", direction)
    chat.get_by_role("button", name="Options").click()
    chat.get_by_label("System prompt").fill(ARABIC)
    expect(chat.get_by_label("System prompt")).to_have_css("direction", "rtl")


def test_reasoning_and_instructions_are_written_in_their_own_direction(chat: Page) -> None:
    system = {"role": "system", "content": HEBREW}
    open_items(chat, system, {"role": "user", "content": f"perform think {ARABIC} | say one"})
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    last_reply(chat).locator("summary").click()
    assert is_on_the_right(last_reply(chat).locator(".folded .block"))
    assert is_on_the_right(chat.locator(".system .content"))


def test_arguments_of_calls_are_written_from_left_to_right(chat: Page) -> None:
    send(chat, f'perform call f {{"{ARABIC}": 1}}')
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    last_reply(chat).locator("summary").click()
    assert not is_on_the_right(last_reply(chat).locator(".folded .block"))


def test_code_in_text_is_written_from_left_to_right(chat: Page) -> None:
    send(chat, f'say {ARABIC} `end=""` {ARABIC}')
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    code = last_reply(chat).locator("code")
    assert is_on_the_right(last_reply(chat).locator("p"))
    left, right = code.evaluate(ENDS)
    assert left < right
