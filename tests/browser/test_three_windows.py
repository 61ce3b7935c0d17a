"""Three windows of one user, and many random acts: at the end, all agree with the database, and no text is lost."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from playwright.sync_api import Error, Locator, Page, expect

from models.validation import Json
from tests.browser.conftest import OpenPage
from tests.browser.proxy import Proxy
from tests.browser.steps import PHONE, expect_connection, open_chat
from tests.browser.test_branches import said
from tests.support.scripted import ScriptedChat
from tests.support.serving import Served

ACTS = 200
ROUNDS = 5  # in each, all windows begin with one conversation
SEEDS = [1, 2]
PATIENCE = 500  # milliseconds that an element of the page has to be ready


class Window:
    """A window whose user does something at random."""

    def __init__(self, page: Page, proxy: Proxy, chance: random.Random) -> None:
        self.page = page
        self.proxy = proxy
        self.chance = chance
        self.is_asleep = False
        self.said = 0

    def act(self, number: int) -> bool:
        """Do something that the page offers. Returns False if it was gone when the user reached for it."""
        acts = [self.wake] if self.is_asleep and self.chance.random() < 0.3 else self.acts()
        try:
            self.chance.choice(acts)(number)
        except Error:  # the act of another window came first
            return False
        return True

    def acts(self) -> list[Callable[[int], None]]:
        common = [self.ask] * 6 + [self.edit] * 3 + [self.ask_again] * 3 + [self.stop] * 3 + [self.show_version] * 3
        return [*common, *[self.open] * 3, self.begin, self.rename, self.delete, self.sleep]

    def ask(self, number: int) -> None:
        self.page.locator("#message").fill(self.text(number), timeout=PATIENCE)
        self.page.locator("#message").press("Enter")

    def edit(self, number: int) -> None:
        self.click_one(self.page.locator("article .edit"))
        self.page.get_by_label("Edit message").last.fill(self.text(number), timeout=PATIENCE)
        self.page.get_by_label("Edit message").last.press("Enter", timeout=PATIENCE)

    def ask_again(self, number: int) -> None:
        self.click_one(self.page.locator("article .ask_again"))

    def stop(self, number: int) -> None:
        self.click_one(self.page.locator("#stop:not([hidden])"))

    def show_version(self, number: int) -> None:
        self.click_one(self.page.locator(".versions button:enabled"))

    def open(self, number: int) -> None:
        """Open the conversation that was used last, so that windows often meet, or any other."""
        entries = self.page.locator("#entries a")
        self.click_one(entries.first if self.chance.random() < 0.7 else entries)

    def begin(self, number: int) -> None:
        self.page.locator("header .new-chat, #sidebar .new-chat").locator("visible=true").first.click(timeout=PATIENCE)

    def rename(self, number: int) -> None:
        self.click_one(self.page.locator(".entry .manage"))
        self.page.locator("#rename").click(timeout=PATIENCE)
        self.page.get_by_label("New title").fill(f"title {number}", timeout=PATIENCE)
        self.page.get_by_label("New title").press("Enter", timeout=PATIENCE)

    def delete(self, number: int) -> None:
        if self.page.locator(".entry").count() > 2:
            self.click_one(self.page.locator(".entry .manage"))
            self.page.locator("#delete").click(timeout=PATIENCE)
            self.page.get_by_role("alertdialog").get_by_role("button", name="Delete").click(timeout=PATIENCE)

    def sleep(self, number: int) -> None:
        self.proxy.cut()
        self.is_asleep = True

    def wake(self, number: int) -> None:
        self.proxy.mend()
        self.page.evaluate("window.dispatchEvent(new Event('online'))")
        self.is_asleep = False

    def text(self, number: int) -> str:
        return f"{'wait' if self.chance.random() < 0.3 else 'say'} t{number}"

    def click_one(self, locator: Locator) -> None:
        """Click on one of the elements that the user can see or scroll to, if there is any."""
        there = [one for one in locator.all() if one.is_enabled(timeout=PATIENCE)]
        if not there:
            raise Error("there is nothing to click on")
        self.chance.choice(there).dispatch_event("click", timeout=PATIENCE)

    def finished(self) -> set[str]:
        """The replies that this window has seen the end of."""
        ended = self.page.locator("article.assistant[data-status=completed] .content")
        return {"".join(text.split()) for text in ended.all_text_contents()}

    @property
    def conversation(self) -> str:
        return self.page.url.partition("#")[2]


@pytest.fixture
def windows(chat: Page, scripted_server: Served, open_page: OpenPage) -> Iterator[list[Window]]:
    """A window on a laptop, another one of the same browser, and one on a phone."""
    chance = random.Random()
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy.to(scripted_server.port)) for _ in range(3)]
        pages = [open_page(), open_page(), open_page(viewport={**PHONE, "width": 900})]
        for page, proxy in zip(pages, proxies, strict=True):
            open_chat(page, proxy.url)
        yield [Window(page, proxy, chance) for page, proxy in zip(pages, proxies, strict=True)]


def nodes_of(chat: Page, server: Served, id: str) -> list[Json]:
    """The current branch of a conversation, as soon as no reply in it is being stored."""
    while True:
        branch = chat.request.get(f"{server.url}/v1/conversations/{id}/branch?limit=100").json()
        if not branch["response_id"]:
            nodes: list[Json] = branch["data"]
            return nodes


def texts_of(chat: Page, server: Served, id: str) -> set[str]:
    """The texts on all branches of a conversation, found by going through all versions."""
    headers, texts, shown, left = {"Origin": server.url}, set[str](), set[str](), [""]
    while left:
        if leaf := left.pop():
            url = f"{server.url}/v1/conversations/{id}"
            assert chat.request.post(url, data={"leaf": leaf}, headers=headers).ok
        nodes = nodes_of(chat, server, id)
        texts.update("".join(text.split()) for text in said(nodes))
        shown.update(node["id"] for node in nodes)
        others = [node["parley"]["versions"][way] for node in nodes for way in ("older", "newer")]
        left = [*left, *(other for other in others if other)]
        left = [other for other in dict.fromkeys(left) if other not in shown]
    return texts


class Story:
    """What the windows do, and what they have seen."""

    def __init__(self, windows: list[Window], chance: random.Random) -> None:
        self.windows = windows
        self.chance = chance
        self.number = 0  # of the act
        self.seen: dict[str, set[str]] = {}  # the replies that have ended, by conversation

    def go_on(self, acts: int) -> None:
        """Let the windows act, so many times."""
        while acts:
            self.number += 1
            acts -= self.chance.choice(self.windows).act(self.number)
            for window in self.windows:
                if window.conversation.startswith("conv_") and not window.is_asleep:
                    self.seen.setdefault(window.conversation, set()).update(window.finished())

    def come_to_rest(self, scripted: ScriptedChat, server: Served) -> None:
        """Wake all windows, and wait until no reply runs."""
        for window in self.windows:
            if window.is_asleep:
                window.wake(0)
            expect_connection(window.page)
        while scripted.running:
            server.in_loop(scripted.release)
        for window in self.windows:  # the end of a reply is told when it is stored
            expect(window.page.locator("article[data-status=in_progress]")).to_have_count(0)


def expect_agreement(window: Window, nodes: list[Json]) -> None:
    """Check that a window shows the nodes of a branch, and their versions."""
    expected = [re.compile(r"^\s*" + r"\s*".join(map(re.escape, text.split())) + r"\s*$") for text in said(nodes)]
    expect(window.page.locator("article .content")).to_have_text(expected)  # blocks have no lines between them
    places = [node["parley"]["versions"] for node in nodes if node["parley"]["versions"]["count"] > 1]
    expect(window.page.locator(".versions")).to_have_count(len(places))
    labels = window.page.locator(".versions").evaluate_all("all => all.map((one) => one.ariaLabel)")
    assert labels == [f"Version {place['number']} of {place['count']}" for place in places]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_all_windows_agree_with_the_database_after_random_acts(
    seed: int, windows: list[Window], chat: Page, scripted: ScriptedChat, scripted_server: Served
) -> None:
    chance = random.Random(seed)
    for window in windows:
        window.chance = chance
    story = Story(windows, chance)
    for _ in range(ROUNDS):
        for window in windows:
            window.page.locator("#entries a").first.or_(window.page.locator("#message")).first.click()
        story.go_on(ACTS // ROUNDS)
        story.come_to_rest(scripted, scripted_server)
        there = [
            one["id"] for one in chat.request.get(f"{scripted_server.url}/v1/conversations?limit=100").json()["data"]
        ]
        for window in windows:  # as they are, without a reload
            window.page.wait_for_function("ids => !location.hash || ids.includes(location.hash.slice(1))", arg=there)
            if window.conversation:
                expect_agreement(window, nodes_of(chat, scripted_server, window.conversation))
            else:
                expect(window.page.locator("article")).to_have_count(0)
    listed = chat.request.get(f"{scripted_server.url}/v1/conversations?limit=100").json()["data"]
    for window in windows:
        expect(window.page.locator("#entries a")).to_have_text([one["title"] for one in listed])
        expect(window.page.locator(".entry .running")).to_have_count(0)
        for one in listed:
            window.page.evaluate("id => { location.hash = id; }", one["id"])
            expect_agreement(window, nodes_of(chat, scripted_server, one["id"]))
    for one in listed:
        assert story.seen.get(one["id"], set()) <= texts_of(chat, scripted_server, one["id"])
