"""The harmony format of gpt-oss: messages with a header, in channels."""

from __future__ import annotations

import re

from models.language.replies.parser import ReplyParser
from models.language.replies.parts import Parts
from models.language.replies.source import Reader, Sink, markers_of
from models.tools import NO_TOOLS, Tools

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CONSTRAIN, CALL, RETURN = "<|constrain|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, MESSAGE, END, CONSTRAIN, CALL, RETURN)
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


class HarmonyReply(ReplyParser):
    """`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`

    "analysis" is reasoning, "final" and "commentary" are text, and a message to a function is a call. A header is no
    part of any of them. Two neighbouring messages of one kind become one part, with a blank line between them.
    """

    def __init__(self, tools: Tools = NO_TOOLS) -> None:
        self._callable = bool(tools.callable)
        super().__init__(Parts(False, not tools.parallel))

    def _read(self) -> Reader[None]:
        if not (yield from self._begins_with_header()):
            yield from self._read_message(self._parts.text)
        while (yield from self._source.peek()):
            header: list[str] = []
            if (yield from self._source.until(markers_of(MESSAGE), header.append)):
                yield from self._read_part("".join(header))

    def _begins_with_header(self) -> Reader[bool]:
        """The prompt ends with the beginning of a header; a reply without the rest of it is text."""
        start = yield from self._source.matches(CHANNEL, START, " to=", "to=")
        self._source.unread(start)
        return bool(start)

    def _read_part(self, header: str) -> Reader[None]:
        channel, recipient = CHANNEL_NAME.search(header), RECIPIENT.search(header)
        thinks = channel is not None and channel[1] == "analysis"
        if recipient and self._callable and not (thinks and "to=functions." not in header):
            self._parts.call(recipient[1])
            if (yield from self._read_message(self._parts.arguments)):
                self._parts.end_call()
            return
        self._parts.thinking = thinks
        self._parts.separate()
        yield from self._read_message(self._parts.reasoning if thinks else self._parts.text)
        self._parts.thinking = False

    def _read_message(self, sink: Sink) -> Reader[str]:
        """Read up to the end of a message, or to the header of the next one."""
        end = yield from self._source.until(markers_of(*MARKERS), sink)
        if end in (START, CHANNEL):
            self._source.unread(end)
        return end
