"""The tokens at which a reply of a GGUF file's model ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ENDS = {  # of a turn, of a message or call, of a text; llama.cpp knows these names
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    # a file that the model writes ends here: repositories of code, and padding between their parts
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<reponame>",
    "<|file_sep|>",
}
CALLS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})  # with these, <|end|> ends a message, not the reply


def stop_token_ids(metadata: Mapping[str, Any]) -> set[int]:
    """The tokens that the file names as ends, and those of known names."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    ids = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    named = {token_id for token_id in ids if token_id is not None and token_id < len(tokens)}
    return {token_id for token_id in named | named_stop_tokens(tokens) if not _ends_message(token_id, tokens)}


def named_stop_tokens(tokens: Sequence[str]) -> set[int]:
    """The tokens whose names say that they end something."""
    return {token_id for token_id, token in enumerate(tokens) if token in ENDS}


def _ends_message(token_id: int, tokens: Sequence[str]) -> bool:
    """Whether the token ends only one of the messages of a reply."""
    return tokens[token_id] == "<|end|>" and any(call.issubset(tokens) for call in CALLS)
