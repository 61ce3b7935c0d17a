"""Calls of tools and their results, on the page."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.steps import expect_reply, last_reply, open_items, send
from tests.support.scripted import ScriptedChat

ARGUMENTS = '{"city": "Paris", "id": 12345678901234567890, "days": [1, 2.50]}'
IN_LINES = """\
{
  "city": "Paris",
  "id": 12345678901234567890,
  "days": [
    1,
    2.50
  ]
}"""
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
CALL = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": ARGUMENTS}


def fold(page: Page, label: str) -> Locator:
    return page.locator("details").filter(has=page.get_by_text(label, exact=True))


def expect_folded(part: Locator, text: str) -> None:
    """Check that a part is folded, and what it has inside."""
    expect(part.locator(".folded")).to_be_hidden()
    part.locator("summary").click()
    expect(part.locator(".folded")).to_be_visible()
    assert part.locator(".folded").inner_text().strip() == text


@pytest.mark.parametrize("reloaded", [False, True], ids=["live", "reloaded"])
def test_a_call_is_folded_and_shows_its_arguments_in_lines(chat: Page, reloaded: bool) -> None:
    send(chat, f"perform say I look. | call get_weather {ARGUMENTS} | call get_time {{}}")
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    if reloaded:
        chat.reload()
    expect(last_reply(chat).locator("summary")).to_have_text(["Calls get_weather", "Calls get_time"])
    expect_folded(fold(chat, "Calls get_weather"), IN_LINES)
    expect_folded(fold(chat, "Calls get_time"), "{}")
    expect(last_reply(chat).locator(".content")).to_have_text("I look.")


@pytest.mark.parametrize("reloaded", [False, True], ids=["live", "reloaded"])
def test_a_reply_may_be_only_a_call(chat: Page, reloaded: bool) -> None:
    send(chat, "perform call get_time {}")
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    if reloaded:
        chat.reload()
    expect(last_reply(chat).get_by_role("button", name="Ask again")).to_be_attached()
    expect(last_reply(chat).locator(".content, .note")).to_have_count(0)
    expect(last_reply(chat).get_by_role("button", name="Copy")).to_have_count(0)


def test_arguments_that_are_no_json_are_shown_as_they_are(chat: Page) -> None:
    send(chat, 'perform call get_weather {"city": "Par')
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    expect_folded(fold(chat, "Calls get_weather"), '{"city": "Par')


def test_markup_in_reasoning_calls_and_results_is_text(chat: Page) -> None:
    markup = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><b>bold</b>"
    result = {
        "type": "function_call_output",
        "call_id": "call_1",
        "output": f"perform think {markup} | call f {markup}",
    }
    open_items(chat, QUESTION, CALL | {"arguments": markup}, result)
    for part in chat.locator("details").all():
        part.locator("summary").click()
        expect(part.locator(".folded")).to_contain_text(markup)
    expect(chat.locator("#log :is(img, script, b)")).to_have_count(0)
    expect(chat).not_to_have_title("run")


def test_a_result_is_folded_and_names_its_tool(chat: Page) -> None:
    weather = {"type": "function_call_output", "call_id": "call_1", "output": '{"sky":"clear"}'}
    other = {"type": "function_call_output", "call_id": "call_2", "output": "say It is sunny."}
    open_items(chat, QUESTION, CALL, weather, CALL | {"call_id": "call_2", "name": "get_time"}, other)
    expect(chat.locator("summary")).to_have_text(
        ["Calls get_weather", "Result of get_weather", "Calls get_time", "Result of get_time"]
    )
    expect(chat.get_by_role("article")).to_have_count(6)
    expect_folded(fold(chat, "Calls get_weather"), IN_LINES)
    expect_folded(fold(chat, "Result of get_weather"), '{\n  "sky": "clear"\n}')
    expect_folded(fold(chat, "Result of get_time"), "say It is sunny.")
    expect_reply(chat, "It is sunny.")


def test_the_result_of_an_unknown_call_is_shown_too(chat: Page) -> None:
    open_items(chat, QUESTION, {"type": "function_call_output", "call_id": "call_9", "output": "say It is sunny."})
    expect_folded(fold(chat, "Result of a tool"), "say It is sunny.")


def test_a_reply_after_a_result_can_be_asked_again(chat: Page, scripted: ScriptedChat) -> None:
    open_items(
        chat, QUESTION, CALL, {"type": "function_call_output", "call_id": "call_1", "output": "say It is sunny."}
    )
    expect_reply(chat, "It is sunny.")
    before = last_reply(chat).locator(".usage").text_content()
    last_reply(chat).hover()
    last_reply(chat).get_by_role("button", name="Ask again").click()
    expect(last_reply(chat).locator(".usage")).not_to_have_text(str(before))
    expect_reply(chat, "It is sunny.")
    expect(chat.get_by_role("article")).to_have_count(4)
    assert scripted.heard[-1][0] == scripted.heard[-2][0]
