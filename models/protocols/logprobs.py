"""The probabilities of tokens, as OpenAI's APIs have them."""

from __future__ import annotations

from collections.abc import Iterable

from models.output_item import TokenLogprob
from models.validation import Json


def render_logprobs(tokens: Iterable[TokenLogprob]) -> list[Json]:
    """Tokens with their probabilities, and the most probable tokens in the place of each."""
    return [
        _render(token.token, token.logprob) | {"top_logprobs": [_render(*other) for other in token.top]}
        for token in tokens
    ]


def printable_token(token: bytes) -> str:
    """The text of a token, which may be a part of a character."""
    return token.decode(errors="replace")


def _render(token: bytes, logprob: float) -> Json:
    return {"token": printable_token(token), "logprob": logprob, "bytes": list(token)}
