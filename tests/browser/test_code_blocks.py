"""Code in replies: its colours, and long code that folds."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsers import in_each_browser
from tests.browser.conftest import OpenPage
from tests.browser.steps import clipboard, copy, expect_reply, last_reply, open_chat, open_stored, pass_time, send
from tests.browser.test_accessibility import expect_accessible
from tests.support.serving import Served

CODE = 'def answer(question: str) -> int:\n    return 42 if question else "none"  # so far\n'
LONG = "".join(f"value_{number} = {number}\n" for number in range(106))
NAMES = "[...CSS.highlights.keys()]"

# What each highlight covers, without those that cover nothing.
COLORED = """() => Object.fromEntries([...CSS.highlights].filter(([, ranges]) => ranges.size).map(([name, ranges]) => [
    name.replace('code-', ''),
    [...ranges].map(range => range.startContainer.data.slice(range.startOffset, range.endOffset)),
]))"""
# Starts a block that grows as in a reply that one watches.
LIVE = """async ([language, text, folded]) => {
    const { frameCode } = await import('/static/code_block.js');
    const pre = document.createElement('pre');
    pre.innerHTML = `<code class="language-${language}"></code>`;
    document.querySelector('.assistant:last-child .content').append(pre);
    const block = frameCode(pre, () => {}, { folded });
    pre.firstChild.append(text);
    window.grow = (more) => {
        pre.firstChild.firstChild.appendData(more);
        block.grew();
    };
    block.grew();
}"""


def fenced(language: str, code: str) -> str:
    return f"```{language}\n{code}```"


def open_code(page: Page, *blocks: str) -> None:
    """Open a conversation of the history that ends with code."""
    open_stored(page, "a question", "\n\n".join(blocks), "say ok")


def start_live(page: Page, language: str, text: str, folded: bool = False) -> None:
    send(page, "say here is code")
    expect_reply(page, "here is code")
    page.evaluate(LIVE, [language, text, folded])


def wait_for_color(page: Page, color: str, text: str) -> None:
    page.wait_for_function(f"([color, text]) => ({COLORED})()[color]?.includes(text)", arg=[color, text])


def height(page: Page, selector: str) -> float:
    size: float = page.locator(selector).evaluate("element => element.getBoundingClientRect().height")
    return size


@in_each_browser
def test_code_has_colors_and_its_elements_do_not_change(chat: Page) -> None:
    open_code(chat, fenced("python", CODE))
    wait_for_color(chat, "comment", "# so far")
    colored = chat.evaluate(COLORED)
    assert colored["keyword"] == ["def", "return", "if", "else"]
    assert (colored["string"], colored["number"], colored["title"]) == (['"none"'], ["42"], ["answer"])
    assert chat.locator("pre code").evaluate("code => [code.childNodes.length, code.firstChild.data]") == [1, CODE]


@pytest.mark.parametrize(
    ("language", "code", "keyword"),
    [
        ("py", "def f(): 1\n", "def"),
        ("js", "const a = 1;\n", "const"),
        ("sh", "if true; then x; fi\n", "if"),
        ("c++", "return 1;\n", "return"),
        ("html", "<script>const a = 1</script>\n", "const"),
    ],
)
def test_languages_have_aliases_and_other_languages_in_them(chat: Page, language: str, code: str, keyword: str) -> None:
    open_code(chat, fenced(language, code))
    chat.wait_for_function(f"text => ({COLORED})().keyword?.some(covered => covered.includes(text))", arg=keyword)


def test_code_of_an_unknown_or_no_language_stays_plain(chat: Page) -> None:
    open_code(chat, fenced("parseltongue", CODE), fenced("", CODE), fenced("python", "pass\n"))
    wait_for_color(chat, "keyword", "pass")
    assert chat.evaluate(COLORED) == {"keyword": ["pass"]}


@in_each_browser
def test_code_that_streams_has_colors_and_keeps_a_selection(chat: Page) -> None:
    start_live(chat, "python", "def first():\n")
    wait_for_color(chat, "title", "first")
    chat.evaluate(
        "getSelection().setBaseAndExtent(...['.code code'].flatMap(selector => {"
        "const text = document.querySelector(selector).firstChild; return [text, 4, text, 9]; }))"
    )
    chat.evaluate("grow('    return 1\\n')")
    wait_for_color(chat, "keyword", "return")
    assert chat.evaluate("getSelection().toString()") == "first"
    chat.evaluate("grow('\\ndef second():\\n')")
    wait_for_color(chat, "title", "second")
    assert chat.evaluate("getSelection().toString()") == "first"


def test_code_that_has_changed_in_another_way_than_growing_gets_its_new_colors(chat: Page) -> None:
    start_live(chat, "python", "def first():\n")
    wait_for_color(chat, "title", "first")
    chat.evaluate("document.querySelector('.code code').firstChild.data = 'class A:'")
    chat.evaluate("grow('')")
    wait_for_color(chat, "title", "A")


def test_history_that_gets_its_text_later_is_folded_too(chat: Page) -> None:
    start_live(chat, "python", "", folded=True)
    chat.evaluate("text => grow(text)", LONG)
    expect(chat.get_by_role("button", name="All lines")).to_have_attribute("aria-expanded", "false")


def test_only_lines_near_the_visible_ones_have_ranges(chat: Page) -> None:
    start_live(chat, "python", "".join(f"value_{number} = {number}\n" for number in range(5000)))
    chat.locator("#log").evaluate("log => { log.scrollTop = log.scrollHeight; }")
    wait_for_color(chat, "number", "4999")
    assert len(chat.evaluate(COLORED)["number"]) < 150
    chat.locator("#log").evaluate("log => { log.scrollTop = 0; }")
    wait_for_color(chat, "number", "1")
    assert "4999" not in chat.evaluate(COLORED)["number"]


def test_code_after_100_000_characters_stays_plain(chat: Page) -> None:
    start_live(chat, "python", f"pass\n# {'a' * 99_990}\nreturn\n")
    chat.locator("#log").evaluate("log => { log.scrollTop = log.scrollHeight; }")
    wait_for_color(chat, "keyword", "pass")
    assert chat.evaluate(COLORED)["keyword"] == ["pass"]


def test_code_that_is_no_longer_shown_has_no_ranges(chat: Page) -> None:
    open_code(chat, fenced("python", CODE))
    wait_for_color(chat, "keyword", "def")
    chat.get_by_role("button", name="New chat").first.click()
    chat.wait_for_function(f"() => !Object.keys(({COLORED})()).length")


def test_code_is_plain_in_a_browser_without_highlights(scripted_server: Served, page: Page) -> None:
    page.add_init_script("delete CSS.__proto__.highlights; delete CSS.highlights; delete window.Highlight")
    open_chat(page, scripted_server.url)
    open_code(page, fenced("python", CODE))
    expect(page.locator("pre code")).to_have_text(CODE)
    assert page.evaluate("[typeof CSS.highlights, typeof Highlight]") == ["undefined", "undefined"]


def test_a_worker_that_never_answers_is_replaced(scripted_server: Served, page: Page) -> None:
    page.clock.install()
    page.add_init_script("""window.workers = [];
        window.Worker = class { constructor() { workers.push(this); this.asked = []; }
            postMessage(message) { this.asked.push(message.text); }
            terminate() { this.ended = true; } };""")
    open_chat(page, scripted_server.url)
    open_code(page, fenced("python", "first\n"), fenced("python", "second\n"))
    pass_time(page, 1)
    page.wait_for_function("() => workers.length === 1")
    pass_time(page, 5)
    page.wait_for_function("() => workers.length === 2")
    assert page.evaluate("workers.map(worker => [worker.asked, !!worker.ended])") == [
        [["first\n"], True],
        [["second\n"], False],
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_of_code_have_enough_contrast(chat: Page, scheme: Literal["light", "dark"]) -> None:
    chat.emulate_media(color_scheme=scheme)
    open_code(chat, fenced("python", CODE))
    wait_for_color(chat, "keyword", "def")
    behind = channels(chat.locator(".code").evaluate("frame => getComputedStyle(frame).backgroundColor"))
    for name in chat.evaluate(NAMES):
        script = f"code => getComputedStyle(code, '::highlight({name})').color"
        assert contrast(channels(chat.locator("pre code").evaluate(script)), behind) >= 4.5, name


def test_forced_colors_are_left_alone(chat: Page) -> None:
    chat.emulate_media(forced_colors="active")
    open_code(chat, fenced("python", CODE))
    wait_for_color(chat, "keyword", "def")
    script = "code => getComputedStyle(code, '::highlight(code-keyword)').color === getComputedStyle(code).color"
    assert chat.locator("pre code").evaluate(script)


def channels(color: str) -> list[float]:
    return [int(channel) / 255 for channel in re.findall(r"\d+", color)[:3]]


def contrast(one: list[float], other: list[float]) -> float:
    def luminance(color: list[float]) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@in_each_browser
def test_long_code_of_the_history_is_folded_until_the_reader_unfolds_it(chat: Page) -> None:
    open_code(chat, fenced("python", LONG))
    toggle = chat.get_by_role("button", name="All lines")
    expect(toggle).to_have_attribute("aria-expanded", "false")
    expect(chat.get_by_role("button", name="… 86 more lines")).to_be_visible()
    expect(chat.locator("pre code")).to_have_text(LONG)
    folded = height(chat, "pre")
    toggle.click()
    expect(toggle).to_have_attribute("aria-expanded", "true")
    expect(chat.get_by_text("86 more lines")).to_have_count(0)
    assert height(chat, "pre") > 5 * folded
    toggle.click()
    assert height(chat, "pre") == folded
    chat.get_by_role("button", name="… 86 more lines").click()
    expect(chat.locator("pre")).to_be_focused()
    expect(toggle).to_have_attribute("aria-expanded", "true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_folded_code_is_accessible(chat: Page, scheme: Literal["light", "dark"]) -> None:
    chat.emulate_media(color_scheme=scheme)
    open_code(chat, fenced("python", LONG))
    expect(chat.get_by_role("button", name="… 86 more lines")).to_be_visible()
    expect_accessible(chat)


def test_unfolding_leaves_the_first_lines_where_they_are(chat: Page) -> None:
    open_code(chat, fenced("python", LONG))
    expect(chat.get_by_role("button", name="All lines")).to_be_visible()
    chat.wait_for_function("() => log.scrollHeight - log.scrollTop - log.clientHeight < 2")
    before = chat.locator("pre").bounding_box()
    chat.get_by_role("button", name="All lines").evaluate("button => button.click()")  # which does not scroll
    chat.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    after = chat.locator("pre").bounding_box()
    assert before
    assert after
    assert after["y"] == before["y"]


def test_code_of_40_lines_is_not_folded(chat: Page) -> None:
    open_code(chat, fenced("python", "x = 1\n" * 40))
    expect(chat.locator(".bar")).to_be_visible()
    expect(chat.get_by_role("button", name="All lines")).to_have_count(0)


def test_long_code_that_one_has_watched_is_not_folded_but_can_be(chat: Page) -> None:
    send(chat, f"say {fenced('python', LONG)}")
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    toggle = chat.get_by_role("button", name="All lines")
    expect(toggle).to_have_attribute("aria-expanded", "true")
    toggle.click()
    expect(chat.get_by_role("button", name="… 86 more lines")).to_be_visible()
    chat.reload()
    expect(toggle).to_have_attribute("aria-expanded", "false")


def test_code_that_grows_long_gets_a_fold_button(chat: Page) -> None:
    start_live(chat, "python", "x = 1\n" * 40)
    toggle = chat.get_by_role("button", name="All lines")
    expect(toggle).to_have_count(0)
    chat.evaluate("grow('x = 2\\n')")
    expect(toggle).to_have_attribute("aria-expanded", "true")


def test_code_unfolds_when_a_search_or_a_selection_scrolls_to_a_line_that_is_cut_off(chat: Page) -> None:
    open_code(chat, fenced("python", LONG))
    toggle = chat.get_by_role("button", name="All lines")
    expect(toggle).to_have_attribute("aria-expanded", "false")
    chat.wait_for_function("() => log.scrollHeight - log.scrollTop - log.clientHeight < 2")
    line = """() => {
        const range = document.createRange();
        range.setStart(document.querySelector('pre code').firstChild, 1000);
        return Math.round(range.getBoundingClientRect().top);
    }"""
    # As browsers do then; the event that tells the page comes later.
    place = chat.evaluate(f"() => {{ document.querySelector('pre').scrollTop = 600; return ({line})(); }}")
    expect(toggle).to_have_attribute("aria-expanded", "true")
    chat.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert chat.evaluate(line) == place


def test_folded_code_is_printed_and_copied_whole(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.clock.install()
    open_chat(page, scripted_server.url)
    open_code(page, fenced("python", LONG))
    copy(page, "Copy code")
    assert clipboard(page) == LONG
    folded = height(page, "pre")
    page.emulate_media(media="print")
    assert height(page, "pre") > 5 * folded
    expect(page.get_by_text("86 more lines")).to_be_hidden()


def test_the_copy_button_says_for_a_while_that_it_has_copied(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.clock.install()
    open_chat(page, scripted_server.url)
    open_code(page, fenced("python", CODE))
    word = "button => getComputedStyle(button, '::after').content"
    button = page.get_by_role("button", name="Copy code")
    assert button.evaluate(word) == "none"
    copy(page, "Copy code")
    assert button.evaluate(word) == '"Copied"'
    pass_time(page, 2)
    assert button.evaluate(word) == "none"


def test_code_is_left_to_right_and_the_keyboard_scrolls_it(chat: Page) -> None:
    chat.locator("html").evaluate("html => { html.dir = 'rtl'; }")
    open_code(chat, fenced("python", f"x = '{'a long line ' * 50}'\n"))
    assert chat.locator("pre").evaluate("pre => getComputedStyle(pre).direction") == "ltr"
    chat.locator("pre").focus()
    chat.keyboard.press("End")
    chat.keyboard.press("ArrowRight")
    chat.wait_for_function("() => document.querySelector('pre').scrollLeft > 0")
