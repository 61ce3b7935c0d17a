"""Formulas in replies."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.browsers import in_each_browser
from tests.browser.conftest import OpenPage
from tests.browser.steps import PHONE, clipboard, expect_reply, open_chat, send
from tests.browser.test_accessibility import expect_accessible
from tests.support.serving import Served

SOLUTION = r"\frac{-b\pm\sqrt{b^2-4ac}}{2a}"
FORMULAS = [
    SOLUTION,
    r"e^{i\pi}+1=0",
    r"\sum_{n=1}^{\infty}\frac{1}{n^2}=\frac{\pi^2}{6}",
    r"\int_{-\infty}^{\infty}e^{-x^2}\,dx=\sqrt{\pi}",
    r"\begin{pmatrix}a&b\\c&d\end{pmatrix}\begin{bmatrix}x\\y\end{bmatrix}",
    r"f(x)=\begin{cases}x^2&\text{if }x\ge 0\\-x&\text{otherwise}\end{cases}",
    r"\begin{aligned}a&=b+c\\&=d\end{aligned}",
    r"\begin{align}x&=1\\y&=2\end{align}",
    r"\begin{array}{|c|c|}\hline 1&2\\\hline\end{array}",
    r"\boxed{E=mc^2}",
    r"\mathbb{R}^n\ni\mathbf{x},\mathcal{L},\mathfrak{g},\mathscr{F},\alpha,\Omega",
    r"\underbrace{1+\cdots+1}_{n\text{ times}}\le\overbrace{m}^{2}",
    r"\textcolor{red}{x}+\color{#0a5}y+\colorbox{yellow}{z}",
    r"\vec{v}\cdot\hat{n}=\overline{AB}\quad\tilde{x}\quad\dot{y}",
    r"\lim_{x\to0}\frac{\sin x}{x}=1",
    r"\left(\frac{\partial f}{\partial x}\right)_{y}\Bigg|_{0}",
    r"\binom{n}{k}\equiv\nabla\times\mathbf{E}",
    r"\pmb{x}\quad\pmb y",
    r"\cancel{x}\quad\ce{2H2O -> 2H2 + O2}\quad f''(x)\quad\pu{3 m/s}",
    r"P(A\mid B)=\frac{P(B\mid A)P(A)}{P(B)}\tag{1}",
    r"\operatorname{softmax}(z)_i=\frac{e^{z_i}}{\sum_j e^{z_j}}",
    r"\underset{x}{\arg\max}\;f(x)\xrightarrow{n\to\infty}\text{中文}",
]
# Adds a formula to the reply, as Markdown does, and returns once it is asked for.
ADD = """async ([tex, source, display]) => {
    const { typeset } = await import('/static/maths.js');
    const formula = document.createElement('span');
    formula.className = display ? 'math display' : 'math';
    formula.dataset.tex = tex;
    formula.textContent = source;
    document.querySelector('.assistant:last-child .content').append('before ', formula, ' after');
    typeset(formula.parentElement);
    return Boolean(formula.querySelector('math'));
}"""


@pytest.fixture
def reply(chat: Page) -> Page:
    """A page with a reply."""
    return with_reply(chat)


def with_reply(page: Page) -> Page:
    send(page, "say here is maths")
    expect_reply(page, "here is maths")
    return page


def add(page: Page, tex: str, display: bool = True) -> Locator:
    page.evaluate(ADD, [tex, f"$${tex}$$" if display else f"${tex}$", display])
    return page.locator(".math").nth(page.locator(".math").count() - 1)


def load_library(page: Page) -> None:
    expect(add(page, "1").locator("math")).to_be_visible()


@pytest.mark.parametrize("tex", FORMULAS)
def test_a_formula_is_mathml(reply: Page, tex: str) -> None:
    formula = add(reply, tex)
    expect(formula.locator("math")).to_be_visible()
    expect(formula.locator("math[display=block]")).to_have_count(1)
    assert reply.locator(".math :is(a, img, script, [id], .temml-error)").count() == 0


@in_each_browser
def test_the_library_is_loaded_with_the_first_formula(reply: Page) -> None:
    loaded = "performance.getEntriesByType('resource').map(({ name }) => name).filter(name => name.includes('emml'))"
    assert reply.evaluate(loaded) == []
    assert not reply.evaluate(ADD, ["x", "$x$", False])
    expect(reply.locator(".math math")).to_be_visible()
    assert len(reply.evaluate(loaded)) >= 3
    assert reply.evaluate(ADD, ["y", "$y$", False])  # at once, since the library is there


def test_formulas_asked_for_while_the_library_loads_are_all_shown(reply: Page) -> None:
    for tex in ("a", "b", "c"):
        add(reply, tex)
    expect(reply.locator(".math math")).to_have_text(["a", "b", "c"])


def test_the_source_stays_if_the_library_cannot_be_loaded_and_the_next_formula_tries_again(
    scripted_server: Served, page: Page
) -> None:
    page.route("**/temml.min.js", lambda route: route.abort())
    open_chat(page, scripted_server.url)
    with_reply(page)
    with page.expect_event("requestfailed"):
        first = add(page, "x^2")
    expect(first).to_have_text("$$x^2$$")
    page.unroute("**/temml.min.js")
    load_library(page)
    expect(first.locator("math")).to_be_visible()


@pytest.mark.parametrize(
    "tex",
    [
        r"\frac{1}",
        r"\unknown{x}",
        "x_",
        r"\href{https://example.com/}{x}",
        r"\url{https://example.com/}",
        r"\includegraphics{https://example.com/x.png}",
        r"\class{chat-page}{x}",
        r"\id{log}{x}",
        r"\style{position: fixed}{x}",
        r"\label{log}x",
        r"\ref{log}",
        r"\def\x{\x\x}\x",
        r"\newcommand{\x}{y}\x",
        r"\cancelto{0}{x}",
        "x+" * 1001,
        r"\frac{" * 200 + "x" + "}{y}" * 200,
        r"\sqrt " * 600 + "x",
        r"\begin{matrix}" + "&" * 3900 + r"\end{matrix}",
        r"\LaTeX" * 600,
    ],
    ids=lambda tex: tex[:20],
)
def test_a_source_that_is_wrong_refused_or_too_large_stays(reply: Page, tex: str) -> None:
    load_library(reply)
    formula = add(reply, tex)
    assert formula.text_content() == f"$${tex}$$"
    assert formula.locator("*").count() == 0


def test_a_size_is_limited(reply: Page) -> None:
    load_library(reply)
    formula = add(reply, r"\rule{10000em}{10000em}", display=False)
    box = formula.locator("math").bounding_box()
    assert box
    assert max(box["width"], box["height"]) < 500


@in_each_browser
def test_a_formula_of_the_text_is_in_its_line_and_display_maths_is_not(reply: Page) -> None:
    load_library(reply)
    inline, display = add(reply, "x", display=False), add(reply, "y")
    assert inline.evaluate("formula => getComputedStyle(formula).display") == "inline"
    assert display.evaluate("formula => getComputedStyle(formula).display") == "block"


@in_each_browser
def test_the_keyboard_scrolls_display_maths_that_is_too_wide(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(viewport=PHONE)
    open_chat(page, scripted_server.url)
    with_reply(page)
    formula = add(page, "+".join(f"x_{{{number}}}" for number in range(40)))
    expect(page.get_by_role("group", name="Formula")).to_be_visible()
    assert page.evaluate("log.scrollWidth <= log.clientWidth")
    formula.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.math').scrollLeft > 0")


def test_formulas_are_accessible(reply: Page) -> None:
    for display in (False, True):
        expect(add(reply, SOLUTION, display).locator("math")).to_be_visible()
    expect_accessible(reply)


def test_a_formula_that_has_changed_is_typeset_again(reply: Page) -> None:
    formula = add(reply, "x")
    expect(formula.locator("math")).to_have_text("x")
    reply.evaluate("""async () => {
        const formula = document.querySelector('.math');
        formula.textContent = '$$y$$';
        formula.dataset.tex = 'y';
        (await import('/static/maths.js')).typeset(formula);
    }""")
    expect(formula.locator("math")).to_have_text("y")
    expect(formula).to_have_attribute("data-source", "$$y$$")


def test_equations_of_a_message_are_numbered(reply: Page) -> None:
    add(reply, r"\begin{align}x&=1\\y&=2\end{align}")
    expect(reply.locator(".tml-eqn")).to_have_count(2)
    counters = "[...document.querySelectorAll('.tml-eqn')].map(part => getComputedStyle(part, '::before').content)"
    assert len(set(reply.evaluate(counters))) == 1  # they count, from where the message begins
    assert reply.locator(".content").last.evaluate("part => getComputedStyle(part).counterReset") == "tmlEqnNo 0"


def test_a_selection_is_copied_with_the_sources_of_its_formulas(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    open_chat(page, scripted_server.url)
    with_reply(page)
    expect(add(page, SOLUTION, display=False).locator("math")).to_be_visible()
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.assistant .content'))")
    page.keyboard.press("ControlOrMeta+c")
    assert f"before ${SOLUTION}$ after" in clipboard(page)


def test_a_formula_that_is_selected_in_part_is_copied_whole(scripted_server: Served, open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    open_chat(page, scripted_server.url)
    with_reply(page)
    expect(add(page, SOLUTION, display=False).locator("math")).to_be_visible()
    page.evaluate("""() => {
        const [first] = document.querySelectorAll('.math mi');
        getSelection().setBaseAndExtent(first.firstChild, 0, document.querySelector('.math').nextSibling, 6);
    }""")
    page.keyboard.press("ControlOrMeta+c")
    assert clipboard(page) == f"${SOLUTION}$ after"
