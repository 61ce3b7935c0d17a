"""Pictures in the messages of requests, in both of OpenAI's forms."""

from __future__ import annotations

import re
from typing import Any

from models.errors import InvalidValueError, UnsupportedParameterError
from models.messages import Image

URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")
ALLOWED = "a data: URL of a PNG, JPEG, WebP or GIF picture: this server fetches none"
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
        if not isinstance(url, str) or not URL.fullmatch(url):
            raise InvalidValueError(f"{param}.image_url must be {ALLOWED}", f"{param}.image_url", ALLOWED)
        self.images.append({"url": url, "at": len(self.text)})
