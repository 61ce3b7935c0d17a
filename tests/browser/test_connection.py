"""The page when its connection fails."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncGenerator

import pytest
from playwright.sync_api import Page, WebSocketRoute, expect

from models.language.events import Event
from models.settings import Settings
from server import create_app
from tests.browser.browsers import in_each_browser
from tests.browser.proxy import Proxy
from tests.browser.steps import branch, converse, expect_reply, last_reply, open_chat, pass_time, send
from tests.support.scripted import ScriptedChat, ScriptedReply
from tests.support.serving import Served, serve

pytestmark = in_each_browser


class TellingChat(ScriptedChat):
    """Sets `asked` when a request has arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    async def events(self, reply: ScriptedReply) -> AsyncGenerator[Event, None]:
        self.asked.set()
        async for event in super().events(reply):
            yield event


def expect_disconnected(page: Page) -> None:
    expect(page.locator("#status")).to_have_text(re.compile("retrying in"))


def expect_connected(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("Connected", timeout=30_000)


def cut(page: Page, proxy: Proxy) -> None:
    """Cut the connection, and wait until the page shows it."""
    proxy.cut()
    expect_disconnected(page)


def mend(page: Page, proxy: Proxy) -> None:
    """Mend the connection, and wait until the page is connected. The browser tells the page, so it need not wait."""
    proxy.mend()
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect_connected(page)


def test_a_reply_goes_on_after_a_lost_connection(
    page: Page, proxy: Proxy, scripted: ScriptedChat, scripted_server: Served
) -> None:
    open_chat(page, proxy.url)
    send(page, "hold every word of it")
    expect(last_reply(page)).to_have_text("Waiting, position 3")
    cut(page, proxy)
    scripted_server.in_loop(scripted.release)
    mend(page, proxy)
    expect_reply(page, "every word of it", "in_progress")
    cut(page, proxy)
    expect_reply(page, "every word of it", "in_progress")
    scripted_server.in_loop(scripted.release)
    mend(page, proxy)
    expect_reply(page, "every word of it")
    assert len(scripted.heard) == 1
    converse(page, "say more")


def test_a_repeated_delta_is_shown_once(scripted_server: Served, page: Page) -> None:
    def repeat(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def send_twice(message: str | bytes) -> None:
            for _ in range(2):
                socket.send(message)

        server.on_message(send_twice)

    page.route_web_socket("**/ws", repeat)
    open_chat(page, scripted_server.url)
    send(page, "wait for every word")
    expect_reply(page, "for every word", "in_progress")


def test_a_stop_without_a_connection_is_sent_after_reconnecting(page: Page, proxy: Proxy) -> None:
    open_chat(page, proxy.url)
    send(page, "wait for me")
    expect_reply(page, "for me", "in_progress")
    cut(page, proxy)
    page.get_by_role("button", name="Stop").click()
    mend(page, proxy)
    expect_reply(page, "for me", "cancelled")


def test_a_lost_message_returns_to_the_input(page: Page, proxy: Proxy, scripted: ScriptedChat) -> None:
    open_chat(page, proxy.url)
    for _ in range(2):  # in a new conversation, then in that one
        proxy.lost.add("up")
        send(page, "say one")
        expect(page.locator("#message")).to_have_value("")
        cut(page, proxy)
        mend(page, proxy)
        expect(page.locator("#message")).to_have_value("say one")
        page.locator("#message").press("Enter")
        expect_reply(page, "one")
    assert len(scripted.heard) == 2


def test_a_message_that_arrived_unconfirmed_is_answered(page: Page, settings: Settings) -> None:
    scripted = TellingChat()
    with serve(create_app(settings, scripted.opened)) as served, Proxy.to(served.port) as proxy:
        open_chat(page, proxy.url)
        for message in ("say one", "say two"):  # in a new conversation, then in that one
            scripted.asked.clear()
            proxy.lost.add("down")
            send(page, message)
            assert scripted.asked.wait(30)
            cut(page, proxy)
            mend(page, proxy)
            expect_reply(page, message.removeprefix("say "))
            expect(page.locator("#message")).to_have_value("")
        expect(page.locator("article .content")).to_have_text(["say one", "one", "say two", "two"])
        assert len(scripted.heard) == 2


def ask_again(page: Page) -> None:
    last_reply(page).hover()
    page.get_by_role("button", name="Ask again").click()


def test_a_reply_stays_when_asking_again_is_lost(page: Page, proxy: Proxy, scripted: ScriptedChat) -> None:
    open_chat(page, proxy.url)
    converse(page, "say one")
    before = branch(page)
    proxy.lost.add("up")
    ask_again(page)
    expect(last_reply(page)).to_have_attribute("data-status", "in_progress")
    cut(page, proxy)
    mend(page, proxy)
    expect_reply(page, "one")
    expect(page.locator("#message")).to_have_value("")
    assert branch(page) == before
    assert len(scripted.heard) == 1


def test_asking_again_that_arrived_unconfirmed_is_answered(page: Page, settings: Settings) -> None:
    scripted = TellingChat()
    with serve(create_app(settings, scripted.opened)) as served, Proxy.to(served.port) as proxy:
        open_chat(page, proxy.url)
        converse(page, "say one")
        scripted.asked.clear()
        before = branch(page)
        proxy.lost.add("down")
        ask_again(page)
        assert scripted.asked.wait(30)
        cut(page, proxy)
        mend(page, proxy)
        expect_reply(page, "one")
        again = branch(page)
        assert (again[0]["id"], len(again), len(scripted.heard)) == (before[0]["id"], 2, 2)
        assert again[1]["id"] != before[1]["id"]
        converse(page, "say two")
        assert branch(page)[:2] == again


def test_a_conversation_that_failed_to_load_is_loaded_after_reconnecting(page: Page, proxy: Proxy) -> None:
    open_chat(page, proxy.url)
    converse(page, "say one")
    page.get_by_role("button", name="New chat").click()
    cut(page, proxy)
    page.go_back()
    expect(page.get_by_role("alert")).to_have_text("The conversation could not be loaded.")
    mend(page, proxy)
    expect_reply(page, "one")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_what_the_server_could_not_read_is_loaded_again(page: Page, scripted_server: Served) -> None:
    page.clock.install()
    open_chat(page, scripted_server.url)
    converse(page, "say one")
    page.get_by_role("button", name="New chat").click()
    page.route("**/branch?*", lambda route: route.fulfill(status=503, json={}), times=1)
    page.go_back()
    expect(page.get_by_role("alert")).to_have_text("The conversation could not be loaded.")
    pass_time(page, 5)
    expect_reply(page, "one")
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.slow
def test_the_page_reconnects_by_itself_after_a_restart_of_the_server(
    page: Page, settings: Settings, scripted: ScriptedChat
) -> None:
    with serve(create_app(settings, scripted.opened)) as first:
        open_chat(page, first.url)
        send(page, "wait for it")
        expect_reply(page, "for it", "in_progress")
    expect_disconnected(page)
    with serve(create_app(settings, ScriptedChat().opened), port=first.port):
        expect_connected(page)
        expect_reply(page, "for it", "failed")
        note = last_reply(page).locator(".note")
        expect(note).to_have_text("The server was shut down before the reply was finished.")
        page.get_by_role("button", name="Ask again").click()
        expect_reply(page, "for it", "in_progress")
