"""Pictures in the messages of requests, in both of OpenAI's forms."""

from __future__ import annotations

import binascii
import re
from typing import Any

from models.errors import InvalidValueError, UnsupportedParameterError
from models.messages import Image

URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,([A-Za-z0-9+/]+={0,2})")
ALLOWED = "a data: URL of a PNG, JPEG, WebP or GIF picture: this server fetches none"
MOST_IMAGES = 20  # of one message
BEGINNINGS = {  # of a file, by its kind
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
}
PART_TYPES = ("image_url", "input_image")


class Content:
    """The content of one message, which grows by parts: its text in lines, and its pictures."""

    def __init__(self) -> None:
        self.text = ""
        self.images: list[Image] = []
        self._is_empty = True

    def add_text(self, text: str) -> None:
        """Add a part of text, in a line of its own."""
        self.text += text if self._is_empty else f"\n{text}"
        self._is_empty = False

    def add_image(self, part: dict[str, Any], param: str, has_images: bool) -> None:
        """Add a picture. Raises UnsupportedParameterError if the model reads only text, or InvalidValueError."""
        if not has_images:
            told = f"{param}: {part['type']} is not supported, this model reads only text"
            raise UnsupportedParameterError(told, param)
        url = part.get("image_url")
        if isinstance(url, dict):
            url = url.get("url")
        if not isinstance(url, str) or not _is_image(url):
            raise InvalidValueError(f"{param}.image_url must be {ALLOWED}", f"{param}.image_url", ALLOWED)
        if len(self.images) == MOST_IMAGES:
            allowed = f"one of at most {MOST_IMAGES} pictures of a message"
            raise InvalidValueError(f"{param} must be {allowed}", param, allowed)
        self.images.append({"url": url, "at": len(self.text)})


def _is_image(url: str) -> bool:
    """Whether a URL has the beginning of a picture of the kind that it names."""
    found = URL.fullmatch(url)
    if not found:
        return False
    try:
        data = binascii.a2b_base64(found[2], strict_mode=True)
    except binascii.Error:
        return False
    return BEGINNINGS[found[1]].match(data) is not None
