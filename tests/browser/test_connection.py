"""The page where the connection fails it."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncGenerator, Sequence

from playwright.sync_api import Page, WebSocketRoute, expect

from models.admission import Ticket
from models.item import Message
from models.options import Options
from models.reply import Event
from models.settings import Settings
from server import create_app
from tests.browser.proxy import Proxy
from tests.browser.steps import converse, expect_reply, last_reply, log_in, send
from tests.conftest import ANN
from tests.scripted import ScriptedChat
from tests.serving import Served, serve


class TellingChat(ScriptedChat):
    """Says when it has been asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    async def reply(
        self, ticket: Ticket, messages: Sequence[Message], options: Options, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        async for event in super().reply(ticket, messages, options):
            yield event
            self.asked.set()


def expect_cut(page: Page) -> None:
    expect(page.locator("#status")).to_have_text(re.compile("retrying in"))


def expect_mended(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("Connected", timeout=30_000)


def test_a_reply_goes_on_after_the_network_was_cut(
    page: Page, proxy: Proxy, scripted: ScriptedChat, scripted_server: Served
) -> None:
    log_in(page, proxy.url, ANN)
    send(page, "hold every word of it")
    expect(last_reply(page)).to_have_text("Waiting, position 3")
    proxy.cut()
    expect_cut(page)
    scripted_server.in_loop(scripted.release)
    proxy.mend()
    expect_mended(page)
    expect_reply(page, "every word of it", "in_progress")
    proxy.cut()
    expect_cut(page)
    expect_reply(page, "every word of it", "in_progress")
    scripted_server.in_loop(scripted.release)
    proxy.mend()
    expect_mended(page)
    expect_reply(page, "every word of it")
    assert len(scripted.heard) == 1
    converse(page, "say more")


def test_a_delta_that_comes_twice_counts_once(scripted_server: Served, page: Page) -> None:
    def repeat(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def passed_on(message: str | bytes) -> None:
            for _ in range(2):
                socket.send(message)

        server.on_message(passed_on)

    page.route_web_socket("**/ws", repeat)
    log_in(page, scripted_server.url, ANN)
    send(page, "wait for every word")
    expect_reply(page, "for every word", "in_progress")


def test_a_stop_without_a_connection_counts_once_there_is_one(page: Page, proxy: Proxy, scripted: ScriptedChat) -> None:
    log_in(page, proxy.url, ANN)
    send(page, "wait for me")
    expect_reply(page, "for me", "in_progress")
    proxy.cut()
    expect_cut(page)
    page.get_by_role("button", name="Stop").click()
    proxy.mend()
    expect_mended(page)
    expect_reply(page, "for me", "cancelled")


def test_a_question_that_never_arrived_is_handed_back(page: Page, proxy: Proxy, scripted: ScriptedChat) -> None:
    log_in(page, proxy.url, ANN)
    for _ in range(2):  # in a new conversation, then in that one
        proxy.lost.add("up")
        send(page, "say one")
        expect(page.locator("#message")).to_have_value("")
        proxy.cut()
        expect_cut(page)
        proxy.mend()
        expect_mended(page)
        expect(page.locator("#message")).to_have_value("say one")
        page.locator("#message").press("Enter")
        expect_reply(page, "one")
    assert len(scripted.heard) == 2


def test_a_question_that_arrived_unknown_to_the_page_is_answered(page: Page, settings: Settings) -> None:
    scripted = TellingChat()
    with serve(create_app(settings, scripted.opened)) as served, Proxy.to(served.port) as proxy:
        log_in(page, proxy.url, ANN)
        for question in ("say one", "say two"):  # in a new conversation, then in that one
            scripted.asked.clear()
            proxy.lost.add("down")
            send(page, question)
            assert scripted.asked.wait(30)
            proxy.cut()
            expect_cut(page)
            proxy.mend()
            expect_mended(page)
            expect_reply(page, question.removeprefix("say "))
            expect(page.locator("#message")).to_have_value("")
        expect(page.locator("article .content")).to_have_text(["say one", "one", "say two", "two"])
        assert len(scripted.heard) == 2


def test_a_conversation_that_could_not_be_loaded_is_loaded_later(page: Page, proxy: Proxy) -> None:
    log_in(page, proxy.url, ANN)
    converse(page, "say one")
    page.get_by_role("button", name="New chat").click()
    proxy.cut()
    page.go_back()
    expect(page.get_by_role("alert")).to_have_text("The conversation could not be loaded.")
    proxy.mend()
    expect_reply(page, "one")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_page_comes_back_after_a_restart(page: Page, settings: Settings, scripted: ScriptedChat) -> None:
    with serve(create_app(settings, scripted.opened)) as first:
        log_in(page, first.url, ANN)
        send(page, "wait for it")
        expect_reply(page, "for it", "in_progress")
    expect_cut(page)
    with serve(create_app(settings, ScriptedChat().opened), port=first.port):
        expect_mended(page)
        expect_reply(page, "for it", "failed")
        note = last_reply(page).locator(".note")
        expect(note).to_have_text("The server was shut down before the reply was finished.")
        page.get_by_role("button", name="Ask again").click()
        expect_reply(page, "for it", "in_progress")
