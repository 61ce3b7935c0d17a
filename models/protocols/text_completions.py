"""OpenAI's older Completions API: the model goes on with a text, without a chat template."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from models.chat_request import ChatRequest
from models.generation.events import OutputDelta, OutputItemAdded
from models.model_info import ModelList
from models.output_item import TokenLogprob
from models.protocols.completion import Choice, finish_reason
from models.protocols.completion_request import (
    CompletionBody,
    CompletionRequest,
    check_options,
    convert_body,
    take_values,
)
from models.protocols.logprobs import printable_token
from models.store.item import Item
from models.validation import NO_SURROGATE, Json

USUAL_TOKENS = 16  # of a reply whose request does not say how many; so it is at OpenAI

Prompt = Annotated[str, Meta(min_length=1, pattern=NO_SURROGATE)]
Prompts = Annotated[list[Prompt], Meta(min_length=1, max_length=1)]


class TextBody(CompletionBody, forbid_unknown_fields=True, kw_only=True):
    """The parameters that are not options."""

    prompt: Annotated[Prompt | Prompts, Meta(description="text, or a list of one text; send a request for each prompt")]
    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None, Meta(description="a whole number from 0 to 20, or null")
    ] = None


def parse_text_completion(body: bytes, models: ModelList, user: str) -> CompletionRequest:
    """The request of a user in a body. Raises APIError if anything in it is wrong."""
    model, chosen, values = take_values(body, models)
    parsed = convert_body(values, TextBody)
    prompt = parsed.prompt if isinstance(parsed.prompt, str) else parsed.prompt[0]
    options = check_options({"max_tokens": USUAL_TOKENS} | chosen, model)
    chat = ChatRequest(user, [], options, top_logprobs=parsed.logprobs, prompt=prompt, model=model.name)
    return CompletionRequest.of(parsed, chat)


class TextChoice(Choice):
    """A choice with a text."""

    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl"
    input_param = "prompt"

    def __init__(self, index: int, has_logprobs: bool) -> None:
        super().__init__(index, has_logprobs)
        self._offset = 0  # of the next token, in the text

    def whole(self, reply: Item) -> Json:
        """The choice with the whole text."""
        tokens = [token for item in reply.output for piece in item.logprobs or () for token in piece]
        return self._choice("".join(item.text for item in reply.output), tokens, finish_reason(reply))

    def first(self) -> None:
        """There is no chunk before the text."""

    def next(self, event: OutputItemAdded | OutputDelta) -> Json | None:
        """The choice with the next piece of text."""
        return self._choice(event.text, [*(event.logprobs or ())]) if isinstance(event, OutputDelta) else None

    def last(self, reply: Item) -> Json:
        """The choice with the finish reason."""
        return self._choice("", [], finish_reason(reply))

    def _choice(self, text: str, tokens: list[TokenLogprob], finish_reason: str | None = None) -> Json:
        logprobs = self._render_logprobs(tokens) if self.has_logprobs else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _render_logprobs(self, tokens: list[TokenLogprob]) -> Json:
        texts, offsets = [printable_token(token.token) for token in tokens], []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{printable_token(other): logprob for other, logprob in token.top} for token in tokens],
            "text_offset": offsets,
        }
