"""The text of a reply: tokens in, text out, until a stop string or the last token."""

from __future__ import annotations

from dataclasses import dataclass

from models.language.detokenizer import UNDECODABLE, Detokenizer
from models.language.stop_strings import StopStrings
from models.messages import FinishReason


@dataclass
class ReplyText:
    """The text of a reply: never half a character, never a stop string."""

    detokenizer: Detokenizer
    stop_strings: StopStrings

    def push(self, token_id: int, finish_reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """The text that is certain after a token, and why the reply ends, if it does."""
        piece = self.stop_strings.push("" if finish_reason == "stop" else self.detokenizer.push(token_id))
        if finish_reason:
            rest = self.stop_strings.push(self.detokenizer.flush()) + self.stop_strings.flush()
            piece += rest if finish_reason == "stop" else rest.rstrip(UNDECODABLE)
        piece = piece.replace("\0", UNDECODABLE)  # as in the database: PostgreSQL cannot store U+0000
        return piece, "stop" if self.stop_strings.found else finish_reason
