"""What Markdown becomes, as a whole and while it grows."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsers import in_each_browser
from tests.browser.steps import last_reply, send

pytestmark = in_each_browser

# The HTML of a text, without what is the same everywhere.
RENDER = """async ([texts, ended]) => {
    const { MarkdownStream } = await import('/static/markdown_stream.js');
    return texts.map((text) => {
        const stream = new MarkdownStream(document.createElement('div'));
        if (ended) {
            stream.end(text);
        } else {
            stream.append(text);
            stream.draw();
        }
        return [text, stream.node.innerHTML.replaceAll(/ (dir|target|rel|title)="[^"]*"/g, '')];
    });
}"""

WHOLE = {
    "**注意：**请看": "<p><strong>注意：</strong>请看</p>",
    "请看**“重点”**部分": "<p>请看<strong>“重点”</strong>部分</p>",
    "**a**b and **「x」**や": "<p><strong>a</strong>b and <strong>「x」</strong>や</p>",
    "一_二_三 ** 四 **": "<p>一_二_三 ** 四 **</p>",
    "https://example.com/a?b=1.": '<p><a href="https://example.com/a?b=1">https://example.com/a?b=1</a>.</p>',
    "见https://example.com/a。好": '<p>见<a href="https://example.com/a">https://example.com/a</a>。好</p>',
    "（http://example.com），好": '<p>（<a href="http://example.com">http://example.com</a>），好</p>',
    "www.example.com/x，好": '<p><a href="https://www.example.com/x">www.example.com/x</a>，好</p>',
    "mailto:a@example.com": '<p><a href="mailto:a@example.com">mailto:a@example.com</a></p>',
    "a.py, a@example.com, ftp://example.com": "<p>a.py, a@example.com, ftp://example.com</p>",
    "awww.example.com, //example.com, www.x": "<p>awww.example.com, //example.com, www.x</p>",
    "![a *b*](https://a.example/)": '<p><a class="image" href="https://a.example/">a b</a></p>',
    "![](https://a.example/)": '<p><a class="image" href="https://a.example/">https://a.example/</a></p>',
    "[![a](https://a.example/)](https://b.example/)": '<p><a href="https://b.example/">a</a></p>',
    "![a](/x.png) [b](/x) [c](javascript:x)": "<p>![a](/x.png) [b](/x) [c](javascript:x)</p>",
    "It costs $5 and $10.": "<p>It costs $5 and $10.</p>",
    "$ x$ and $x $ and \\$x$": "<p>$ x$ and $x $ and $x$</p>",
    "a $x*y*z$ b": '<p>a <span class="math" data-tex="x*y*z">$x*y*z$</span> b</p>',
    "a \\(x\\)": '<p>a <span class="math" data-tex="x">\\(x\\)</span></p>',
    "a $$x$$.": '<p>a <span class="math display" data-tex="x">$$x$$</span>.</p>',
    "a \\[x\\] b": '<p>a <span class="math display" data-tex="x">\\[x\\]</span> b</p>',
    '$a"b$': '<p><span class="math" data-tex="a&quot;b">$a"b$</span></p>',
    "so\n$$\n- a\n\n+ b\n$$\nis": (
        '<p>so</p><div class="math display" data-tex="\n- a\n\n+ b\n">$$\n- a\n\n+ b\n$$</div><p>is</p>'
    ),
    "$$ x\n- y\n\nz": "<p>$$ x<br>\n- y</p><p>z</p>",
    "`$x$` \\$x\\$": "<p><code>$x$</code> $x$</p>",
    "1. a\n   \\[\n   x\n   \\]\n2. b": (
        '<ol><li><p>a</p><div class="math display" data-tex="\nx\n">\\[\nx\n\\]</div></li><li><p>b</p></li></ol>'
    ),
    "a[^1]\n\n[^1]: b": (
        "<p>a<sup>"
        '<button type="button" class="note" data-note="1" aria-label="Footnote 1">1</button></sup></p>'
        '<div class="footnote">'
        '<button class="back" type="button" data-note="1" aria-label="Footnote 1, back to the text">1</button>'
        '<div class=""><p>b</p></div></div>'
    ),
    "not [^a-z], but [^2]": "<p>not [^a-z], but <sup>2</sup></p>",
    "|a|b|\n|:-:|-|\n|x|y|": (
        '<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead>'
        '<tr><th class="center">a</th><th>b</th></tr></thead><tbody>'
        '<tr><td class="center">x</td><td>y</td></tr></tbody></table></div>'
    ),
    "- [x] a\n- b": (
        '<ul><li><input class="task" type="checkbox" disabled="" checked="" aria-label="Done"><p>a</p></li>'
        "<li><p>b</p></li></ul>"
    ),
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "<b>a</b>&lt;": "<p>&lt;b&gt;a&lt;/b&gt;&lt;</p>",
}

GROWING = {
    "a **bo": "<p>a <strong>bo</strong></p>",
    "a **bold*": "<p>a <strong>bold</strong></p>",
    "a *it **bo": "<p>a <em>it <strong>bo</strong></em></p>",
    "2*3": "<p>2*3</p>",
    "a ~~go": "<p>a <s>go</s></p>",
    "a `co **d": "<p>a <code>co **d</code></p>",
    "a [te": "<p>a te</p>",
    "a [te*xt](https://ex": "<p>a te*xt</p>",
    "a ![te": "<p>a te</p>",
    "a $x^": '<p>a <span class="tex">$x^</span></p>',
    "a $5 or": "<p>a $5 or</p>",
    "a \\(x_": '<p>a <span class="tex">\\(x</span></p>',
    "a &am": "<p>a</p>",
    "a <https://exam": "<p>a</p>",
    "a\n-": "<p>a</p>",
    "a\n12": "<p>a</p>",
    "a\n\n#": "<p>a</p>",
    "a\n```py": "<p>a</p>",
    "a\n\n|b|c": "<p>a</p>",
    "a\n\n|b|c|\n|-": "<p>a</p>",
    "a\n\n|b|c|\nd": "<p>a</p><p>|b|c|<br>\nd</p>",
    "a\n\n[b]: https://exam": "<p>a</p>",
    "a **b\n\nc **d": "<p>a **b</p><p>c <strong>d</strong></p>",
    "$$\nx\n\ny": '<div class="tex display">$$\nx\n\ny</div>',
    "- a\n- [x": "<ul><li><p>a</p></li></ul>",
}


@pytest.mark.parametrize(("texts", "ended"), [(WHOLE, True), (GROWING, False)], ids=["whole", "growing"])
def test_a_text_shows_what_is_certain(chat: Page, texts: dict[str, str], ended: bool) -> None:
    assert dict(chat.evaluate(RENDER, [list(texts), ended])) == texts


DEEP = ["- ", "1. ", "> ", "> - ", "[^a]: "]


@pytest.mark.parametrize("marker", DEEP)
def test_what_is_nested_too_deep_is_text_and_nothing_after_it_is_lost(chat: Page, marker: str) -> None:
    texts = [f"{marker * 200}deep\n\nlast", f"- a\n\n  {marker * 200}deep\n- last"]
    for _, html in chat.evaluate(RENDER, [texts, True]):
        assert "deep" in html
        assert "last" in html
    indented = "".join("  " * level + f"- item {level}\n" for level in range(100))
    (_, html), *_ = chat.evaluate(RENDER, [[indented + "\nlast"], True])
    assert all(f"item {level}" in html for level in range(100))
    assert "last" in html


def test_a_table_that_is_nearly_all_empty_cells_is_text(chat: Page) -> None:
    head = "|" + "a|" * 250 + "\n|" + "-|" * 250
    texts = [
        f"{head}\n" + "b\n" * 5 + "\nlast",
        "> " + head.replace("\n", "\n> "),
        f"{head}\n|{'b|' * 250}" + "\n|c|" * 3,
    ]
    (_, empty), (_, quoted), (_, full) = chat.evaluate(RENDER, [texts, True])
    assert "<table>" not in empty
    assert empty.endswith("<p>last</p>")
    assert quoted.count("<th>") == 250
    assert full.count("<td>") == 4 * 250


def test_footnotes_lead_to_each_other_and_the_address_stays(chat: Page) -> None:
    send(chat, "say " + "one[^1] " + "\n\na paragraph" * 60 + "\n\n[^1]: The note.\n\ntext")
    reply = last_reply(chat)
    expect(reply).to_have_attribute("data-status", "completed")
    address = chat.url
    reply.get_by_role("button", name="Footnote 1", exact=True).click()
    back = reply.get_by_role("button", name="Footnote 1, back to the text")
    expect(back).to_be_focused()
    expect(back).to_be_in_viewport()
    back.press("Enter")
    expect(reply.get_by_role("button", name="Footnote 1", exact=True)).to_be_focused()
    expect(reply.get_by_role("button", name="Footnote 1", exact=True)).to_be_in_viewport()
    assert chat.url == address
