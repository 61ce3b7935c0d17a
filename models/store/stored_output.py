"""The output of a reply as it is stored: JSON, without the text of its messages, which the content has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct, json

from models.output_item import OutputItem, OutputType, TokenLogprob

_Token = tuple[str, float]  # its bytes as Latin-1, with its logprob


class _StoredPart(Struct, omit_defaults=True):
    """A part of a reply. `cuts` are the lengths of its pieces in characters."""

    type: OutputType
    cuts: list[int] = []
    text: str = ""  # of reasoning and of arguments
    name: str = ""
    call_id: str = ""
    complete: bool = False
    logprobs: list[list[list[_Token]]] | None = None  # of each piece, of each token: itself, then those in its place


def encode_output(output: Iterable[OutputItem], has_logprobs: bool = True) -> str:
    """The output as it is stored, with or without the probabilities of its tokens."""
    return json.encode([_stored(part, has_logprobs) for part in output]).decode()


def decode_output(stored: str, content: str) -> list[OutputItem]:
    """The output with each of its pieces. `content` is the text of its messages, joined."""
    return [_restored(part, _pieces(text, part.cuts), part.logprobs) for part, text in _with_texts(stored, content)]


def decode_joined(stored: str, content: str) -> list[OutputItem]:
    """The output with the text of each part in one piece and without logprobs, which takes much less memory."""
    return [_restored(part, [text] if text else [], None) for part, text in _with_texts(stored, content)]


def _stored(part: OutputItem, has_logprobs: bool) -> _StoredPart:
    logprobs = part.logprobs if has_logprobs else None
    return _StoredPart(
        part.type,
        [len(piece) for piece in part.pieces],
        "" if part.type == "message" else part.text,
        part.name,
        part.call_id,
        part.complete,
        None if logprobs is None else [[_tokens(token) for token in piece] for piece in logprobs],
    )


def _restored(part: _StoredPart, pieces: list[str], logprobs: list[list[list[_Token]]] | None) -> OutputItem:
    item = OutputItem(part.type, pieces, part.name, part.call_id, complete=part.complete)
    if logprobs is not None:
        item.logprobs = [[_logprob(tokens) for tokens in piece] for piece in logprobs]
    return item


def _with_texts(stored: str, content: str) -> Iterator[tuple[_StoredPart, str]]:
    """Each stored part with its text."""
    start = 0
    for part in json.decode(stored, type=list[_StoredPart]):
        if part.type == "message":
            end = start + sum(part.cuts)
            yield part, content[start:end]
            start = end
        else:
            yield part, part.text


def _pieces(text: str, cuts: Sequence[int]) -> list[str]:
    pieces, start = [], 0
    for length in cuts:
        pieces.append(text[start : start + length])
        start += length
    return pieces


def _tokens(token: TokenLogprob) -> list[_Token]:
    pairs = [(token.token, token.logprob), *token.top]
    return [(bytes.decode("latin-1"), logprob) for bytes, logprob in pairs]


def _logprob(tokens: Sequence[_Token]) -> TokenLogprob:
    pairs = [(text.encode("latin-1"), logprob) for text, logprob in tokens]
    return TokenLogprob(*pairs[0], pairs[1:])
