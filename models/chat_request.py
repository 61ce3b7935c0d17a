"""What a language model is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.messages import Message
from models.options import Options
from models.output_format import PLAIN_TEXT, OutputFormat
from models.tools import NO_TOOLS, Tools


@dataclass(frozen=True)
class ChatRequest:
    """A request for a reply to the last message of a user's messages.

    `model` is the name of the one to ask; None is the default one. With a `prompt`, there are no messages, and the
    model goes on with that text, without a chat template. `ignore_eos` lets it go on after it has ended the reply.
    """

    user: str
    messages: Sequence[Message]
    options: Options
    tools: Tools = NO_TOOLS
    format: OutputFormat = PLAIN_TEXT
    top_logprobs: int | None = None  # how many alternatives each token is told with; None tells no probabilities
    template_arguments: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    truncate: bool = False  # leave out the oldest messages if all of them do not fit the context
    prompt: str | None = None
    ignore_eos: bool = False
    model: str | None = None
