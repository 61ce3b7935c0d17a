"""Pictures that go with a message, where the model reads them."""

from __future__ import annotations

import base64
import zlib

import pytest
from playwright.sync_api import FilePayload, Locator, Page, expect

from models.messages import Message
from tests.browser.steps import expect_reply, last_reply
from tests.support.scripted import ScriptedChat


@pytest.fixture
def scripted() -> ScriptedChat:
    chat = ScriptedChat()
    chat.capabilities = (*chat.capabilities, "images")
    return chat


def png(width: int, height: int) -> bytes:
    """A red picture."""

    def piece(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    rows = (b"\0" + b"\xff\0\0" * width) * height
    body = piece(b"IHDR", head) + piece(b"IDAT", zlib.compress(rows)) + piece(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def file(width: int = 8, height: int = 8, name: str = "red.png") -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": png(width, height)}


def add(page: Page, *files: FilePayload) -> None:
    """Choose files with the button."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    chooser.value.set_files([*files])


def chosen(page: Page) -> Locator:
    return page.get_by_role("list", name="Pictures to send").get_by_role("img")


def say(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message").fill(text)
    page.get_by_role("button", name="Send").click()


def images_of(message: Message) -> list[bytes]:
    """The bytes of the pictures in a message."""
    return [base64.b64decode(image["url"].partition(",")[2]) for image in message.get("images", ())]


def test_a_picture_goes_with_its_message_and_stays_with_it(chat: Page, scripted: ScriptedChat) -> None:
    add(chat, file())
    expect(chosen(chat)).to_have_count(1)
    say(chat, "say red")
    expect_reply(chat, "red")
    expect(chosen(chat)).to_have_count(0)
    (image,) = images_of(scripted.requests[-1].messages[-1])
    assert image.startswith(b"\xff\xd8")  # JPEG
    shown = chat.locator(".user .content img")
    expect(shown).to_have_count(1)
    chat.reload()
    expect(shown).to_have_count(1)
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 8
    say(chat, "say again")
    expect_reply(chat, "again")
    assert [len(images_of(message)) for message in scripted.requests[-1].messages] == [1, 0, 0]


def test_a_large_picture_is_made_smaller(chat: Page, scripted: ScriptedChat) -> None:
    add(chat, file(3000, 1500))
    expect(chosen(chat)).to_have_count(1)
    say(chat, "say red")
    expect_reply(chat, "red")
    size = chat.locator(".user .content img").evaluate(
        "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
    )
    assert size == [1024, 512]


def test_a_picture_can_be_taken_away(chat: Page, scripted: ScriptedChat) -> None:
    add(chat, file(), file(16, 16))
    chat.get_by_role("button", name="Remove").first.click()
    expect(chosen(chat)).to_have_count(1)
    chat.get_by_role("button", name="Remove").click()
    say(chat, "say none")
    expect_reply(chat, "none")
    assert "images" not in scripted.requests[-1].messages[-1]


def test_too_many_pictures_are_told(chat: Page) -> None:
    add(chat, *[file()] * 5)
    expect(chat.get_by_role("alert")).to_contain_text("4 pictures a message at most")
    expect(chosen(chat)).to_have_count(0)


def test_what_is_no_picture_is_told(chat: Page) -> None:
    add(chat, {"name": "red.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(chat.get_by_role("alert")).to_contain_text("cannot be read")


def test_pictures_wait_for_their_conversation(chat: Page) -> None:
    say(chat, "say one")
    expect_reply(chat, "one")
    add(chat, file())
    expect(chosen(chat)).to_have_count(1)
    chat.get_by_role("button", name="New chat").click()
    expect(chosen(chat)).to_have_count(0)
    chat.go_back()
    expect(chosen(chat)).to_have_count(1)


def test_an_edited_question_keeps_its_picture(chat: Page, scripted: ScriptedChat) -> None:
    add(chat, file())
    expect(chosen(chat)).to_have_count(1)
    say(chat, "say one")
    expect_reply(chat, "one")
    chat.locator(".user").hover()
    chat.get_by_role("button", name="Edit").click()
    chat.locator(".editor textarea").fill("say two")
    chat.locator(".editor").get_by_role("button", name="Ask again").click()
    expect(last_reply(chat)).to_contain_text("two")
    assert len(images_of(scripted.requests[-1].messages[-1])) == 1


def test_pictures_come_by_paste_too(chat: Page) -> None:
    chat.get_by_role("textbox", name="Message").evaluate(
        """(node, data) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], 'red.png', { type: 'image/png' }));
            const options = { clipboardData: transfer, bubbles: true, cancelable: true };
            node.dispatchEvent(new ClipboardEvent('paste', options));
        }""",
        base64.b64encode(png(8, 8)).decode(),
    )
    expect(chosen(chat)).to_have_count(1)


class TestWithoutPictures:
    """A model that reads only text."""

    @pytest.fixture
    def scripted(self) -> ScriptedChat:
        return ScriptedChat()

    def test_there_is_no_button(self, chat: Page) -> None:
        expect(chat.get_by_role("textbox", name="Message")).to_be_visible()
        expect(chat.get_by_role("button", name="Add pictures")).to_be_hidden()
