"""Markdown is rendered while it comes, and the end of it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsers import in_each_browser
from tests.browser.markdown_texts import CASES, combined, generated, pieces
from tests.browser.steps import last_reply, open_chat, send
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

pytestmark = in_each_browser

# Renders texts in pieces and as a whole. Resolves to the texts of which the results differ, or of which a block was
# touched after it had ended. Only text with brackets may change then: it can mention what is defined later.
STREAM = """async (texts) => {
    const { MarkdownStream } = await import('/static/markdown_stream.js');
    const wrong = [];
    for (const deltas of texts) {
        const text = deltas.join('');
        const whole = new MarkdownStream(document.createElement('div'));
        whole.end(text);
        const stream = new MarkdownStream(document.createElement('div'));
        const ended = [];
        for (const delta of deltas) {
            stream.append(delta);
            stream.draw();
            const count = stream.node.childNodes.length - stream.blocks.views.length;
            const fresh = [...stream.node.childNodes].slice(ended.length, count);
            ended.push(...fresh.map((node) => ({ node, html: node.outerHTML })));
        }
        stream.end();
        if (!stream.node.isEqualNode(whole.node)) {
            wrong.push({ text, deltas, whole: whole.node.innerHTML, stream: stream.node.innerHTML });
        }
        ended.forEach(({ node, html }, index) => {
            const isThere = stream.node.childNodes[index] === node;
            if (isThere && (node.outerHTML === html || text.includes('['))) return;
            wrong.push({ text, deltas, ended: html, touched: isThere ? node.outerHTML : 'replaced' });
        });
    }
    return wrong;
}"""


def expect_same(page: Page, texts: list[list[str]]) -> None:
    wrong = page.evaluate(STREAM, texts)
    assert not wrong, f"{len(wrong)} of {len(texts)}: {min(wrong, key=lambda each: len(each['text']))}"


def test_a_text_in_single_characters_becomes_the_same_as_the_whole(chat: Page) -> None:
    expect_same(chat, [list(text) for text in CASES])


@pytest.mark.parametrize("make", [generated, combined])
def test_a_text_in_random_pieces_becomes_the_same_as_the_whole(chat: Page, make: Callable[[int], str]) -> None:
    expect_same(chat, [pieces(make(seed), seed) for seed in range(400)])


# What is appended to the open block touches nothing before its last lines.
@pytest.mark.parametrize("line", ["- an *item*\n", "| a | *b* |\n", "> a *quotation*\n>\n", "a *line*\n", "    code\n"])
def test_only_the_end_of_a_growing_block_is_touched(chat: Page, line: str) -> None:
    start = "| a | b |\n|---|---|\n" if "|" in line else ""
    touched = chat.evaluate(
        """async ([start, line]) => {
            const { MarkdownStream } = await import('/static/markdown_stream.js');
            const stream = new MarkdownStream(document.createElement('div'));
            stream.append(start + line.repeat(100));
            stream.draw();
            const parts = [...stream.node.querySelectorAll('*')].slice(0, -8);
            const observer = new MutationObserver(() => {});
            observer.observe(stream.node, { childList: true, characterData: true, attributes: true, subtree: true });
            for (let count = 0; count < 20; count++) {
                for (const character of line) {
                    stream.append(character);
                    stream.draw();
                }
            }
            const growing = new Set(['P', 'UL', 'TBODY', 'BLOCKQUOTE']);
            const targets = observer.takeRecords().map(({ target }) => target);
            const changed = targets.filter((node) => !growing.has(node.nodeName));
            return parts.filter((part) => changed.includes(part) || !stream.node.contains(part)).length;
        }""",
        [start, line],
    )
    assert touched == 0


def test_a_text_that_ends_otherwise_is_shown_as_it_ends(chat: Page) -> None:
    html = chat.evaluate("""async () => {
        const { MarkdownStream } = await import('/static/markdown_stream.js');
        const stream = new MarkdownStream(document.createElement('div'));
        stream.append('one **two**\\n\\nthree STOP here');
        stream.draw();
        stream.end('one **two**\\n\\n*three*');
        return stream.node.innerHTML;
    }""")
    assert html == '<p dir="auto">one <strong>two</strong></p><p dir="auto"><em>three</em></p>'


def test_drawing_leaves_the_page_time_for_other_things(chat: Page) -> None:
    times = chat.evaluate("""async () => {
        const { MarkdownStream } = await import('/static/markdown_stream.js');
        const times = [];
        class Slow extends MarkdownStream {
            draw() {
                const start = performance.now();
                while (performance.now() < start + 20);
                super.draw();
                times.push([start, performance.now()]);
            }
        }
        const stream = new Slow(document.createElement('div'));
        while (times.length < 5) {
            stream.append('word ');
            await new Promise(requestAnimationFrame);
        }
        return times;
    }""")
    for (start, end), (following, _) in pairwise(times):
        assert following - end >= 2.9 * (end - start)


def test_a_selection_survives_while_the_reply_grows_and_ends(
    page: Page, scripted_server: Served, scripted: ScriptedChat
) -> None:
    open_chat(page, scripted_server.url)
    send(page, "wait **Select** this [link](https://example.com/), and *more")
    expect(last_reply(page).locator("em")).to_have_text("more")
    page.evaluate("""() => {
        const paragraph = document.querySelector('.assistant p');
        getSelection().setBaseAndExtent(paragraph.firstChild.firstChild, 2, paragraph.lastChild.firstChild, 2);
    }""")
    scripted_server.in_loop(scripted.release)
    expect(last_reply(page)).to_have_attribute("data-status", "completed")
    assert page.evaluate("String(getSelection())").startswith("lect this link, and ")


def test_the_end_of_a_reply_moves_nothing(chat: Page, scripted_server: Served, scripted: ScriptedChat) -> None:
    send(chat, "wait " + "\n\n".join(CASES[:50]) + "\n\nThe end.")
    expect(last_reply(chat).locator(".content > :last-child")).to_have_text("The end.")
    chat.evaluate("import('/static/maths.js').then(({ typesetAll }) => typesetAll())")
    places = "[...document.querySelectorAll('.assistant .content *')].map((part) => part.offsetTop)"
    before = chat.evaluate(places)
    scripted_server.in_loop(scripted.release)
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    assert chat.evaluate(places) == before


def test_a_reader_who_has_scrolled_up_stays_there(chat: Page, scripted_server: Served, scripted: ScriptedChat) -> None:
    send(chat, "wait " + "A **paragraph**.\n\n" * 60 + "- an item\n" * 60)
    expect(last_reply(chat).get_by_role("listitem")).to_have_count(60)
    chat.evaluate("document.getElementById('log').scrollTop = 300")
    expect(chat.get_by_role("button", name="Jump to latest")).to_be_visible()
    scripted_server.in_loop(scripted.release)
    expect(last_reply(chat)).to_have_attribute("data-status", "completed")
    assert chat.evaluate("document.getElementById('log').scrollTop") == 300


# Longer than all that a model says; what a model repeats when it has lost its way is among them.
ENDLESS = {
    "full stops": "." * 130_000,
    "emphasis": "*_" * 65_000,
    "brackets": "![" * 65_000,
    "spaces": "x\n" + " " * 130_000 + "x\n|a|\n|",
}


def test_a_long_paragraph_is_plain_after_its_beginning(chat: Page) -> None:
    beginning, end = "**a** " * 1666 + "*b* ", "*c*\n" * 300  # the 10,000th character is the one behind *b*
    assert len(beginning) == 10_000
    expect_same(chat, [pieces(beginning + end, 5), [beginning, end], [beginning[:-2], beginning[-2:] + end]])
    plain, html = chat.evaluate(
        """async (text) => {
            const { MarkdownStream } = await import('/static/markdown_stream.js');
            const stream = new MarkdownStream(document.createElement('div'));
            stream.end(text);
            return [stream.node.querySelector('.plain').textContent, stream.node.innerHTML];
        }""",
        beginning + end,
    )
    assert plain == end.rstrip()
    assert html.count("<strong>") == 1666
    assert html.count("<em>") == 1


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_no_text_stops_the_page(chat: Page, text: str) -> None:
    chat.evaluate(
        """async (text) => {
            const { MarkdownStream } = await import('/static/markdown_stream.js');
            const { Announcer } = await import('/static/announcer.js');
            setTimeout(() => {
                const stream = new MarkdownStream(document.createElement('div'));
                const announcer = new Announcer();
                for (let at = 0; at < text.length; at += 5000) {
                    stream.append(text.slice(at, at + 5000));
                    stream.draw();
                    announcer.read(text.slice(at, at + 5000));
                }
                stream.end();
                document.title = 'ended';
            });
        }""",
        text,
    )
    expect(chat).to_have_title("ended")
